from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from contracts.model import Input
from handlers.errors import RequestError
from handlers.plain_png import read_plain_png
from handlers.preprocess import decode_for_network, prepare

SIZE = Input(24, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
GRADIENT = np.linspace(0, 255, NOISE.size).astype(np.uint8).reshape(NOISE.shape)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


def png(compressed: bytes, *, header: bytes = bytes([8, 2, 0, 0, 0]), parts: int = 1) -> bytes:
    step = -(-len(compressed) // parts)
    data = b"".join(chunk(b"IDAT", compressed[start : start + step]) for start in range(0, len(compressed), step))
    beginning = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack("!II", SIZE.width, SIZE.height) + header)
    return beginning + data + chunk(b"IEND", b"")


def scan_lines(pixels: np.ndarray, method: int) -> bytes:
    """The lines of the image, each announced as filtered by `method`: whatever they are then, they are an image."""
    return b"".join(bytes([method]) + line.tobytes() for line in pixels)


def saved(mode: str, pixels: np.ndarray = NOISE, name: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, name, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return prepare(decode_for_network(data, SIZE).image, SIZE)


@pytest.mark.parametrize("method", range(5))
@pytest.mark.parametrize("pixels", [NOISE, GRADIENT], ids=["noise", "gradient"])
@pytest.mark.parametrize("parts", [1, 3])
def test_pixels_are_those_that_pillow_reads(method, pixels, parts):
    data = png(zlib.compress(scan_lines(pixels, method)), parts=parts)
    read = read_plain_png(memoryview(data), SIZE)
    assert read is not None
    np.testing.assert_array_equal(read, by_pillow(data))


def test_image_that_is_not_plain_is_left_to_pillow():
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    others = {
        **{mode: saved(mode) for mode in ("L", "P", "RGBA", "LA", "1", "I;16")},
        "transparent colour": saved("RGB", transparency=(1, 2, 3)),
        "gamma": saved("RGB", pnginfo=text),
        "turned": saved("RGB", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
        "another size": saved("RGB", NOISE[:20]),
        "JPEG": saved("RGB", name="JPEG"),
        "interlaced": png(zlib.compress(scan_lines(NOISE, 0)), header=bytes([8, 2, 0, 0, 1])),
        "more than the image": saved("RGB") + b"more",
        "many parts": png(zlib.compress(scan_lines(NOISE, 0)), parts=1000),
        "nothing": b"",
    }
    assert [name for name, data in others.items() if read_plain_png(data, SIZE) is not None] == []
    assert read_plain_png(saved("RGB"), SIZE) is not None


def test_damaged_image_is_never_answered_otherwise_than_by_pillow():
    """Bytes changed at random, with sums that are right or wrong; lines cut off; lines that have no such filter."""
    chance = random.Random(0)
    lines = scan_lines(NOISE // 16, 1)
    answered = 0
    for _ in range(1500):
        compressed = bytearray(zlib.compress(lines[: chance.choice([len(lines), chance.randrange(1, len(lines))])]))
        for _ in range(chance.choice([0, 0, 1, 3])):
            compressed[chance.randrange(len(compressed))] = chance.randrange(256)
        data = bytearray(png(bytes(compressed[: chance.choice([len(compressed), chance.randrange(1, 200)])])))
        for _ in range(chance.choice([0, 0, 1])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        read = read_plain_png(bytes(data), SIZE)
        if read is None:
            continue
        answered += 1
        try:
            expected = by_pillow(bytes(data))
        except RequestError as error:
            pytest.fail(f"Pillow says {error}")
        np.testing.assert_array_equal(read, expected)
    assert answered > 20
