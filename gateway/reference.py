"""The settings for people: the table of docs/gateway.md, and the values in effect with where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gateway.settings import PREFIX, Settings


def settings_table() -> str:
    """The settings as a Markdown table."""
    rows = [f"| `{name}` | {_shown(default)} | {text} |" for name, default, text in _fields()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def effective_settings(settings: Settings) -> list[tuple[str, str, str]]:
    """Each setting's name, value and source (`environment` or `default`); key digests are masked."""
    shown = []
    for field in Settings.model_fields:
        value = _written(getattr(settings, field))
        if field == "keys" and value:
            value = ",".join(f"{entry.partition(':')[0]}:****" for entry in value.split(","))
        source = "environment" if field in settings.model_fields_set else "default"
        shown.append((PREFIX + field.upper(), value, source))
    return shown


def _fields() -> list[tuple[str, str, str]]:
    fields = []
    for name, field in Settings.model_fields.items():
        default = field.default_factory is None and field.default
        written = ".gradserve/plan.json" if name == "plan" else _written(default)
        fields.append((PREFIX + name.upper(), written, " ".join((field.description or "").split())))
    return fields


def _written(value: Any) -> str:  # noqa: ANN401 — a setting's value
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value.as_posix() if isinstance(value, Path) else value)


def _shown(default: str) -> str:
    return f"`{default}`" if default else ""
