"""Records training steps as CUDA graphs: a replay is one launch, where a plain step launches hundreds of kernels.

It was not run on a GPU yet, so it is off unless `gradserve train --cuda-graphs` asks for it. Source: "Whole-network
capture" in https://docs.pytorch.org/docs/stable/notes/cuda.html
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Call = Callable[[], Tensor]
    Step = Callable[[Tensor, Tensor, float], Tensor]

logger = logging.getLogger(__name__)

PLAIN_STEPS = 3  # of a kind before its recording: libraries choose algorithms, the optimiser allocates its buffers


class Recorder(Protocol):
    """Runs calls, and turns a call into one that repeats it."""

    def warm_up(self, call: Call) -> Tensor:
        """Run `call` as the recording will run it, and return its answer."""
        ...

    def record(self, call: Call) -> Call:
        """Return what repeats `call`, which is not run yet.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


class CudaGraphs:
    """Records calls on the current GPU.

    All graphs share one memory pool: each writes whatever it reads there, so none needs what another left.
    """

    def __init__(self) -> None:
        self._side = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Call) -> Tensor:
        """Run `call` on the stream of the recording."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            answer = call()
        torch.cuda.current_stream().wait_stream(self._side)
        return answer

    def record(self, call: Call) -> Call:
        """Return a function that replays the kernels of `call`; each replay overwrites the last one's answer."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side):  # where libraries have their handles by now
            answer = call()

        def replay() -> Tensor:
            graph.replay()
            return answer

        return replay


@dataclass
class _Kind:
    """Steps of one batch shape and radius: the buffers that they read, and what repeats them."""

    images: Tensor
    labels: Tensor
    plain_steps: int = 0
    replay: Call | None = None


class RecordedSteps:
    """Steps of one phase of a training, recorded for each shape of images and labels and each radius.

    The first steps of a kind are plain ones. Where one cannot be recorded, that is logged once, and no further kind is
    recorded.
    """

    def __init__(self, step: Step, optimiser: torch.optim.SGD, recorder: Recorder) -> None:
        """Record nothing yet.

        Args:
            step: trains on images (N, 3, H, W) and labels with a sharpness-aware radius, and returns its sums.
            optimiser: the one that `step` uses; its rate becomes a tensor, because a recorded number would stay.
            recorder: `CudaGraphs`.
        """
        self._step, self._optimiser, self._recorder = step, optimiser, recorder
        self._kinds: dict[tuple[torch.Size, torch.Size, float], _Kind] = {}
        self._rate = torch.zeros((), device=optimiser.param_groups[0]["params"][0].device)
        self._is_broken = False

    def __call__(self, images: Tensor, labels: Tensor, *, rate: float, radius: float) -> Tensor:
        """Train on one batch and return its sums, which the next step may overwrite."""
        self._rate.fill_(rate)
        for parameters in self._optimiser.param_groups:
            parameters["lr"] = self._rate
        key = (images.shape, labels.shape, radius)
        if key not in self._kinds:
            self._kinds[key] = _Kind(torch.empty_like(images), torch.empty_like(labels))
        kind = self._kinds[key]
        kind.images.copy_(images)
        kind.labels.copy_(labels)
        call = partial(self._step, kind.images, kind.labels, radius)
        if kind.replay is None and kind.plain_steps >= PLAIN_STEPS and not self._is_broken:
            kind.replay = self._recorded(call)
        if kind.replay is None:
            kind.plain_steps += 1
            return self._recorder.warm_up(call)
        return kind.replay()

    def _recorded(self, call: Call) -> Call | None:
        try:
            return self._recorder.record(call)
        except RuntimeError as error:
            self._is_broken = True
            reason = (str(error).splitlines() or [""])[0]
            logger.warning("training steps cannot be recorded as CUDA graphs (%s): they run plainly", reason)
            return None
