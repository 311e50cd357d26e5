"""From an image's bytes to what the network takes, bit for bit the same in training, evaluation and serving.

Geometry: the whole image is squashed to the contract's size, each axis by itself. Nothing is cut off and nothing is
added, so that a heatmap maps back onto the image by one plain resize (handlers/overlay.py). The filter is Pillow's
bilinear one, which averages over all pixels when it shrinks; an image that has the contract's size already is not
touched.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, PngImagePlugin, UnidentifiedImageError

from handlers.errors import ImageTooLarge, ImageUnreadable, RequestError
from handlers.signatures import foreign_format

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from contracts.model import Input

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000
"""50 megapixels are 200 MB once decoded; above that a few requests would fill a worker's memory."""

MAX_SIDE = 16_384
MAX_ASPECT = 2_000
"""Pixels of the longer side, and how many times the shorter one: Pillow's tables for resampling grow with the side."""

MAX_SCANNED = 16 * MAX_PIXELS
"""Pixels times scans of a JPEG, each of which goes over all pixels: a second's work. Progressive ones have ten or so,
hostile ones thousands."""

DRAFT_FACTOR = 2
"""A large JPEG is decoded at 1/2, 1/4 or 1/8, to no less than twice the network's size: the filter still averages."""

REDUCED_PIXELS = 2_097_152
"""An image of more pixels, once decoded, is averaged over boxes before anything else is made of it."""

_LEAST_BOXES = 256
_STRIP_PIXELS = 262_144
"""A large image is converted in strips of so many pixels: its memory is that of the decoded file and little more."""

_FREE_READS, _BYTES_A_READ = 2_000, 256
"""Reads that a file's decoder may make, and for how many bytes one more. Of a JPEG of 4-byte markers or a PNG of
12-byte chunks Pillow's loops in Python would take 3 s for 6 MB; real files need one for some thousand bytes."""

# Pillow's own limit would answer before ours and without numbers; ours is checked right after the header is read.
Image.MAX_IMAGE_PIXELS = None
# Pillow's own bound of 64 MiB costs 0.3 s, which 60 kB of compressed text are enough for.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * 1024 * 1024
# It warns of oddities in metadata; the pixels decide. Once for the process: for each image it would cost 0.03 ms.
warnings.filterwarnings("ignore", module=r"PIL\.")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Source: https://www.w3.org/TR/png-3/#11IHDR: samples a pixel has, by colour type.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_INFLATED_BYTES = 1 << 18
_JPEGS = {"JPEG", "MPO"}
_START_OF_SCAN = b"\xff\xda"
_ORIENTATION_TAG = 0x0112
# Source: EXIF 2.32, tag 274: how to turn the stored rows so that the image stands upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image, upright and RGB; `size` is its full (width, height), `image` may be a smaller draft."""

    image: Image.Image
    size: tuple[int, int]


def decode_image(data: bytes | bytearray | memoryview, *, at_least: tuple[int, int] | None = None) -> DecodedImage:
    """The image in `data`: first frame, EXIF orientation honoured, transparency over white, 8 bits a channel.

    Args:
        data: a PNG, JPEG, WebP, BMP or GIF file; its bytes decide, not what anybody declares.
        at_least: (width, height) that suffices; a larger JPEG is decoded at a fraction that is no smaller, several
            times faster, and what still has over 2 megapixels is averaged over boxes to no less. None keeps every
            pixel.

    Raises:
        ImageTooLarge: the header announces more than 50 megapixels, a side of more than 16,384, or one that is more
            than 2,000 times the other; nothing has been decoded.
        ImageUnreadable: no such image, damaged, truncated, without pixels, or a JPEG of too many scans.
    """
    if not data:
        raise ImageUnreadable("the image is empty")
    try:
        return _decode(_CountedFile(data), at_least)
    except (RequestError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        name = foreign_format(data)
        raise ImageUnreadable(f"{name} images are not read here" if name else "the bytes are no known image") from error
    except Exception as error:
        # Decoders meet hostile bytes with OSError, SyntaxError, ValueError, struct.error, IndexError and others.
        raise ImageUnreadable("the image is damaged or truncated") from error


def prepare(image: Image.Image, size: Input) -> NDArray[np.uint8]:
    """The pixels of an RGB image as the network sees them: (height, width, 3) uint8 of the contract's size."""
    if image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), Image.Resampling.BILINEAR)
    # np.asarray(image) does the same by way of Pillow's array interface, 0.03 ms slower.
    return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(size.height, size.width, 3)


def decode_for_network(data: bytes | bytearray | memoryview, size: Input) -> DecodedImage:
    """The image in `data`, decoded only as large as `prepare` needs; raises what `decode_image` raises."""
    return decode_image(data, at_least=(size.width * DRAFT_FACTOR, size.height * DRAFT_FACTOR))


def normalise(pixels: NDArray[np.uint8], size: Input, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """`(pixels / 255 - mean) / std` per channel, for a batch.

    Each of the 256 values of a channel is looked up in a table made in double precision: the result has the same bits
    whatever the batch's length, its memory layout or the processor's vector width.

    Args:
        pixels: (N, H, W, 3) uint8.
        size: the contract's mean and std; H and W are the caller's.
        out: where to put the result; None makes an array.

    Returns:
        (N, 3, H, W) float32, contiguous unless `out` is not.
    """
    count, height, width, _ = pixels.shape
    images = np.empty((count, 3, height, width), dtype=np.float32) if out is None else out
    for channel, table in enumerate(_tables(size)):
        np.take(table, pixels[..., channel], out=images[:, channel], mode="clip")
    return images


@lru_cache(maxsize=8)
def _tables(size: Input) -> list[NDArray[np.float32]]:
    """Return the result of `normalise` for each of the 256 values, for each channel."""
    values = np.arange(256, dtype=np.float64) / 255
    return [((values - mean) / std).astype(np.float32) for mean, std in zip(size.mean, size.std, strict=True)]


class _CountedFile(io.BytesIO):
    """A file in memory that ends a decoder which reads it in tiny bits."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        super().__init__(data)
        self._reads_left = _FREE_READS + len(data) // _BYTES_A_READ

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes.

        Raises:
            ImageUnreadable: there were too many reads for a file of this size.
        """
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ImageUnreadable("the image is in too many parts")
        return super().read(size)


def _decode(file: io.BytesIO, at_least: tuple[int, int] | None) -> DecodedImage:
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        _check_size(width, height)
        if image.format in _JPEGS and width * height * file.getvalue().count(_START_OF_SCAN) > MAX_SCANNED:
            raise ImageUnreadable("the JPEG has too many scans")
        if image.format == "PNG" and struct.unpack_from("!II", file.getbuffer(), 16) != image.size:
            raise ImageUnreadable("the PNG announces two sizes")  # the gateway has judged the first
        turn = _TURNS.get(_orientation(image))
        turned = turn is not None and turn not in {
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.ROTATE_180,
        }
        stored = at_least[::-1] if turned and at_least is not None else at_least
        if stored is not None:
            image.draft(None, stored)  # does nothing unless it is a JPEG
        image.load()
        if image.format == "PNG":
            _check_rows(image, file.getbuffer())
            _note_transparent_colour(image, file.getbuffer())
        upright = _to_rgb(image) if stored is None else _to_small_rgb(image, stored)
    if turn is not None:
        upright = upright.transpose(turn)
    return DecodedImage(upright, (height, width) if turned else (width, height))


def _check_size(width: int, height: int) -> None:
    """Raise `ImageTooLarge` or `ImageUnreadable` for a size that is not decoded."""
    if width < 1 or height < 1:
        raise ImageUnreadable("the image has no pixels")
    longer, shorter = max(width, height), min(width, height)
    if width * height > MAX_PIXELS or longer > MAX_SIDE or longer > MAX_ASPECT * shorter:
        raise ImageTooLarge(width, height, max_pixels=MAX_PIXELS, max_side=MAX_SIDE, max_aspect=MAX_ASPECT)


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG":
        # Its metadata may stand behind the pixels; reading none is a tenth of the decoding. Outside the `try`: pixels
        # that cannot be read are an error, and to a second `load` they would be black.
        image.load()
        if not image.info:
            return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - broken metadata does not make an image unreadable
        return 1


def _check_rows(image: Image.Image, png: memoryview) -> None:
    """Raise `ImageUnreadable` if the PNG's data ends before its last row: Pillow leaves the rest black.

    Of an interlaced PNG Pillow says so itself. Counting the decompressed bytes costs half as much as decoding does, so
    they are counted only if the last row is black.
    """
    width, height = image.size
    depth, colour_type, interlaced = png[24], png[25], png[28]
    last_row = image.crop((0, height - 1, width, height))
    if interlaced or last_row.getbbox(alpha_only=False) is not None:
        return
    missing = height * (1 + (width * depth * _PNG_CHANNELS[colour_type] + 7) // 8)
    decompressor = zlib.decompressobj()
    for part in _png_data(png):
        left: bytes | memoryview = part
        while missing > 0 and (rows := decompressor.decompress(left, _INFLATED_BYTES)):
            missing -= len(rows)
            left = decompressor.unconsumed_tail
    if missing > 0:
        raise ImageUnreadable("the PNG has fewer rows than it announces")


def _png_data(png: memoryview) -> Iterator[memoryview]:
    """Yield the contents of the IDAT chunks."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(png):
        length, kind = struct.unpack_from("!I4s", png, at)
        if kind == b"IDAT":
            yield png[at + 8 : at + 8 + length]
        at += length + 12


def _note_transparent_colour(image: Image.Image, png: memoryview) -> None:
    """Make the transparent colour of a PNG (tRNS) one that Pillow finds among the pixels it has decoded.

    The colour is told in the file's depth, and Pillow looks for it among 8-bit values: 4-bit grey, which it stretches,
    never fits, and 16-bit RGB has lost its lower bytes. Source: https://www.w3.org/TR/png-3/#11tRNS
    """
    depth, colour = png[24], image.info.get("transparency")
    if isinstance(colour, int) and image.mode == "L" and depth < 8:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif isinstance(colour, tuple) and depth == 16:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as lower:
            # As if the bytes stood in the other order: the lower one of each is what is left of it.
            lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
            lower.load()
            bytes_and_keys = [
                (band, part)
                for half, shift in ((image, 8), (lower, 0))
                for band, part in zip(half.split(), ((value >> shift) & 255 for value in colour), strict=True)
            ]
        opaque = Image.new("L", image.size)
        for band, key in bytes_and_keys:
            opaque = ImageChops.lighter(opaque, band.point([0 if value == key else 255 for value in range(256)]))
        del image.info["transparency"]
        image.putalpha(opaque)


def _to_small_rgb(image: Image.Image, at_least: tuple[int, int]) -> Image.Image:
    """The image as RGB, if it is a large one averaged over boxes to no less than (width, height) `at_least`."""
    width, height = image.size
    # The last box is mostly no whole one, and stands for one in what follows: of 256 it shifts nothing that matters.
    across, down = (
        max(1, side // max(wanted, _LEAST_BOXES)) for side, wanted in zip(image.size, at_least, strict=True)
    )
    if width * height <= REDUCED_PIXELS or across * down == 1:
        return _to_rgb(image)
    small = Image.new("RGB", (-(-width // across), -(-height // down)))
    rows = max(1, _STRIP_PIXELS // (width * down)) * down
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        small.paste(_to_rgb(strip).reduce((across, down)), (0, top // down))
    return small


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # the opened file keeps its buffers and its file otherwise
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 instead of scaling it.
        values = np.asarray(image).astype(np.uint32)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65_535
        return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGB", colours.size, (255, 255, 255))
        white.paste(colours, mask=colours.getchannel("A"))
        return white
    return image.convert("RGB")
