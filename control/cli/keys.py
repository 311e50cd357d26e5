"""The commands for the gateway: `gradserve keys make|rotate|edit|list|revoke` and `gradserve config`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see main.py)

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from control.errors import BadSetting, KeysUnusable
from control.settings import PREFIX, home_directory, read_agent_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.auth.keys import Key

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_NONE = "none"

keys = typer.Typer(
    help="Make, rotate, edit, list and revoke the gateway's API keys.\n\nExample: gradserve keys make alice",
    no_args_is_help=True,
)
File = Annotated[
    Path | None,
    typer.Option(
        "--file", envvar="GATEWAY_KEYS_FILE", help="The key file. Default: keys.json in GRADSERVE_HOME.", metavar="PATH"
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the caller; the gateway's logs contain it.")]
Scopes = Annotated[
    list[str] | None,
    typer.Option(
        "--scope", help="Permission of the key: predict, explain, feedback or read. Can be repeated.", metavar="SCOPE"
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Model that the key may call; without it, all. Can be repeated.", metavar="NAME"),
]
Expires = Annotated[
    str | None,
    typer.Option(help="Time at which the key expires: 90d, 12h, 30m, or an ISO date and time (UTC).", metavar="WHEN"),
]
QuotaOfKey = Annotated[
    str | None,
    typer.Option("--quota", help="Rate limit of this key, instead of GATEWAY_RATE_PER_KEY.", metavar="600/minute"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `gradserve` command."""
    app.add_typer(keys, name="keys", rich_help_panel="Serve")
    app.command(rich_help_panel="Serve")(config)


@keys.command()
def make(
    name: Name,
    scope: Scopes = None,
    model: Models = None,
    expires: Expires = None,
    quota: QuotaOfKey = None,
    *,
    file: File = None,
) -> None:
    """Make a key and print its secret once: only its SHA-256 is stored. Default scopes: predict and explain.

    The secret goes to stdout and everything else to stderr, so `KEY=$(gradserve keys make alice)` works.

    Example: gradserve keys make alice --expires 90d --quota 600/minute
    """
    from gateway.auth.keys import make_key

    path = key_file(file)
    with changing(path) as stored:
        if any(key.name == name and not key.is_expired() for key in stored):
            raise KeysUnusable(
                path, f"a key named {name} already exists: run `gradserve keys rotate {name}`, or choose another name"
            )
        secret, key = make_key(
            name,
            scope or ["predict", "explain"],
            created=_today(),
            expires=_moment(path, expires),
            quota=quota or "",
            models=model or (),
        )
        stored[:] = [*(other for other in stored if other.name != name), key]
    typer.echo(secret)
    of_models = f" of {', '.join(key.models)}" if key.models else ""
    typer.echo(f"stored in {path} for {', '.join(key.scopes)}{of_models}; the secret is not shown again", err=True)
    if not os.environ.get("GATEWAY_KEYS_FILE"):
        typer.echo(f"the gateway requires keys if it is started with GATEWAY_KEYS_FILE={path}", err=True)


@keys.command()
def rotate(
    name: Name,
    overlap: Annotated[
        str, typer.Option(help="Time for which the old key still works: 7d, 12h, 30m; 0d ends it now.", metavar="TIME")
    ] = "7d",
    expires: Expires = None,
    file: File = None,
) -> None:
    """Make a second key of the same name, scopes, models and quota, print its secret, and let the old one expire.

    Both keys work until --overlap has passed. The metric gateway_caller_requests_total shows by its label `key` if the
    old key is still used. Without --expires the new key expires when the old one would have expired.

    Example: gradserve keys rotate alice --overlap 12h
    """
    from gateway.auth.keys import make_key

    path = key_file(file)
    with changing(path) as stored:
        own = [key for key in stored if key.name == name and not key.is_expired()]
        if not own:
            raise _no_key(path, name)
        newest = own[-1]
        secret, key = make_key(
            name,
            newest.scopes,
            created=_today(),
            expires=_moment(path, expires) or newest.expires,
            quota=newest.quota,
            models=newest.models,
        )
        end = _moment(path, overlap, may_be_now=True)
        if not end:
            raise typer.BadParameter("the old key must end: give --overlap a time like 7d, or 0d to end it now")
        old = [
            replace(other, expires=min(filter(None, (other.expires, end)), key=datetime.fromisoformat)) for other in own
        ]
        stored[:] = [*(other for other in stored if other.name != name), *old, key]
    typer.echo(secret)
    for other in old:
        typer.echo(f"the old key {other.id} works until {other.expires}", err=True)
    typer.echo(f"the new key {key.id} is stored in {path}; the secret is not shown again", err=True)


@keys.command()
def edit(
    name: Name,
    scope: Scopes = None,
    model: Models = None,
    expires: Expires = None,
    quota: QuotaOfKey = None,
    *,
    file: File = None,
) -> None:
    """Change the scopes, models, quota or expiry of a key; `none` removes models, quota or expiry. The secret stays.

    If the key is being rotated, the new key is changed.

    Example: gradserve keys edit alice --quota 100/second --expires none
    """
    from gateway.auth.keys import check_key

    path = key_file(file)
    with changing(path) as stored:
        own = [index for index, key in enumerate(stored) if key.name == name]
        if not own:
            raise _no_key(path, name)
        if not scope and not model and expires is None and quota is None:
            raise typer.BadParameter("nothing to change: give --scope, --model, --expires or --quota")
        changes: dict[str, Any] = {}
        if scope:
            changes["scopes"] = tuple(scope)
        if model:
            changes["models"] = () if model == [_NONE] else tuple(model)
        if expires is not None:
            changes["expires"] = _moment(path, expires)
        if quota is not None:
            changes["quota"] = "" if quota == _NONE else quota
        stored[own[-1]] = check_key(replace(stored[own[-1]], **changes))
    typer.echo(f"changed: {name} {stored[own[-1]].id}", err=True)


@keys.command("list")
def list_keys(
    file: File = None,
    *,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON array: name, id, scopes, models, created, expires, quota, expired of each; no digest.",
        ),
    ] = False,
) -> None:
    """List the keys: name, id, date of creation, scopes, models, quota and expiry.

    Example: gradserve keys list --json
    """
    stored = read_keys(key_file(file))
    if as_json:
        rows = [{**asdict(key), "id": key.id, "expired": key.is_expired()} for key in stored]
        typer.echo(json.dumps([{name: row[name] for name in row if name != "sha256"} for row in rows], indent=2))
        return
    width = max((len(key.name) for key in stored), default=0)
    for key in stored:
        end = f"  {'expired' if key.is_expired() else 'expires'} {key.expires}" if key.expires else ""
        quota = f"  {key.quota}" if key.quota else ""
        models = f"  only {' '.join(key.models)}" if key.models else ""
        typer.echo(f"{key.name:{width}}  {key.id}  {key.created or '-':10}  {' '.join(key.scopes)}{models}{quota}{end}")


@keys.command()
def revoke(
    name: Name,
    only: Annotated[
        str | None, typer.Option("--id", help="Revoke only the key with this id, if two keys have the name.")
    ] = None,
    file: File = None,
) -> None:
    """Revoke a key; running gateways refuse it within a second.

    Example: gradserve keys revoke alice
    """
    path = key_file(file)
    with changing(path) as stored:
        left = [key for key in stored if key.name != name or only not in {None, key.id}]
        if len(left) == len(stored):
            raise _no_key(path, name, only)
        stored[:] = left
    typer.echo(f"revoked: {name}", err=True)


def _no_key(path: Path, name: str, only: str | None = None) -> KeysUnusable:
    which = f" with the id {only}" if only else ""
    return KeysUnusable(path, f"there is no key named {name}{which}; `gradserve keys list` shows them")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _moment(path: Path, when: str | None, *, may_be_now: bool = False) -> str:
    """Return the time that `when` names, a duration from now or an ISO date and time (UTC); empty for `none`.

    Raises:
        KeysUnusable: it names no time, or one that has passed.
    """
    if when in {None, _NONE}:
        return ""
    now = datetime.now(UTC).replace(microsecond=0)
    if duration := re.fullmatch(r"([0-9]{1,4})([mhd])", when or ""):
        moment = now + timedelta(**{_UNITS[duration[2]]: int(duration[1])})
    else:
        try:
            moment = datetime.fromisoformat(when or "")
        except ValueError as error:
            raise KeysUnusable(path, f"{when!r} is no time: write 90d, 12h, 30m or 2026-12-31T18:00") from error
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment < now or (moment == now and not may_be_now):
        raise KeysUnusable(path, f"{when} has passed: `gradserve keys revoke` ends a key now")
    return moment.astimezone(UTC).isoformat()


def key_file(file: Path | None) -> Path:
    """Return the path of the key file: `file`, else keys.json in GRADSERVE_HOME."""
    return (file or home_directory() / "keys.json").resolve()


def read_keys(path: Path) -> list[Key]:
    """Return the keys in the file; an empty list if the file does not exist.

    Raises:
        KeysUnusable: the file cannot be read or is no key file.
    """
    from gateway.auth.keys import KeyFileError, load_keys

    try:
        return list(load_keys(path))
    except FileNotFoundError:
        return []
    except (OSError, KeyFileError) as error:
        raise KeysUnusable(path, str(error)) from error


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[Key]]:
    """Yield the file's keys under a lock and write the list back when the block ends.

    Raises:
        KeysUnusable: the keys cannot be read, are invalid after the change, or cannot be written.
    """
    from gateway.auth.keys import KeyFileError, save_keys

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stored = read_keys(path)
            yield stored
            save_keys(path, stored)
    except (OSError, KeyFileError) as error:
        raise KeysUnusable(path, str(error)) from error


def config(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")] = False
) -> None:
    """Print every setting in effect and its source: the environment, .env, or the default. Secrets are masked.

    `gradserve up` sets GATEWAY_PLAN, GATEWAY_PORT and GATEWAY_AGENTS for the gateway that it starts. For the agent it
    sets AGENT_PLAN and, unless you set it, AGENT_MANAGEMENT_LOG.

    Example: gradserve config --json
    """
    rows = settings_in_effect()
    if as_json:
        typer.echo(json.dumps([{"name": n, "value": v, "source": s} for n, v, s in rows], indent=2))
        return
    width = min(60, max(len(name) + len(value) + 1 for name, value, _ in rows))
    for name, value, source in rows:
        typer.echo(f"{f'{name}={value}':{width}}  # {source}")


def settings_in_effect() -> list[tuple[str, str, str]]:
    """Return name, value (secrets masked) and source of each setting of the gateway and the agent.

    Raises:
        ControlError: some settings cannot be used; the text names them.
    """
    from dotenv import dotenv_values

    from gateway.settings import SettingsError, load_settings
    from gateway.settings_docs import effective_settings, written

    try:
        gateway = effective_settings(load_settings())
    except SettingsError as error:
        raise BadSetting([str(error)]) from error
    agent = read_agent_settings()
    rows = [*gateway]
    for field in type(agent).model_fields:
        source = "environment" if field in agent.model_fields_set else "default"
        rows.append((PREFIX + field.upper(), written(getattr(agent, field)), source))
    # `gradserve` has read .env into the environment, where a variable that was set before took precedence.
    in_file = dotenv_values(".env") if Path(".env").is_file() else {}
    return [
        (name, value, ".env" if source == "environment" and in_file.get(name) == os.environ.get(name) else source)
        for name, value, source in rows
    ]
