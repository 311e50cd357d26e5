"""Errors: the tree that the module draws is whole, and each of the handler's codes has its status."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

import gateway.refusals
from contracts import wire
from gateway import errors
from gateway.errors import HANDLER_CODES, RESERVED, GatewayError, ImageRefused, Unavailable
from handlers import errors as handler_errors

if TYPE_CHECKING:
    from collections.abc import Iterator


def subclasses(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def drawn() -> set[tuple[int, str]]:
    """Return each status with each code that stands beside it in the module's tree."""
    status, found = 0, set()
    for line in (errors.__doc__ or "").splitlines():
        if "│" in line or "─" in line:
            status = int(number[0]) if (number := re.search(r"\b\d{3}\b", line)) else status
            words = line[line.index(number[0]) :] if number else line if "──" not in line else ""
            found |= {(status, code) for code in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)*\b", words.partition("(")[0])}
    return found


def test_the_tree_names_every_status_and_code_and_no_other() -> None:
    kinds = [
        kind for kind in subclasses(GatewayError) if kind.__module__ in (errors.__name__, gateway.refusals.__name__)
    ]
    codes = {(kind.status, kind.code) for kind in kinds if "code" in vars(kind) or "status" not in vars(kind)}
    codes |= {(Unavailable.status, code) for code in Unavailable.sentences}
    assert drawn() == codes


def test_handler_and_gateway_know_exactly_the_error_codes_of_the_wire() -> None:
    raised = {
        kind.code
        for kind in vars(handler_errors).values()
        if isinstance(kind, type) and issubclass(kind, handler_errors.RequestError) and hasattr(kind, "code")
    }
    assert raised == set(HANDLER_CODES) == set(wire.ERROR_CODES)


def test_the_handlers_facts_stand_in_the_problem_and_replace_none_of_its_members() -> None:
    facts = {**dict.fromkeys(RESERVED, "forged"), "limit": 7}
    assert ImageRefused("image_unreadable", "It ends too early.", facts).problem() == {
        "type": "about:blank",
        "title": "Unprocessable Entity",
        "status": 422,
        "code": "image_unreadable",
        "detail": "It ends too early.",
        "limit": 7,
    }


@pytest.mark.parametrize("code", Unavailable.sentences)
def test_a_call_that_is_refused_for_now_says_when_to_come_again(code: str) -> None:
    error = Unavailable(code, retry_after_s=3)
    assert (error.status, error.code, error.headers) == (503, code, {"retry-after": "3"})
    assert error.detail.endswith(": try again in 3 s.")
