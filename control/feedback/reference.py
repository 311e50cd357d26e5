"""The reference that `gradserve drift` compares with: the answers to images that are like those of the training."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from control.archive import file_sha256, inspect_archive
from control.errors import ControlError, NoServing
from control.feedback.drift import Answers, answers_of
from control.images.archive_source import ArchiveSource
from control.images.files import find_images
from control.release.plan_folder import write_atomically
from gradserve import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

IMAGES = 2000
"""Held-out images that make the reference: enough for differences of 0.05, answered in seconds."""


def held_out_answers(archive: Path, cache: Path, home: Path) -> Answers:
    """Return the archive's answers to images that its training held out; they are kept in `home` for the next time.

    Args:
        archive: the archive.
        cache: the folder that keeps data sets.
        home: GRADSERVE_HOME.

    Raises:
        ControlError: the archive or its training's images cannot be read.
    """
    kept = home / "drift" / f"{file_sha256(archive)}.json"
    try:
        return _parse(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        answers = image_answers(archive, list(_held_out(archive, cache)))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(asdict(answers)))
    return answers


def folder_answers(archive: Path, folder: Path) -> Answers:
    """Return the archive's answers to the images in the folder.

    Raises:
        ControlError: the archive or the folder cannot be read.
    """
    try:
        return image_answers(archive, [image.read() for image in find_images([str(folder)])])
    except OSError as error:
        raise ControlError(f"the images in {folder} cannot be read: {error}") from error


def image_answers(archive: Path, images: Sequence[bytes]) -> Answers:
    """Return the archive's answers to the images; those that are no images are left out.

    Raises:
        ControlError: the archive cannot be loaded.
    """
    source = ArchiveSource(archive)
    try:
        return answers_of(entry for entry in source.predict(images, 1) if not isinstance(entry, Failed))
    finally:
        source.close()


def _held_out(archive: Path, cache: Path) -> Iterator[bytes]:
    """Yield up to `IMAGES` of the images that the archive's training held out, always the same ones, as PNG files.

    Raises:
        NoServing: a package that reads images is not installed.
        ControlError: the training's images cannot be had, or are not those of the training.
    """
    try:
        from PIL import Image  # noqa: PLC0415 - seconds

        from training.data.images import divide, load_training_images  # noqa: PLC0415 - as above
        from training.errors import TrainingError  # noqa: PLC0415 - as above
        from training.recipe import recipe_from_dict  # noqa: PLC0415 - as above
    except ImportError as error:
        raise NoServing(error.name or str(error)) from error
    accepted = inspect_archive(archive).contract.accepted
    remedy = "compare with earlier calls (--reference earlier) or with a folder of images (--reference FOLDER)"
    if accepted.recipe is None or accepted.provenance is None:
        raise ControlError(f"{archive.name} does not say what it was trained on: {remedy}")
    try:
        recipe = recipe_from_dict(accepted.recipe)
        images, _ = load_training_images(recipe.data, cache)
        if images.sha256() != accepted.provenance.data_sha256:
            raise ControlError(f"the images of {recipe.data} are not those of the training any more: {remedy}")
        _, held_out = divide(images, subset=recipe.subset, validation=recipe.validation, seed=recipe.seed)
    except TrainingError as error:
        raise ControlError(f"{error}; {remedy}") from error
    for pixels in held_out.sample(IMAGES).images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        yield file.getvalue()


def _parse(text: str) -> Answers:
    """Return the answers in a kept reference.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    data = json.loads(text)
    return Answers(*(tuple(data[name]) for name in ("classes", "confidences", "familiar")))
