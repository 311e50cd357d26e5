"""Spread shards over a Ray cluster, or over this machine's cores. The only module that imports Ray.

Ray Data keeps a pool of actors, each with one core and its own copy of the model, gives every actor the next shard, and
starts actors and shards again that were lost with a machine. The actors write the output; only counts come back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from control import bulk
from control.bulk.scorer import ArchiveModel, Counts, Scorer
from control.bulk.source import parse_shard
from control.errors import MissingExtra, ScoringFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from control.bulk.scorer import Job
    from control.bulk.source import Shard

EXTRA = "bulk"
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
"""For the archive and the list of shards; images do not pass through Ray's memory."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Report nothing to Ray's makers; and no line about every actor that may be restarted (Ray's issue 53727)."""

_SHARDS_AT_ONCE = 2
"""Shards that an actor has: one that it answers, and the next."""


def check_installed() -> None:
    """Raise unless Ray Data is installed.

    Raises:
        MissingExtra: it is not.
    """
    for package in ("ray", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "gradserve score", EXTRA)


class _Actor:
    """A `Scorer` on the cluster, with Ray Data's rows in and out."""

    def __init__(self, archive: Any, job: Job) -> None:  # noqa: ANN401 - ray.ObjectRef
        import ray  # noqa: PLC0415 - optional

        self._score = Scorer(ArchiveModel(ray.get(archive)), job)

    def __call__(self, row: dict[str, str]) -> dict[str, int]:
        return self._score(parse_shard(row["shard"]))._asdict()


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
        rows = ray.data.from_items([{"shard": shard.dump()} for shard in shards], override_num_blocks=len(shards))
        answered = rows.map(
            _Actor,
            fn_constructor_args=(ray.put(archive), job),
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=_SHARDS_AT_ONCE
            ),
            num_cpus=1,
        )
        try:
            for row in answered.iter_rows():
                yield Counts(**row)
        except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
            raise ScoringFailed(_reason(error)) from error


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
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress; what fails is raised too
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
