"""Read an image's number of pixels from its file's header, without decoding, before the call is queued.

A file of 40 bytes may be an image whose decoding takes a second. Pillow's `open` is not used here because it may block
the event loop: it decompresses a PNG's text (0.4 s for 60 kB), and it takes 0.5 s to walk through 1 MB of empty PNG or
JPEG segments. This module takes microseconds, and at most a thousand steps. It recognises formats by their first bytes,
as the handler does, which checks the size again when it opens the file.
"""

from __future__ import annotations

import struct

from gateway.refusals import ImageTooLarge

MAX_SIDE = 16_384
MAX_ASPECT = 2_000
"""The most pixels that a side may have, and the largest ratio of the longer to the shorter side."""

LARGE_PIXELS = 2_097_152
"""Pixels that the images of one upstream batch may have together; a larger image is sent alone."""

_STEPS = 1_000
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_GIFS = (b"GIF87a", b"GIF89a")
# Source: ITU-T T.81, table B.1: frame headers (SOF), and markers without a length.
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = {0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}
_FILL, _START_OF_SCAN = 0xFF, 0xDA


def count_pixels(image: bytes, most: int) -> int:
    """Return the number of pixels by the file's header; 0 if it is no image of a known format.

    A file that begins like an image and has a broken header counts as a large image.

    Raises:
        ImageTooLarge: the image has more than `most` pixels, a side is too long, or the ratio of the sides too large.
    """
    try:
        size = _read_size(image)
    except (struct.error, IndexError, ValueError):  # the file ends too early, or lacks a segment
        return LARGE_PIXELS + 1
    if size is None:
        return 0
    width, height = size
    longer, shorter = max(width, height), min(width, height)
    pixels = width * height
    if pixels > most or (pixels and (longer > MAX_SIDE or longer > MAX_ASPECT * shorter)):
        raise ImageTooLarge(width, height, max_pixels=most, max_side=MAX_SIDE, max_aspect=MAX_ASPECT)
    return pixels


def _read_size(image: bytes) -> tuple[int, int] | None:
    """Return (width, height); None if the file is no image of a known format."""
    if image.startswith(_PNG):
        # The first chunk is always IHDR. Source: https://www.w3.org/TR/png-3/#5ChunkOrdering
        width, height = struct.unpack_from("!II", image, 16)
        return width, height
    if image.startswith(_JPEG):
        return _jpeg_size(image)
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return _webp_size(image)
    if image.startswith(_GIFS):
        return _gif_size(image)
    if image.startswith(b"BM"):
        (header_bytes,) = struct.unpack_from("<I", image, 14)
        width, height = struct.unpack_from("<HH" if header_bytes == 12 else "<ii", image, 18)
        return abs(width), abs(height)
    return None


def _jpeg_size(image: bytes) -> tuple[int, int]:
    """Return the size in the frame header; the largest if there are several, because decoders choose differently."""
    at, sizes = 2, list[tuple[int, int]]()
    for _ in range(_STEPS):
        at = image.index(b"\xff", at) if image[at] != _FILL else at
        marker = image[at + 1]
        if marker == _START_OF_SCAN:
            return max(sizes, key=lambda size: size[0] * size[1])
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from("!HH", image, at + 5)
            sizes.append((width, height))
        if marker == _FILL:
            at += 1
        elif marker in _BARE_MARKERS:
            at += 2
        else:
            at += 2 + int.from_bytes(image[at + 2 : at + 4], "big")
    raise IndexError("no scan begins in the first segments")


def _webp_size(image: bytes) -> tuple[int, int]:
    """Return the size of a WebP image.

    Source: https://developers.google.com/speed/webp/docs/riff_container and RFC 9649.
    """
    kind = image[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(image[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", image, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind != b"VP8 ":
        raise IndexError("the first chunk is no image")
    width, height = struct.unpack_from("<HH", image, 26)
    return width & 0x3FFF, height & 0x3FFF


def _gif_size(image: bytes) -> tuple[int, int]:
    """Return the size of the screen, enlarged to hold the first frame, as Pillow does."""
    width, height, flags = struct.unpack_from("<HHB", image, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    steps = _STEPS
    while image[at] == 0x21:  # an extension: its label, then blocks up to an empty one
        at += 2
        while (length := image[at]) and steps:
            at, steps = at + 1 + length, steps - 1
        at, steps = at + 1, steps - 1
        if steps <= 0:
            raise IndexError("no frame begins in the first blocks")
    if image[at] == 0x2C:
        left, top, frame_width, frame_height = struct.unpack_from("<4H", image, at + 1)
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    return width, height
