"""From an image's bytes to what the network takes, bit for bit the same in training, evaluation and serving.

Geometry: the whole image is squashed to the contract's size, each axis by itself. Nothing is cut off and nothing is
added, so that a heatmap maps back onto the image by one plain resize (handlers/overlay.py). The filter is Pillow's
bilinear one, which averages over all pixels when it shrinks; an image that has the contract's size already is not
touched.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from handlers.errors import ImageTooLarge, ImageUnreadable, RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from contracts.model import Input

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000
"""50 megapixels are 200 MB once decoded; above that a few requests would fill a worker's memory."""

MAX_SCANNED = 16 * MAX_PIXELS
"""Pixels times scans of a JPEG, each of which goes over all pixels: a second's work. Progressive ones have ten or so,
hostile ones thousands."""

DRAFT_FACTOR = 2
"""A large JPEG is decoded at 1/2, 1/4 or 1/8, to no less than twice the network's size: the filter still averages."""

# Pillow's own limit would answer before ours and without numbers; ours is checked right after the header is read.
Image.MAX_IMAGE_PIXELS = None
# It warns of oddities in metadata; the pixels decide. Once for the process: for each image it would cost 0.03 ms.
warnings.filterwarnings("ignore", module=r"PIL\.")

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
class Picture:
    """A decoded image, upright and RGB; `size` is its full (width, height), `image` may be a smaller draft."""

    image: Image.Image
    size: tuple[int, int]


def decode_image(data: bytes | bytearray | memoryview, *, at_least: tuple[int, int] | None = None) -> Picture:
    """The image in `data`: first frame, EXIF orientation honoured, transparency over white, 8 bits a channel.

    Args:
        data: a PNG, JPEG, WebP, BMP or GIF file; its bytes decide, not what anybody declares.
        at_least: (width, height) that suffices; a larger JPEG is decoded at a fraction that is no smaller, several
            times faster. None decodes every pixel.

    Raises:
        ImageTooLarge: the header announces more than 50 megapixels; nothing has been decoded.
        ImageUnreadable: no such image, damaged, truncated, without pixels, or a JPEG of too many scans.
    """
    if not data:
        raise ImageUnreadable("the image is empty")
    try:
        return _decode(io.BytesIO(data), at_least)
    except (RequestError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageUnreadable("the bytes are no known image") from error
    except Exception as error:
        # Decoders meet hostile bytes with OSError, SyntaxError, ValueError, struct.error, IndexError and others.
        raise ImageUnreadable("the image is damaged or truncated") from error


def prepare(image: Image.Image, size: Input) -> NDArray[np.uint8]:
    """The pixels of an RGB image as the network sees them: (height, width, 3) uint8 of the contract's size."""
    if image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), Image.Resampling.BILINEAR)
    # np.asarray(image) does the same by way of Pillow's array interface, 0.03 ms slower.
    return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(size.height, size.width, 3)


def decode_for_network(data: bytes | bytearray | memoryview, size: Input) -> Picture:
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
    """What `normalise` makes of each of the 256 values, for each channel."""
    values = np.arange(256, dtype=np.float64) / 255
    return [((values - mean) / std).astype(np.float32) for mean, std in zip(size.mean, size.std, strict=True)]


def _decode(file: io.BytesIO, at_least: tuple[int, int] | None) -> Picture:
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise ImageUnreadable("the image has no pixels")
        if width * height > MAX_PIXELS:
            raise ImageTooLarge(width, height, MAX_PIXELS)
        if image.format in _JPEGS and width * height * file.getvalue().count(_START_OF_SCAN) > MAX_SCANNED:
            raise ImageUnreadable("the JPEG has too many scans")
        turn = _TURNS.get(_orientation(image))
        turned = turn is not None and turn not in {
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.ROTATE_180,
        }
        if at_least is not None:
            image.draft(None, at_least[::-1] if turned else at_least)  # does nothing unless it is a JPEG
        image.load()
        upright = _to_rgb(image)
    if turn is not None:
        upright = upright.transpose(turn)
    return Picture(upright, (height, width) if turned else (width, height))


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # the opened file keeps its buffers and its file otherwise
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 instead of scaling it.
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGB", colours.size, (255, 255, 255))
        white.paste(colours, mask=colours.getchannel("A"))
        return white
    return image.convert("RGB")
