"""Names the image formats that are not read here by a file's first bytes, for the error that refuses it."""

from __future__ import annotations

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Brands of the container that HEIC and AVIF share; an AVIF file may name the general `mif1` first.
# Source: https://mp4ra.org/registered-types/brands
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_MOST_BRANDS_BYTES = 256


def foreign_format(data: bytes | bytearray | memoryview) -> str | None:
    """Return `HEIC`, `AVIF` or `TIFF` if `data` begins like a file of that format, else None."""
    head = bytes(data[:_MOST_BRANDS_BYTES])
    if head.startswith(_TIFF):
        return "TIFF"
    if head[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[start : start + 4] for start in (8, *range(16, end, 4))}
    if brands & _AVIF:
        return "AVIF"
    return "HEIC" if brands & _HEIC else None
