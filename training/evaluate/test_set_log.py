"""A log of the evaluations on test images: one line each, added and never changed.

A test set measures a model without bias once. Anyone who evaluates often and keeps the best model has chosen on it, so
a figure needs the number of evaluations as much as the number of images.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def record_look(path: Path, purpose: str, **facts: Any) -> None:  # noqa: ANN401 - whatever JSON holds
    """Adds a line to `path`: when, what for, and `facts` such as model, commit, number of images and accuracy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), "purpose": purpose, **facts})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
