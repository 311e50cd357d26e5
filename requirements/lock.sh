#!/usr/bin/env bash
# Writes the lock files again from pyproject.toml: every installed package with its hashes (`make lock`).
#
#   requirements/lock.sh [SOURCE]      SOURCE: an index or a folder with the CPU build of torch, by default PyTorch's index
#
# A locked package keeps its version if pyproject.toml allows it; UPGRADE=1 raises all versions. Needs uv
# (`pip install uv`).
#
#   gateway, serving, training   the packages of each image, without torch
#   dev                          further packages for tests, lint and `make sbom`, those of the extras feedback and sources included
#   docs                         further packages for `make docs`
#   bulk                         further packages for `make test-bulk`: Ray
#   torch-cpu, torch-cuda        PyTorch's CPU build; PyPI's build with its CUDA libraries. One of the two is installed
#   build                        packages that build source packages
set -euo pipefail
source=${1:-https://download.pytorch.org/whl/cpu}
cd "$(dirname "$0")/.."
torch=$(sed -n 's/^  "torch==\(.*\)",$/\1/p' pyproject.toml | head -1)
# The installed packages are Linux wheels for x86-64, like the base image.
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
# Resolve all together first, because a developer's machine installs all: so no two lock files have different versions of a
# package. uv prefers the present versions.
if [[ -z ${UPGRADE:-} ]]; then
  cat requirements/{gateway,serving,training,dev,docs,bulk}.txt >"$new/all.txt"
  cp requirements/torch-cuda.txt "$new/"
fi
lock all pyproject.toml --all-extras "${from[@]}" --no-emit-package torch
for file in gateway serving training dev docs bulk; do
  extras=(--extra "$file")
  [[ $file != dev ]] || extras+=(--extra feedback --extra sources)
  lock "$file" pyproject.toml "${extras[@]}" "${from[@]}" --no-emit-package torch --constraint "$new/all.txt"
done
for file in gateway serving training; do except "$new/$file.txt" | write "$file"; done
except "$new/dev.txt" requirements/{gateway,serving,training}.txt | write dev
except "$new/docs.txt" requirements/{gateway,serving,training,dev}.txt | write docs
except "$new/bulk.txt" requirements/{gateway,serving,training,dev}.txt | write bulk
sed -n 's/^requires = \["\(setuptools==.*\)"\]$/\1/p' pyproject.toml | lock build -
write build <"$new/build.txt"

python3 -m pip download --quiet --no-deps --only-binary :all: "${from[@]}" --dest "$new" "torch==$torch+cpu"
printf 'torch==%s \\\n    --hash=sha256:%s\n' "$torch+cpu" "$(sha256sum "$new"/torch-*.whl | cut -d ' ' -f 1)" | write torch-cpu
# PyPI's build with the CUDA libraries that it requires; packages shared with the other lock files have the same version.
printf 'torch==%s\n' "$torch" | lock torch-cuda - --constraint "$new/all.txt"
except "$new/torch-cuda.txt" requirements/training.txt | write torch-cuda
