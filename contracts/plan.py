"""The traffic plan: which version is stable, canary, shadow or only kept loaded.

One small JSON file passes between the `gradserve` command (writes it), the agents (bring TorchServe to it) and the
gateway (routes by it). Plans of schema 1, which knew no `previous`, are read too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from contracts.fields import DocumentError, Fields, as_json, read_json
from contracts.names import ARCHIVE, NAME, SHA256, VERSION

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 2
READABLE = (1, 2)
MAX_BYTES = 1_000_000
MAX_RETAINED = 200
MAX_PREVIOUS = 20
_SALT = re.compile(r"[A-Za-z0-9_-]{0,64}")


class PlanError(DocumentError):
    """A plan that cannot be used."""

    document = "plan"
    remedy = "correct it, or bring back an earlier one from the folder history/"


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
    """Versions of `model` and the share of callers that each gets; every change raises `revision` by one.

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
    """Return the plan that `data` (parsed JSON) describes.

    Raises:
        PlanError: the schema is unknown, a field is missing, unknown or impossible, or a version appears twice.
    """
    fields = Fields(data, "", PlanError)
    fields.schema(READABLE)
    plan = Plan(
        revision=fields.integer("revision"),
        model=fields.text("model", pattern=NAME),
        stable=_release(fields.inner("stable")),
        canary=_canary(fields.maybe("canary", fields.inner)),
        shadow=_optional(fields.maybe("shadow", fields.inner)),
        retained=_releases(fields, "retained"),
        previous=_releases(fields, "previous"),
    )
    fields.end()
    versions = [release.version for release in plan.releases()]
    if twice := sorted({version for version in versions if versions.count(version) > 1}):
        raise PlanError("", f"version {twice[0]} in two roles", "one role for each version")
    return plan


def load(path: Path) -> Plan:
    """Return the plan in the file `path`.

    Raises:
        PlanError: the file is no JSON or no plan.
        OSError: the file cannot be read.
    """
    return parse(read_json(path.read_bytes(), PlanError, most_bytes=MAX_BYTES))


def schema_of(path: Path) -> int:
    """Return the schema of the plan in the file `path`.

    Raises:
        PlanError: the file is no JSON or no plan.
        OSError: the file cannot be read.
    """
    return Fields(read_json(path.read_bytes(), PlanError, most_bytes=MAX_BYTES), "", PlanError).schema(READABLE)


def dump(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON-able data, such that `parse(dump(plan)) == plan`."""
    return {"schema": SCHEMA, **as_json(plan)}


def _release(fields: Fields) -> Release:
    release = Release(**_release_fields(fields))
    fields.end()
    return release


def _optional(fields: Fields | None) -> Release | None:
    return None if fields is None else _release(fields)


def _canary(fields: Fields | None) -> Canary | None:
    if fields is None:
        return None
    canary = Canary(
        **_release_fields(fields),
        share=fields.number("share", least=0, most=100),
        salt=fields.maybe("salt", partial(fields.text, pattern=_SALT)) or "",
    )
    fields.end()
    return canary


def _releases(fields: Fields, name: str) -> tuple[Release, ...]:
    return tuple(map(_release, fields.inners(name, most=MAX_RETAINED))) if name in fields else ()


def _release_fields(fields: Fields) -> dict[str, Any]:
    return {
        "version": fields.text("version", pattern=VERSION),
        "archive": fields.text("archive", pattern=ARCHIVE),
        "sha256": fields.text("sha256", pattern=SHA256),
        "workers": fields.maybe("workers", partial(fields.integer, least=1)),
    }
