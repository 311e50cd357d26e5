"""Writes .env.example from the settings themselves: `make env-example`. A test holds that the file is up to date."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined

from control.settings import AgentSettings
from gateway.settings import Settings as GatewaySettings

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

_HEAD = """\
# Settings of the local stack, one place each. Copy to .env and uncomment what you change; `gradserve` reads .env in the
# working directory, and what is set in the environment wins. Unknown AGENT_* and GATEWAY_* names are refused at start.
# `gradserve up` sets GATEWAY_PLAN, GATEWAY_AGENTS and AGENT_PLAN itself (GRADSERVE_HOME moves the plan). With another
# AGENT_MODEL_STORE give `gradserve package` the same `--store`.
# Written by `make env-example`: change the settings, not this file.

# Folder of the traffic plan, its history and the logs.
#GRADSERVE_HOME=.gradserve
# Megabytes of logs that `up` keeps of each part, in four files.
#GRADSERVE_LOG_MB=256
# Who changes the plan, for its audit log. Default: user@machine.
#GRADSERVE_OPERATOR=
# Gateways whose counts `status` shows and `promote --auto` judges by, with commas. Default: this machine's own.
#GRADSERVE_GATEWAYS=
# An API key for them, where they ask: scope read, and predict for `deploy --gate`.
#GRADSERVE_KEY=
# Where training is recorded, and the registry of releases. Default: a SQLite file in the working directory.
#MLFLOW_TRACKING_URI=
# Port of MLflow's page (`up --mlflow`). Default: 5000, or a free one where that is taken.
#MLFLOW_PORT=
"""
# Defaults that are made at start from other settings or from where the code lies.
_COMPUTED = {"plan": "GRADSERVE_HOME/plan.json", "config": "config/torchserve"}


def render() -> str:
    """The text of .env.example."""
    gateway = _section("The gateway", "GATEWAY_", GatewaySettings)
    return _HEAD + gateway + _section("The agent and its TorchServe", "AGENT_", AgentSettings)


def _section(title: str, prefix: str, settings: type[BaseSettings]) -> str:
    lines = [f"\n# ---- {title} ----\n"]
    for name, field in settings.model_fields.items():
        description = " ".join((field.description or "").split())
        lines += [f"# {line}\n" for line in textwrap.wrap(description, 117)]
        lines.append(f"#{prefix}{name.upper()}={_COMPUTED.get(name) or _shown(field.default)}\n")
    return "".join(lines)


def _shown(value: Any) -> str:  # noqa: ANN401 (a default may be anything)
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


if __name__ == "__main__":
    print(render(), end="")  # noqa: T201 (that is what it is for)
