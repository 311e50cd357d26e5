#!/usr/bin/env bash
# Writes the lock files anew from pyproject.toml: every package that an image gets, with its hashes (`make lock`).
#
#   requirements/lock.sh [SOURCE]      SOURCE: an index or a folder that has the CPU build of torch, by default PyTorch's own
#
# Needs uv (`pip install uv`). torch itself is not in the lock files of the processes: torch-cpu.txt and torch-cuda.txt hold
# it, and one of the two is installed.
set -euo pipefail
source=${1:-https://download.pytorch.org/whl/cpu}
cd "$(dirname "$0")/.."
torch=$(sed -n 's/^  "torch==\(.*\)",$/\1/p' pyproject.toml | head -1)
# The installed packages are Linux wheels for x86-64, as the base image is.
common=(--quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header
  --index-strategy unsafe-best-match --no-annotate)

lock() { # file, then options
  local file=requirements/$1
  shift
  { echo "# Written by requirements/lock.sh from pyproject.toml."; uv pip compile "${common[@]}" "$@"; } >"$file.new"
  mv "$file.new" "$file"
}

if [[ -d $source ]]; then from=(--find-links "$source"); else from=(--extra-index-url "$source"); fi
lock gateway.txt pyproject.toml --extra gateway
lock serving.txt pyproject.toml --extra serving "${from[@]}" --no-emit-package torch
lock training.txt pyproject.toml --extra training "${from[@]}" --no-emit-package torch
wheels=$(mktemp -d)
python3 -m pip download --quiet --no-deps --only-binary :all: "${from[@]}" --dest "$wheels" "torch==$torch+cpu"
{
  echo "# Written by requirements/lock.sh from pyproject.toml."
  printf 'torch==%s \\\n' "$torch+cpu"
  printf '    --hash=sha256:%s\n' "$(sha256sum "$wheels"/torch-*.whl | cut -d ' ' -f 1)"
} >requirements/torch-cpu.txt
rm -r "$wheels"
# PyPI's build, with the CUDA libraries that it names; what it shares with the others has the same version.
printf 'torch==%s\n' "$torch" | uv pip compile "${common[@]}" - -c requirements/training.txt >requirements/all.new
python3 - requirements/training.txt requirements/all.new >requirements/torch-cuda.txt <<'PYTHON'
"""Prints the second lock file without the packages of the first."""
import re
import sys
from pathlib import Path

first, second = (re.split(r"\n(?=\S)", Path(name).read_text().strip()) for name in sys.argv[1:])
there = {entry.split("==")[0] for entry in first}
print("# Written by requirements/lock.sh from pyproject.toml.")
print("\n".join(entry for entry in second if entry.split("==")[0] not in there))
PYTHON
rm requirements/all.new
