"""Every error that the gateway answers with, in one shape: problem documents (RFC 9457).

    GatewayError
    ├── BadRequest              400  empty_body · bad_multipart · missing_file · unexpected_field · too_many_files
    │                                bad_parameter · bad_json · unknown_class · bad_http
    ├── KeyMissing, KeyUnknown,
    │   KeyExpired              401  key_missing · key_unknown · key_expired
    ├── ScopeMissing            403  scope_missing
    ├── ModelForbidden          403  model_forbidden
    ├── RouteUnknown            404  route_unknown
    ├── VersionUnknown          404  version_unknown
    ├── RequestUnknown          404  request_unknown
    ├── ModelUnknown            404  model_unknown
    ├── ExampleUnknown          404  unknown_example
    ├── MethodNotAllowed        405  method_not_allowed
    ├── BodyTooSlow             408  body_too_slow
    ├── BodyTooLarge            413  body_too_large
    ├── ImageTooLarge           413  image_too_large (or by the handler, as ImageRefused)
    ├── TooManyPixels           413  too_many_pixels
    ├── MediaTypeUnsupported,
    │   FileTypeUnsupported,
    │   FormExpected            415  media_type_unsupported
    ├── QuotaExceeded           429  quota_exceeded
    ├── CallerHasTooManyPixels  429  too_many_pixels
    ├── HeadersTooLarge         431  headers_too_large
    │   (all errors above are in gateway/refusals.py: the caller can correct them)
    ├── ImageRefused            4xx  the handler's error for one image (`HANDLER_CODES`)
    ├── Internal                500  internal_error
    ├── HandlerFailed           500  handler_failed
    ├── EngineNonsense          502  engine_nonsense
    ├── EngineBroke             502  engine_broke
    ├── Unavailable             503  saturated · not_ready · draining · feedback_store
    └── DeadlinePassed          504  deadline_passed

A constructor takes facts, the class writes the sentence. No sentence holds text from TorchServe, a path or a traceback.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar

# The status for each of the handler's error codes. For a 4xx the handler's own sentence and facts are passed on.
HANDLER_CODES = {
    "image_too_large": 413,
    "image_unreadable": 422,
    "unknown_target": 400,
    "unknown_method": 400,
    "unknown_example": 404,
    "bad_options": 400,
    "bad_frames": 400,
    "deadline_passed": 504,
    "handler_failed": 500,
}
# Members of the problem document that the handler's facts may not overwrite.
RESERVED = {"type", "title", "status", "code", "detail", "instance", "request_id"}


class GatewayError(Exception):
    """An error that a caller gets: a status, a stable code, one sentence and its facts."""

    status: int = 500
    code: str = "internal_error"

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None, **facts: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}
        self.facts = facts

    def problem(self) -> dict[str, object]:
        """Return the members of the problem document that do not depend on the request."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.facts,
        }


class ImageRefused(GatewayError):
    """4xx: the handler refused one image or its options; `code` is the handler's own."""

    def __init__(self, code: str, detail: str, facts: dict[str, object]) -> None:
        super().__init__(detail)
        self.facts = {key: value for key, value in facts.items() if key not in RESERVED}
        self.status = HANDLER_CODES[code]
        self.code = code


class Internal(GatewayError):
    """500: the gateway raised an unexpected exception; its log has it under the request's id."""

    def __init__(self) -> None:
        super().__init__("The gateway failed; its log has the reason under this request's id.")


class HandlerFailed(GatewayError):
    """500: the model's code or its worker failed on this request."""

    code = "handler_failed"

    def __init__(self) -> None:
        super().__init__("The model failed on this request; the server's log has the reason.")


class EngineNonsense(GatewayError):
    """502: TorchServe's response cannot be parsed."""

    status = 502
    code = "engine_nonsense"

    def __init__(self) -> None:
        super().__init__("The model server's answer cannot be parsed; its log may have the reason.")


class EngineBroke(GatewayError):
    """502: the connection to TorchServe was lost before the response came."""

    status = 502
    code = "engine_broke"

    def __init__(self) -> None:
        super().__init__("The connection to the model server was lost before it answered: send the request again.")


class Unavailable(GatewayError):
    """503: the gateway cannot serve the call now; Retry-After gives the seconds to wait."""

    status = 503
    sentences: ClassVar[dict[str, str]] = {
        "saturated": "All places for calls, or all that one caller may have, are taken",
        "not_ready": "No verified worker is ready for this version",
        "draining": "This server is shutting down",
        "feedback_store": "The feedback cannot be kept now; the gateway's log has the reason",
    }

    def __init__(self, code: str, retry_after_s: int = 1) -> None:
        super().__init__(
            f"{self.sentences[code]}: try again in {retry_after_s} s.", headers={"retry-after": str(retry_after_s)}
        )
        self.code = code


class DeadlinePassed(GatewayError):
    """504: the answer did not come before the deadline."""

    status = 504
    code = "deadline_passed"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"No answer came within the request's {timeout_s:g} s.", timeout_seconds=round(timeout_s, 3))
