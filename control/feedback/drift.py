"""Compare recent answers with a reference: confidence, class mix, and how many images are familiar.

Three tests, each with the size of its effect; the verdict is drift if a difference is both significant and large enough
to matter. The p-values are compared with `alpha` divided by the number of tests (Bonferroni), so that without any drift
at most `alpha` of the verdicts are false alarms. The tests are those of the label-free shift detectors of Rabanser et
al. 2019, "Failing Loudly", section 3, https://arxiv.org/abs/1810.11953: univariate tests on the model's outputs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from control.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.feedback.store import LoggedCall
    from gradserve import Prediction

LEAST_IMAGES = 100
"""Fewer recent or reference images give no verdict."""

LEAST_EFFECT = {"confidence": 0.1, "classes": 0.1, "familiar": 0.03}
"""Smaller effects are no drift, however significant: with a million images every difference is.

`confidence`: the largest distance of the two cumulative distributions. `classes`: Cramér's V. `familiar`: the
difference of the shares of unfamiliar images.
"""

_LEAST_EXPECTED = 5.0


@dataclass(frozen=True)
class Answers:
    """Answers to compare: class and confidence of each image; `familiar` of those of which it is known."""

    classes: tuple[str, ...]
    confidences: tuple[float, ...]
    familiar: tuple[bool, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.classes)


@dataclass(frozen=True)
class Comparison:
    """One test: `effect` and p-value of `about`, one of `LEAST_EFFECT`; `is_drift` if both pass their bounds."""

    about: str
    test: str
    effect: float
    p: float
    is_drift: bool
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """The result; `false_alarm_rate` is the largest share of drift verdicts where nothing has changed."""

    decision: Literal["drift", "none", "too_few"]
    recent: int
    reference: int
    false_alarm_rate: float
    comparisons: tuple[Comparison, ...]

    def dump(self) -> dict[str, Any]:
        """Return the result as JSON-able data."""
        return asdict(self)


def answers_of(found: Iterable[LoggedCall | Prediction]) -> Answers:
    """Return the answers in logged calls, or in predictions."""
    kept = list(found)
    return Answers(
        tuple(answer.class_name for answer in kept),
        tuple(answer.confidence for answer in kept),
        tuple(answer.familiar for answer in kept if answer.familiar is not None),
    )


def compare(reference: Answers, recent: Answers, *, alpha: float = 0.01) -> Verdict:
    """Return whether the recent answers differ from the reference.

    Args:
        reference: the answers to the training's held-out images, or to earlier calls.
        recent: the answers to judge.
        alpha: the largest share of false alarms.

    Raises:
        MissingExtra: scipy is not installed.
    """
    if min(len(reference), len(recent)) < LEAST_IMAGES:
        return Verdict("too_few", len(recent), len(reference), alpha, ())
    tests = [_compare_confidence, _compare_classes]
    if min(len(reference.familiar), len(recent.familiar)) >= LEAST_IMAGES:
        tests.append(_compare_familiar)
    try:
        comparisons = tuple(test(reference, recent, alpha / len(tests)) for test in tests)
    except ImportError as error:
        raise MissingExtra("scipy", "gradserve drift", "training") from error
    decision: Literal["drift", "none"] = "drift" if any(found.is_drift for found in comparisons) else "none"
    return Verdict(decision, len(recent), len(reference), alpha, comparisons)


def _compare_confidence(reference: Answers, recent: Answers, alpha: float) -> Comparison:
    from scipy import stats  # noqa: PLC0415 - a second

    found = stats.ks_2samp(reference.confidences, recent.confidences)
    means = [sum(answers.confidences) / len(answers) for answers in (reference, recent)]
    sentence = f"mean confidence {means[1]:.1%}, in the reference {means[0]:.1%}"
    return _judge("confidence", "Kolmogorov-Smirnov", found.statistic, found.pvalue, sentence, alpha=alpha)


def _compare_classes(reference: Answers, recent: Answers, alpha: float) -> Comparison:
    from scipy import stats  # noqa: PLC0415 - a second

    counts = [Counter(answers.classes) for answers in (reference, recent)]
    names = sorted(set(counts[0]) | set(counts[1]))
    shares = {name: [count[name] / count.total() for count in counts] for name in names}
    largest = max(names, key=lambda name: abs(shares[name][1] - shares[name][0]))
    sentence = f"{largest} is {shares[largest][1]:.1%} of the answers, in the reference {shares[largest][0]:.1%}"
    table = _merge_rare([[count[name] for name in names] for count in counts])
    if len(table[0]) < 2:
        return Comparison("classes", "chi-squared", 0.0, 1.0, is_drift=False, sentence=sentence)
    found = stats.chi2_contingency(table, correction=False)
    cramers_v = (found.statistic / sum(map(sum, table))) ** 0.5  # two rows: the smaller side less one is 1
    return _judge("classes", "chi-squared", cramers_v, found.pvalue, sentence, alpha=alpha)


def _compare_familiar(reference: Answers, recent: Answers, alpha: float) -> Comparison:
    from scipy import stats  # noqa: PLC0415 - a second

    counts = [[answers.familiar.count(known) for known in (False, True)] for answers in (reference, recent)]
    shares = [unfamiliar / (unfamiliar + familiar) for unfamiliar, familiar in counts]
    sentence = f"{shares[1]:.1%} of the images are unlike the training images, in the reference {shares[0]:.1%}"
    p = stats.fisher_exact(counts).pvalue
    return _judge("familiar", "Fisher", abs(shares[1] - shares[0]), p, sentence, alpha=alpha)


def _judge(about: str, test: str, effect: float, p: float, sentence: str, *, alpha: float) -> Comparison:
    is_drift = bool(p < alpha and effect >= LEAST_EFFECT[about])
    return Comparison(about, test, float(effect), float(p), is_drift=is_drift, sentence=sentence)


def _merge_rare(table: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the table with its rare columns in one: the test's p-value needs at least 5 expected in each cell."""
    totals = [sum(row) for row in table]
    smaller = min(totals) / sum(totals)
    rare = [column for column, counts in enumerate(zip(*table, strict=True)) if sum(counts) * smaller < _LEAST_EXPECTED]
    merged = [[count for column, count in enumerate(row) if column not in rare] for row in table]
    rest = [sum(row[column] for column in rare) for row in table]
    if sum(rest) * smaller >= _LEAST_EXPECTED:
        return [[*row, count] for row, count in zip(merged, rest, strict=True)]
    # The rest is too rare on its own as well: it joins the last common class.
    return [[*row[:-1], row[-1] + count] for row, count in zip(merged, rest, strict=True)] if merged[0] else [[], []]
