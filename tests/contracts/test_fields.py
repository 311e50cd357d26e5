"""The reader of all documents: fields are taken once, bounded, and refused with their path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import pytest

from contracts.fields import DocumentError, Fields, as_json, read_json


class NoteError(DocumentError):
    """A note that cannot be used."""

    document = "note"
    remedy = "write it again"


def fields(data: object) -> Fields:
    return Fields(data, "", NoteError)


def test_a_refusal_names_document_field_finding_and_remedy():
    with pytest.raises(NoteError) as refusal:
        fields({"page": {"number": "x"}}).inner("page").integer("number", least=1)
    assert str(refusal.value) == (
        "note field page.number is 'x', expected a whole number of at least 1: write it again"
    )
    assert refusal.value.field == "page.number"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff", "9" * 5000])
def test_what_is_no_json_is_refused_without_being_quoted(text):
    with pytest.raises(NoteError, match=r"^note is no JSON \(") as refusal:
        read_json(text, NoteError, most_bytes=200_000)
    assert "[[" not in str(refusal.value)


def test_a_text_above_the_bound_is_not_parsed():
    with pytest.raises(NoteError, match="'11 bytes', expected at most 10"):
        read_json("[" * 11, NoteError, most_bytes=10)


@pytest.mark.parametrize("found", ["x" * 10**6, ["x" * 10**6] * 100, {"a": [[[[[[1]]]]]]}, 10**4000])
def test_what_an_error_quotes_is_bounded(found):
    assert len(str(NoteError("field", found, "another"))) < 600


def test_a_deeply_nested_value_is_quoted():
    deep: object = []
    for _ in range(5000):
        deep = [deep]
    assert "[[...]]" in str(NoteError("field", deep, "another"))


def test_maybe_takes_null_and_nothing_and_nullable_only_null():
    assert fields({"page": None}).maybe("page", fields({}).text) is None
    assert fields({}).maybe("page", fields({}).text) is None
    whole = fields({"page": 3, "line": None})
    assert whole.nullable("page", partial(whole.integer, most=3)) == 3
    assert whole.nullable("line", whole.integer) is None
    with pytest.raises(NoteError, match="word is None, expected a value or null"):
        whole.nullable("word", whole.text)


@pytest.mark.parametrize("value", [True, "1", 1.0, None, -1, 4, 10**400])
def test_a_whole_number_out_of_range_or_of_another_type_is_refused(value):
    with pytest.raises(NoteError):
        fields({"n": value}).integer("n", least=0, most=3)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400, -0.1, 1.1])
def test_a_number_out_of_range_or_of_another_type_is_refused(value):
    with pytest.raises(NoteError):
        fields({"n": value}).number("n", least=0, most=1)


def test_a_text_is_bounded_and_matched_as_a_whole():
    assert fields({"t": "ab"}).text("t", pattern=re.compile("[ab]+"), most=2) == "ab"
    for value in ("abc", "b\n", 1):
        with pytest.raises(NoteError):
            fields({"t": value}).text("t", pattern=re.compile("[abc]+"), most=2)


def test_lists_are_bounded_and_their_items_are_named():
    assert fields({"t": ["a", "b"]}).texts("t", most_items=2) == ("a", "b")
    with pytest.raises(NoteError, match="'3 items', expected a list of at most 2"):
        fields({"t": ["a"] * 3}).texts("t", most_items=2)
    with pytest.raises(NoteError, match=r"t\[1\] is 7"):
        fields({"t": ["a", 7]}).texts("t", most_items=2)
    with pytest.raises(NoteError, match=r"t\[1\] is 'b', expected a JSON object"):
        fields({"t": [{}, "b"]}).inners("t", most=2)


@pytest.mark.parametrize(("levels", "is_taken"), [(1, True), (20, True), (21, False), (5000, False)])
def test_a_document_in_a_document_is_taken_as_it_is_unless_it_is_nested_deeply(levels, is_taken):
    value: object = 1
    for level in range(levels):
        value = {"a": value} if level % 2 or level == levels - 1 else [value]
    if is_taken:
        assert fields({"recipe": value}).json("recipe") == value
        return
    with pytest.raises(NoteError, match="at most 20 levels"):
        fields({"recipe": value}).json("recipe")


def test_end_refuses_what_was_not_taken():
    left = fields({"a": 1, "b": 2})
    left.integer("a")
    with pytest.raises(NoteError, match="b is 2, expected no such field"):
        left.end()
    left.take("b")
    left.end()


def test_dataclasses_become_json():
    @dataclass(frozen=True)
    class Note:
        lines: tuple[str, ...]
        after: object

    assert as_json(Note(("a",), Note((), {"k": (1, None)}))) == {
        "lines": ["a"],
        "after": {"lines": [], "after": {"k": [1, None]}},
    }
