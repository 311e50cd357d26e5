"""Print a lock file's entries without the packages that other lock files have: `except.py FILE [OTHER …]`."""

import re
import sys
from pathlib import Path

first, *others = (re.split(r"\n(?=\S)", Path(name).read_text(encoding="utf-8").strip()) for name in sys.argv[1:])
there = {entry.split("==")[0] for other in others for entry in other}
kept = [entry for entry in first if entry.split("==")[0] not in there and not entry.startswith("#")]
sys.stdout.write("\n".join(kept) + "\n")
