"""The 4xx errors, which the caller can correct; gateway/errors.py draws the whole tree."""

from __future__ import annotations

from gateway.errors import GatewayError


class BadRequest(GatewayError):
    """400: the request lacks something, or has something that the route does not take."""

    status = 400


class EmptyBody(BadRequest):
    """400: the body is empty."""

    code = "empty_body"

    def __init__(self) -> None:
        super().__init__("The body is empty: send an image as the body, or as the multipart field `file`.")


class BadMultipart(BadRequest):
    """400: the content type announces multipart, and the body cannot be parsed as such."""

    code = "bad_multipart"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The multipart body is broken: {reason}.")


class MissingFile(BadRequest):
    """400: the multipart body has no field `file`."""

    code = "missing_file"

    def __init__(self) -> None:
        super().__init__("The multipart body has no field `file` that holds an image.")


class UnexpectedField(BadRequest):
    """400: the multipart body has another field than `file`."""

    code = "unexpected_field"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The multipart field {name[:64]!r} is unknown: images go into `file` (or `image`, `files`), options into "
            "the query string."
        )


class TooManyFiles(BadRequest):
    """400: the body has more images than the route takes."""

    code = "too_many_files"

    def __init__(self, limit: int) -> None:
        remedy = "use /predict/batch for several" if limit == 1 else "send them in several calls"
        super().__init__(f"More than {limit} file(s) were sent: {remedy}.", limit=limit)


class BadParameter(BadRequest):
    """400: an option, header or JSON member has an impossible value."""

    code = "bad_parameter"

    def __init__(self, name: str, value: str, expected: str) -> None:
        super().__init__(f"{name[:64]}={value[:64]!r} is not {expected}.", parameter=name[:64])


class UnknownParameter(BadRequest):
    """400: the route has no such option."""

    code = "bad_parameter"

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        options = ", ".join(known) or "none"
        super().__init__(f"The parameter {name[:64]!r} is unknown here; known: {options}.", parameter=name[:64])


class BadJson(BadRequest):
    """400: the JSON body is not what the route takes."""

    code = "bad_json"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The JSON body is wrong: {reason}.")


def list_some(names: tuple[str, ...], most: int = 20) -> str:
    """Return the names for a sentence, the first `most` of them."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


class ClassUnknown(BadRequest):
    """400: feedback names a class that the version does not have."""

    code = "unknown_class"

    def __init__(self, name: str, classes: tuple[str, ...]) -> None:
        super().__init__(f"There is no class {name[:64]!r}: use one of {list_some(classes)}.", classes=classes)


class BadHttp(BadRequest):
    """400: the bytes are no HTTP request."""

    code = "bad_http"

    def __init__(self) -> None:
        super().__init__("This is no HTTP request.", headers={"connection": "close"})


class KeyMissing(GatewayError):
    """401: the request has no API key."""

    status = 401
    code = "key_missing"

    def __init__(self) -> None:
        super().__init__(
            "An API key is needed: send `Authorization: Bearer <key>` or `x-api-key: <key>`.",
            headers={"www-authenticate": "Bearer"},
        )


class KeyUnknown(GatewayError):
    """401: the API key is not known here."""

    status = 401
    code = "key_unknown"

    def __init__(self) -> None:
        super().__init__("The API key is unknown or was revoked.", headers={"www-authenticate": "Bearer"})


class KeyExpired(GatewayError):
    """401: the API key was valid until `expires`."""

    status = 401
    code = "key_expired"

    def __init__(self, expires: str) -> None:
        super().__init__(
            f"The API key expired at {expires}: ask for a new one.",
            headers={"www-authenticate": "Bearer"},
            expires=expires,
        )


class ScopeMissing(GatewayError):
    """403: the API key lacks the scope that the route needs."""

    status = 403
    code = "scope_missing"

    def __init__(self, scope: str) -> None:
        super().__init__(f"The API key lacks the scope `{scope}`.", scope=scope)


class ModelForbidden(GatewayError):
    """403: the API key is limited to other models."""

    status = 403
    code = "model_forbidden"

    def __init__(self, model: str, models: tuple[str, ...]) -> None:
        allowed = ", ".join(models[:5]) + (", …" if len(models) > 5 else "")
        super().__init__(
            f"The API key may not call the model {model[:64]!r}: name one of its models ({allowed}) by `model=`, or "
            "ask for a key for this one.",
            models=models,
        )


class RouteUnknown(GatewayError):
    """404: no route has this path."""

    status = 404
    code = "route_unknown"

    def __init__(self) -> None:
        super().__init__("No such route; GET /docs lists them.")


class RequestUnknown(GatewayError):
    """404: feedback names a call that is not in the store."""

    status = 404
    code = "request_unknown"

    def __init__(self, request_id: str, days: float) -> None:
        super().__init__(
            f"No call {request_id[:128]!r} is known: send the request_id of an answer of /predict or /explain that is "
            f"at most {days:g} days old.",
            request=request_id[:128],
        )


class VersionUnknown(GatewayError):
    """404: the plan does not name this version."""

    status = 404
    code = "version_unknown"

    def __init__(self, version: str) -> None:
        super().__init__(f"Version {version} is not served; GET /models lists the versions that are.", version=version)


class ModelUnknown(GatewayError):
    """404: the V2 path names a model that is not served."""

    status = 404
    code = "model_unknown"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {model[:64]!r} is not served; GET /models names the one that is.")


class ExampleUnknown(GatewayError):
    """404: the version has no thumbnail with this number."""

    status = 404
    code = "unknown_example"

    def __init__(self, example: int, version: str, examples: int) -> None:
        remedy = f"use a number below {examples}" if examples else "it was packed without thumbnails"
        super().__init__(f"Version {version} has no example {example}: {remedy}.", examples=examples)


class HeatmapsTooLarge(BadRequest):
    """400: the heatmaps of one call have more numbers than are written as rows."""

    code = "bad_parameter"

    def __init__(self, numbers: int, limit: int) -> None:
        super().__init__(
            f"The heatmaps have {numbers} numbers, more than {limit}: ask for heatmap=base64 or heatmap=none, or send "
            "the images in several calls.",
            parameter="heatmap",
            limit=limit,
        )


class MethodNotAllowed(GatewayError):
    """405: the route does not take this method."""

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
    """413: the body has more bytes than the limit; they are counted while they arrive."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The body is larger than {limit} bytes: send a smaller image.", limit_bytes=limit)


class ImageTooLarge(GatewayError):
    """413: the image's header announces too many pixels, too long a side, or too extreme proportions."""

    status = 413
    code = "image_too_large"

    def __init__(self, width: int, height: int, *, max_pixels: int, max_side: int, max_aspect: int) -> None:
        super().__init__(
            f"The image has {width} x {height} = {width * height} pixels: send one of at most {max_pixels} pixels, "
            f"{max_side} a side, whose longer side is at most {max_aspect} times the shorter.",
            width=width,
            height=height,
            pixels=width * height,
            limit=max_pixels,
        )


class TooManyPixels(GatewayError):
    """413: the images of one call together have too many pixels."""

    status = 413
    code = "too_many_pixels"

    def __init__(self, pixels: int, limit: int) -> None:
        super().__init__(
            f"The images have {pixels} pixels together, more than {limit}: send them in several calls.",
            pixels=pixels,
            limit=limit,
        )


class CallerHasTooManyPixels(GatewayError):
    """429: the images of a caller's calls in flight together have too many pixels."""

    status = 429
    code = "too_many_pixels"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"Your calls in flight would have more than {limit} pixels together: wait for their answers.",
            headers={"retry-after": "1"},
            limit=limit,
        )


class MediaTypeUnsupported(GatewayError):
    """415: the declared content type is not that of a raster image."""

    status = 415
    code = "media_type_unsupported"

    def __init__(self, media_type: str, url: str) -> None:
        super().__init__(
            f"{media_type[:64]!r} is no raster image: send the image's bytes without a type, or as image/png, "
            f"image/jpeg, image/webp, image/bmp or image/gif, or in a form: curl -F file=@image.png {url}"
        )


class FileTypeUnsupported(GatewayError):
    """415: the declared content type of a file in a form is not that of a raster image; `index` counts from 0."""

    status = 415
    code = "media_type_unsupported"

    def __init__(self, index: int, name: str, media_type: str) -> None:
        super().__init__(
            f"Image {index}: the file {name[:64]!r} is declared as {media_type[:64]!r}, which is no raster image: "
            "declare it as image/png, image/jpeg, image/webp, image/bmp or image/gif, or without a type.",
            index=index,
        )


class FormExpected(GatewayError):
    """415: the route takes a form, and the declared content type is another."""

    status = 415
    code = "media_type_unsupported"

    def __init__(self, media_type: str, url: str) -> None:
        super().__init__(
            f"{media_type[:64]!r} is no form: send multipart/form-data with the field `file` once for each image: "
            f"curl -F file=@1.png -F file=@2.png {url}"
        )


class QuotaExceeded(GatewayError):
    """429: the caller's quota is used up until the window ends."""

    status = 429
    code = "quota_exceeded"

    def __init__(self, quota: str, retry_after_s: int) -> None:
        super().__init__(
            f"The quota of {quota} is used up: try again in {retry_after_s} s.",
            headers={"retry-after": str(retry_after_s)},
            quota=quota,
        )


class HeadersTooLarge(GatewayError):
    """431: the request's line and headers have more bytes, or there are more headers, than the limit."""

    status = 431
    code = "headers_too_large"

    def __init__(self, limit: int, most: int) -> None:
        super().__init__(
            f"The request's line and headers have more than {limit} bytes, or there are more than {most} headers.",
            headers={"connection": "close"},
            limit_bytes=limit,
            limit_headers=most,
        )
