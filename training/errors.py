"""What can go wrong between raw data and an archive, one tree; each message is for the person at the command.

TrainingError         the recipe cannot be followed, or a run cannot go on
├── DataError         data that cannot be had or used
│   ├── NoSource          no source of CIFAR-10 could be reached
│   └── CorruptData       a file whose content is not CIFAR-10's
├── ModelError        a model that cannot be found or read
└── ExportError       a model that cannot be packed
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


class ExportError(TrainingError):
    """A model that cannot be packed; the message says what is missing or wrong."""


class RegistryError(TrainingError):
    """MLflow's registry cannot be asked, or does not have what is wanted."""
