"""Say what a model, a version and an archive may be called: they become parts of file names and of paths at TorchServe.

No name holds anything that a path or a query could be made of.
"""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Of a model."""

VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
"""Of a model's version."""

ARCHIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}\.mar")
"""Of an archive's file in the model store."""

SHA256 = re.compile(r"[0-9a-f]{64}")

EXPLAIN_SUFFIX = "-explain"
"""The end of the name of the TorchServe entry that explains a model; the entry that predicts has the model's name."""
