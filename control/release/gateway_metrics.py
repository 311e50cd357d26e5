"""What the gateways have counted, by version: read from their `/metrics` and added up; the change between two looks."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx

from control.errors import MetricsUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

# What a version does to a caller. A refusal for want of room, and what callers do wrong, is no fault of the version.
FAULTS = ("handler_failed", "engine_broke", "engine_nonsense", "deadline_passed", "not_ready", "internal_error")
_REQUESTS, _SECONDS = "gateway_version_requests_total", "gateway_model_seconds_bucket"
_PAIRS, _SHIFT = "gateway_shadow_images_total", "gateway_shadow_shift_total"
Values: TypeAlias = "defaultdict[tuple[str, ...], float]"
# Label names, in the order in which their values follow the metric's name in a key.
_LABELS = {
    _REQUESTS: ("version", "kind", "outcome"),
    _SECONDS: ("version", "kind", "le"),
    _PAIRS: ("version", "outcome"),
    _SHIFT: ("version", "direction"),
}


@dataclass(frozen=True)
class Times:
    """A histogram of seconds: upper bounds, rising, the last infinite, and how many were within each."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many there were."""
        return self.cumulative[-1] if self.cumulative else 0

    def quantile_bound(self, share: float) -> float:
        """The smallest bound within which at least `share` of them were."""
        return next(b for b, c in zip(self.bounds, self.cumulative, strict=True) if c >= share * self.count)

    def slower_than(self, bound: float) -> int:
        """How many were above the smallest bound that is at least `bound`."""
        within = next(c for b, c in zip(self.bounds, self.cumulative, strict=True) if b >= bound)
        return self.count - within


class Counts:
    """Counters by metric and labels."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def since(self, before: Counts) -> Counts | None:
        """What was added since; None where a counter fell: a gateway has been started anew."""
        change: Values = defaultdict(float, self._values)
        for key, value in before._values.items():
            change[key] -= value
        return None if any(value < 0 for value in change.values()) else Counts(change)

    def versions(self) -> list[str]:
        """Every version that anything was counted of."""
        return sorted({key[1] for key in self._values})

    def requests(self, version: str) -> tuple[int, int]:
        """How many requests the version answered or failed by its own fault, and how many of them it failed."""
        by_outcome = self._by_last(_REQUESTS, version)
        failed = sum(by_outcome[fault] for fault in FAULTS)
        return int(by_outcome["ok"] + failed), int(failed)

    def kind(self, version: str) -> str:
        """The kind of call that the version answered most."""
        kinds = {key[2] for key in self._values if key[:2] == (_SECONDS, version)}
        return max(sorted(kinds), key=lambda kind: self.times(version, kind).count, default="predict")

    def times(self, version: str, kind: str) -> Times:
        """The times of the version's good answers to calls of this kind."""
        found = sorted(
            (float(key[3]), int(value)) for key, value in self._values.items() if key[:3] == (_SECONDS, version, kind)
        )
        return Times(tuple(bound for bound, _ in found), tuple(count for _, count in found))

    def pairs(self, version: str) -> dict[str, int]:
        """Images mirrored to the version, by what came of them: `agree`, `disagree`, `failed`, `dropped`."""
        found = self._by_last(_PAIRS, version)
        return {outcome: int(found[outcome]) for outcome in ("agree", "disagree", "failed", "dropped")}

    def mean_shift(self, version: str) -> float | None:
        """By how much more confident the shadow was than the stable version, on average; None without a pair."""
        pairs, shift = self.pairs(version), self._by_last(_SHIFT, version)
        compared = pairs["agree"] + pairs["disagree"]
        return (shift["up"] - shift["down"]) / compared if compared else None

    def summary(self, version: str) -> dict[str, Any]:
        """What is worth telling of the version, as JSON-able data."""
        requests, failed = self.requests(version)
        times = self.times(version, self.kind(version))
        p99 = times.quantile_bound(0.99) if times.count else math.inf
        pairs, shift = self.pairs(version), self.mean_shift(version)
        return {
            "requests": requests,
            "failed": failed,
            "p99_ms": round(1000 * p99, 1) if math.isfinite(p99) else None,
            "pairs": pairs if any(pairs.values()) else None,
            "mean_shift": None if shift is None else round(shift, 4),
        }

    def _by_last(self, metric: str, version: str) -> defaultdict[str, float]:
        """Sums by the last label."""
        sums: defaultdict[str, float] = defaultdict(float)
        for key, value in self._values.items():
            if key[:2] == (metric, version):
                sums[key[-1]] += value
        return sums


def read_counts(gateways: Sequence[str], key: str | None) -> Counts:
    """What the gateways at these addresses have counted, together; `key` has the scope `read` where keys are on.

    Raises:
        MetricsUnreadable: one cannot be asked, or answers something else.
    """
    values: Values = defaultdict(float)
    for url in gateways:
        text = _ask(url, key)
        try:
            found = parse_metrics(text)
        except ImportError as error:
            raise MetricsUnreadable(url, "is not understood here: run `make install` in the clone") from error
        except (ValueError, KeyError) as error:
            raise MetricsUnreadable(url, "answers something else than metrics") from error
        for name, value in found.items():
            values[name] += value
    return Counts(values)


def parse_metrics(text: str) -> Values:
    """The values of the metrics that go by version, in Prometheus's text, by metric and labels."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 (the gateway's extra has it)

    values: Values = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if labels := _LABELS.get(sample.name):
                values[sample.name, *(sample.labels[label] for label in labels)] += sample.value
    return values


def _ask(url: str, key: str | None) -> str:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}/metrics", headers=headers, timeout=5.0, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MetricsUnreadable(url, f"does not answer ({type(error).__name__})") from error
    if answer.status_code in {401, 403}:
        raise MetricsUnreadable(url, "asks for a key: set GRADSERVE_KEY to one with the scope read")
    if answer.status_code != 200:
        raise MetricsUnreadable(url, f"answers {answer.status_code}")
    return answer.text
