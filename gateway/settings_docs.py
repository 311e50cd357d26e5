"""The settings as text for people: the table in docs/, and the values in effect with their sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gateway.settings import PREFIX, Settings

CREDENTIALS = re.compile(r"://[^/,\s]*@")
SECRET_PARAMETER = re.compile(r"([?&](?:password|secret|token|username))=[^&,\s]*", re.IGNORECASE)


def settings_table() -> str:
    """Return the settings as a Markdown table."""
    rows = [f"| `{name}` | {_shown(default)} | {text} |" for name, default, text in _fields()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def effective_settings(settings: Settings) -> list[tuple[str, str, str]]:
    """Return each setting's name, value and source (`environment` or `default`); secrets are masked."""
    shown = []
    for field in Settings.model_fields:
        value = mask_passwords(written(getattr(settings, field)))
        if field == "keys" and value:
            value = ",".join(mask_key(entry) for entry in value.split(","))
        source = "environment" if field in settings.model_fields_set else "default"
        shown.append((PREFIX + field.upper(), value, source))
    return shown


def mask_key(entry: str) -> str:
    """Return an entry of GATEWAY_KEYS as `name:****`; one without a colon is masked whole, as it may be a secret."""
    name, colon, _ = entry.partition(":")
    return f"{name}:****" if colon else "****"


def mask_passwords(value: str) -> str:
    """Return `value` with the credentials in its addresses masked."""
    return SECRET_PARAMETER.sub(r"\1=****", CREDENTIALS.sub("://****@", value))


def _fields() -> list[tuple[str, str, str]]:
    fields = []
    for name, field in Settings.model_fields.items():
        default = field.default_factory is None and field.default
        shown = ".gradserve/plan.json" if name == "plan" else written(default)
        fields.append((PREFIX + name.upper(), shown, " ".join((field.description or "").split())))
    return fields


def written(value: Any) -> str:  # noqa: ANN401 — a setting's value
    """Return the value as text for an environment variable."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value.as_posix() if isinstance(value, Path) else value)


def _shown(default: str) -> str:
    return f"`{default}`" if default else ""
