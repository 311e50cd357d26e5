"""Read the fields of a JSON document one by one: every refusal names the field, what was found there and the remedy.

The documents of this package are read with it. A reader raises nothing but its document's own error, whatever it is
given: sizes are bounded, and so is the depth of what an error quotes.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from reprlib import Repr
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Sequence

Value = TypeVar("Value")

MAX_TEXT = 1000
"""Characters in one text, unless its reader says otherwise."""

MAX_INTEGER = 2**53
"""The largest whole number that every JSON reader keeps exactly."""

MAX_NUMBER = 1e300

MAX_DEPTH = 20
"""Levels of a document in a document; what writes it again takes two frames of Python's stack for each."""

_QUOTE = Repr()
_QUOTE.maxlevel, _QUOTE.maxstring, _QUOTE.maxother, _QUOTE.maxdict, _QUOTE.maxlist = 2, 80, 80, 3, 3


class DocumentError(ValueError):
    """A document that cannot be used: `field` holds `found` where `expected` should be.

    `field` is a path such as `stable.version`; it is empty where the document as a whole is wrong. An exception as
    `found` says itself why it is not what is expected: what is no document at all is not quoted, for it may be secret.
    """

    document: ClassVar[str] = "document"
    remedy: ClassVar[str] = "write it anew"

    def __init__(self, field: str, found: object, expected: str) -> None:
        where = f"{self.document} field {field}" if field else self.document
        is_error = isinstance(found, Exception)
        problem = f"no {expected} ({found})" if is_error else f"{_QUOTE.repr(found)}, expected {expected}"
        super().__init__(f"{where} is {problem}: {self.remedy}")
        self.field = field


def read_json(text: str | bytes, error: type[DocumentError], *, most_bytes: int) -> object:
    """Return the JSON value that `text` writes.

    Raises:
        DocumentError: `error`, for a text above `most_bytes` (characters of a str) or one that is no JSON.
    """
    if len(text) > most_bytes:
        raise error("", f"{len(text)} bytes", f"at most {most_bytes}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error("", problem, "JSON") from problem


def as_json(value: Any) -> Any:  # noqa: ANN401 - a document's part, of any type
    """Return dataclasses as objects of their fields and tuples as lists, down to texts, numbers, flags and None."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclass_fields(value)}
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


class Fields:
    """The fields of one JSON object; each is taken out once, and `end` refuses those that are left.

    Args:
        data: what should be a JSON object.
        where: its path in the document; empty for the document itself.
        error: the document's own error, raised for everything that is wrong.

    Raises:
        DocumentError: `error`, if `data` is no JSON object.
    """

    def __init__(self, data: object, where: str, error: type[DocumentError]) -> None:
        if not isinstance(data, dict):
            raise error(where, data, "a JSON object")
        self._rest = dict(data)
        self._where = where
        self._error = error

    def __contains__(self, name: str) -> bool:
        return name in self._rest

    def refuse(self, name: str, found: object, expected: str) -> DocumentError:
        """Return the error that says that the field `name` holds `found` where `expected` should be."""
        return self._error(self._path(name), found, expected)

    def take(self, name: str) -> object:
        """Return the field's value as it is; None where there is none."""
        return self._rest.pop(name, None)

    def maybe(self, name: str, read: Callable[[str], Value]) -> Value | None:
        """Return what `read` makes of the field; None where it is null or missing."""
        if self._rest.get(name) is None:
            self._rest.pop(name, None)
            return None
        return read(name)

    def nullable(self, name: str, read: Callable[[str], Value]) -> Value | None:
        """Return what `read` makes of the field; None where it is null, but not where it is missing.

        Raises:
            DocumentError: the field is missing, or `read` refuses it.
        """
        if name not in self._rest:
            raise self.refuse(name, None, "a value or null")
        return self.maybe(name, read)

    def schema(self, readable: Sequence[int]) -> int:
        """Return the document's schema, the field `schema`.

        Raises:
            DocumentError: it is none of the `readable` ones.
        """
        value = self.take("schema")
        if not isinstance(value, int) or isinstance(value, bool) or value not in readable:
            raise self.refuse("schema", value, " or ".join(map(str, readable)))
        return value

    def text(self, name: str, *, pattern: re.Pattern[str] | None = None, most: int = MAX_TEXT) -> str:
        """Return a text of at most `most` characters that matches `pattern` as a whole.

        Raises:
            DocumentError: the field is none.
        """
        return self._text(self.take(name), name, pattern, most)

    def texts(
        self, name: str, *, pattern: re.Pattern[str] | None = None, most: int = MAX_TEXT, most_items: int
    ) -> tuple[str, ...]:
        """Return a list of at most `most_items` texts, each as `text` takes them.

        Raises:
            DocumentError: the field is none.
        """
        items = self.items(name, most=most_items)
        return tuple(self._text(item, f"{name}[{index}]", pattern, most) for index, item in enumerate(items))

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Return one of the texts in `choices`.

        Raises:
            DocumentError: the field is none of them.
        """
        value = self.take(name)
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(name, value, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false.

        Raises:
            DocumentError: the field is neither.
        """
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def integer(self, name: str, *, least: int = 0, most: int = MAX_INTEGER) -> int:
        """Return a whole number from `least` to `most`.

        Raises:
            DocumentError: the field is none.
        """
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            limit = f"of at least {least}" if most == MAX_INTEGER else f"from {least} to {most}"
            raise self.refuse(name, value, f"a whole number {limit}")
        return value

    def number(self, name: str, *, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a finite number from `least` to `most`.

        Raises:
            DocumentError: the field is none.
        """
        return self._number(self.take(name), name, least, most)

    def numbers(self, name: str, *, count: int, least: float = -math.inf, most: float = math.inf) -> tuple[float, ...]:
        """Return a list of exactly `count` numbers, each as `number` takes them.

        Raises:
            DocumentError: the field is none.
        """
        items = self.items(name, most=count)
        if len(items) != count:
            raise self.refuse(name, items, f"{count} numbers")
        return tuple(self._number(item, f"{name}[{index}]", least, most) for index, item in enumerate(items))

    def table(self, name: str, *, rows: int, columns: int, least: float, most: float) -> tuple[tuple[float, ...], ...]:
        """Return a list of `rows` lists of `columns` numbers, each as `number` takes them.

        Raises:
            DocumentError: the field is none.
        """
        lines = self.items(name, most=rows)
        if len(lines) != rows or not all(isinstance(line, list | tuple) and len(line) == columns for line in lines):
            raise self.refuse(name, lines, f"{rows} lists of {columns} numbers")
        inner = Fields({f"[{index}]": line for index, line in enumerate(lines)}, self._path(name), self._error)
        return tuple(inner.numbers(f"[{index}]", count=columns, least=least, most=most) for index in range(rows))

    def named(self, name: str, read: Callable[[object, str], Value], *, most: int) -> tuple[tuple[str, Value], ...]:
        """Return a list of at most `most` pairs of a name and what `read` makes of the value beside it.

        `read` is `text_of` or `number_of` of this object.

        Raises:
            DocumentError: the field is none, or `read` refuses a value.
        """
        pairs = []
        for index, pair in enumerate(self.items(name, most=most)):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise self.refuse(f"{name}[{index}]", pair, "a pair of a name and a value")
            key, value = pair
            pairs.append((self.text_of(key, f"{name}[{index}]"), read(value, f"{name}[{index}]")))
        return tuple(pairs)

    def text_of(self, value: object, name: str) -> str:
        """Return `value`, which stands at `name`, if it is a text.

        Raises:
            DocumentError: it is none.
        """
        return self._text(value, name, None, MAX_TEXT)

    def number_of(self, value: object, name: str, *, least: float = -math.inf, most: float = math.inf) -> float:
        """Return `value`, which stands at `name`, if it is a finite number from `least` to `most`.

        Raises:
            DocumentError: it is none.
        """
        return self._number(value, name, least, most)

    def items(self, name: str, *, most: int) -> list[object]:
        """Return a list of at most `most` items as they are.

        Raises:
            DocumentError: the field is none.
        """
        value = self.take(name)
        if not isinstance(value, list | tuple):
            raise self.refuse(name, value, "a list")
        if len(value) > most:
            raise self.refuse(name, f"{len(value)} items", f"a list of at most {most}")
        return list(value)

    def inner(self, name: str) -> Fields:
        """Return the fields of the object in the field `name`.

        Raises:
            DocumentError: there is no object.
        """
        return Fields(self.take(name), self._path(name), self._error)

    def inners(self, name: str, *, most: int) -> list[Fields]:
        """Return the fields of each object in the list `name`.

        Raises:
            DocumentError: the field is no list of at most `most` objects.
        """
        items = self.items(name, most=most)
        return [Fields(item, self._path(f"{name}[{index}]"), self._error) for index, item in enumerate(items)]

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in the field `name` as it is: a document of its own, which another reader knows.

        Raises:
            DocumentError: there is no object, or it is nested deeper than `MAX_DEPTH`.
        """
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.refuse(name, value, "a JSON object")
        level: list[Any] = [value]
        for _ in range(MAX_DEPTH):
            items = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
            level = [item for item in items if isinstance(item, dict | list | tuple)]
        if level:
            raise self.refuse(name, value, f"at most {MAX_DEPTH} levels of objects and lists")
        return value

    def all_texts(self) -> dict[str, str]:
        """Return all fields that are left, each a text.

        Raises:
            DocumentError: one is none.
        """
        return {name: self.text(name) for name in list(self._rest)}

    def counts(self, name: str, *, pattern: re.Pattern[str], most: int, most_items: int) -> dict[str, int]:
        """Return an object of at most `most_items` whole numbers from 0 to `most`, whose names match `pattern`.

        Raises:
            DocumentError: the field is none.
        """
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.refuse(name, value, "a JSON object")
        if len(value) > most_items:
            raise self.refuse(name, f"{len(value)} entries", f"at most {most_items}")
        inner = Fields(value, self._path(name), self._error)
        for key in value:
            self._text(key, name, pattern, MAX_TEXT)
        return {key: inner.integer(key, most=most) for key in value}

    def end(self) -> None:
        """Return if every field has been taken.

        Raises:
            DocumentError: one has not: this reader does not know it.
        """
        if self._rest:
            name = min(self._rest)
            raise self.refuse(name, self._rest[name], "no such field")

    def _path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _text(self, value: object, name: str, pattern: re.Pattern[str] | None, most: int) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise self.refuse(name, value, f"a text of at most {most} characters")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.refuse(name, value, f"a text that matches {pattern.pattern}")
        return value

    def _number(self, value: object, name: str, least: float, most: float) -> float:
        # Compared, not converted: float() fails on whole numbers of hundreds of digits, and NaN is in no range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            raise self.refuse(name, value, "a number")
        if not least <= value <= most:
            limits = [f"at least {least:g}"] * math.isfinite(least) + [f"at most {most:g}"] * math.isfinite(most)
            raise self.refuse(name, value, f"a number of {' and '.join(limits)}")
        return float(value)
