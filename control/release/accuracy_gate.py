"""`deploy --gate DIR`: labelled images through the real server, for the new version and the stable one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from control.errors import GateUnusable, Refused
from gradserve import Client, GatewayProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

# Of one call: a gateway takes no body above GATEWAY_MAX_BATCH_BYTES.
_AT_ONCE, _BYTES_AT_ONCE = 32, 8 * 1024 * 1024
# A gateway looks at plan and agents twice a second; until then it does not know a version that has just been loaded.
_KNOWN_WITHIN_S = 10.0
_NOT_YET = {"version_unknown", "not_ready"}
# What the server says of a file that is no image, or none that it takes.
_NO_IMAGE = {"image_unreadable", "image_too_large", "body_too_large"}


@dataclass(frozen=True)
class Gate:
    """A folder of images, one folder a class; a gateway with a key that may predict; the accuracy that may be lost.

    `max_drop` is a share: 0.005 is half a point.
    """

    folder: Path
    url: str
    key: str | None
    max_drop: float

    def check(self, classes: Sequence[str]) -> None:
        """Does nothing where a version with these classes can be judged.

        Raises:
            GateUnusable: there are no images, or folders that are none of the classes.
        """
        labels = {label for _, label in self._images()}
        if not labels:
            raise GateUnusable(self.folder, "no images: it needs a folder for each class, with images in it")
        if unknown := sorted(labels - set(classes)):
            raise GateUnusable(self.folder, f"{', '.join(unknown)}: no class of the new version has this name")

    def judge(self, stable: str, new: str, say: Callable[[str], None]) -> str:
        """Return both versions' accuracies in a sentence, if the new one's is high enough.

        Files that neither version can read as an image do not count; `say` is told each of them.

        Raises:
            Refused: the accuracy falls by more than `max_drop`, or a version does not answer.
            GateUnusable: most of the files are no images.
        """
        images = self._images()
        with Client(self.url, key=self.key, retries=10) as gateway:
            of_new, of_stable = (self._answers(gateway, images, version, new) for version in (new, stable))
        skipped = [path for path in of_new if of_new[path] is None and of_stable[path] is None]
        if 2 * len(skipped) > len(images):
            raise GateUnusable(self.folder, f"{len(skipped)} of {len(images)} files are no images, {skipped[0]} first")
        for path in skipped:
            say(f"skipped {path}: no image")
        judged = [(path, label) for path, label in images if path not in set(skipped)]
        for version, answers in ((new, of_new), (stable, of_stable)):
            for path, _ in judged:
                if answers[path] is None:
                    raise Refused(new, "the gate", f"{version} cannot read {path}, and the other version can")
        count = len(judged)
        correct_new, correct_stable = (
            sum(answers[path] == label for path, label in judged) for answers in (of_new, of_stable)
        )
        found = f"accuracy {correct_new / count:.2%} of {count} images, {stable} has {correct_stable / count:.2%}"
        if skipped:
            found += f", {len(skipped)} files skipped"
        if (correct_stable - correct_new) / count > self.max_drop:
            raise Refused(new, "the gate", f"{found}: it falls by more than {100 * self.max_drop:g} points")
        return found

    def _images(self) -> list[tuple[Path, str]]:
        """Every file with its class, the name of its folder; hidden files and folders are not looked at."""
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
        """Return the class that the version names for each file; None for a file that it takes for no image."""
        answers: dict[Path, str | None] = {}
        for some in _groups(images):
            paths = [path for path, _ in some]
            for path, entry in zip(paths, self._ask(gateway, paths, version, new), strict=True):
                code = entry["error"]["code"] if "error" in entry else None
                if code is not None and code not in _NO_IMAGE:
                    raise Refused(new, "the gate", f"{version} answered {code} to {path}")
                answers[path] = None if code else entry["class"]
        return answers

    def _ask(self, gateway: Client, paths: Sequence[Path], version: str, new: str) -> list[dict[str, Any]]:
        end = time.monotonic() + _KNOWN_WITHIN_S
        while True:
            try:
                return gateway.predict_batch(paths, version=version)
            except GatewayProblem as error:
                if error.code in _NO_IMAGE:  # of one file, for which the whole call is refused: find it
                    if len(paths) == 1:
                        return [{"error": {"code": error.code}}]
                    return [entry for path in paths for entry in self._ask(gateway, [path], version, new)]
                if error.code not in _NOT_YET or time.monotonic() > end:
                    raise Refused(new, "the gate", f"the gateway {self.url} answered {error}") from error
            except httpx.HTTPError as error:
                raise Refused(
                    new, "the gate", f"no answer from the gateway {self.url} ({type(error).__name__})"
                ) from error
            time.sleep(0.2)


def _groups(images: Sequence[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    """The images in their order, as many together as fit into one call, one at least."""
    group: list[tuple[Path, str]] = []
    size = 0
    for image in images:
        own = image[0].stat().st_size
        if group and (len(group) == _AT_ONCE or size + own > _BYTES_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(image)
        size += own
    if group:
        yield group
