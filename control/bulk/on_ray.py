"""Spread shards over a Ray cluster, or over this machine's cores. The only module that imports Ray.

Actors, each with one core and its own copy of the model, answer the shards and write the output; only counts come back.
An actor that is lost, with its machine or because an image ended its process, is replaced. Another actor answers its
shard then, image by image where need be, in a process of its own: see `GuardedModel`.

Ray's actors are used here without Ray Data, which gives a shard to the same actor again without end if it ends the
actor's process, and lets the shards of a lost machine wait until their actors run somewhere else.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from control import bulk
from control.bulk.scorer import ArchiveModel, Counts, GuardedModel, ProcessEnded, Scorer
from control.bulk.source import parse_shard
from control.errors import MissingExtra, ScoringFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from control.bulk.output import Entry
    from control.bulk.scorer import Job
    from control.bulk.source import Piece, Shard

EXTRA = "bulk"
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
"""For the archive; images pass through Ray's memory only after a process has ended."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Report nothing to Ray's makers; and no line about every actor that is lost (Ray's issue 53727)."""

_MOST_LOSSES = 3
"""Actors that a shard may lose before it is given up."""
_MOST_FAILED_STARTS = 3
"""Actors in a row that may be lost while they load the model."""


def check_installed() -> None:
    """Raise unless Ray and pyarrow are installed.

    Raises:
        MissingExtra: one is not.
    """
    for package in ("ray", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "gradserve score", EXTRA)


def score_shards(
    archive: bytes, job: Job, shards: Sequence[Shard], *, address: str | None = None, workers: int | None = None
) -> Iterator[Counts]:
    """Answer the shards and yield the counts of each when its file is written, in the order of their ends.

    Args:
        archive: the bytes of the archive.
        job: what is done with every shard.
        shards: the shards.
        address: of a cluster that this machine is part of; None starts Ray on this machine for this run.
        workers: the most actors at a time, each with one core; None for all cores of the cluster.

    Raises:
        ScoringFailed: the cluster cannot be reached, or a shard cannot be answered.
    """
    import ray  # noqa: PLC0415 - optional

    with _cluster(address, workers):
        most = min(len(shards), workers or int(ray.cluster_resources().get("CPU", 1)))
        yield from _Pool(archive, job, most).answer(shards)


class _Work(NamedTuple):
    """A shard, and the actors that were lost while they answered it."""

    shard: Shard
    losses: int = 0


class _Pool:
    """The actors. Each answers one shard at a time."""

    def __init__(self, archive: bytes, job: Job, size: int) -> None:
        import ray  # noqa: PLC0415 - optional

        self._actor = ray.remote(num_cpus=1)(_Actor)
        self._archive = ray.put(archive)
        self._job = job
        self._size = size
        self._waiting: deque[_Work] = deque()
        self._idle: list[Any] = []
        self._asked: dict[Any, tuple[Any, _Work | None]] = {}  # by the reference to the answer; no work: it loads
        self._failed_starts = 0

    def answer(self, shards: Sequence[Shard]) -> Iterator[Counts]:
        """Yield the counts of each shard.

        Raises:
            ScoringFailed: a shard cannot be answered; all others are, if it was given up.
        """
        import ray  # noqa: PLC0415 - optional

        given_up: list[Shard] = []
        self._waiting.extend(map(_Work, shards))
        while self._waiting or any(work for _, work in self._asked.values()):
            self._give()
            (answer,), _ = ray.wait(list(self._asked), num_returns=1)
            actor, work = self._asked.pop(answer)
            try:
                counts = ray.get(answer)
            except ray.exceptions.RayTaskError as error:
                raise ScoringFailed(_reason(error)) from error
            except ray.exceptions.RayError as error:
                ray.kill(actor)  # it may live on behind a broken connection
                given_up += self._lose(work, error)
                continue
            self._idle.append(actor)
            self._failed_starts = 0
            if counts is not None:
                yield Counts(*counts)
        if given_up:
            raise ScoringFailed(_name_shards(given_up))

    def _give(self) -> None:
        """Give waiting shards to idle actors, and start actors for the rest."""
        while self._waiting and self._idle:
            actor, work = self._idle.pop(), self._waiting.popleft()
            answer = actor.answer.remote(work.shard.dump(), is_careful=work.losses > 0)
            self._asked[answer] = actor, work
        while self._waiting and len(self._asked) < self._size:
            actor = self._actor.remote([self._archive], self._job)
            self._asked[actor.load.remote()] = actor, None

    def _lose(self, work: _Work | None, error: Exception) -> list[Shard]:
        """Let the shard of a lost actor wait for another; return it if too many were lost.

        Raises:
            ScoringFailed: too many actors were lost before they had loaded the model.
        """
        if work is None:
            self._failed_starts += 1
            if self._failed_starts == _MOST_FAILED_STARTS:
                problem = f"{self._failed_starts} processes in a row ended while they loaded the model"
                raise ScoringFailed(f"{problem} ({_reason(error)})") from error
        elif work.losses + 1 < _MOST_LOSSES:
            self._waiting.appendleft(work._replace(losses=work.losses + 1))
        else:
            return [work.shard]
        return []


class _Actor:
    """A `Scorer` on the cluster."""

    def __init__(self, archive: list[Any], job: Job) -> None:
        self._archive = archive[0]  # in a list, a reference stays one
        self._job = job

    def load(self) -> None:
        """Load the model.

        Raises:
            RuntimeError: it cannot run here, and why.
        """
        import ray  # noqa: PLC0415 - optional

        self._score = Scorer(ArchiveModel(ray.get(self._archive)), self._job)

    def answer(self, shard: str, *, is_careful: bool) -> Counts:
        """Answer a shard; `is_careful` keeps the model in a process of its own, which an image may end.

        Raises:
            OSError, ValueError, RuntimeError: it cannot be answered.
        """
        if not is_careful:
            return self._score(parse_shard(shard))
        with tempfile.TemporaryDirectory(prefix="gradserve-score-") as within:
            return Scorer(GuardedModel(partial(_Helper, self._archive, within)), self._job)(parse_shard(shard))


class _Helper:
    """A model in a process of its own on this machine, while the caller waits for it."""

    def __init__(self, archive: Any, within: str) -> None:  # noqa: ANN401 - ray.ObjectRef
        import ray  # noqa: PLC0415 - optional
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415 - optional

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor = ray.remote(num_cpus=0, scheduling_strategy=here)(ArchiveModel).remote(archive, within)

    def answer(self, images: Sequence[bytes], *, top_k: int, explain: bool) -> list[Entry]:
        """Return one entry of the wire per image, in order.

        Raises:
            ProcessEnded: the process has ended.
        """
        import ray  # noqa: PLC0415 - optional

        try:
            entries: list[Entry] = ray.get(self._actor.answer.remote(images, top_k=top_k, explain=explain))
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise ProcessEnded from error
        return entries


@contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine that ends with the block.

    Raises:
        ScoringFailed: it cannot be reached or started.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray  # noqa: PLC0415 - optional

    local = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else local))
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise ScoringFailed(f"Ray at {address or 'this machine'} does not answer: {error}") from error
    # The cluster's machines need no gradserve, and one that is there may be of another release.
    ray.cloudpickle.register_pickle_by_value(bulk)
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(bulk)
        ray.shutdown()


def _reason(error: BaseException) -> str:
    """Return the sentence of the first error that the cluster reported."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, BaseException) and cause is not error:
        return _reason(cause)
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _name_shards(shards: Sequence[Shard]) -> str:
    """Return the sentence that names the images of shards that were given up."""
    parts = "; ".join(
        f"{_name(shard.pieces[0])} to {_name(shard.pieces[-1])} ({shard.rows:,} images)" for shard in shards
    )
    return f"{_MOST_LOSSES} processes ended at each of these, and all other images are answered: {parts}"


def _name(piece: Piece) -> str:
    return piece.file if piece.row is None else f"{piece.file}, row group {piece.group}"
