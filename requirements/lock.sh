#!/usr/bin/env bash
# Writes the lock files anew from pyproject.toml: every package that is installed, with its hashes (`make lock`).
#
#   requirements/lock.sh [SOURCE]      SOURCE: an index or a folder that has the CPU build of torch, by default PyTorch's own
#
# What is locked keeps its version where pyproject.toml allows it; with UPGRADE=1 everything is raised. Needs uv
# (`pip install uv`).
#
#   gateway, serving, training   what each image gets, without torch
#   dev                          what tests, lint and `make sbom` need besides
#   torch-cpu, torch-cuda        PyTorch's CPU build; PyPI's build with its CUDA libraries. One of the two is installed
#   build                        what builds the packages that come as source
set -euo pipefail
source=${1:-https://download.pytorch.org/whl/cpu}
cd "$(dirname "$0")/.."
torch=$(sed -n 's/^  "torch==\(.*\)",$/\1/p' pyproject.toml | head -1)
# The installed packages are Linux wheels for x86-64, as the base image is.
common=(--quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header
  --index-strategy unsafe-best-match --no-annotate)
new=$(mktemp -d)
trap 'rm -r "$new"' EXIT

write() { # file: takes the entries from standard input
  { echo "# Written by requirements/lock.sh from pyproject.toml."; cat; } >"requirements/$1.txt"
}
lock() { # file, then options
  uv pip compile "${common[@]}" --output-file "$new/$1.txt" "${@:2}" >/dev/null
}
except() { python3 requirements/except.py "$@"; }

if [[ -d $source ]]; then from=(--find-links "$source"); else from=(--extra-index-url "$source"); fi
# All together first, because a developer's machine has it all: no two lock files name a package in two versions. The
# present versions are uv's first choice.
if [[ -z ${UPGRADE:-} ]]; then
  cat requirements/{gateway,serving,training,dev}.txt >"$new/all.txt"
  cp requirements/torch-cuda.txt "$new/"
fi
lock all pyproject.toml --all-extras "${from[@]}" --no-emit-package torch
for file in gateway serving training; do
  lock "$file" pyproject.toml --extra "$file" "${from[@]}" --no-emit-package torch --constraint "$new/all.txt"
  except "$new/$file.txt" | write "$file"
done
except "$new/all.txt" requirements/{gateway,serving,training}.txt | write dev
sed -n 's/^requires = \["\(setuptools==.*\)"\]$/\1/p' pyproject.toml | lock build -
write build <"$new/build.txt"

python3 -m pip download --quiet --no-deps --only-binary :all: "${from[@]}" --dest "$new" "torch==$torch+cpu"
printf 'torch==%s \\\n    --hash=sha256:%s\n' "$torch+cpu" "$(sha256sum "$new"/torch-*.whl | cut -d ' ' -f 1)" | write torch-cpu
# PyPI's build, with the CUDA libraries that it names; what it shares with the others has the same version.
printf 'torch==%s\n' "$torch" | lock torch-cuda - --constraint "$new/all.txt"
except "$new/torch-cuda.txt" requirements/training.txt | write torch-cuda
