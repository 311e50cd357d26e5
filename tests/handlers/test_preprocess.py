from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contracts.model import Input
from handlers.errors import ImageTooLarge, ImageUnreadable
from handlers.preprocess import FORMATS, decode_for_network, decode_image, normalise, prepare

SIZE = Input(32, 32, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
RED, BLUE = (255, 0, 0), (0, 0, 255)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and ends where its pixels would begin."""
    chunk = b"IHDR" + struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack("!I", 13) + chunk + struct.pack("!I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack("!I", 100) + b"IDAT"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, colour_type: int, rows: bytes, *more: bytes, interlaced: bool = False
) -> bytes:
    """A PNG whose complete zlib stream holds `rows`, with the chunks `more` before it."""
    header = struct.pack("!IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    chunks = (chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_decoded_by_its_bytes(name, noise, encode):
    decoded = decode_image(encode(noise, name))
    assert decoded.image.mode == "RGB"
    assert decoded.image.size == decoded.size == (40, 30)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_truncated_images_are_unreadable(name, share, noise, encode):
    data = encode(noise, name)
    with pytest.raises(ImageUnreadable):
        decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("at", [0, 0.5])
def test_a_png_with_damaged_pixels_is_unreadable_and_not_black(at, noise, encode):
    data = bytearray(encode(noise, "PNG"))
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    damaged = start + 4 + int(at * length)
    data[damaged : damaged + 64] = bytes(64)
    end = start + 4 + length
    data[end : end + 4] = struct.pack(">I", zlib.crc32(data[start:end]))
    with pytest.raises(ImageUnreadable):
        decode_image(bytes(data))


@pytest.mark.parametrize("name", ["TIFF", "PPM", "ICO", "TGA"])
def test_formats_beyond_the_five_are_refused_though_pillow_reads_them(name, noise, encode):
    with pytest.raises(ImageUnreadable):
        decode_image(encode(noise, name))


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(1000)])
def test_what_is_no_image_is_unreadable(data):
    with pytest.raises(ImageUnreadable):
        decode_image(data)


def test_a_header_of_more_than_50_megapixels_is_refused_before_anything_is_decoded():
    with pytest.raises(ImageTooLarge) as refusal:
        decode_image(png_header(10_000, 5_001))
    facts = {"width": 10_000, "height": 5_001, "pixels": 50_010_000, "limit": 50_000_000}
    assert refusal.value.facts == facts


def test_a_header_of_200_megapixels_gets_the_same_answer_not_pillows_own():
    with pytest.raises(ImageTooLarge):
        decode_image(png_header(20_000, 10_000))


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_anything_is_decoded():
    """Each scan goes over all pixels: 40 kB of them took as long as 50 images."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 2500), RED).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    assert decode_image(whole).size == (4000, 2500)
    last = whole.rindex(b"\xff\xda")
    hostile = whole[:last] + whole[last:-2] * 100 + whole[-2:]
    with pytest.raises(ImageUnreadable, match="too many scans"):
        decode_image(hostile)


@pytest.mark.parametrize("size", [(43_000_000, 1), (1, 43_000_000), (16_385, 100), (2_001, 1)])
def test_too_long_a_side_or_too_extreme_an_aspect_is_refused_before_anything_is_decoded(size):
    with pytest.raises(ImageTooLarge) as refusal:
        decode_image(png_header(*size))
    assert ", 16384 a side, whose longer side is at most 2000 times the shorter" in str(refusal.value)


def test_a_png_that_announces_two_sizes_is_unreadable():
    second = png(5000, 5000, 8, 2, b"")
    header = chunk(b"IHDR", struct.pack("!IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
    with pytest.raises(ImageUnreadable, match="two sizes"):
        decode_image(second[:8] + header + second[8:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG after its pixels", "compressed text"])
def test_headers_that_keep_a_decoder_busy_are_refused_in_milliseconds(kind, noise, encode):
    """2 MB of them took Pillow 0.5 to 1 s on the reference machine."""
    whole = encode(noise, kind.split()[0] if kind != "compressed text" else "PNG")
    chunks = chunk(b"tEXt", b"a\0b") * 150_000
    if kind == "JPEG":
        hostile = whole[:2] + b"\xff\xfe\x00\x02" * 500_000 + whole[2:]
    elif kind == "PNG after its pixels":
        hostile = whole[:-12] + chunks + whole[-12:]
    else:
        text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
        hostile = whole[:33] + (text * 60 if kind == "compressed text" else chunks) + whole[33:]
    started = time.process_time()
    with pytest.raises(ImageUnreadable):
        decode_image(hostile)
    assert time.process_time() - started < 0.15


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_images_without_pixels_are_unreadable(size):
    with pytest.raises(ImageUnreadable):
        decode_image(png_header(*size))


@pytest.mark.parametrize("size", [(1, 1), (4000, 3), (3, 4000)])
def test_extreme_sizes_are_prepared(size, encode):
    decoded = decode_for_network(encode(Image.new("RGB", size, RED)), SIZE)
    pixels = prepare(decoded.image, SIZE)
    assert pixels.shape == (32, 32, 3)
    assert (pixels == RED).all()


def test_transparency_lies_over_white(encode):
    image = Image.new("RGBA", (2, 1), (*BLUE, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    pixels = np.asarray(decode_image(encode(image)).image)
    assert pixels.tolist() == [[list(BLUE), [255, 255, 255]]]


def test_a_palettes_transparent_colour_lies_over_white(encode):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(decode_image(encode(image, transparency=0)).image)
    assert pixels.tolist() == [[[255, 255, 255], list(BLUE)]]


def test_grey_with_a_transparent_value_lies_over_white(encode):
    pixels = np.asarray(decode_image(encode(Image.new("L", (1, 1), 7), transparency=7)).image)
    assert pixels.tolist() == [[[255, 255, 255]]]


WHITE = [255, 255, 255]
TRANSPARENT_PNGS = {
    # bit depth, colour type, samples of the pixels (the first is of the transparent colour), the pixels over white
    "grey2": (2, 0, [1, 2], [WHITE, [170] * 3]),
    "grey4": (4, 0, [3, 4], [WHITE, [68] * 3]),
    "grey8": (8, 0, [3, 4], [WHITE, [4] * 3]),
    "grey16": (16, 0, [0x0304, 0x0305], [WHITE, [3] * 3]),
    "rgb8": (8, 2, [1, 2, 3, 1, 2, 4], [WHITE, [1, 2, 4]]),
    "rgb16, another lower byte": (16, 2, [0x0102, 0x0304, 0x0506, 0x0102, 0x0304, 0x0507], [WHITE, [1, 3, 5]]),
    "rgb16, another upper byte": (16, 2, [0x0102, 0x0304, 0x0506, 0x0202, 0x0304, 0x0506], [WHITE, [2, 3, 5]]),
}


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("name", TRANSPARENT_PNGS)
def test_pngs_transparent_colour_is_that_of_its_own_depth(name, interlaced):
    depth, colour_type, samples, expected = TRANSPARENT_PNGS[name]
    channels = 3 if colour_type == 2 else 1
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    half = depth * channels
    lines = [bits[:half], bits[half:]] if interlaced else [bits]  # of two pixels, one is all of pass 1, one of pass 6
    rows = b"".join(
        b"\0" + int(line.ljust(-(-len(line) // 8) * 8, "0"), 2).to_bytes(-(-len(line) // 8)) for line in lines
    )
    transparent = chunk(b"tRNS", struct.pack(f"!{channels}H", *samples[:channels]))
    data = png(2, 1, depth, colour_type, rows, transparent, interlaced=interlaced)
    assert np.asarray(decode_image(data).image).tolist() == [expected]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("rows", [1, 31])
@pytest.mark.parametrize("value", [0, 200])
def test_a_png_whose_complete_stream_holds_too_few_rows_is_unreadable(rows, interlaced, value):
    row = b"\0" + bytes([value]) * 96
    with pytest.raises(ImageUnreadable, match=r"fewer rows|damaged"):
        decode_image(png(32, 32, 8, 2, row * rows, interlaced=interlaced))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(33, 17), (1, 1), (3, 9)])
def test_a_whole_black_png_is_answered(mode, size, encode):
    assert decode_image(encode(Image.new(mode, size))).size == size


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 3), (8, 8), (9, 17)])
@pytest.mark.parametrize(("depth", "colour_type"), [(1, 0), (4, 0), (8, 6), (16, 2)])
def test_a_whole_interlaced_png_is_answered(width, height, depth, colour_type):
    bits = depth * {0: 1, 2: 3, 6: 4}[colour_type]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = b"".join(
        (b"\0" + bytes((len(range(x, width, step_x)) * bits + 7) // 8)) * len(range(y, height, step_y))
        for x, y, step_x, step_y in passes
        if x < width
    )
    assert decode_image(png(width, height, depth, colour_type, lines, interlaced=True)).size == (width, height)
    with pytest.raises(ImageUnreadable):
        decode_image(png(width, height, depth, colour_type, lines[:-1], interlaced=True))


def test_16_bit_grey_is_scaled_not_clipped(encode):
    pixels = np.asarray(decode_image(encode(np.array([[0, 0x8080, 0xFFFF]], dtype=np.uint16))).image)
    assert pixels[..., 0].tolist() == [[0, 128, 255]]


def test_1_bit_images_are_black_and_white(encode):
    pixels = np.asarray(decode_image(encode(Image.fromarray(np.array([[True, False]])))).image)
    assert pixels[..., 0].tolist() == [[255, 0]]


def test_cmyk_jpegs_are_decoded(encode):
    pixels = np.asarray(decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).image)
    assert pixels[8, 8, 0] > 200
    assert pixels[8, 8, 1:].max() < 60


def test_the_first_frame_of_an_animation_counts(encode):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(data).image)[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("at_least", [None, (8, 8)])
def test_exif_orientation_is_honoured(orientation, at_least, encode):
    upright = Image.new("RGB", (96, 64), "white")
    upright.paste(RED, (0, 0, 32, 32))
    # The transposition that undoes each orientation, found by asking which stored image Pillow turns back into ours.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(stored, "JPEG", exif=exif, quality=95), at_least=at_least)
    assert decoded.size == (96, 64)
    pixels = np.asarray(decoded.image.resize((3, 2), Image.Resampling.BOX)).astype(int)
    assert abs(pixels[0, 0] - RED).max() < 30
    assert pixels.reshape(-1, 3)[1:].min() > 220


def test_broken_exif_does_not_make_a_image_unreadable(noise, encode):
    assert decode_image(encode(noise, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (40, 30)


def test_large_jpegs_are_decoded_at_a_fraction_but_keep_their_size(encode):
    data = encode(Image.new("RGB", (1600, 1200), RED), "JPEG")
    decoded = decode_for_network(data, SIZE)
    assert decoded.size == (1600, 1200)
    assert decoded.image.size == (200, 150)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_large_image_is_averaged_to_almost_the_pixels_that_resampling_all_of_it_gives(mode, encode):
    """Of 255, at hard edges: its last boxes are no whole ones."""
    coarse = np.random.default_rng(5).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((1999, 1501), Image.Resampling.BICUBIC).convert(mode)
    data = encode(image)
    large = decode_for_network(data, SIZE)
    assert (large.size, large.image.size) == ((1999, 1501), (286, 301))
    difference = prepare(large.image, SIZE).astype(int) - prepare(decode_image(data).image, SIZE)
    assert np.abs(difference).max() <= 16
    assert np.abs(difference).mean() < 1.5


def test_an_ordinary_image_is_resampled_from_all_its_pixels(encode):
    image = Image.fromarray(np.random.default_rng(6).integers(0, 256, (1024, 2048, 3), dtype=np.uint8))
    assert decode_for_network(encode(image), SIZE).image.size == (2048, 1024)


def test_memory_of_a_decode_is_bounded():
    """25 megapixels of each format, and the longest images, in a process of its own; the handler's own takes 0.1 GB."""
    program = """
import io, json, resource, sys
sys.path.insert(0, sys.argv[1])
from PIL import Image
from contracts.model import Input
from handlers.preprocess import decode_for_network, prepare
SIZE = Input(32, 32, (0.5,) * 3, (0.25,) * 3)
peaks = {}
def peak(name, data):
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    prepare(decode_for_network(data, SIZE).image, SIZE)
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    peaks[name] = int(status["VmHWM"].split()[0]) * 1024 - before
def encoded(mode, size, name, **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, name, **options)
    return file.getvalue()
for mode in ("RGB", "RGBA", "P", "I;16"):
    peak(f"PNG {mode}", encoded(mode, (5000, 5000), "PNG", compress_level=1))
peak("WebP", encoded("RGBA", (16_383, 1_525), "WEBP", lossless=True, method=0))
peak("JPEG", encoded("CMYK", (5000, 5000), "JPEG"))
peak("GIF", encoded("P", (5000, 5000), "GIF"))
peak("long", encoded("RGB", (16_384, 9), "PNG"))
print(json.dumps(peaks))
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program, root], capture_output=True, text=True, check=True)
    megabytes = {name: peak / 1e6 for name, peak in json.loads(done.stdout).items()}
    assert max(megabytes.values()) < 450, megabytes
    assert max(value for name, value in megabytes.items() if name.startswith("PNG")) < 130, megabytes


def test_preparing_a_image_of_the_networks_size_changes_no_pixel(encode):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (prepare(decode_image(encode(pixels)).image, SIZE) == pixels).all()


def test_normalising_equals_the_formula():
    pixels = np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    expected = (torch.from_numpy(pixels).double() / 255 - torch.tensor(SIZE.mean)) / torch.tensor(SIZE.std)
    np.testing.assert_allclose(normalise(pixels, SIZE), expected.permute(0, 3, 1, 2), atol=1e-6)


def test_training_and_serving_preprocess_bit_for_bit_alike(encode):
    """Training normalises whole uint8 arrays, serving one encoded image after another."""
    pixels = np.random.default_rng(3).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    trained = normalise(pixels, SIZE)
    served = [normalise(prepare(decode_for_network(encode(p), SIZE).image, SIZE)[None], SIZE)[0] for p in pixels]
    assert np.stack(served).tobytes() == trained.tobytes()
    assert normalise(np.asfortranarray(pixels), SIZE).tobytes() == trained.tobytes()
