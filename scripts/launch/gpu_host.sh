#!/bin/sh
# One host with NVIDIA GPUs, one process for all of them. Needs pip install "jax[cuda13]".
#   sh scripts/launch/gpu_host.sh --config=configs/quickstart.py --workdir=DIR --config.mesh.data=-1
set -eu
cd "$(dirname "$0")/../.."
. scripts/launch/again.sh
again .venv/bin/python main.py "$@"
