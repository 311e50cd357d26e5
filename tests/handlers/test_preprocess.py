from __future__ import annotations

import io
import struct
import zlib

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


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_decoded_by_its_bytes(name, noise, encode):
    picture = decode_image(encode(noise, name))
    assert picture.image.mode == "RGB"
    assert picture.image.size == picture.size == (40, 30)


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
    assert refusal.value.facts == {"pixels": 50_010_000, "limit": 50_000_000}


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


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_images_without_pixels_are_unreadable(size):
    with pytest.raises(ImageUnreadable):
        decode_image(png_header(*size))


@pytest.mark.parametrize("size", [(1, 1), (4000, 3), (3, 4000)])
def test_extreme_sizes_are_prepared(size, encode):
    picture = decode_for_network(encode(Image.new("RGB", size, RED)), SIZE)
    pixels = prepare(picture.image, SIZE)
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
    picture = decode_image(encode(stored, "JPEG", exif=exif, quality=95), at_least=at_least)
    assert picture.size == (96, 64)
    pixels = np.asarray(picture.image.resize((3, 2), Image.Resampling.BOX)).astype(int)
    assert abs(pixels[0, 0] - RED).max() < 30
    assert pixels.reshape(-1, 3)[1:].min() > 220


def test_broken_exif_does_not_make_a_image_unreadable(noise, encode):
    assert decode_image(encode(noise, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (40, 30)


def test_large_jpegs_are_decoded_at_a_fraction_but_keep_their_size(encode):
    data = encode(Image.new("RGB", (1600, 1200), RED), "JPEG")
    picture = decode_for_network(data, SIZE)
    assert picture.size == (1600, 1200)
    assert picture.image.size == (200, 150)


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
