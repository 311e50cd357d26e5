"""The gateway's settings: read once from `GATEWAY_*`, frozen, passed in. No module reads the environment on import."""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gateway.kubernetes import addresses

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "GATEWAY_"
VERSION = "0.1.0"
_SERVICE = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_PORT = re.compile(r"_PORT$")
MIB = 1024 * 1024
AnySettings = TypeVar("AnySettings", bound=BaseSettings)


class SettingsError(ValueError):
    """Raised for settings with which a process does not start; the message says what to change."""


def _home_file(name: str) -> Path:
    return Path(os.environ.get("GRADSERVE_HOME", ".gradserve")) / name


class Settings(BaseSettings):
    """The settings. Each field is the environment variable `GATEWAY_<FIELD>`; lists are separated by commas."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on. An address other than loopback needs API keys, or `GATEWAY_AUTH=off`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on."""
    workers: int = Field(default=1, ge=1, le=64)
    """Number of gateway processes. They share the workers, and so do several gateways: the agents tell each process how
    many others have calls in flight. Each counts places for itself. One suffices for about four cores, which it shares
    with TorchServe's workers."""

    agents: Annotated[tuple[str, ...], NoDecode] = ("http://127.0.0.1:9100",)
    """Addresses of the agents, one per replica. A host name that has several addresses stands for as many replicas; it
    is resolved again every 3 s. `kubernetes:NAMESPACE/SERVICE:PORT` stands for the endpoints of a Service, which are
    followed by watch."""
    plan: Path = Field(default_factory=lambda: _home_file("plan.json"))
    """File of the traffic plan, or `kubernetes:NAMESPACE/NAME` for a ConfigMap that is followed by watch. The default
    is `plan.json` in GRADSERVE_HOME, which itself defaults to `.gradserve`."""
    poll_s: float = Field(default=0.5, gt=0)
    """Seconds between two polls of the agents, the plan file and the key file."""
    status_max_age_s: float = Field(default=3.0, gt=0)
    """Seconds after which an agent's status no longer counts."""

    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a request may take in total. A caller can shorten this with the header `x-timeout-ms`."""
    in_flight_predict: int | None = Field(default=None, ge=1)
    """Predictions of one model that one caller (by key, else by address) may have in flight in one gateway process; all
    callers together may have a quarter more. Further calls wait briefly, then get 503. By default two upstream batches
    (`GATEWAY_CHUNK_IMAGES`) for each worker in the process's share of the model's workers."""
    in_flight_explain: int | None = Field(default=None, ge=1)
    """Explanations made in the forward pass that one caller may have in flight in one gateway process; otherwise as for
    predictions. By default half of `GATEWAY_IN_FLIGHT_PREDICT`."""
    in_flight_backward: int = Field(default=4, ge=1)
    """Explanations that need a backward pass, or come from a version packed before there were others, that one caller
    may have in flight in one gateway process; otherwise as for predictions."""
    admission_wait_s: float = Field(default=0.25, ge=0)
    """Seconds that a request may wait for a place before it gets 503. Under lasting overload most get 503 at once."""

    max_image_bytes: int = Field(default=6 * MIB, ge=1)
    """Bytes that one image may have. TorchServe's `max_request_size` must be larger."""
    max_batch_bytes: int = Field(default=32 * MIB, ge=1)
    """Bytes that the body of one /predict/batch or V2 call may have."""
    max_pixels: int = Field(default=25_000_000, ge=1, le=50_000_000)
    """Pixels that one image may have. The handler decodes at most 50,000,000."""
    max_caller_pixels: int = Field(default=200_000_000, ge=1)
    """Pixels that the images of one call may have together (above it: 413), and those of all calls that one caller has
    in flight in one gateway process (above it: 429)."""
    max_batch_images: int = Field(default=256, ge=1)
    """Images that one /predict/batch or V2 call may have."""
    chunk_images: int = Field(default=32, ge=1)
    """Images in one upstream batch (one request to TorchServe), at most. They come from one /predict/batch call or from
    several callers of /predict. With 1 the images of different callers are never sent together."""
    max_buffered_bytes: int = Field(default=256 * MIB, ge=1)
    """Bytes of request bodies that one gateway process holds at a time; further requests get 503."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a caller may take to send a body, and to read an answer, before its connection is closed."""
    header_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a caller may take to send a request's headers before its connection is closed."""
    max_header_bytes: int = Field(default=16 * 1024, ge=1024)
    """Bytes that a request's line and headers may have together."""
    max_connections: int = Field(default=4000, ge=1)
    """Connections that one gateway process holds at a time; fewer if its limit of open files would not leave 256 for
    other uses. For each further connection the one that has been idle longest is closed."""
    keep_alive_s: int = Field(default=15, ge=1)
    """Seconds that an idle connection stays open."""

    auth: Literal["keys", "off"] = "keys"
    """`off` serves everyone, on any address. `keys` needs an API key if any keys are configured; without keys it serves
    loopback only."""
    keys_file: Path | None = None
    """File of API keys (only their SHA-256), written by `gradserve keys` and re-read when it changes."""
    keys: Annotated[tuple[str, ...], NoDecode] = ()
    """More API keys, each `name:sha256:scope+scope` with the scopes predict, explain, feedback, read. With
    `:model+model` at its end a key is limited to these models."""
    rate_per_key: str = ""
    """Quota of each API key that has no quota of its own, like `600/minute`; empty for no quota."""
    rate_per_address: str = ""
    """Quota of each client address, like `100/second`; empty for no quota."""
    rate_store: str = "memory://"
    """Store in which quotas are counted: `memory://` (per gateway process) or a `redis://` address (shared)."""
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = ()
    """Addresses of the proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted; `*` trusts every caller."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose web pages may call the gateway from a browser."""

    feedback_file: Path | None = None
    """SQLite file, on a local disk, in which POST /feedback keeps callers' corrections, beside the calls that they are
    about. Processes and gateways of one host share it. Without it there is no /feedback and nothing is kept."""
    feedback_sample: float = Field(default=0.0, ge=0, le=1)
    """Share of the answered images of /predict and /explain that are kept in `feedback_file`, from 0 to 1."""
    feedback_mb: int = Field(default=1024, ge=1)
    """Megabytes that `feedback_file` keeps; the oldest calls without feedback go first."""
    feedback_days: float = Field(default=30.0, gt=0)
    """Days after which a call, its image and its feedback are removed from `feedback_file`."""

    drain_s: float = Field(default=1.0, ge=0)
    """Seconds that a process still accepts connections after SIGTERM, while /readyz answers 503 and answers ask for the
    connection's end."""
    otlp_endpoint: str = ""
    """OpenTelemetry collector that traces are sent to over OTLP/HTTP, like `http://127.0.0.1:4318`; empty for none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log lines that are written; the line for each request has `info`."""

    @field_validator("agents", "keys", "trusted_proxies", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("keys_file", "feedback_file", "in_flight_predict", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("plan")
    @classmethod
    def _plan(cls, plan: Path) -> Path:
        return check_plan(plan)

    @field_validator("agents")
    @classmethod
    def _addresses(cls, agents: tuple[str, ...]) -> tuple[str, ...]:
        if not agents or not all(agent.startswith(("http://", "https://", addresses.PREFIX)) for agent in agents):
            raise ValueError(
                "takes one or more addresses like http://127.0.0.1:9100, or kubernetes:NAMESPACE/SERVICE:9100"
            )
        for agent in filter(addresses.is_address, agents):
            addresses.parse_service(agent)
        return tuple(agent.rstrip("/") for agent in agents)

    @model_validator(mode="after")
    def _safe_default(self) -> Settings:
        self.check_addresses([self.host])
        return self

    def check_addresses(self, hosts: Iterable[str]) -> None:
        """Refuse to serve other machines without API keys, unless `GATEWAY_AUTH=off` allows it.

        Raises:
            ValueError: one of `hosts` is reachable by other machines, and callers need no key.
        """
        if self.auth == "off" or self.asks_for_keys:
            return
        for host in hosts:
            if not is_loopback(host):
                raise ValueError(
                    f"the address {host} is reachable by other machines and no API keys are configured: set "
                    "GATEWAY_KEYS_FILE (`gradserve keys` makes one), or GATEWAY_AUTH=off to serve everyone, "
                    "or GATEWAY_HOST=127.0.0.1"
                )

    def places_predict(self, share: int) -> int:
        """Return the predictions of a model that one caller may have in flight in a process with `share` workers.

        Unless it is set: of each upstream batch that the process sends at a time, one at the worker and one that waits.
        """
        return 2 * self.chunk_images * share if self.in_flight_predict is None else self.in_flight_predict

    def places_explain(self, share: int) -> int:
        """Return the explanations in the forward pass that one caller may have in flight there.

        Unless it is set, half of the predictions, so that these two never fill the workers' queue with explanations.
        """
        half = math.ceil(self.places_predict(share) / 2)
        return half if self.in_flight_explain is None else self.in_flight_explain

    @property
    def asks_for_keys(self) -> bool:
        """True if callers need an API key."""
        return self.auth == "keys" and (self.keys_file is not None or bool(self.keys))


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_plan(where: Path) -> Path:
    """Return `where`, the path of a plan or `kubernetes:NAMESPACE/NAME`.

    Raises:
        ValueError: it begins with `kubernetes:` and names no ConfigMap.
    """
    addresses.parse_plan(str(where))
    return where


def load_settings() -> Settings:
    """Return the gateway's settings from the environment.

    Raises:
        SettingsError: the environment has an unknown `GATEWAY_*` name, or an impossible value.
    """
    return read_settings(Settings)


def read_settings(model: type[AnySettings]) -> AnySettings:
    """Return the settings of `model` from the environment; the agent's settings are read with it too.

    pydantic-settings ignores a mistyped variable, so this refuses names that have the model's prefix and are no field.

    Raises:
        SettingsError: the environment has an unknown name with the model's prefix, or an impossible value.
    """
    prefix = model.model_config["env_prefix"]
    known = {prefix + field.upper() for field in model.model_fields}
    for name in sorted(os.environ):
        if name.startswith(prefix) and _is_service_variable(name):
            raise SettingsError(
                f"{name} is no setting: Kubernetes sets it for a Service whose name begins with "
                f"{prefix.rstrip('_').lower()}. Set enableServiceLinks: false in the pod, or rename the Service"
            )
        if name.upper().startswith(prefix) and name.upper() not in known:
            nearest = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.0)[0]
            raise SettingsError(f"{name} is no setting; the nearest known one is {nearest}")
    try:
        return model()
    except ValidationError as error:
        raise SettingsError(_sentence(error, prefix)) from error


def _is_service_variable(name: str) -> bool:
    """Return True for a variable that Kubernetes sets in a pod for a Service.

    Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    if _SERVICE_PORT.search(name):
        return os.environ[name].startswith(("tcp://", "udp://", "sctp://"))
    return "KUBERNETES_SERVICE_HOST" in os.environ and _SERVICE.search(name) is not None


def _sentence(error: ValidationError, prefix: str) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        reason = problem["msg"].removeprefix("Value error, ")
        field = ".".join(str(part) for part in problem["loc"][:1])
        problems.append(f"{prefix}{field.upper()} = {problem['input']!r}: {reason}" if field else reason)
    return "; ".join(problems)


def trusts_everyone(proxies: Iterable[str]) -> bool:
    """Return True if `proxies` (GATEWAY_TRUSTED_PROXIES) lets every caller choose the address it is counted by."""
    return any(proxy.strip() in {"*", "0.0.0.0/0", "::/0"} for proxy in proxies)
