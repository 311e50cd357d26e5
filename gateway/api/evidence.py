"""The public document of an explanation, made from the handler's entry; the same for every wire.

Evidence that a version cannot give is `{"unavailable": reason}` in its place.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from contracts import wire
from gateway.errors import EngineNonsense
from gateway.inference.examples import thumbnails
from gateway.inference.questions import wire_of
from gateway.refusals import HeatmapsTooLarge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.wire import Entry
    from gateway.api.params import EvidenceQuery
    from gateway.inference.answer import Answer

WITHOUT_EVIDENCE = wire.unavailable("this version was packed without evidence: pack it again with gradserve package")
MAX_NUMBERS = 4_000_000  # each takes 7 bytes in JSON
EVIDENCE = ("strength", "familiar", "familiarity", "similar")
# A heatmap's byte as a number from 0 to 1. Looking numbers up takes a fifth of the time of computing them.
LEVELS = tuple(round(level / 255, 4) for level in range(256))


def write_documents(answer: Answer, query: EvidenceQuery) -> list[dict[str, Any]]:
    """Return the documents of an answer's entries, in order; the error of an image that has no explanation.

    Raises:
        EngineNonsense: an entry is no explanation.
    """
    write = _write_1 if wire_of(answer.contract) < 2 else _write_2
    try:
        if query.heatmap == "rows":
            _check_size(answer)
        return [entry if "error" in entry else write(entry, answer, query) for entry in answer.entries]
    except (wire.BadAnswer, KeyError, TypeError, ValueError) as error:
        raise EngineNonsense from error


def _check_size(answer: Answer) -> None:
    """Refuse heatmaps that would be tens of megabytes as rows of numbers.

    Raises:
        HeatmapsTooLarge: they have more than `MAX_NUMBERS` numbers.
    """
    heatmaps = [entry["heatmap"] for entry in answer.entries if "error" not in entry]
    if len(heatmaps) < 2:
        return
    is_rows = isinstance(heatmaps[0], list)
    sizes = (len(map_) * len(map_[0]) if is_rows else map_["height"] * map_["width"] for map_ in heatmaps)
    if (numbers := sum(sizes)) > MAX_NUMBERS:
        raise HeatmapsTooLarge(numbers, MAX_NUMBERS)


def _write_2(entry: Entry, answer: Answer, query: EvidenceQuery) -> dict[str, Any]:
    document = {name: entry[name] for name in ("class", "confidence", "target", "method")}
    if query.heatmap == "base64":
        document["heatmap"] = entry["heatmap"]
    elif query.heatmap == "rows":
        document["heatmap"] = expand_rows(wire.parse_heatmap(entry["heatmap"]))
    document |= {name: entry.get(name, WITHOUT_EVIDENCE) for name in EVIDENCE}
    if isinstance(document["similar"], list):
        document["similar"] = _with_links(document["similar"], answer)
    return document | _asked_for(entry, query)


def _write_1(entry: Entry, _answer: Answer, query: EvidenceQuery) -> dict[str, Any]:
    document = {name: entry[name] for name in ("class", "confidence")}
    is_best = entry["target"] == entry["class"]
    document["target"] = {"class": entry["target"], "confidence": entry["confidence"] if is_best else None}
    document["method"] = entry["method"]
    if query.heatmap == "base64":
        document["heatmap"] = _compact(entry["heatmap"])
    elif query.heatmap == "rows":
        document["heatmap"] = entry["heatmap"]
    return document | dict.fromkeys(EVIDENCE, WITHOUT_EVIDENCE) | _asked_for(entry, query)


def _asked_for(entry: Entry, query: EvidenceQuery) -> dict[str, Any]:
    """Return the evidence that is given only when asked for."""
    asked = {"classes": query.coverage is not None, "test": query.test}
    return {name: entry.get(name, WITHOUT_EVIDENCE) for name, is_asked in asked.items() if is_asked}


def expand_rows(rows: Iterable[bytes]) -> list[tuple[float, ...]]:
    """Return rows of bytes as rows of numbers from 0 to 1, of four decimals."""
    # The additional byte, because `itemgetter` returns no tuple for a single one; it takes half of the time of `map`.
    return [itemgetter(*row, 0)(LEVELS)[:-1] for row in rows]


def _compact(rows: list[list[float]]) -> dict[str, Any]:
    values = bytes(round(255 * value) for row in rows for value in row)
    return wire.dump_heatmap(len(rows), len(rows[0]), values)


def _with_links(similar: list[dict[str, Any]], answer: Answer) -> list[dict[str, Any]]:
    """Return the similar images with the path of each thumbnail, if the archive has thumbnails."""
    if not thumbnails(answer.contract):
        return similar
    folder = f"/models/{answer.model}/versions/{answer.version}/examples"
    return [{**image, "image": f"{folder}/{image['id']}.png"} for image in similar]
