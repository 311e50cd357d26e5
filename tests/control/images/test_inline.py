"""An image in the terminal: the right protocol by the environment, and bytes that decode to the image again."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from control.images.inline import COLUMNS, draw, find_protocol


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "dumb"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
        ({}, None),
    ],
)
def test_protocol_follows_the_environment(environ, protocol):
    assert find_protocol(environ, is_terminal=True) == protocol
    assert find_protocol(environ, is_terminal=False) is None


@pytest.fixture
def image():
    pixels = np.zeros((20, 10, 3), np.uint8)
    pixels[:7], pixels[7:, :4], pixels[7:, 4:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


@pytest.fixture
def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_kitty_gets_the_png_in_chunks():
    data = bytes(range(256)) * 40
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", draw(data, "kitty"))
    assert base64.b64decode("".join(chunk for _, chunk in parts)) == data
    assert [keys.split(",")[-1] for keys, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]
    assert all(len(chunk) <= 4096 for _, chunk in parts)
    assert parts[0][0].startswith("a=T,f=100")


def test_iterm2_gets_the_png_whole(png):
    (data,) = re.findall(r"\x1b\]1337;File=inline=1;size=\d+;width=\d+:([^\x07]*)\x07", draw(png, "iterm2"))
    assert base64.b64decode(data) == png


def decode_sixels(text):
    """Return the pixels of sixels as (height, width, 3) uint8."""
    head, width, height = re.match(r"(\x1bPq\"1;1;(\d+);(\d+))", text).groups()
    body = text[len(head) : text.index("\x1b\\")]
    palette = {int(n): rgb for n, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", body)}
    pixels = np.zeros((int(height), int(width), 3), np.uint8)
    for band, passes in enumerate(re.sub(r"#\d+;2;\d+;\d+;\d+", "", body).split("-")):
        for colour, marks in re.findall(r"#(\d+)([?-~]*)", passes):
            for x, mark in enumerate(marks):
                for line in range(6):
                    if (ord(mark) - 63) >> line & 1:
                        pixels[6 * band + line, x] = [round(255 * int(value) / 100) for value in palette[int(colour)]]
    return pixels


def test_sixels_decode_to_the_image(png, image):
    pixels = decode_sixels(draw(png, "sixel"))
    assert pixels.shape == (256, 128, 3)
    for (x, y), colour in {(60, 20): (255, 0, 0), (10, 200): (0, 255, 0), (100, 200): (0, 0, 255)}.items():
        np.testing.assert_allclose(pixels[y, x], colour, atol=12)


def test_half_blocks_show_two_pixels_in_one_character(png):
    lines = draw(png, "blocks").splitlines()
    assert len(lines) == COLUMNS  # twice as high as wide, and two pixels in a character
    assert all(line.count("▀") == COLUMNS for line in lines)
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m" in lines[0]
