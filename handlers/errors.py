"""Errors of one image or one upstream batch: each becomes one JSON entry and affects no other entry.

    RequestError
    ├── ImageTooLarge      image_too_large    more pixels than are decoded, too long or too narrow
    ├── ImageUnreadable    image_unreadable   no image of the five formats, truncated, or of no size
    ├── UnknownTarget      unknown_target     a class name that the contract does not hold
    ├── UnknownMethod      unknown_method     a CAM method that the contract does not offer
    ├── UnknownExample     unknown_example    a training image whose thumbnail the archive does not hold
    ├── BadOptions         bad_options        the `x-gradserve` header is not what contracts/wire.py describes
    ├── BadFrames          bad_frames         a body of several images that cannot be taken apart
    ├── DeadlinePassed     deadline_passed    nobody waits for the answer any more
    └── HandlerFailed      handler_failed     our own fault; the log has the trace

The gateway turns the codes into HTTP statuses. `EngineError` is about a worker, not about an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from contracts.wire import dump_error

if TYPE_CHECKING:
    from contracts.wire import Entry


class RequestError(Exception):
    """A reason why an image or a row has no answer; `facts` are told beside the sentence, for programs."""

    code: ClassVar[str]

    def __init__(self, detail: str, **facts: Any) -> None:  # noqa: ANN401 - facts are any JSON
        super().__init__(detail)
        self.detail = detail
        self.facts = facts

    def entry(self) -> Entry:
        """Return the error as its entry on the wire."""
        return dump_error(self.code, self.detail, self.facts)


class ImageTooLarge(RequestError):
    """The image's header announces more pixels than are decoded, too long a side, or too extreme proportions."""

    code = "image_too_large"

    def __init__(self, width: int, height: int, *, max_pixels: int, max_side: int, max_aspect: int) -> None:
        super().__init__(
            f"the image has {width} x {height} = {width * height} pixels: send one of at most {max_pixels} pixels, "
            f"{max_side} a side, whose longer side is at most {max_aspect} times the shorter",
            width=width,
            height=height,
            pixels=width * height,
            limit=max_pixels,
        )


class ImageUnreadable(RequestError):
    """The bytes are no image that is decoded here; `reason` is a fixed phrase, never a decoder's message."""

    code = "image_unreadable"

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: send a whole PNG, JPEG, WebP, BMP or GIF image")


class UnknownTarget(RequestError):
    """The class to explain is none of the contract's."""

    code = "unknown_target"

    def __init__(self, target: str, classes: tuple[str, ...]) -> None:
        super().__init__(
            f"there is no class {target[:100]!r}: use one of the model's classes", classes=list(classes[:100])
        )


class UnknownMethod(RequestError):
    """The CAM method is none of the contract's."""

    code = "unknown_method"

    def __init__(self, method: str, methods: tuple[str, ...]) -> None:
        super().__init__(f"there is no method {method[:100]!r}: use {', '.join(methods)}", methods=list(methods))


class UnknownExample(RequestError):
    """The archive holds no thumbnail of this training image."""

    code = "unknown_example"

    def __init__(self, example: int, examples: int) -> None:
        super().__init__(
            f"there is no example {example}: "
            + (f"use a number below {examples}" if examples else "this version was packed without thumbnails"),
            examples=examples,
        )


class BadOptions(RequestError):
    """An option has the wrong type or an impossible value."""

    code = "bad_options"

    def __init__(self, option: str, expected: str) -> None:
        super().__init__(f"{option} must be {expected}", option=option)


class AnswerTooLarge(BadOptions):
    """The answer would be longer than TorchServe carries, which would kill the worker."""

    def __init__(self, answer_bytes: int, limit: int) -> None:
        super().__init__(
            "top_k", f"smaller, or fewer images sent: the answer has {answer_bytes} bytes, more than {limit}"
        )


class BadFrames(RequestError):
    """The body is not what its content type promises."""

    code = "bad_frames"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body's images cannot be told apart: {reason}")


class DeadlinePassed(RequestError):
    """The row was reached after the moment until which its caller waits."""

    code = "deadline_passed"

    def __init__(self, late_ms: int) -> None:
        super().__init__(f"the answer was due {late_ms} ms ago", late_ms=late_ms)


class HandlerFailed(RequestError):
    """Anything that should not have happened; the caller learns nothing of it, the log all."""

    code = "handler_failed"

    def __init__(self) -> None:
        super().__init__("the model could not be run on this image")


class EngineError(RuntimeError):
    """An engine that cannot be built here; the message says which and why."""
