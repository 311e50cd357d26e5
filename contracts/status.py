"""The agent's status (`GET /status`): what it sees of its TorchServe, for gateways, `gradserve` and tests.

Readers ignore fields that they do not know, because agents and gateways are not updated in one moment; statuses of
schema 1 are read too. Everything in it is bounded, and nothing but `StatusError` is raised by reading it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from contracts import model as model_contract
from contracts import report
from contracts.fields import DocumentError, Fields, as_json, read_json
from contracts.names import NAME, VERSION

SCHEMA = 2
READABLE = (1, 2)
MAX_BYTES = 16_000_000
MAX_VERSIONS = 256
MAX_GATEWAYS = 256
MAX_REASON = 10_000
_URL = re.compile(r"https?://[A-Za-z0-9_.:\[\]-]{1,255}/?")
_LATEST = 1e11  # Unix seconds


class StatusError(DocumentError):
    """An answer that is no status."""

    document = "agent status"
    remedy = "run agent, gateway and gradserve of the same release"


@dataclass(frozen=True)
class Pool:
    """The workers of one TorchServe entry, `ready` of `wanted`.

    `pending` upstream batches wait in its queue, which has room for `capacity` (None: not seen). `fallback` of the
    ready workers run the contract's fallback engine.
    """

    ready: int = 0
    wanted: int = 0
    pending: int | None = None
    capacity: int | None = None
    fallback: int = 0


@dataclass(frozen=True)
class VersionStatus:
    """One version on one replica.

    Attributes:
        model: the model's name.
        version: the version.
        role: `stable`, `canary`, `shadow`, `retained` or `retiring`.
        state: `loading`, `verifying`, `ready`, `degraded` or `failed`.
        routable: gateways may send to it.
        predict: the workers that predict.
        explain: the workers that explain.
        verified: it computes what training computed.
        signed: `no`, `not checked` or `by` and the key's name; None until its archive was read.
        reason: what is wrong, for people; None when nothing is.
        contract: the version's public contract; None until its archive was read, or where this release cannot read it.
    """

    model: str
    version: str
    role: str
    state: str
    routable: bool
    predict: Pool
    explain: Pool
    verified: bool = False
    signed: str | None = None
    reason: str | None = None
    contract: model_contract.Contract | None = None


@dataclass(frozen=True)
class ServerStatus:
    """The TorchServe behind the agent.

    Attributes:
        state: `starting`, `running`, `backoff` or `stopped`.
        restarts: how often it was started again.
        inference_url: the address that gateways call, without a slash at its end.
        pid: its process; None while there is none.
        removed_entries: what the agent found there and had not registered itself.
    """

    state: str
    restarts: int
    inference_url: str
    pid: int | None = None
    removed_entries: tuple[str, ...] = ()


@dataclass(frozen=True)
class GatewayStatus:
    """A gateway process that reports to the agent, and how many seconds ago it last did."""

    report: report.Report
    heard_s: float


@dataclass(frozen=True)
class AgentStatus:
    """One agent's status; both times are Unix seconds by its own clock.

    Attributes:
        observed_at: when it last saw TorchServe.
        told_at: when it wrote this status; None from an agent of before 1.0.
        draining: it is about to stop, and takes no calls.
        plan_revision: the revision of the plan that it follows; None without one.
        plan_error: what is wrong with the plan's file; None when nothing is.
        torchserve: the server.
        gateways: the gateway processes that report to it.
        versions: every version on it.
    """

    observed_at: float
    draining: bool
    torchserve: ServerStatus
    versions: tuple[VersionStatus, ...]
    told_at: float | None = None
    plan_revision: int | None = None
    plan_error: str | None = None
    gateways: tuple[GatewayStatus, ...] = ()

    def version(self, model: str, version: str) -> VersionStatus | None:
        """Return what it says of a version of a model; None where it does not have it."""
        wanted = (model, version)
        return next((found for found in self.versions if (found.model, found.version) == wanted), None)

    def serves(self) -> bool:
        """Return True if it has a stable version that gateways may send to."""
        return any(found.role == "stable" and found.routable for found in self.versions)


def dump(status: AgentStatus) -> dict[str, Any]:
    """Return the status as JSON-able data, such that `parse(dump(status)) == status`."""
    return {
        "schema": SCHEMA,
        "time": status.told_at,
        "observed_at": status.observed_at,
        "draining": status.draining,
        "plan_revision": status.plan_revision,
        "plan_error": _shortened(status.plan_error),
        "torchserve": as_json(status.torchserve),
        "gateways": [as_json(gateway.report) | {"heard_s": gateway.heard_s} for gateway in status.gateways],
        "versions": [_dump_version(version) for version in status.versions],
    }


def parse(text: str | bytes) -> AgentStatus:
    """Return the status that `text` (JSON) holds.

    Raises:
        StatusError: it holds none.
    """
    fields = Fields(read_json(text, StatusError, most_bytes=MAX_BYTES), "", StatusError)
    fields.schema(READABLE)
    return AgentStatus(
        told_at=fields.maybe("time", partial(fields.number, least=0, most=_LATEST)),
        observed_at=fields.number("observed_at", least=0, most=_LATEST),
        draining=fields.flag("draining"),
        plan_revision=fields.maybe("plan_revision", fields.integer),
        plan_error=fields.maybe("plan_error", partial(fields.text, most=MAX_REASON)),
        torchserve=_server(fields.inner("torchserve")),
        gateways=tuple(map(_gateway, fields.maybe("gateways", partial(fields.inners, most=MAX_GATEWAYS)) or ())),
        versions=tuple(map(_version, fields.inners("versions", most=MAX_VERSIONS))),
    )


def _dump_version(status: VersionStatus) -> dict[str, Any]:
    contract = None if status.contract is None else model_contract.dump(status.contract)
    data: dict[str, Any] = as_json(replace(status, reason=_shortened(status.reason), contract=None))
    return data | {"contract": contract}


def _shortened(text: str | None) -> str | None:
    return None if text is None else text[:MAX_REASON]


def _server(fields: Fields) -> ServerStatus:
    return ServerStatus(
        state=fields.text("state"),
        restarts=fields.integer("restarts"),
        inference_url=fields.text("inference_url", pattern=_URL).rstrip("/"),
        pid=fields.maybe("pid", fields.integer),
        removed_entries=fields.maybe("removed_entries", partial(fields.texts, most_items=MAX_VERSIONS)) or (),
    )


def _gateway(fields: Fields) -> GatewayStatus:
    return GatewayStatus(report.read(fields, is_whole=False), fields.number("heard_s", least=0))


def _version(fields: Fields) -> VersionStatus:
    status = VersionStatus(
        model=fields.text("model", pattern=NAME),
        version=fields.text("version", pattern=VERSION),
        role=fields.text("role"),
        state=fields.text("state"),
        routable=fields.flag("routable"),
        predict=_pool(fields.inner("predict")),
        explain=_pool(fields.inner("explain")),
        verified=fields.maybe("verified", fields.flag) or False,
        signed=fields.maybe("signed", fields.text),
        reason=fields.maybe("reason", partial(fields.text, most=MAX_REASON)),
    )
    # An agent of schema 1 tells an empty object before it has read the archive.
    data = fields.maybe("contract", fields.json)
    if not data:
        return status
    try:
        return replace(status, contract=_public_contract(json.dumps(data)))
    except model_contract.ContractError as error:
        # An archive of a later release, whose wire is not known here. The other versions can be called all the same.
        return replace(status, routable=False, reason=_shortened(str(error)))


@lru_cache(maxsize=MAX_VERSIONS)
def _public_contract(text: str) -> model_contract.Contract:
    """Return the public contract that `text` (JSON) describes: every poll of every replica brings the same few.

    Raises:
        ContractError: it describes none.
    """
    return model_contract.parse(json.loads(text)).public()


def _pool(fields: Fields) -> Pool:
    return Pool(
        ready=fields.integer("ready"),
        wanted=fields.integer("wanted"),
        pending=fields.maybe("pending", fields.integer),
        capacity=fields.maybe("capacity", fields.integer),
        fallback=fields.maybe("fallback", fields.integer) or 0,
    )
