#!/usr/bin/env bash
# Writes an SBOM (CycloneDX, JSON) for each image and for the wheel, from the lock files (`make sbom`).
#
#   requirements/sbom.sh BIN [FOLDER]      BIN: folder of the environment's commands; TORCH=cuda: PyPI's build of torch
#
# Each lists the installed Python packages with their hashes. It does not list the content of the base image and of the packages
# (Debian's packages, the libraries in TorchServe's jar): docs/explanation/security.md.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 folder=${2:-sbom} torch=torch-${TORCH:-cpu}
mkdir -p "$folder"
project=$(mktemp)
trap 'rm "$project"' EXIT

sbom() { # name, then lock files
  local name=$1 files=() file
  shift
  sed "s/^name = \"gradserve\"$/name = \"$name\"/" pyproject.toml >"$project"
  for file; do
    "$bin/python" requirements/except.py "requirements/$file.txt" ${files[@]+"${files[@]}"}
    files+=("requirements/$file.txt")
  done | PYTHONWARNINGS=ignore "$bin/cyclonedx-py" requirements --pyproject "$project" --output-reproducible \
    --output-file "$folder/$name.cdx.json" -
  echo "$folder/$name.cdx.json"
}

sbom gradserve-gateway gateway
sbom gradserve-torchserve "$torch" serving
sbom gradserve-training "$torch" training
sbom gradserve "$torch" gateway serving training
