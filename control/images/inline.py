"""Show a PNG in the terminal: by kitty's, iTerm2's or the sixel protocol, else in coloured half blocks."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

COLUMNS = 32
"""Width of an image, in characters. A character is about twice as high as wide."""

_KITTY_CHUNK = 4096
_SIXEL_SIDE = 256
_SIXEL_COLOURS = 64
_SIXEL_TERMINALS = ("foot", "mlterm", "contour", "yaft")


def find_protocol(environ: Mapping[str, str], *, is_terminal: bool) -> str | None:
    """Return `kitty`, `iterm2`, `sixel` or `blocks` by the terminal's variables; None if it shows no colours.

    tmux and screen pass no images on, so that half blocks are left there.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if not is_terminal or term in {"", "dumb"} or environ.get("NO_COLOR"):
        return None
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return "blocks"
    if "KITTY_WINDOW_ID" in environ or term in {"xterm-kitty", "xterm-ghostty"} or program == "ghostty":
        return "kitty"
    if program in {"iTerm.app", "WezTerm"} or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if "sixel" in term or term.startswith(_SIXEL_TERMINALS):
        return "sixel"
    return "blocks"


def draw(png: bytes, protocol: str) -> str:
    """Return the text that shows the PNG in a terminal of this protocol, one of those of `find_protocol`.

    Raises:
        ImportError: sixel and half blocks need Pillow, and it is not installed.
    """
    if protocol == "kitty":
        return _kitty(png)
    if protocol == "iterm2":
        return _iterm2(png)
    from PIL import Image  # noqa: PLC0415 - optional

    with Image.open(io.BytesIO(png)) as file:
        image = file.convert("RGB")
    return _sixel(image) if protocol == "sixel" else _blocks(image)


def _kitty(png: bytes) -> str:
    """Source: https://sw.kovidgoyal.net/kitty/graphics-protocol/, direct transmission of a PNG in chunks."""
    data = base64.standard_b64encode(png).decode("ascii")
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    first = f"a=T,f=100,c={COLUMNS},"
    return (
        "".join(
            f"\x1b_G{first if index == 0 else ''}m={int(index < len(chunks) - 1)};{chunk}\x1b\\"
            for index, chunk in enumerate(chunks)
        )
        + "\n"
    )


def _iterm2(png: bytes) -> str:
    """Source: https://iterm2.com/documentation-images.html."""
    data = base64.standard_b64encode(png).decode("ascii")
    return f"\x1b]1337;File=inline=1;size={len(png)};width={COLUMNS}:{data}\x07\n"


def _sixel(image: Image) -> str:
    """Return the image as sixels: bands of six lines, one pass for each colour of a band.

    Source: VT330/VT340 Programmer Reference Manual, volume 2, chapter 14, https://vt100.net/docs/vt3xx-gp/chapter14.html
    """
    from PIL import Image as Pillow  # noqa: PLC0415 - as in `draw`

    scale = _SIXEL_SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    flat = image.resize((size[0], size[1]), Pillow.Resampling.BICUBIC).quantize(_SIXEL_COLOURS)
    palette = flat.getpalette() or []
    width, height = flat.size
    pixels = flat.tobytes()
    parts = [f'\x1bPq"1;1;{width};{height}']
    for index in range(len(palette) // 3):
        red, green, blue = (round(100 * value / 255) for value in palette[3 * index : 3 * index + 3])
        parts.append(f"#{index};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        rows = [pixels[line * width : (line + 1) * width] for line in range(top, min(top + 6, height))]
        passes = [_sixel_pass(rows, colour) for colour in sorted(set(b"".join(rows)))]
        parts.append("$".join(passes) + "-")
    return "".join(parts) + "\x1b\\\n"


def _sixel_pass(rows: list[bytes], colour: int) -> str:
    """Return one colour of a band: a character for each column, whose bits are the band's lines, the top one lowest."""
    columns = zip(*rows, strict=True)
    marks = (sum((value == colour) << line for line, value in enumerate(column)) for column in columns)
    return f"#{colour}" + "".join(chr(63 + mark) for mark in marks)


def _blocks(image: Image) -> str:
    """Return the image as upper half blocks: a character shows two pixels, its foreground above its background."""
    width = COLUMNS
    height = max(2, round(image.height * width / image.width))
    small = image.resize((width, height + height % 2))
    data = small.tobytes()

    def colour(x: int, y: int) -> str:
        start = 3 * (y * width + x)
        return ";".join(map(str, data[start : start + 3]))

    lines = [
        "".join(f"\x1b[38;2;{colour(x, y)};48;2;{colour(x, y + 1)}m▀" for x in range(width))
        for y in range(0, small.height, 2)
    ]
    return "\x1b[0m\n".join(lines) + "\x1b[0m\n"
