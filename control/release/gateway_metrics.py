"""The gateways' counts by version: read from their `/metrics`, summed, and subtracted from later counts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx

from control.errors import MetricsUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

# Outcomes that are a version's fault. Refusals under load and callers' errors are not.
FAULTS = ("handler_failed", "engine_broke", "engine_nonsense", "deadline_passed", "not_ready", "internal_error")
_REQUESTS, _SECONDS = "gateway_version_requests_total", "gateway_model_seconds_bucket"
_PAIRS, _SHIFT = "gateway_shadow_images_total", "gateway_shadow_shift_total"
Values: TypeAlias = "defaultdict[tuple[str, ...], float]"
# Label names, in the order of their values in a key, after the metric's name.
_LABELS = {
    _REQUESTS: ("version", "kind", "outcome"),
    _SECONDS: ("version", "kind", "le"),
    _PAIRS: ("version", "outcome"),
    _SHIFT: ("version", "direction"),
}


@dataclass(frozen=True)
class Times:
    """A histogram of seconds: ascending upper bounds, the last infinite, and the number of answers within each."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of answers."""
        return self.cumulative[-1] if self.cumulative else 0

    def quantile_bound(self, share: float) -> float:
        """Return the smallest bound that holds at least the share `share` of the answers."""
        return next(b for b, c in zip(self.bounds, self.cumulative, strict=True) if c >= share * self.count)

    def slower_than(self, bound: float) -> int:
        """Return the number of answers above the smallest bound that is at least `bound`."""
        within = next(c for b, c in zip(self.bounds, self.cumulative, strict=True) if b >= bound)
        return self.count - within


class Counts:
    """Counters by metric and labels."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def since(self, before: Counts) -> Counts | None:
        """Return the increase since `before`; None if a counter fell, because a gateway was restarted."""
        change: Values = defaultdict(float, self._values)
        for key, value in before._values.items():
            change[key] -= value
        return None if any(value < 0 for value in change.values()) else Counts(change)

    def versions(self) -> list[str]:
        """Return every version that has counts."""
        return sorted({key[1] for key in self._values})

    def requests(self, version: str) -> tuple[int, int]:
        """Return two counts: requests answered or failed by the version's own fault, and the failed ones of them."""
        by_outcome = self._by_last(_REQUESTS, version)
        failed = sum(by_outcome[fault] for fault in FAULTS)
        return int(by_outcome["ok"] + failed), int(failed)

    def kind(self, version: str) -> str:
        """Return the kind of request that the version answered most, `predict` or `explain`."""
        kinds = {key[2] for key in self._values if key[:2] == (_SECONDS, version)}
        return max(sorted(kinds), key=lambda kind: self.times(version, kind).count, default="predict")

    def times(self, version: str, kind: str) -> Times:
        """Return the times of the version's successful answers to requests of this kind."""
        found = sorted(
            (float(key[3]), int(value)) for key, value in self._values.items() if key[:3] == (_SECONDS, version, kind)
        )
        return Times(tuple(bound for bound, _ in found), tuple(count for _, count in found))

    def pairs(self, version: str) -> dict[str, int]:
        """Return the images mirrored to the version, by outcome: `agree`, `disagree`, `failed`, `dropped`."""
        found = self._by_last(_PAIRS, version)
        return {outcome: int(found[outcome]) for outcome in ("agree", "disagree", "failed", "dropped")}

    def mean_shift(self, version: str) -> float | None:
        """Return the mean difference of confidence, shadow minus stable version; None without a pair."""
        pairs, shift = self.pairs(version), self._by_last(_SHIFT, version)
        compared = pairs["agree"] + pairs["disagree"]
        return (shift["up"] - shift["down"]) / compared if compared else None

    def summary(self, version: str) -> dict[str, Any]:
        """Return the version's counts as JSON-able data, as `gradserve status` shows them."""
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
        """Return the version's sums by the metric's last label."""
        sums: defaultdict[str, float] = defaultdict(float)
        for key, value in self._values.items():
            if key[:2] == (metric, version):
                sums[key[-1]] += value
        return sums


def read_counts(gateways: Sequence[str], key: str | None, model: str | None = None) -> Counts:
    """Return the sum of the counts of all `gateways`, of `model` alone if that is given.

    `key`, if the gateways require one, has the scope `read`.

    Raises:
        MetricsUnreadable: a gateway does not answer, or not with metrics.
    """
    values: Values = defaultdict(float)
    for url in gateways:
        text = _ask(url, key)
        try:
            found = parse_metrics(text, model)
        except ImportError as error:
            raise MetricsUnreadable(
                url, "cannot be read: the package prometheus-client is missing, run `make install` in the clone"
            ) from error
        except (ValueError, KeyError) as error:
            raise MetricsUnreadable(url, "does not answer with metrics") from error
        for name, value in found.items():
            values[name] += value
    return Counts(values)


def parse_metrics(text: str, model: str | None = None) -> Values:
    """Return the values of the metrics that have a version label, from Prometheus's text; of `model`, or of all.

    The metrics of gateways that served one model have no label for it.
    """
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 (the gateway's extra has it)

    values: Values = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = _LABELS.get(sample.name)
            if labels and (model is None or sample.labels.get("model", model) == model):
                values[sample.name, *(sample.labels[label] for label in labels)] += sample.value
    return values


def _ask(url: str, key: str | None) -> str:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}/metrics", headers=headers, timeout=5.0, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MetricsUnreadable(url, f"does not answer ({type(error).__name__})") from error
    if answer.status_code in {401, 403}:
        raise MetricsUnreadable(url, "requires a key: set GRADSERVE_KEY to one with the scope read")
    if answer.status_code != 200:
        raise MetricsUnreadable(url, f"answers with status {answer.status_code}")
    return answer.text
