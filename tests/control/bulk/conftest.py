"""Images in a folder and in Parquet files, and an archive that need not be loaded."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from control.archive import inspect_archive

ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "tests" / "samples").glob("*/*.png"))


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with 7 files that have the names of images."""
    folder = tmp_path / "photos"
    for name in ("a/1.png", "a/2.JPG", "b/c/3.webp", "b/4.gif", "_5.bmp", "6.jpeg", "7.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


@pytest.fixture(scope="session")
def samples() -> list[Path]:
    """The 100 sample images."""
    return SAMPLES


@pytest.fixture(scope="session")
def write_parquet():
    """`write_parquet(path, images, group=…, **columns)`: a Parquet file with a column `image`."""

    def write(path: Path, images, group=2, **columns) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": pa.array(images, pa.binary()), **columns})
        parquet.write_table(table, path, row_group_size=group)
        return path

    return write


@pytest.fixture(scope="session")
def released(released_archive):
    """The released model's archive, inspected."""
    return inspect_archive(released_archive)
