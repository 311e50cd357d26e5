"""The gateway's commands: `gradserve keys make|list|revoke` and `gradserve config`."""
# ruff: noqa: PLC0415 (each command imports what it needs, see cli.py)

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control.errors import BadSetting, KeysUnusable
from control.settings import PREFIX, home_directory, read_agent_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.keys import Key

keys = typer.Typer(help="Make, list and revoke the gateway's API keys.", no_args_is_help=True)
File = Annotated[
    Path | None,
    typer.Option(
        "--file", envvar="GATEWAY_KEYS_FILE", help="The key file; default: keys.json in GRADSERVE_HOME.", metavar="PATH"
    ),
]
Name = Annotated[str, typer.Argument(help="Whose key it is; the name stands in the gateway's logs.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the `gradserve` command."""
    app.add_typer(keys, name="keys", rich_help_panel="Serve")
    app.command(rich_help_panel="Serve")(config)


@keys.command()
def make(
    name: Name,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it may do: predict, explain, read. Repeat it; default: predict and explain."),
    ] = None,
    file: File = None,
) -> None:
    """Make a key and print its secret, once: only the SHA-256 of it is stored.

    The secret goes to stdout and everything else to stderr, so that `KEY=$(gradserve keys make alice)` holds it.
    """
    from gateway.keys import make_key

    path = key_file(file)
    with changing(path) as stored:
        if any(key.name == name for key in stored):
            raise KeysUnusable(path, f"there is a key named {name} already; revoke it first or choose another name")
        secret, key = make_key(name, scope or ["predict", "explain"], created=datetime.now(UTC).date().isoformat())
        stored.append(key)
    typer.echo(secret)
    typer.echo(f"stored in {path} for {', '.join(key.scopes)}; the secret is shown this once", err=True)
    if not os.environ.get("GATEWAY_KEYS_FILE"):
        typer.echo(f"the gateway asks for keys when it is started with GATEWAY_KEYS_FILE={path}", err=True)


@keys.command("list")
def list_keys(
    file: File = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the keys: names, scopes and the day each was made."""
    stored = read_keys(key_file(file))
    if as_json:
        rows = [{"name": key.name, "scopes": list(key.scopes), "created": key.created} for key in stored]
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max((len(key.name) for key in stored), default=0)
    for key in stored:
        typer.echo(f"{key.name:{width}}  {key.created or '-':10}  {' '.join(key.scopes)}")


@keys.command()
def revoke(name: Name, file: File = None) -> None:
    """Take a key back; running gateways refuse it within a second."""
    path = key_file(file)
    with changing(path) as stored:
        left = [key for key in stored if key.name != name]
        if len(left) == len(stored):
            raise KeysUnusable(path, f"there is no key named {name}; `gradserve keys list` shows them")
        stored[:] = left
    typer.echo(f"revoked: {name}", err=True)


def key_file(file: Path | None) -> Path:
    """The file that is meant."""
    return (file or home_directory() / "keys.json").resolve()


def read_keys(path: Path) -> list[Key]:
    """The keys in the file; none where there is no file yet.

    Raises:
        KeysUnusable: it cannot be read or is no key file.
    """
    from gateway.keys import KeyFileError, load_keys

    try:
        return list(load_keys(path))
    except FileNotFoundError:
        return []
    except (OSError, KeyFileError) as error:
        raise KeysUnusable(path, str(error)) from error


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[Key]]:
    """The file's keys, written back when the block has changed the list; two changes at once wait for each other.

    Raises:
        KeysUnusable: the keys cannot be read, cannot be as they are now, or cannot be written.
    """
    from gateway.keys import KeyFileError, save_keys

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
    """Print every setting in effect and where it comes from: the environment, .env, or its default. Secrets are masked.

    `gradserve up` itself sets GATEWAY_PLAN, GATEWAY_PORT and GATEWAY_AGENTS for the gateway it starts, and AGENT_PLAN
    and, unless it is set, AGENT_MANAGEMENT_LOG for the agent.
    """
    rows = settings_in_effect()
    if as_json:
        typer.echo(json.dumps([{"name": n, "value": v, "source": s} for n, v, s in rows], indent=2))
        return
    width = min(60, max(len(name) + len(value) + 1 for name, value, _ in rows))
    for name, value, source in rows:
        typer.echo(f"{f'{name}={value}':{width}}  # {source}")


def settings_in_effect() -> list[tuple[str, str, str]]:
    """Name, value (secrets masked) and source of each of the gateway's and the agent's settings.

    Raises:
        ControlError: some cannot be used; the text says which.
    """
    from dotenv import dotenv_values

    from gateway.reference import effective_settings, written
    from gateway.settings import SettingsError, load_settings

    try:
        gateway = effective_settings(load_settings())
    except SettingsError as error:
        raise BadSetting([str(error)]) from error
    agent = read_agent_settings()
    rows = [*gateway]
    for field in type(agent).model_fields:
        source = "environment" if field in agent.model_fields_set else "default"
        rows.append((PREFIX + field.upper(), written(getattr(agent, field)), source))
    # `gradserve` has put .env's lines into the environment; what was set there before has won.
    in_file = dotenv_values(".env") if Path(".env").is_file() else {}
    return [
        (name, value, ".env" if source == "environment" and in_file.get(name) == os.environ.get(name) else source)
        for name, value, source in rows
    ]
