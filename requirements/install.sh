#!/usr/bin/env bash
# Installs everything into a virtual environment from the lock files, each file checked by its hash (`make install`).
#
#   requirements/install.sh PYTHON [INDEX]      PYTHON: the environment's own; INDEX: one that has the CPU build of torch
#
# Of torch pip takes the CPU build where it finds it (in INDEX, or by its own configuration), else PyPI's, which on Linux
# needs CUDA libraries of several gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 index=${2:-}
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation "$@"; }

# What comes as source is built with this setuptools: pip would fetch another, unchecked.
install --require-hashes -r requirements/build.txt
install --require-hashes ${index:+--extra-index-url "$index"} -r requirements/torch.txt
version=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
if [[ $version != *+cpu && $(uname -sm) == "Linux x86_64" ]]; then
  install --require-hashes -r requirements/torch-cuda.txt
fi
install --require-hashes -r requirements/gateway.txt -r requirements/serving.txt -r requirements/training.txt \
  -r requirements/dev.txt
install --editable .
"$python" -m pip check
