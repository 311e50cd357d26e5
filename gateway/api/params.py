"""What a caller may ask for beside the image: query parameters and headers, checked before anything is read or sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import QueryParams

from contracts.names import VERSION
from contracts.wire import DEFAULTS, MAX_OVERLAY_SIDE, Options
from gateway.refusals import BadParameter, UnknownParameter

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_TOP_K = 1000
MAX_NAME_CHARACTERS = 200
MAX_TIMEOUT_MS = 10**9
NO_PARAMETERS = QueryParams()


def query_of(request: Request, known: tuple[str, ...]) -> QueryParams:
    """The query's parameters.

    Raises:
        BadParameter, UnknownParameter: one of them is not in `known`, or comes twice.
    """
    if not request.scope["query_string"]:
        return NO_PARAMETERS
    query = request.query_params
    for name, _ in query.multi_items():
        if name not in known:
            raise UnknownParameter(name, known)
    if len(query.multi_items()) != len(query):
        twice = next(name for name in query if len(query.getlist(name)) > 1)
        raise BadParameter(twice, ", ".join(query.getlist(twice)), "a single value")
    return query


def top_k_of(query: QueryParams) -> int:
    """How many classes to name, best first."""
    return whole_number("top_k", query.get("top_k", "1"), least=1, most=MAX_TOP_K)


def version_of(query: QueryParams) -> str | None:
    """The version that was asked for by name."""
    version = query.get("version")
    return None if version is None else check_version(version)


def check_version(version: str) -> str:
    """The version, if it can be one."""
    if not VERSION.fullmatch(version):
        raise BadParameter("version", version, "a version, like 1.0.0")
    return version


def explain_options_of(query: QueryParams, *, as_json: bool) -> Options:
    """Return the options of an explanation, such as were given.

    Raises:
        BadParameter: one of them has an impossible value.
    """
    alpha, size = query.get("alpha"), query.get("size")
    return Options(
        target=_name("target", query.get("target")),
        method=_name("method", query.get("method")),
        alpha=DEFAULTS.alpha if alpha is None else _fraction("alpha", alpha),
        size=None if size is None else whole_number("size", size, least=1, most=MAX_OVERLAY_SIDE),
        format="json" if as_json else "png",
    )


def wants_json(accept: str) -> bool:
    """Whether an Accept header asks for numbers: it names JSON and no image; in doubt the image is sent."""
    return "application/json" in accept and "image/" not in accept


def timeout_of(request: Request, longest_s: float) -> float:
    """Seconds the caller wants to wait, from `x-timeout-ms`; `longest_s` without it, and at most."""
    value = request.headers.get("x-timeout-ms")
    if value is None:
        return longest_s
    return min(whole_number("x-timeout-ms", value, least=1, most=MAX_TIMEOUT_MS) / 1000, longest_s)


def whole_number(name: str, value: str, *, least: int, most: int) -> int:
    """The number that `value` writes in plain digits.

    Raises:
        BadParameter: it writes none from `least` to `most`.
    """
    # int() alone would take "1_0", " 7" and other scripts' digits.
    if value.isascii() and value.isdigit() and len(value) <= 12 and least <= int(value) <= most:
        return int(value)
    raise BadParameter(name, value, f"a whole number from {least} to {most}")


def _name(parameter: str, value: str | None) -> str | None:
    if value is not None and not 0 < len(value) <= MAX_NAME_CHARACTERS:
        raise BadParameter(parameter, value, f"a name of 1 to {MAX_NAME_CHARACTERS} characters")
    return value


def _fraction(name: str, value: str) -> float:
    try:
        number = float(value) if value.isascii() and "_" not in value else -1.0
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise BadParameter(name, value, "a number from 0 to 1")
    return number
