"""The settings in effect, as an operator sees them: with their source and without secrets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gateway.settings import PREFIX, Settings, load_settings
from gateway.settings_docs import effective_settings, mask_key, mask_passwords, settings_table, written

if TYPE_CHECKING:
    import pytest


def test_the_effective_settings_have_their_source_and_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEYS", "alice:" + "ab" * 32 + ":read")
    shown = {name: (value, source) for name, value, source in effective_settings(load_settings())}
    assert shown["GATEWAY_KEYS"] == ("alice:****", "environment")
    assert shown["GATEWAY_PORT"] == ("8000", "default")


def test_no_password_or_token_in_an_address_is_shown() -> None:
    shown = mask_passwords("redis://me:s3cret@a:6379/0?password=s3cret&db=1,redis://b:6379?Token=s3cret,http://c/d@e")
    assert shown == "redis://****@a:6379/0?password=****&db=1,redis://b:6379?Token=****,http://c/d@e"


def test_an_entry_of_keys_is_shown_by_its_name_and_a_secret_in_its_place_not_at_all() -> None:
    assert mask_key("alice:0123:read") == "alice:****"
    assert mask_key("gs_a-secret-in-the-wrong-place") == "****"


def test_every_setting_is_in_the_table_with_its_default_and_its_meaning() -> None:
    rows = [line.strip("|").split(" | ") for line in settings_table().splitlines()[2:]]
    assert [row[0].strip(" `") for row in rows] == [PREFIX + name.upper() for name in Settings.model_fields]
    assert all(len(row[2].strip()) > 10 for row in rows), "what it is for"
    assert ["`GATEWAY_PORT`", "`8000`"] in [[cell.strip() for cell in row[:2]] for row in rows]


def test_a_value_is_written_as_the_environment_has_it() -> None:
    values = (None, ("a", "b"), Path("/srv/plan.json"), 0.5, True)
    assert [written(value) for value in values] == ["", "a,b", "/srv/plan.json", "0.5", "True"]
