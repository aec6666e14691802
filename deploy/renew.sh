#!/usr/bin/env bash
# Renews what the image is pinned to: the digest of its base image, and the versions and checksums of its packages.
# Needs docker and uv. Review and commit the changes: git diff deploy
set -euo pipefail
cd "$(dirname "$0")/.."

# PyTorch is left out: it comes from an index of its own, for CPUs or for a version of CUDA.
echo hatchling | uv pip compile pyproject.toml - --extra local --extra serve --upgrade --generate-hashes \
  --override <(echo "torch; python_version < '3'") --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
  --no-header --no-annotate --no-emit-index-url --output-file deploy/requirements.lock

base=python:3.12-slim
digest=$(docker buildx imagetools inspect "$base" --format '{{.Manifest.Digest}}')
sed -i "s|^ARG BASE=.*|ARG BASE=$base@$digest|" deploy/Dockerfile
