#!/usr/bin/env bash
# Installs everything into a virtual environment from the lock files; pip checks each file by its hash (`make install`).
#
#   requirements/install.sh PYTHON [INDEX]      PYTHON: the environment's Python; INDEX: an index with the CPU build of torch
#
# Installs the CPU build of torch if pip finds it, in INDEX or by its own configuration. Otherwise, without INDEX, it installs
# PyPI's build, which has CUDA libraries of several gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 index=${2:-}
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation "$@"; }

# Source packages are built with this setuptools; pip would fetch another one without checking its hash.
install --require-hashes -r requirements/build.txt
if ! said=$(install --require-hashes ${index:+--extra-index-url "$index"} -r requirements/torch-cpu.txt 2>&1); then
  # A file with another hash is an error, and so is an INDEX without the file.
  [[ -z $index && $said == *"No matching distribution found"* ]] || { echo "$said" >&2; exit 1; }
  install --require-hashes -r requirements/torch-cuda.txt
fi
install --require-hashes -r requirements/gateway.txt -r requirements/serving.txt -r requirements/training.txt \
  -r requirements/dev.txt
install --editable .
"$python" -m pip check
