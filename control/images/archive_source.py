"""Answer from an archive, with this installation's handlers, in this process. The archive's own code does not run."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts import wire
from control.archive import checksum_beside, inspect_archive, load_trusted_keys
from control.errors import ArchiveError, ControlError, NoServing
from control.images.sources import Explained
from control.settings import trusted_key_files
from gradserve import Failed
from gradserve.answers import parse_batch, parse_evidence, parse_prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from control.images.sources import Question
    from gradserve import Prediction
    from handlers.model import ServedModel

_MOST_IMAGES = 32


class ArchiveSource:
    """Answers with the archive's model.

    Raises:
        ArchiveError: the archive must not be loaded.
        NoServing: a package that the model needs is not installed.
    """

    def __init__(self, path: Path) -> None:
        trusted = load_trusted_keys(trusted_key_files())
        self._contract = inspect_archive(path, checksum_beside(path), trusted=trusted).contract
        # Kept, because an engine may map its files.
        self._folder = tempfile.TemporaryDirectory(prefix="gradserve-")
        with zipfile.ZipFile(path) as members:
            members.extractall(self._folder.name)  # `inspect_archive` refuses members that would leave the folder
        try:
            self._model = _load(path, Path(self._folder.name))
        except ControlError:
            self.close()
            raise

    def predict(self, images: Sequence[bytes], top_k: int) -> list[Prediction | Failed]:
        """Return one entry per image, in order."""
        entries: list[Prediction | Failed] = []
        for start in range(0, len(images), _MOST_IMAGES):
            group = list(images[start : start + _MOST_IMAGES])
            answer = self._answer("predict", group, wire.Options(top_k=top_k))
            entries += parse_batch(self._named(answer), parse_prediction, len(group))
        return entries

    def explain(self, image: bytes, question: Question) -> Explained | Failed:
        """Return the evidence about the image.

        Raises:
            ControlError: the model has no such class or method.
        """
        classes = self._contract.classes
        if question.target is not None and question.target not in classes:
            raise ControlError(f"no class {question.target!r}; this model has {', '.join(classes)}")
        about = wire.ImageOptions(
            explain=True,
            target=None if question.target is None else classes.index(question.target),
            method=question.method,
            coverage=question.coverage,
            test=question.test,
        )
        asked = wire.Options(images=(about,))
        answer = self._answer("explain", [image], asked._replace(format="json"))
        (found,) = parse_batch(self._named(answer), parse_evidence, 1)
        if isinstance(found, Failed):
            if found.code == "unknown_method":
                raise ControlError(found.detail)
            return found
        alpha = wire.DEFAULTS.alpha if question.alpha is None else question.alpha
        overlay = self._answer("explain", [image], asked._replace(alpha=alpha, size=question.size))
        return Explained(found, overlay)

    def close(self) -> None:
        """Remove the unpacked files."""
        self._folder.cleanup()

    def _answer(self, kind: str, images: list[bytes], options: wire.Options) -> bytes:
        from handlers.wire import Row  # noqa: PLC0415 - numpy and Pillow

        (answer,) = self._model.answer([Row(kind, options, list(images))])
        return answer.body

    def _named(self, answer: bytes) -> dict[str, Any]:
        model = {"name": self._contract.name, "version": self._contract.version}
        return {**json.loads(answer), "model": model, "request_id": ""}


def _load(path: Path, folder: Path) -> ServedModel:
    try:
        from contracts.model import ContractError  # noqa: PLC0415 - as above
        from handlers.build import BrokenArchive  # noqa: PLC0415 - as above
        from handlers.errors import EngineError  # noqa: PLC0415 - as above
        from handlers.model import load_model  # noqa: PLC0415 - as above
    except ImportError as error:
        raise NoServing(error.name or str(error)) from error
    try:
        return load_model(folder, device="cpu", explains=False)
    except (BrokenArchive, ContractError, EngineError) as error:
        raise ArchiveError(path, str(error)) from error
