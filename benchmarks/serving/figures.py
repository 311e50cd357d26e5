"""Figures over the rounds of a benchmark."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the range."""
    median, least, most = statistics.median(values), min(values), max(values)
    return {"median": round(median, 3), "least": round(least, 3), "most": round(most, 3)}
