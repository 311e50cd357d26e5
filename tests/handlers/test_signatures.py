from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from handlers.errors import ImageUnreadable
from handlers.preprocess import decode_image
from handlers.signatures import foreign_format

PIXELS = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))


def saved(name: str) -> bytes:
    file = io.BytesIO()
    PIXELS.save(file, name)
    return file.getvalue()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 32  # as an iPhone's camera begins its files
FOREIGN = [("TIFF", saved("TIFF")), ("AVIF", saved("AVIF")), ("HEIC", HEIC)]


@pytest.mark.parametrize(("name", "data"), FOREIGN)
def test_an_image_of_a_format_that_is_not_read_is_refused_by_its_name(name, data):
    with pytest.raises(ImageUnreadable) as refused:
        decode_image(memoryview(data))
    assert refused.value.detail == f"{name} images are not read here: send a whole PNG, JPEG, WebP, BMP or GIF image"


@pytest.mark.parametrize("data", [b"", b"II", b"\0\0\0\x18ftypisom\0\0\0\0mp42", b"GIF89a", b"\xff\xff\xff\xffftyp"])
def test_other_bytes_have_no_such_name(data):
    assert foreign_format(data) is None
