#!/bin/sh
# One host with NVIDIA GPUs; needs pip install "jax[cuda13]". All its GPUs belong to one process.
#   sh scripts/launch/gpu_host.sh --config=configs/quickstart.py --workdir=DIR --config.mesh.data=-1
set -eu
cd "$(dirname "$0")/../.."
. scripts/launch/again.sh
again .venv/bin/python main.py "$@"
