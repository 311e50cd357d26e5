"""Find the image files that an operator names: files, folders, patterns, and `-` for the standard input."""

from __future__ import annotations

import glob
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
"""The names that count as images in a folder; a file that is named itself may have any."""

OVERLAY_SUFFIX = "-heatmap.png"
STDIN = "-"


@dataclass(frozen=True)
class ImageFile:
    """One image to classify.

    Attributes:
        name: as it is printed.
        path: None for the standard input.
        relative: the path below the folder that was named, or the file's name.
    """

    name: str
    path: Path | None
    relative: Path

    def read(self) -> bytes:
        """Return the bytes of the image.

        Raises:
            OSError: the file cannot be read.
        """
        return self.path.read_bytes() if self.path is not None else sys.stdin.buffer.read()

    def overlay_path(self, folder: Path | None) -> Path:
        """Return the path of the image's overlay: beside it, or below `folder`."""
        beside = self.path.parent if self.path is not None else Path()
        where = beside if folder is None else folder / self.relative.parent
        return where / f"{self.relative.stem}{OVERLAY_SUFFIX}"


def find_images(names: Iterable[str]) -> list[ImageFile]:
    """Return the images that `names` name, each once, in the order of the names; those of a folder sorted.

    A folder stands for the images in it and below it, but for hidden ones and overlays that `explain` wrote. A name
    that is no file may be a pattern (`*`, `?`, `[…]`, `**`). A name that matches nothing stays as it is, so that it can
    be reported.
    """
    found: dict[Path | None, ImageFile] = {}
    for name in names:
        for image in _find(name):
            found.setdefault(image.path, image)
    return list(found.values())


def _find(name: str) -> Iterator[ImageFile]:
    path = Path(name)
    if name == STDIN:
        yield ImageFile("stdin", None, Path("stdin"))
    elif path.is_dir():
        yield from _in_folder(path)
    elif path.exists() or not (matches := sorted(glob.glob(name, recursive=True))):  # noqa: PTH207 - `name` may be absolute
        yield ImageFile(name, path, Path(path.name))
    else:
        for match in map(Path, matches):
            if match.is_dir():
                continue
            if _is_image(match, Path(match.name)):
                yield ImageFile(str(match), match, Path(match.name))


def _in_folder(folder: Path) -> Iterator[ImageFile]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if _is_image(path, relative):
            yield ImageFile(str(path), path, relative)


def _is_image(path: Path, relative: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in relative.parts)
    is_overlay = path.name.endswith(OVERLAY_SUFFIX)
    return path.suffix.lower() in SUFFIXES and not is_hidden and not is_overlay and path.is_file()
