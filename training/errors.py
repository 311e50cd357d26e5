"""Errors between raw data and an archive, in one tree; each message is for the person at the command.

TrainingError         the recipe cannot be followed, or a run cannot go on
├── DataError         data that cannot be had or used
│   ├── NoSource          no source of CIFAR-10 could be reached
│   └── CorruptData       a file whose content is not CIFAR-10's
├── ModelError        a model that cannot be found or read
│   └── HeatmapsAlike     heatmaps that are the same for every class
├── ExportError       a model that cannot be packed
└── RegistryError     MLflow's registry cannot be asked, or lacks what is wanted
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class TrainingError(RuntimeError):
    """A foreseeable failure; its text says what to do."""


class DataError(TrainingError):
    """Data that cannot be had or used."""


class NoSource(DataError):
    """No source of CIFAR-10 could be reached, for these `reasons`; `url` is where a person finds it."""

    def __init__(self, reasons: list[str], url: str) -> None:
        super().__init__(
            f"CIFAR-10 could not be fetched ({'; '.join(reasons)}). Download {url} where there is a network, "
            "copy it here and pass it: --data cifar10:/path/to/cifar-10-binary.tar.gz"
        )


class CorruptData(DataError):
    """The file `path` is not what it should be; `reason` says how that shows."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not the complete CIFAR-10 ({reason}): delete it or pass another file")


class ModelError(TrainingError):
    """A model that cannot be found or read."""


class HeatmapsAlike(ModelError):
    """Heatmaps of `layer` by `method` correlate for the first two classes by `correlation`, which is above `limit`."""

    def __init__(self, layer: str, method: str, correlation: float, *, limit: float, images: int) -> None:
        super().__init__(
            f"heatmaps of {layer} by {method} hardly depend on the class: those for an image's first and second class "
            f"have a rank correlation of {correlation:.2f} on {images} held-out images, above {limit:g}. Let held-out "
            "images choose layer and method (--explain-images 500), train longer, or raise the bound knowingly "
            "(--max-alike 1)"
        )
        self.correlation = correlation


class ExportError(TrainingError):
    """A model that cannot be packed; the message says what is missing or wrong."""


class RegistryError(TrainingError):
    """MLflow's registry cannot be asked, or does not have what is wanted."""
