"""A heatmap laid over its image, as a PNG of the image's own proportions.

The network saw the whole image squashed to its input size (handlers/preprocess.py), so resizing the heatmap to the
image's size is the exact way back. Colours: inferno, whose lightness rises evenly with the value; the image fades
to grey as it mixes in, so that hue and lightness tell the heat on light and dark images alike.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contracts.wire import ABOUT_KEYWORD, MAX_OVERLAY_SIDE

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INFERNO = base64.b64decode(
    "AAADAAAEAAAGAQAHAQEJAQELAgEOAgIQAwISBAMUBAMWBQQYBgQbBwUdCAYfCQYhCgcjCwcmDQgoDggqDwktEAkvEgoyEwo0FAs2Fgs5Fws7GQs+"
    "GgtAHAxDHQxFHwxHIAxKIgtMJAtOJgtQJwtSKQtUKwpWLQpYLgpaMApcMgldNAlfNQlgNwlhOQliOwlkPAllPglmQAlmQQlnQwpoRQppRgppSAtq"
    "SgtqSwxrTQxrTw1sUA1sUg5sUw5tVQ9tVw9tWBBtWhFtWxFuXRJuXxJuYBNuYhRuYxRuZRVuZhVuaBZuahduaxdubRhubhhucBluchltcxptdRtt"
    "dhtteBxtehxtex1sfR1sfh5sgB9rgR9rgyBrhSBqhiFqiCFqiSJpiyJpjSNpjiRokCRokSVnkyVnlSZmliZmmCdlmShkmyhknCljniljoCpioSth"
    "oythpCxgpixfpy1fqS5eqy5drC9crjBbrzFbsTFasjJZtDNYtTNXtzRWuDVWujZVuzdUvTdTvjhSvzlRwTpQwjtPxDxOxT1Nxz5MyD5LyT9Ky0BJ"
    "zEFIzUJHz0RG0EVE0UZD0kdC1EhB1UlA1ko/10s+2U092k4720863FA53VI43lM331Q24FY04lcz41gy5Fox5Vsw5lwu5l4t518s6GEr6WIq6mQo"
    "62Un7Gcm7Wgl7Woj7mwi720h8G8f8HAe8XId8nQc8nUa83cZ83kY9HoW9XwV9X4U9oAS9oER94MQ94UO+IcN+IgM+IoL+YwJ+Y4I+ZAI+pEH+pMG"
    "+pUG+pcG+5kG+5sG+50G+54H+6AH+6II+6QK+6YL+6gN+6oO+6wQ+64S+7AU+7EW+7MY+7Ua+7cc+7ke+rsh+r0j+r8l+sEo+cMq+cUs+ccv+Mkx"
    "+Ms0+M03988699E89tM/9tVC9ddF9dlI9NtL9NxP895S8+BW8+JZ8uRd8uZg8ehk8elo8ets8e1w8e508fB58fJ98vOB8vSF8/aJ9PeN9fiR9vqV"
    "9/uZ+fyd+v2g/P6k"
)
"""The colour map inferno, 256 RGB values. Source: van der Walt & Smith 2015, CC0, https://bids.github.io/colormap/"""

_COLOURS = np.frombuffer(_INFERNO, dtype=np.uint8).reshape(256, 3).astype(np.float32)


def overlay_size(image_size: tuple[int, int], long_side: int | None) -> tuple[int, int]:
    """Return (width, height) of the overlay of an image of that size.

    Args:
        image_size: (width, height) of the image at full resolution.
        long_side: pixels asked for; None keeps the image's own, up to `MAX_OVERLAY_SIDE`.
    """
    long = max(image_size)
    wanted = min(long_side if long_side is not None else long, MAX_OVERLAY_SIDE)
    width, height = (max(1, round(side * wanted / long)) for side in image_size)
    return width, height


def stretch(heatmap: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """The heatmap at (width, height) `size`: (height, width) float32 in 0..1."""
    stretched = Image.fromarray(heatmap.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(stretched, dtype=np.float32), 0, 1)


def draw_overlay(
    image: Image.Image,
    heatmap: NDArray[np.float32],
    *,
    size: tuple[int, int],
    alpha: float,
    about: str = "",
    caption: str = "",
) -> bytes:
    """The PNG of the image with its heatmap.

    Args:
        image: RGB, of any resolution.
        heatmap: (H, W) float32 in 0..1, over the whole image.
        size: the overlay's (width, height).
        alpha: how much of the colours shows: 0 is the image alone, 1 the heatmap alone.
        about: ASCII that the file carries as the text `ABOUT_KEYWORD`, before its pixels; none where empty.
        caption: the text `Description` that image viewers show, after `about`. It is not drawn: that would change the
            image's proportions, or hide a part of what is explained.
    """
    resized = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    # Luma of ITU-R BT.601, as Pillow's own conversion to grey.
    grey = (resized @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    faded = resized + alpha * (grey - resized)
    colours = _COLOURS[np.rint(stretch(heatmap, size) * 255).astype(np.uint8)]
    mixed = np.rint((1 - alpha) * faded + alpha * colours).astype(np.uint8)
    text = PngInfo()
    if about:
        text.add_text(ABOUT_KEYWORD, about)
    if caption:
        text.add_itxt("Description", caption)
    file = io.BytesIO()
    Image.fromarray(mixed).save(file, "PNG", compress_level=4, pnginfo=text)
    return file.getvalue()
