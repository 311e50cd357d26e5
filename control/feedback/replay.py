"""Replay logged images through a candidate archive: which answers change, and whether feedback says for the better."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from control.errors import FeedbackUnusable, MissingExtra
from control.feedback.export import reading
from gradserve import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from control.images.sources import Source
    from gateway.feedback.store import FeedbackStore, LoggedCall

_AT_ONCE = 32


@dataclass(frozen=True)
class Difference:
    """One call that the candidate answers differently; `right` is the class by feedback, None without feedback."""

    request_id: str
    version: str
    was: str
    was_confidence: float
    now: str
    now_confidence: float
    right: str | None


@dataclass(frozen=True)
class Replay:
    """The result of a replay.

    Attributes:
        images: calls that were replayed.
        failed: calls whose image the candidate refused.
        agree: calls with the same class.
        agreement: 95 % interval of the share that agrees (Wilson).
        confidence_shift: mean of the candidate's confidence less the logged one.
        labelled: replayed calls with feedback.
        right_before: of these, those that were answered rightly.
        right_now: of these, those that the candidate answers rightly.
        p: p-value of the difference between the two (exact McNemar test); None without feedback.
        differences: every call that is answered differently, the surest new answer first.
    """

    images: int
    failed: int
    agree: int
    agreement: tuple[float, float]
    confidence_shift: float
    labelled: int
    right_before: int
    right_now: int
    p: float | None
    differences: tuple[Difference, ...]

    def changes(self) -> list[tuple[str, str, int]]:
        """Return each pair of old and new class with its number of calls, most first."""
        pairs = Counter((found.was, found.now) for found in self.differences)
        return [(was, now, count) for (was, now), count in pairs.most_common()]

    def dump(self) -> dict[str, Any]:
        """Return the result as JSON-able data."""
        return asdict(self)


def replay(
    store: FeedbackStore, candidate: Source, *, since: float = 0.0, limit: int, count: Callable[[], None]
) -> Replay:
    """Return how the candidate answers the newest `limit` calls with an image since the Unix time `since`.

    `count` is called for each image.

    Raises:
        FeedbackUnusable: the store cannot be read, or has no image.
        MissingExtra: scipy is not installed.
    """
    try:
        from scipy import stats  # noqa: PLC0415 - a second
    except ImportError as error:
        raise MissingExtra("scipy", "gradserve replay", "training") from error
    with reading(store):
        right = {call.request_id: said.class_name for call, said in store.labelled()}
        calls = list(deque(store.calls(since=since, with_image=True), maxlen=limit))
    if not calls:
        raise FeedbackUnusable(store.path, "it has no image (GATEWAY_FEEDBACK_SAMPLE is the share that is kept)")
    answers: list[Difference] = []
    for call, (name, confidence) in _answers(calls, candidate, count):
        said = right.get(call.request_id)
        answers.append(
            Difference(call.request_id, call.version, call.class_name, call.confidence, name, confidence, said)
        )
    agree = sum(found.was == found.now for found in answers)
    labelled = [found for found in answers if found.right is not None]
    better = sum(found.now == found.right != found.was for found in labelled)
    worse = sum(found.was == found.right != found.now for found in labelled)
    interval = stats.binomtest(agree, len(answers)).proportion_ci(method="wilson") if answers else None
    different = sorted((found for found in answers if found.was != found.now), key=lambda row: -row.now_confidence)
    return Replay(
        images=len(answers),
        failed=len(calls) - len(answers),
        agree=agree,
        agreement=(float(interval.low), float(interval.high)) if interval else (0.0, 1.0),
        confidence_shift=sum(found.now_confidence - found.was_confidence for found in answers) / max(1, len(answers)),
        labelled=len(labelled),
        right_before=sum(found.was == found.right for found in labelled),
        right_now=sum(found.now == found.right for found in labelled),
        p=float(stats.binomtest(better, better + worse).pvalue) if better + worse else (1.0 if labelled else None),
        differences=tuple(different),
    )


def _answers(
    calls: list[LoggedCall], candidate: Source, count: Callable[[], None]
) -> Iterator[tuple[LoggedCall, tuple[str, float]]]:
    """Yield the candidate's class and confidence for each call whose image it can read."""
    for start in range(0, len(calls), _AT_ONCE):
        group = calls[start : start + _AT_ONCE]
        answers = candidate.predict([call.image or b"" for call in group], 1)
        for call, answer in zip(group, answers, strict=True):
            count()
            if not isinstance(answer, Failed):
                yield call, (answer.class_name, answer.confidence)
