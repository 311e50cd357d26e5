"""Write the reference of HTTP, the command line and the settings as Markdown, each from the code that defines it.

`make_tables.py` puts the texts into docs/reference/.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from control.env_example import agent_settings
from gateway.api.openapi.document import document
from gateway.app import create_app
from gateway.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SOME_KEY = f"docs:{'0' * 64}:predict"  # with a key in its settings, the gateway documents keys and their errors
SCHEMA_LINK = re.compile(r"#/components/schemas/(\w+)")


def cli() -> str:
    """Return every command with its arguments and options, as Typer documents them."""
    command = [sys.executable, "-m", "typer", "control.cli.main", "utils", "docs", "--name", "gradserve"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 — our own command
    text = done.stdout.split("\n", 1)[1]  # the page has its own title
    # A usage line is a pattern, and no command to type.
    return text.replace("```console\n$ ", "```text\n").strip()


def agent_table() -> str:
    """Return the agent's settings as a Markdown table."""
    rows = [f"| `{name}` | {f'`{default}`' if default else ''} | {text} |" for name, default, text in agent_settings()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def http() -> str:
    """Return every route of the OpenAPI document of a gateway with keys, then the types of its answers."""
    with tempfile.TemporaryDirectory() as folder:  # with a feedback store there is a route for feedback
        settings = Settings(keys=(SOME_KEY,), feedback_file=Path(folder) / "feedback.db")
        described = document(create_app(settings), settings)
    lines = []
    for tag in described["tags"]:
        lines += [f"## {tag['name'].capitalize()}", "", tag["description"], ""]
        for path, methods in described["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    lines += [f"### `{method.upper()} {path}`", "", *_operation(operation)]
    lines += ["## Types", ""]
    for name, schema in sorted(described["components"]["schemas"].items()):
        lines += [f"### {name}", "", *_schema(schema)]
    return "\n".join(lines).strip()


def _operation(operation: dict[str, Any]) -> Iterator[str]:
    yield from (operation.get("description") or operation["summary"], "")
    if parameters := operation.get("parameters"):
        yield from ("| parameter | in | type | meaning |", "|---|---|---|---|")
        for parameter in parameters:
            kind, meaning = _type(parameter["schema"]), parameter.get("description", "")
            yield f"| `{parameter['name']}` | {parameter['in']} | {kind} | {meaning} |"
        yield ""
    if body := operation.get("requestBody"):
        yield from (f"Body: {_contents(body['content'])}.", "")
    responses = operation["responses"]
    yield from (f"Answers with {_contents(responses['200']['content'])}.", "")
    if headers := responses["200"].get("headers"):
        yield from (f"Headers: {', '.join(f'`{name}`' for name in headers)}.", "")
    for content in responses["200"]["content"].values():
        if "example" in content:
            yield from ("```json", json.dumps(content["example"], ensure_ascii=False), "```", "")
    if codes := _codes(responses):
        yield from (f"Errors: {codes}.", "")
    yield from ("Needs an API key if the gateway has keys." if "security" in operation else "Needs no API key.", "")


def _contents(contents: dict[str, Any]) -> str:
    return ", ".join(f"`{kind}` ({_type(content.get('schema', {}))})" for kind, content in contents.items())


def _codes(responses: dict[str, Any]) -> str:
    shown = []
    for status, response in sorted(responses.items()):
        content = response.get("content", {}).get("application/problem+json", {})
        if codes := sorted(content.get("examples", {})):
            shown.append(f"{status} {' '.join(f'`{code}`' for code in codes)}")
    return ", ".join(shown)


def _schema(schema: dict[str, Any]) -> Iterator[str]:
    yield from (" ".join(schema.get("description", "").split()), "")
    yield from ("| field | type | meaning |", "|---|---|---|")
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        optional = "" if name in required else ", optional"
        yield f"| `{name}` | {_type(field)}{optional} | {' '.join(field.get('description', '').split())} |"
    yield ""


def _type(schema: dict[str, Any]) -> str:
    """Return a schema's type in a few words, with a link if it has a name."""
    if "$ref" in schema:
        name = SCHEMA_LINK.fullmatch(schema["$ref"])[1]  # type: ignore[index]  # every reference is to a schema
        return f"[{name}](#{name.lower()})"
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, choices)))
    if values := schema.get("enum") or [schema[name] for name in ("const",) if name in schema]:
        return " or ".join(f"`{value}`" for value in values)
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}"
    if schema.get("format") == "binary":
        return "bytes"
    return kind + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is None and most is None:
        return ""
    if most is None:
        return f" ≥ {least:,}"
    return f" ≤ {most:,}" if least is None else f" {least:,}–{most:,}"
