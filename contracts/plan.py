"""The traffic plan: which version is stable, canary, shadow or only kept loaded.

One small JSON file passes between the `gradserve` command (writes it), the agents (bring TorchServe to it) and the
gateway (routes by it). Its type and its reader live here, so that all three mean the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
# Both end up in upstream paths (`/predictions/{name}/{version}`): nothing that a path or a query could be made of.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
ARCHIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*\.mar")
SHA256 = re.compile(r"[0-9a-f]{64}")
SALT = re.compile(r"[A-Za-z0-9_-]{0,64}")
MAX_PREVIOUS = 20


class PlanError(ValueError):
    """A plan that cannot be used; the message says which field and why."""


@dataclass(frozen=True)
class Release:
    """One version that the agents keep loaded: its archive's file name in the model store, its SHA-256, its workers.

    `workers` is the number of prediction workers; None leaves it to the agent.
    """

    version: str
    archive: str
    sha256: str
    workers: int | None = None


@dataclass(frozen=True)
class Canary(Release):
    """A release that gets `share` per cent (0 to 100) of the calls that name no version.

    Which callers these are hangs on `salt`: another one draws other callers, the same one keeps them.
    """

    share: float = 0.0
    salt: str = ""


@dataclass(frozen=True)
class Plan:
    """Who gets which version of `model`; `revision` grows by one with every change.

    `retained` versions stay loaded, reachable by name only, until they are retired. `previous` are the versions that
    were stable before, the latest first: `rollback` goes back to them. Standing there neither loads nor routes.
    """

    revision: int
    model: str
    stable: Release
    canary: Canary | None = None
    shadow: Release | None = None
    retained: tuple[Release, ...] = ()
    previous: tuple[Release, ...] = ()

    def releases(self) -> tuple[Release, ...]:
        """Every release in the plan: stable, canary, shadow, then the retained ones."""
        named = (self.stable, self.canary, self.shadow, *self.retained)
        return tuple(release for release in named if release is not None)


def parse(data: object) -> Plan:
    """The plan that `data` (parsed JSON) describes.

    Raises:
        PlanError: the schema is unknown, a field is missing, unknown or impossible, or a version appears twice.
    """
    fields = _object(data, "plan")
    schema = fields.pop("schema", None)
    if schema != SCHEMA:
        raise PlanError(f"plan schema {schema!r} is not {SCHEMA}")
    plan = Plan(
        revision=_integer(fields.pop("revision", None), "revision", least=0),
        model=_text(fields.pop("model", None), "model", NAME),
        stable=_release(fields.pop("stable", None), "stable"),
        canary=_canary(fields.pop("canary", None)),
        shadow=_optional_release(fields.pop("shadow", None), "shadow"),
        retained=_releases(fields.pop("retained", []), "retained"),
        previous=_releases(fields.pop("previous", []), "previous"),
    )
    _refuse_unknown(fields, "plan")
    versions = [release.version for release in plan.releases()]
    if twice := sorted({version for version in versions if versions.count(version) > 1}):
        raise PlanError(f"version {twice[0]} has two roles in the plan: one version, one role")
    return plan


def load(path: Path) -> Plan:
    """The plan in the file `path`.

    Raises:
        PlanError: the file is no JSON or no plan.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path.name} is no JSON: {error}") from error
    return parse(data)


def dump(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able data, such that `parse(dump(plan)) == plan`."""
    return {
        "schema": SCHEMA,
        "revision": plan.revision,
        "model": plan.model,
        "stable": _dump_release(plan.stable),
        "canary": _dump_release(plan.canary),
        "shadow": _dump_release(plan.shadow),
        "retained": [_dump_release(release) for release in plan.retained],
        "previous": [_dump_release(release) for release in plan.previous],
    }


def _dump_release(release: Release | None) -> dict[str, Any] | None:
    if release is None:
        return None
    data: dict[str, Any] = {
        "version": release.version,
        "archive": release.archive,
        "sha256": release.sha256,
        "workers": release.workers,
    }
    if isinstance(release, Canary):
        data |= {"share": release.share, "salt": release.salt}
    return data


def _release(data: object, where: str) -> Release:
    fields = _object(data, where)
    release = Release(**_release_fields(fields, where))
    _refuse_unknown(fields, where)
    return release


def _optional_release(data: object, where: str) -> Release | None:
    return None if data is None else _release(data, where)


def _canary(data: object) -> Canary | None:
    if data is None:
        return None
    fields = _object(data, "canary")
    share = fields.pop("share", None)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 100:
        raise PlanError(f"canary.share {share!r} is no percentage from 0 to 100")
    salt = _text(fields.pop("salt", ""), "canary.salt", SALT)
    canary = Canary(**_release_fields(fields, "canary"), share=share, salt=salt)
    _refuse_unknown(fields, "canary")
    return canary


def _releases(data: object, where: str) -> tuple[Release, ...]:
    if not isinstance(data, list):
        raise PlanError(f"{where} is a list, not {type(data).__name__}")
    return tuple(_release(item, f"{where}[{index}]") for index, item in enumerate(data))


def _release_fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    version = _text(fields.pop("version", None), f"{where}.version", VERSION)
    archive = _text(fields.pop("archive", None), f"{where}.archive", ARCHIVE)
    sha256 = _text(fields.pop("sha256", None), f"{where}.sha256", SHA256)
    workers = fields.pop("workers", None)
    if workers is not None:
        workers = _integer(workers, f"{where}.workers", least=1)
    return {"version": version, "archive": archive, "sha256": sha256, "workers": workers}


def _object(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"{where} is an object, not {type(data).__name__}")
    return dict(data)


def _text(value: object, where: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise PlanError(f"{where} {value!r} does not match {pattern.pattern}")
    return value


def _integer(value: object, where: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{where} {value!r} is no whole number of at least {least}")
    return value


def _refuse_unknown(rest: dict[str, Any], where: str) -> None:
    if rest:
        raise PlanError(f"{where} has the unknown field {min(rest)!r}")
