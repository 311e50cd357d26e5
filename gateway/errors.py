"""Every way in which the gateway refuses or fails, and the one shape in which callers learn of it (RFC 9457).

    GatewayError
    ├── BadRequest              400  empty_body · bad_multipart · missing_file · unexpected_field · too_many_files
    │                                bad_parameter · bad_json
    ├── KeyMissing, KeyUnknown  401  key_missing · key_unknown
    ├── ScopeMissing            403  scope_missing
    ├── RouteUnknown            404  route_unknown
    ├── VersionUnknown          404  version_unknown
    ├── ModelUnknown            404  model_unknown
    ├── MethodNotAllowed        405  method_not_allowed
    ├── BodyTooSlow             408  body_too_slow
    ├── BodyTooLarge            413  body_too_large
    ├── MediaTypeUnsupported    415  media_type_unsupported
    ├── QuotaExceeded           429  quota_exceeded
    ├── ImageRefused            4xx  what the handler said of one image (`HANDLER_CODES`)
    ├── Internal                500  internal_error
    ├── HandlerFailed           500  handler_failed
    ├── EngineNonsense          502  engine_nonsense
    ├── EngineBroke             502  engine_broke
    ├── Unavailable             503  saturated · not_ready · draining
    └── DeadlinePassed          504  deadline_passed

A constructor takes facts, the class writes the sentence. No upstream text, path or stack trace gets into one.
"""

# ruff: noqa: N818 — the tree's names say what happened, as in Starlette and httpx: `BodyTooLarge`, not `BodyTooLargeError`
from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar

# The handler's codes (its own sentence and facts are passed on for 4xx) and the status a caller gets.
HANDLER_CODES = {
    "image_too_large": 413,
    "image_unreadable": 422,
    "unknown_target": 400,
    "unknown_method": 400,
    "bad_options": 400,
    "bad_frames": 400,
    "deadline_passed": 504,
    "handler_failed": 500,
}
# Members that facts from the handler may not overwrite.
RESERVED = {"type", "title", "status", "code", "detail", "instance", "request_id"}


class GatewayError(Exception):
    """What a caller is told: a status, a stable code, one sentence with its facts."""

    status: int = 500
    code: str = "internal_error"

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None, **facts: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}
        self.facts = facts

    def problem(self) -> dict[str, object]:
        """The members of the problem document that do not depend on the request."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.facts,
        }


class BadRequest(GatewayError):
    """400: the request does not say what the route needs."""

    status = 400


class EmptyBody(BadRequest):
    """400: nothing was sent."""

    code = "empty_body"

    def __init__(self) -> None:
        super().__init__("The body is empty: send an image as the body, or as the multipart field `file`.")


class BadMultipart(BadRequest):
    """400: the body is not the multipart that its content type announces."""

    code = "bad_multipart"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The multipart body is broken: {reason}.")


class MissingFile(BadRequest):
    """400: a multipart body without the field `file`."""

    code = "missing_file"

    def __init__(self) -> None:
        super().__init__("The multipart body has no field `file` that holds an image.")


class UnexpectedField(BadRequest):
    """400: a multipart field that is not `file`."""

    code = "unexpected_field"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The multipart field {name[:64]!r} is unknown: images go into `file`, options into the query string."
        )


class TooManyFiles(BadRequest):
    """400: more images than the route takes."""

    code = "too_many_files"

    def __init__(self, limit: int) -> None:
        remedy = "use /predict/batch for several" if limit == 1 else "send them in several calls"
        super().__init__(f"More than {limit} file(s) were sent: {remedy}.", limit=limit)


class BadParameter(BadRequest):
    """400: an option, header or JSON member with a value that it cannot have."""

    code = "bad_parameter"

    def __init__(self, name: str, value: str, expected: str) -> None:
        super().__init__(f"{name[:64]}={value[:64]!r} is not {expected}.", parameter=name[:64])


class UnknownParameter(BadRequest):
    """400: an option that the route does not have."""

    code = "bad_parameter"

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        options = ", ".join(known) or "none"
        super().__init__(f"The parameter {name[:64]!r} is unknown here; known: {options}.", parameter=name[:64])


class BadJson(BadRequest):
    """400: a JSON body that cannot be read as what the route takes."""

    code = "bad_json"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The JSON body is wrong: {reason}.")


class KeyMissing(GatewayError):
    """401: no API key came."""

    status = 401
    code = "key_missing"

    def __init__(self) -> None:
        super().__init__(
            "An API key is needed: send `Authorization: Bearer <key>` or `x-api-key: <key>`.",
            headers={"www-authenticate": "Bearer"},
        )


class KeyUnknown(GatewayError):
    """401: the API key is none of ours."""

    status = 401
    code = "key_unknown"

    def __init__(self) -> None:
        super().__init__("The API key is unknown or was revoked.", headers={"www-authenticate": "Bearer"})


class ScopeMissing(GatewayError):
    """403: the API key may not do this."""

    status = 403
    code = "scope_missing"

    def __init__(self, scope: str) -> None:
        super().__init__(f"The API key lacks the scope `{scope}`.", scope=scope)


class RouteUnknown(GatewayError):
    """404: no such path."""

    status = 404
    code = "route_unknown"

    def __init__(self) -> None:
        super().__init__("No such route; GET /docs lists them.")


class VersionUnknown(GatewayError):
    """404: no replica has, or is about to have, this version."""

    status = 404
    code = "version_unknown"

    def __init__(self, version: str) -> None:
        super().__init__(f"Version {version} is not served; GET /models lists the versions that are.", version=version)


class ModelUnknown(GatewayError):
    """404: the V2 path names another model."""

    status = 404
    code = "model_unknown"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {model[:64]!r} is not served; GET /models names the one that is.")


class MethodNotAllowed(GatewayError):
    """405: the path exists, the method does not."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, allow: str) -> None:
        super().__init__(f"This route takes {allow}.", headers={"allow": allow})


class BodyTooSlow(GatewayError):
    """408: the body did not arrive in time."""

    status = 408
    code = "body_too_slow"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The body did not arrive within {seconds:g} s.", headers={"connection": "close"}, limit_seconds=seconds
        )


class BodyTooLarge(GatewayError):
    """413: the body, counted as it streams, is over the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The body is larger than {limit} bytes: send a smaller picture.",
            headers={"connection": "close"},
            limit_bytes=limit,
        )


class MediaTypeUnsupported(GatewayError):
    """415: the declared type is no raster image."""

    status = 415
    code = "media_type_unsupported"

    def __init__(self, media_type: str) -> None:
        super().__init__(
            f"{media_type[:64]!r} is no raster image: declare image/png, image/jpeg, image/webp, image/bmp, "
            "image/gif or application/octet-stream (with curl: -H 'content-type: application/octet-stream')."
        )


class QuotaExceeded(GatewayError):
    """429: the caller's quota is used up for now."""

    status = 429
    code = "quota_exceeded"

    def __init__(self, quota: str, retry_after_s: int) -> None:
        super().__init__(
            f"The quota of {quota} is used up: try again in {retry_after_s} s.",
            headers={"retry-after": str(retry_after_s)},
            quota=quota,
        )


class ImageRefused(GatewayError):
    """What the handler found wrong with one image or its options; `code` is the handler's own."""

    def __init__(self, code: str, detail: str, facts: dict[str, object]) -> None:
        super().__init__(detail)
        self.facts = {key: value for key, value in facts.items() if key not in RESERVED}
        self.status = HANDLER_CODES[code]
        self.code = code


class Internal(GatewayError):
    """500: a fault of the gateway; the log has it under the request's id."""

    def __init__(self) -> None:
        super().__init__("The gateway failed; its log has the reason under this request's id.")


class HandlerFailed(GatewayError):
    """500: the model's code, or its worker, failed on this request."""

    code = "handler_failed"

    def __init__(self) -> None:
        super().__init__("The model failed on this request; the server's log has the reason.")


class EngineNonsense(GatewayError):
    """502: TorchServe answered something that is no answer."""

    status = 502
    code = "engine_nonsense"

    def __init__(self) -> None:
        super().__init__("The model server answered something that cannot be understood.")


class EngineBroke(GatewayError):
    """502: the connection to TorchServe broke before an answer came."""

    status = 502
    code = "engine_broke"

    def __init__(self) -> None:
        super().__init__("The model server went away before it answered; the request may be sent again.")


class Unavailable(GatewayError):
    """503: not now; Retry-After says when."""

    status = 503
    sentences: ClassVar[dict[str, str]] = {
        "saturated": "All places are taken",
        "not_ready": "No verified worker is ready for this version",
        "draining": "This server is shutting down",
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
