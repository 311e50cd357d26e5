"""The settings in effect, as an operator sees them: with their source and without secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.settings import load_settings
from gateway.settings_docs import effective_settings

if TYPE_CHECKING:
    import pytest


def test_the_effective_settings_have_their_source_and_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEYS", "alice:" + "ab" * 32 + ":read")
    shown = {name: (value, source) for name, value, source in effective_settings(load_settings())}
    assert shown["GATEWAY_KEYS"] == ("alice:****", "environment")
    assert shown["GATEWAY_PORT"] == ("8000", "default")
