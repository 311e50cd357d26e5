"""The gateway's settings: read once from `GATEWAY_*`, frozen, passed in. Nothing reads the environment on import."""

from __future__ import annotations

import difflib
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "GATEWAY_"
VERSION = "0.1.0"
MIB = 1024 * 1024
AnySettings = TypeVar("AnySettings", bound=BaseSettings)


class SettingsError(ValueError):
    """Settings with which a process does not start; the message says what to change."""


def _home_file(name: str) -> Path:
    return Path(os.environ.get("GRADSERVE_HOME", ".gradserve")) / name


class Settings(BaseSettings):
    """What can be set. Each field is the environment variable `GATEWAY_<FIELD>`; lists are separated by commas."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs API keys, or `GATEWAY_AUTH=off`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on."""
    workers: int = Field(default=2, ge=1, le=64)
    """Gateway processes. They share the cores with the model's workers."""

    agents: Annotated[tuple[str, ...], NoDecode] = ("http://127.0.0.1:9100",)
    """Addresses of the agents, one per replica."""
    plan: Path = Field(default_factory=lambda: _home_file("plan.json"))
    """The traffic plan's file. By default `plan.json` in GRADSERVE_HOME, which itself defaults to `.gradserve`."""
    poll_s: float = Field(default=0.5, gt=0)
    """Seconds between two looks at the agents, the plan and the key file."""
    status_max_age_s: float = Field(default=3.0, gt=0)
    """An agent's status older than this many seconds is no status."""

    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds a request may take in all. A caller may ask for less with the header `x-timeout-ms`, never for more."""
    in_flight_predict: int = Field(default=16, ge=1)
    """Predictions that one caller (by key, else by address) has in flight in one gateway process; a quarter more places
    are for other callers. More wait, then get 503."""
    in_flight_explain: int = Field(default=4, ge=1)
    """Explanations that one caller has in flight in one gateway process, likewise."""
    admission_wait_s: float = Field(default=0.25, ge=0)
    """Seconds a request may wait for a place before it gets 503; under lasting overload most do not wait at all."""

    max_image_bytes: int = Field(default=6 * MIB, ge=1)
    """Bytes one image may have. TorchServe's `max_request_size` must be larger."""
    max_batch_bytes: int = Field(default=32 * MIB, ge=1)
    """Bytes the body of one /predict/batch or V2 call may have."""
    max_pixels: int = Field(default=25_000_000, ge=1, le=50_000_000)
    """Pixels one image may have; the handler decodes 50,000,000 at most."""
    max_caller_pixels: int = Field(default=200_000_000, ge=1)
    """Pixels that the images of one call may have together (413), and those of all calls that one caller has in flight
    in one gateway process (429)."""
    max_batch_images: int = Field(default=256, ge=1)
    """Images one /predict/batch or V2 call may have."""
    chunk_images: int = Field(default=32, ge=1)
    """Images that go to TorchServe as one row, at most: of one batch, or of several callers of /predict. With 1 no
    callers share a row."""
    max_buffered_bytes: int = Field(default=256 * MIB, ge=1)
    """Bytes of bodies that one gateway process holds at a time, over all its requests; above it new ones get 503."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds a body may take to arrive, and an answer to be read, before the caller is cut off."""
    header_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds a connection may take to send a request's headers before it is closed."""
    max_header_bytes: int = Field(default=16 * 1024, ge=1024)
    """Bytes a request's line and headers may have together."""
    max_connections: int = Field(default=1000, ge=1)
    """Connections that one gateway process holds at a time, as far as its limit of open files leaves 256 for other
    uses; for further ones those that have been idle longest are ended."""
    keep_alive_s: int = Field(default=15, ge=1)
    """Seconds an idle connection stays open."""

    auth: Literal["keys", "off"] = "keys"
    """`off` serves everyone, on any address. `keys` asks for an API key where keys are configured, and without any
    serves loopback only."""
    keys_file: Path | None = None
    """File of API keys (their SHA-256 only), made by `gradserve keys`; re-read when it changes."""
    keys: Annotated[tuple[str, ...], NoDecode] = ()
    """More API keys, each `name:sha256:scope+scope` with the scopes predict, explain, read."""
    rate_per_key: str = ""
    """Quota of each API key that has none of its own, like `600/minute`; empty for none."""
    rate_per_address: str = ""
    """Quota of each client address, like `100/second`; empty for none."""
    rate_store: str = "memory://"
    """Where quotas are counted: `memory://` (each gateway process for itself) or a `redis://` address (together)."""
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = ()
    """Addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto count; `*` believes every caller."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose pages may call the gateway from a browser."""

    drain_s: float = Field(default=1.0, ge=0)
    """Seconds from SIGTERM, when /readyz turns 503 and connections are asked to close, to the end of accepting."""
    otlp_endpoint: str = ""
    """OpenTelemetry collector that gets traces over OTLP/HTTP, like `http://127.0.0.1:4318`; empty for no traces."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line that is written; a request's line is `info`."""

    @field_validator("agents", "keys", "trusted_proxies", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("keys_file", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("agents")
    @classmethod
    def _addresses(cls, agents: tuple[str, ...]) -> tuple[str, ...]:
        if not agents or not all(agent.startswith(("http://", "https://")) for agent in agents):
            raise ValueError("takes one or more addresses like http://127.0.0.1:9100")
        return tuple(agent.rstrip("/") for agent in agents)

    @model_validator(mode="after")
    def _safe_default(self) -> Settings:
        self.check_addresses([self.host])
        return self

    def check_addresses(self, hosts: Iterable[str]) -> None:
        """Does nothing where only this machine reaches `hosts`, or callers need keys.

        Raises:
            ValueError: others reach one of them, and nobody said that everyone may.
        """
        if self.auth == "off" or self.asks_for_keys:
            return
        for host in hosts:
            if not is_loopback(host):
                raise ValueError(
                    f"the address {host} is reachable by others and no API keys are configured: set "
                    "GATEWAY_KEYS_FILE (`gradserve keys` makes one), or GATEWAY_AUTH=off to serve everyone, "
                    "or GATEWAY_HOST=127.0.0.1"
                )

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers need an API key."""
        return self.auth == "keys" and (self.keys_file is not None or bool(self.keys))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings() -> Settings:
    """Return the gateway's settings that the process's environment gives.

    Raises:
        SettingsError: an unknown `GATEWAY_*` name, or a value that a field cannot have.
    """
    return read_settings(Settings)


def read_settings(model: type[AnySettings]) -> AnySettings:
    """Return the settings of `model` that the process's environment gives; control reads the agent's with it.

    pydantic-settings ignores a mistyped variable, so names with the model's prefix that no field has are refused here.

    Raises:
        SettingsError: an unknown name with the model's prefix, or a value that a field cannot have.
    """
    prefix = model.model_config["env_prefix"]
    known = {prefix + field.upper() for field in model.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name.upper() not in known:
            nearest = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.0)[0]
            raise SettingsError(f"{name} is no setting; the nearest known one is {nearest}")
    try:
        return model()
    except ValidationError as error:
        raise SettingsError(_sentence(error, prefix)) from error


def _sentence(error: ValidationError, prefix: str) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        reason = problem["msg"].removeprefix("Value error, ")
        field = ".".join(str(part) for part in problem["loc"][:1])
        problems.append(f"{prefix}{field.upper()} = {problem['input']!r}: {reason}" if field else reason)
    return "; ".join(problems)


def trusts_everyone(proxies: Iterable[str]) -> bool:
    """Return True if `proxies` (GATEWAY_TRUSTED_PROXIES) let every caller say from which address he comes."""
    return any(proxy.strip() in {"*", "0.0.0.0/0", "::/0"} for proxy in proxies)
