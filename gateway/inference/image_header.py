"""How many pixels an image has by its file's header: read before anything is queued for it, and decoding nothing.

A file of 40 bytes may be an image whose decoding takes a second. Pillow's `open` is not used for this: it inflates a
PNG's text (0.4 s for 60 kB), and its loops over the parts of a PNG or JPEG take 0.5 s for 1 MB of empty ones, in which
the event loop would answer nobody. Here each format takes some microseconds, and at most a thousand steps. Formats are
told by their first bytes, as by the handler, which checks the size again when it opens the file.
"""

from __future__ import annotations

import struct

from gateway.refusals import ImageTooLarge

MAX_SIDE = 16_384
MAX_ASPECT = 2_000
"""Pixels of the longer side, and how many times the shorter one."""

LARGE_PIXELS = 2_097_152
"""An image of more pixels is sent by itself, and together the images of one upstream batch have no more."""

_STEPS = 1_000
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_GIFS = (b"GIF87a", b"GIF89a")
# Source: ITU-T T.81, table B.1: frame headers (SOF), and markers without a length.
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = {0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}
_FILL, _START_OF_SCAN = 0xFF, 0xDA


def count_pixels(image: bytes, most: int) -> int:
    """Return the number of pixels that the file announces: 0 if it is no image of a known format.

    A file that begins as an image and whose header cannot be read counts as a large one.

    Raises:
        ImageTooLarge: there are more than `most`, or a side is too long, or too long beside the other one.
    """
    try:
        size = _read_size(image)
    except (struct.error, IndexError, ValueError):  # the file ends, or has no such part
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
    """Return (width, height); None for no image of a known format."""
    if image.startswith(_PNG):
        # The first chunk tells it, always: https://www.w3.org/TR/png-3/#5ChunkOrdering
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
    """Return the size in the frame header; of several the largest, because decoders differ in which one they take."""
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
    raise IndexError("no scan begins in the first parts")


def _webp_size(image: bytes) -> tuple[int, int]:
    """Source: https://developers.google.com/speed/webp/docs/riff_container and RFC 9649."""
    kind = image[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(image[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", image, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind != b"VP8 ":
        raise IndexError("no image comes first")
    width, height = struct.unpack_from("<HH", image, 26)
    return width & 0x3FFF, height & 0x3FFF


def _gif_size(image: bytes) -> tuple[int, int]:
    """Return the size of the screen, or of the first frame's far corner where that lies beyond, as Pillow does."""
    width, height, flags = struct.unpack_from("<HHB", image, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    steps = _STEPS
    while image[at] == 0x21:  # an extension: its label, then blocks up to an empty one
        at += 2
        while (length := image[at]) and steps:
            at, steps = at + 1 + length, steps - 1
        at, steps = at + 1, steps - 1
        if steps <= 0:
            raise IndexError("no frame begins in the first parts")
    if image[at] == 0x2C:
        left, top, frame_width, frame_height = struct.unpack_from("<4H", image, at + 1)
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    return width, height
