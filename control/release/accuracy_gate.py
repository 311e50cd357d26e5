"""`deploy --gate DIR`: compare the new and the stable version on labelled images, through the real server."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from control.errors import GateUnusable, Refused
from gradserve import Client, Failed, GatewayProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gradserve import Prediction

# Limits of one call: a gateway refuses a body above GATEWAY_MAX_BATCH_BYTES.
_MAX_IMAGES, _MAX_BYTES = 32, 8 * 1024 * 1024
# A gateway reads plan and agents twice a second; until then it does not know a version that has just been loaded.
_KNOWN_WITHIN_S = 10.0
_RETRIED_CODES = {"version_unknown", "not_ready"}
# The server's error codes for a file that is no image, or one that it refuses.
_NO_IMAGE_CODES = {"image_unreadable", "image_too_large", "body_too_large"}


@dataclass(frozen=True)
class Gate:
    """A folder of images, one folder for each class; a gateway and a key with the scope predict; the allowed loss.

    `max_drop` is a share of the images: 0.005 is half a percentage point. `model` is None for the default model.
    """

    folder: Path
    url: str
    key: str | None
    max_drop: float
    model: str | None = None

    def check(self, classes: Sequence[str]) -> None:
        """Raise `GateUnusable` if the folder cannot test a version with these classes.

        Raises:
            GateUnusable: there are no images, or a folder's name is not a class.
        """
        labels = {label for _, label in self._images()}
        if not labels:
            raise GateUnusable(self.folder, "no images: it needs one folder of images for each class")
        if unknown := sorted(labels - set(classes)):
            raise GateUnusable(self.folder, f"{', '.join(unknown)}: the new version has no class of this name")

    def judge(self, stable: str, new: str, say: Callable[[str], None]) -> str:
        """Return both versions' accuracies as a sentence, if the new version passes.

        Files that neither version can read as an image do not count; `say` gets a line for each of them.

        Raises:
            Refused: the accuracy is lower by more than `max_drop`, or a version does not answer.
            GateUnusable: more than half of the files are no images.
        """
        images = self._images()
        with Client(self.url, key=self.key, retries=10) as gateway:
            of_new, of_stable = (self._answers(gateway, images, version, new) for version in (new, stable))
        skipped = [path for path in of_new if of_new[path] is None and of_stable[path] is None]
        if 2 * len(skipped) > len(images):
            raise GateUnusable(
                self.folder, f"{len(skipped)} of {len(images)} files are no images; the first is {skipped[0]}"
            )
        for path in skipped:
            say(f"skipped {path}: not an image")
        judged = [(path, label) for path, label in images if path not in set(skipped)]
        for version, answers in ((new, of_new), (stable, of_stable)):
            for path, _ in judged:
                if answers[path] is None:
                    raise Refused(new, "the gate", f"{version} cannot read {path}, and the other version can")
        count = len(judged)
        correct_new, correct_stable = (
            sum(answers[path] == label for path, label in judged) for answers in (of_new, of_stable)
        )
        result = f"accuracy {correct_new / count:.2%} of {count} images, {stable} has {correct_stable / count:.2%}"
        if skipped:
            result += f", {len(skipped)} files skipped"
        if (correct_stable - correct_new) / count > self.max_drop:
            raise Refused(new, "the gate", f"{result}: lower by more than {100 * self.max_drop:g} points")
        return result

    def _images(self) -> list[tuple[Path, str]]:
        """Return every file with its class, the name of its folder; hidden files and folders are left out."""
        folders = sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [
            (path, folder.name)
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        ]

    def _answers(
        self, gateway: Client, images: Sequence[tuple[Path, str]], version: str, new: str
    ) -> dict[Path, str | None]:
        """Return the class that the version predicts for each file; None for a file that it cannot read as an image."""
        answers: dict[Path, str | None] = {}
        for group in _groups(images):
            paths = [path for path, _ in group]
            for path, entry in zip(paths, self._ask(gateway, paths, version, new), strict=True):
                if isinstance(entry, Failed) and entry.code not in _NO_IMAGE_CODES:
                    raise Refused(new, "the gate", f"{version} answered {entry.code} to {path}")
                answers[path] = None if isinstance(entry, Failed) else entry.class_name
        return answers

    def _ask(self, gateway: Client, paths: Sequence[Path], version: str, new: str) -> list[Prediction | Failed]:
        end = time.monotonic() + _KNOWN_WITHIN_S
        while True:
            try:
                return gateway.predict_batch(paths, version=version, model=self.model)
            except GatewayProblem as error:
                if error.code in _NO_IMAGE_CODES:  # one file makes the gateway refuse the call: find that file
                    if len(paths) == 1:
                        problem = {"error": error.problem}
                        return [Failed(status=error.status, code=error.code, detail=str(error), document=problem)]
                    return [entry for path in paths for entry in self._ask(gateway, [path], version, new)]
                if error.code not in _RETRIED_CODES or time.monotonic() > end:
                    raise Refused(new, "the gate", f"the gateway {self.url} answered {error}") from error
            except httpx.HTTPError as error:
                raise Refused(
                    new, "the gate", f"no answer from the gateway {self.url} ({type(error).__name__})"
                ) from error
            time.sleep(0.2)


def _groups(images: Sequence[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    """Yield the images in their order, in groups that fit into one call."""
    group: list[tuple[Path, str]] = []
    size = 0
    for image in images:
        own = image[0].stat().st_size
        if group and (len(group) == _MAX_IMAGES or size + own > _MAX_BYTES):
            yield group
            group, size = [], 0
        group.append(image)
        size += own
    if group:
        yield group
