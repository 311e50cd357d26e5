"""The agent's settings: read from `AGENT_*` once, at start, and passed in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from control.errors import BadSetting
from gateway.settings import SettingsError, check_plan, read_settings

PREFIX = "AGENT_"
Port = Annotated[int, Field(ge=1, le=65535)]
PORTS = {
    "port": "the agent's status",
    "inference_port": "TorchServe's inference",
    "metrics_port": "TorchServe's metrics",
}
"""The settings that are ports, with the use of each."""


def home_directory() -> Path:
    """Return the folder of plan, history and logs: `GRADSERVE_HOME`, default `.gradserve` in the working directory."""
    return Path(os.environ.get("GRADSERVE_HOME") or ".gradserve").resolve()


def trusted_key_files() -> tuple[Path, ...]:
    """Return the files of trusted public keys, `AGENT_TRUSTED_KEYS`, which operators' commands use too."""
    return tuple(map(Path, _split(os.environ.get(f"{PREFIX}TRUSTED_KEYS", ""))))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class AgentSettings(BaseSettings):
    """The settings of one agent and of the TorchServe that it starts."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address of the private status page, for gateways and operators only."""
    port: Port = 9100
    """Port of the status page."""
    plan: Path = Field(default_factory=lambda: home_directory() / "plan.json")
    """The traffic plan to carry out: a file, or `kubernetes:NAMESPACE/NAME` for a ConfigMap that is followed by
    watch."""
    model_store: Path = Path("model_store")
    """Folder with the archives that the plan names."""
    cache: Path = Field(default_factory=lambda: home_directory() / "archives")
    """Folder for archives that the model store lacks and the plan names a source for."""
    cache_mb: Annotated[int, Field(ge=1)] = 4096
    """Megabytes that `cache` keeps; the archives that were used longest ago go first."""
    archive_mb: Annotated[int, Field(ge=1)] = 2048
    """Megabytes that one fetched archive may have."""
    source_http: bool = False
    """Fetch archives from other machines by plain HTTP too. Their SHA-256 is checked in any case."""
    trusted_keys: Annotated[tuple[Path, ...], NoDecode] = ()
    """Files of trusted public keys (PEM), separated by commas. If set, the agent loads only archives signed by one of
    them."""
    config: Path = Path(__file__).resolve().parent.parent / "config" / "torchserve"
    """Folder with TorchServe's config.properties template, log4j2.xml and metrics.yaml."""
    temp: Path | None = None
    """Folder for TorchServe's sockets, archives and unpacked models: a short path, not mounted with noexec, where the
    system removes no old files (it does in /tmp). Default: GRADSERVE_HOME/run, else ~/.cache/gradserve."""
    management_log: Path | None = None
    """Log file of all calls of TorchServe's management API, one JSON object a line. `up` writes it to
    GRADSERVE_HOME/logs."""
    inference_host: str = "127.0.0.1"
    """Address that TorchServe's inference port binds to."""
    advertised_host: str | None = None
    """Host name under which gateways reach the inference port. Default: `inference_host`."""
    inference_port: Port = 9101
    """TorchServe's inference port. `up` replaces the unset ports of the agent and TorchServe if one is taken."""
    metrics_host: str = "127.0.0.1"
    """Address that TorchServe's metrics port binds to. The port has no access control."""
    metrics_port: Port = 9103
    """TorchServe's metrics port."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Predict workers of the stable version. Default: usable cores / `threads`."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of each worker (OMP_NUM_THREADS)."""
    explain_workers: Annotated[int, Field(ge=1)] = 1
    """Explain workers of each version; they run at lower priority."""
    # The gateway forms the upstream batches, and with 1 TorchServe does not wait for a second one: with 2, a single
    # caller got 228 answers a second instead of 336, and a batch of 32 images took 6 % longer.
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Most upstream batches, of one or more images each, that TorchServe gives a predict worker at once."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Number of GPUs over which TorchServe distributes workers."""
    java_options: str = (
        "-Xms128m -Xmx512m -XX:MaxDirectMemorySize=256m -XX:+UseSerialGC -XX:+ExitOnOutOfMemoryError "
        "-Djava.util.concurrent.ForkJoinPool.common.parallelism=4"
    )
    """Options of the Java virtual machine, separated by spaces."""
    load_timeout_s: Annotated[float, Field(gt=0)] = 180.0
    """Longest time from a version's registration to its first READY worker, in seconds; raise it for a large model or a
    slow machine. `gradserve up` gives up a start without any progress 60 seconds later."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 20.0
    """Longest time that a stopping agent waits for requests in flight, in seconds."""
    retire_settle_s: Annotated[float, Field(ge=0)] = 15.0
    """Seconds after its last report during which a silent gateway still delays the unregistration of a version that
    left the plan: a gateway follows the plan within 3 s, and its longest request takes 10 s (`GATEWAY_TIMEOUT_S`)."""

    @field_validator("trusted_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return _split(value) if isinstance(value, str) else value

    @field_validator("plan")
    @classmethod
    def _check_plan(cls, plan: Path) -> Path:
        return check_plan(plan)

    @property
    def inference_url(self) -> str:
        """The address of TorchServe's inference port for gateways."""
        host = self.advertised_host or self.inference_host
        return f"http://[{host}]:{self.inference_port}" if ":" in host else f"http://{host}:{self.inference_port}"

    def ports(self) -> dict[int, str]:
        """Return every port this agent and its TorchServe listen on, with its use and the variable that moves it."""
        return {getattr(self, field): f"{use}, moved by {PREFIX}{field.upper()}" for field, use in PORTS.items()}


def read_agent_settings() -> AgentSettings:
    """Return the agent's settings from the environment.

    Raises:
        BadSetting: an `AGENT_*` variable is unknown, or a value is invalid.
    """
    try:
        return read_settings(AgentSettings)
    except SettingsError as error:
        raise BadSetting([str(error)]) from error


def local_url(host: str, port: int | str) -> str:
    """Return the URL under which this machine reaches a server that listens on `host`."""
    reached = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 — nothing is bound
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
