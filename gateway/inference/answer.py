"""The call that the inference service takes, and the answer that it returns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from contracts.model import Contract
    from contracts.wire import Entry, Options
    from gateway.errors import GatewayError
    from gateway.inference.torchserve import Deadline


@dataclass(frozen=True, slots=True)
class Call:
    """The facts that every call has beside its images.

    Attributes:
        deadline: the moment until which the caller waits.
        carried: the options that identify the call to the handler: its request id and trace context.
        caller: the name or address that the call's places and pixels count for.
        key_name: the name of the caller's API key, which chooses its side of a canary; empty without keys.
        version: the wanted version; None: the plan chooses.
        model: the wanted model; None: the default model.
    """

    deadline: Deadline
    carried: Options
    caller: str = ""
    key_name: str = ""
    version: str | None = None
    model: str | None = None

    def of(self, version: str | None, model: str | None) -> Call:
        """Return the call with the wanted version and model."""
        return self if version is model is None else replace(self, version=version, model=model)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a call, or the error that it got.

    Attributes:
        model: the model's name; empty if no version was chosen.
        version: its version.
        entries: one per image, in order, as the handler gave them, errors as a caller gets them; empty if there is an
            overlay or an error.
        overlay: the PNG bytes of an explanation, if the caller wanted an image.
        error: the reason why there is no answer.
        timings: the seconds spent in each stage: `wait` (for a place) and `model`.
        batch_id: the request id that the upstream batch was sent under, if it is another call's.
        is_hurried: True if the caller left less than half of the usual time: a missed deadline is not the version's
            fault.
        contract: the version's contract; None if it is not known.
    """

    model: str = ""
    version: str = ""
    entries: Sequence[Entry] = ()
    overlay: bytes | None = None
    error: GatewayError | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    batch_id: str = ""
    is_hurried: bool = False
    contract: Contract | None = None

    @property
    def code(self) -> str:
        """The error's code; else that of the first image that the service, not its caller, failed; else empty."""
        if self.error is not None:
            return self.error.code
        errors = (entry["error"] for entry in self.entries if "error" in entry)
        return next((error["code"] for error in errors if error["status"] >= 500), "")


class Progress:
    """A call on its way: the version chosen for it, and its timings so far."""

    __slots__ = ("batch_id", "call", "contract", "is_hurried", "model", "timings", "version")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.model = self.version = self.batch_id = ""
        self.is_hurried = False
        self.contract: Contract | None = None
        self.timings: dict[str, float] = {}

    def stage(self, name: str) -> Stage:
        """Return a context manager that adds the seconds spent inside to the stage `name`."""
        return Stage(self.timings, name)

    def answer(
        self, entries: Sequence[Entry] = (), overlay: bytes | None = None, error: GatewayError | None = None
    ) -> Answer:
        """Return the call's answer."""
        return Answer(
            self.model,
            self.version,
            entries,
            overlay,
            error,
            self.timings,
            self.batch_id,
            self.is_hurried,
            self.contract,
        )


class Stage:
    """A context manager that times one stage.

    `contextlib.contextmanager` costs several times as much, and each call has two stages.
    """

    __slots__ = ("_name", "_started", "_timings")

    def __init__(self, timings: dict[str, float], name: str) -> None:
        self._timings = timings
        self._name = name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._timings[self._name] = self._timings.get(self._name, 0.0) + time.perf_counter() - self._started
