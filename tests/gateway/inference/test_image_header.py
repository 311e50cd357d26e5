"""The size read from a file's header equals the decoder's, and reading it takes microseconds for any file."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gateway.inference.image_header import LARGE_PIXELS, count_pixels
from gateway.refusals import ImageTooLarge

MOST = 25_000_000
COUNTS_AS_LARGE = LARGE_PIXELS + 1


def encode(mode: str, size: tuple[int, int], name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, name, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


FILES = {
    "PNG": ("RGB", "PNG", {}),
    "PNG of a palette": ("P", "PNG", {"transparency": 0}),
    "PNG of 16 bits": ("I;16", "PNG", {}),
    "JPEG": ("RGB", "JPEG", {}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}),
    "grey JPEG with a comment, a profile and a turn": (
        "L",
        "JPEG",
        {"comment": b"x\xff\xd9" * 9000, "icc_profile": bytes(200_000), "exif": Image.Exif()},
    ),
    "CMYK JPEG": ("CMYK", "JPEG", {}),
    "MPO": ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    "WebP": ("RGB", "WEBP", {}),
    "lossless WebP": ("RGB", "WEBP", {"lossless": True}),
    "WebP with alpha and a profile": ("RGBA", "WEBP", {"icc_profile": bytes(100)}),
    "animated WebP": ("RGB", "WEBP", {"save_all": True, "append_images": [Image.new("RGB", (9, 9), "red")]}),
    "BMP": ("RGB", "BMP", {}),
    "BMP of 1 bit": ("1", "BMP", {}),
    "GIF": ("P", "GIF", {}),
    "GIF with a comment": ("L", "GIF", {"comment": b"x" * 3000}),
    "animated GIF": ("P", "GIF", {"save_all": True, "append_images": [Image.new("P", (9, 9), 1)], "loop": 0}),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (4000, 3), (301, 1023)])
def test_the_size_equals_the_decoders(name: str, size: tuple[int, int]) -> None:
    mode, format_name, options = FILES[name]
    if name.startswith("animated") or name == "MPO":
        options = {**options, "append_images": [Image.new(mode, size, 1)]}
    data = encode(mode, size, format_name, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == size
    assert count_pixels(data, MOST) == size[0] * size[1]


def test_a_bmp_from_the_top_and_one_with_the_old_header_are_read() -> None:
    whole = encode("RGB", (40, 30), "BMP")
    from_top = whole[:22] + struct.pack("<i", -30) + whole[26:]
    old = b"BM" + struct.pack("<IHHI", 26 + 3600, 0, 0, 26) + struct.pack("<IHHHH", 12, 40, 30, 1, 24) + bytes(3600)
    for data in (from_top, old):
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (40, 30)
        assert count_pixels(data, MOST) == 1200


def test_a_gif_whose_first_frame_is_larger_than_its_screen_counts_as_that() -> None:
    whole = bytearray(encode("P", (300, 200), "GIF"))
    whole[6:10] = struct.pack("<HH", 1, 1)
    with Image.open(io.BytesIO(bytes(whole))) as image:
        assert image.size == (300, 200)
    assert count_pixels(bytes(whole), MOST) == 60_000


@pytest.mark.parametrize(
    "data",
    [
        encode("RGB", (16_383, 3_050), "WEBP", lossless=True, method=0),
        encode("L", (5_001, 5_000), "PNG"),
        encode("L", (43_000, 1), "PNG"),
        encode("L", (2_001, 1), "PNG"),
        encode("1", (16_385, 9), "PNG"),
    ],
)
def test_too_many_pixels_too_long_a_side_and_too_extreme_an_aspect_are_refused(data: bytes) -> None:
    with pytest.raises(ImageTooLarge) as refusal:
        count_pixels(data, MOST)
    remedy = "send one of at most 25000000 pixels, 16384 a side, whose longer side is at most 2000 times the shorter"
    assert remedy in str(refusal.value)


@pytest.mark.parametrize("data", [encode("L", (5_000, 5_000), "PNG"), encode("L", (16_384, 9), "PNG")])
def test_sizes_at_the_bounds_pass(data: bytes) -> None:
    assert count_pixels(data, MOST) in {25_000_000, 147_456}


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_header_counts_as_a_large_image(name: str) -> None:
    data = encode("RGB" if name != "GIF" else "P", (40, 30), name)
    lengths = [count_pixels(data[:length], MOST) for length in range(len(data))]
    assert set(lengths) <= {0, 1200, COUNTS_AS_LARGE}
    assert COUNTS_AS_LARGE in lengths


@pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 100, b"RIFF\x00\x00\x00\x00WAVE"])
def test_bytes_that_are_no_image_have_no_pixels_and_are_left_to_the_handler(data: bytes) -> None:
    assert count_pixels(data, MOST) == 0


def test_headers_made_to_keep_a_reader_busy_take_a_millisecond() -> None:
    """2 MB of them keep Pillow's `open` busy for 0.5 to 1 s."""
    jpeg, png, gif = encode("RGB", (32, 32), "JPEG"), encode("RGB", (32, 32), "PNG"), encode("P", (32, 32), "GIF")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    end_of_palette = gif.index(b",")
    hostile = [
        jpeg[:2] + b"\xff\xfe\x00\x02" * 500_000 + jpeg[2:],
        jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:],
        jpeg[:4] + bytes(2_000_000) + jpeg[4:],
        png[:33] + chunk(b"tEXt", b"a\0b") * 150_000 + png[33:],
        png[:33] + text * 60 + png[33:],
        gif[:end_of_palette] + b"!\xfe\x01x\x00" * 400_000 + gif[end_of_palette:],
    ]
    started = time.process_time()
    counts = [count_pixels(data, MOST) for data in hostile]
    assert time.process_time() - started < 0.05
    assert set(counts) <= {1024, COUNTS_AS_LARGE}


def test_bytes_changed_at_random_raise_only_the_refusal() -> None:
    chance = np.random.default_rng(0)
    for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        whole = encode("RGB" if name != "GIF" else "P", (40, 30), name)
        for _ in range(300):
            data = bytearray(whole)
            for at in chance.integers(0, min(len(data), 64), 3):
                data[at] = chance.integers(0, 256)
            try:
                assert count_pixels(bytes(data), MOST) >= 0
            except ImageTooLarge:
                continue
