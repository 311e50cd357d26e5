"""Let a TorchServe worker load torch at its first use, not at its start.

TorchServe's worker imports torch for one check of answers that are tensors. A handler that serves OpenVINO never uses
it: its worker needs 140 MB less, and starts without the seconds that the import takes. An eager engine's own import
loads torch.

Source: ts/protocol/otf_message_handler.py of TorchServe 0.12.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType


class LazyTorch:
    """Find torch as a module that loads when an attribute of it is read, or when it is imported once more."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return torch's spec with a lazy loader, and None for every other module."""
        spec = PathFinder.find_spec(name, path, target) if name == "torch" else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


sys.meta_path.insert(0, LazyTorch)
