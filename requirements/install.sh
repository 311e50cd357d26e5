#!/usr/bin/env bash
# Installs everything into a virtual environment from the lock files, each file checked by its hash (`make install`).
#
#   requirements/install.sh PYTHON [INDEX]      PYTHON: the environment's own; INDEX: one that has the CPU build of torch
#
# Of torch the CPU build is installed where pip finds it: in INDEX, or by its own configuration. Without INDEX it is PyPI's
# otherwise, with CUDA libraries of several gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 index=${2:-}
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation "$@"; }

# What comes as source is built with this setuptools: pip would fetch another, unchecked.
install --require-hashes -r requirements/build.txt
if ! said=$(install --require-hashes ${index:+--extra-index-url "$index"} -r requirements/torch-cpu.txt 2>&1); then
  # A file that is there and is another one is an error, and so is an INDEX without it.
  [[ -z $index && $said == *"No matching distribution found"* ]] || { echo "$said" >&2; exit 1; }
  install --require-hashes -r requirements/torch-cuda.txt
fi
install --require-hashes -r requirements/gateway.txt -r requirements/serving.txt -r requirements/training.txt \
  -r requirements/dev.txt
install --editable .
"$python" -m pip check
