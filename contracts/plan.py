"""The traffic plan: which version of each model is stable, canary, shadow or only kept loaded.

One small JSON file passes between the `gradserve` command (writes it), the agents (bring TorchServe to it) and the
gateway (routes by it). It holds one plan for each model. Plans of schema 1, which knew no `previous`, and of schema 2,
which held one model, are read too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from contracts.fields import DocumentError, Fields, as_json, read_json
from contracts.names import ARCHIVE, EXPLAIN_SUFFIX, NAME, SHA256, VERSION

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 3
READABLE = (1, 2, 3)
MAX_BYTES = 1_000_000
MAX_MODELS = 100
MAX_RETAINED = 200
MAX_PREVIOUS = 20
_SOURCE = re.compile(r"[a-z][a-z0-9+.-]{0,20}://[!-~]{1,900}")
_SALT = re.compile(r"[A-Za-z0-9_-]{0,64}")


class PlanError(DocumentError):
    """A plan that cannot be used."""

    document = "plan"
    remedy = "correct it, or bring back an earlier one from the folder history/"


@dataclass(frozen=True)
class Release:
    """One version that the agents keep loaded: its archive's file name in the model store, its SHA-256, its workers.

    `workers` is the number of prediction workers; None leaves it to the agent, 0 keeps the version unloaded. `source`
    is the URL from which an agent fetches the archive if its model store lacks it.
    """

    version: str
    archive: str
    sha256: str
    workers: int | None = None
    source: str | None = None


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

    def share_of(self, version: str) -> float:
        """Return the share, in per cent, that the plan gives `version` of the calls that name no version."""
        of_canary = self.canary.share if self.canary is not None else 0.0
        if self.canary is not None and version == self.canary.version:
            return of_canary
        return 100.0 - of_canary if version == self.stable.version else 0.0


@dataclass(frozen=True)
class Plans:
    """The plans of all models, all of one `revision`; `default` is the model of the calls that name none."""

    revision: int
    default: str
    models: tuple[Plan, ...]

    def plan(self, model: str | None = None) -> Plan | None:
        """Return the plan of `model`, by default that of the default model; None if no plan is of that model."""
        wanted = self.default if model is None else model
        return next((plan for plan in self.models if plan.model == wanted), None)

    def names(self) -> tuple[str, ...]:
        """Return the names of the models."""
        return tuple(plan.model for plan in self.models)

    def with_plan(self, plan: Plan) -> Plans:
        """Return the plans with `plan` in place of its model's plan, or as a further one."""
        others = tuple(plan if each.model == plan.model else each for each in self.models)
        return replace(self, models=others if plan.model in self.names() else (*others, plan))

    def with_revision(self, revision: int) -> Plans:
        """Return the plans with this revision."""
        return replace(self, revision=revision, models=tuple(replace(each, revision=revision) for each in self.models))


def parse(data: object) -> Plans:
    """Return the plans that `data` (parsed JSON) describes.

    Raises:
        PlanError: the schema is unknown, a field is missing, unknown or impossible, or a model, or a version of it,
            appears twice.
    """
    fields = Fields(data, "", PlanError)
    schema = fields.schema(READABLE)
    revision = fields.integer("revision")
    if schema < 3:
        plan = _plan(fields, revision)
        return Plans(revision, plan.model, (plan,))
    default = fields.text("default", pattern=NAME)
    models = tuple(_plan(inner, revision) for inner in fields.inners("models", most=MAX_MODELS))
    fields.end()
    names = [plan.model for plan in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PlanError("models", f"{twice[0]} twice", "one plan for each model")
    if shadowed := sorted({name + EXPLAIN_SUFFIX for name in names} & set(names)):
        expected = f"no name that ends in {EXPLAIN_SUFFIX} beside the model that it explains"
        raise PlanError("models", shadowed[0], expected)
    if default not in names:
        raise PlanError("default", default, f"one of the models ({', '.join(names) or 'there are none'})")
    return Plans(revision, default, models)


def _plan(fields: Fields, revision: int) -> Plan:
    plan = Plan(
        revision=revision,
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


def loads(text: str | bytes) -> Plans:
    """Return the plans that `text` writes.

    Raises:
        PlanError: the text is no JSON or no plan.
    """
    return parse(read_json(text, PlanError, most_bytes=MAX_BYTES))


def load(path: Path) -> Plans:
    """Return the plans in the file `path`.

    Raises:
        PlanError: the file is no JSON or no plan.
        OSError: the file cannot be read.
    """
    return loads(path.read_bytes())


def schema_of(path: Path) -> int:
    """Return the schema of the plan in the file `path`.

    Raises:
        PlanError: the file is no JSON or no plan.
        OSError: the file cannot be read.
    """
    return Fields(read_json(path.read_bytes(), PlanError, most_bytes=MAX_BYTES), "", PlanError).schema(READABLE)


def dump(plans: Plans) -> dict[str, Any]:
    """Return the plans as JSON-able data, such that `parse(dump(plans)) == plans`."""
    models = [dump_plan(plan) for plan in plans.models]
    for plan in models:
        del plan["revision"]
    return {"schema": SCHEMA, "revision": plans.revision, "default": plans.default, "models": models}


def dump_plan(plan: Plan) -> dict[str, Any]:
    """Return one model's plan as JSON-able data, for programs that read an operator's command."""
    data: dict[str, Any] = as_json(plan)
    for release in (data["stable"], data["canary"], data["shadow"], *data["retained"], *data["previous"]):
        if release is not None and release["source"] is None:
            del release["source"]  # so that an older gradserve reads plans that need no source
    return data


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
        "workers": fields.maybe("workers", partial(fields.integer, least=0)),
        "source": fields.maybe("source", partial(fields.text, pattern=_SOURCE)) if "source" in fields else None,
    }
