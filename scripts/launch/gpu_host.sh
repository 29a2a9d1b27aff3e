#!/bin/sh
# One host with NVIDIA GPUs, one process for all of them. Needs pip install "jax[cuda13]".
#   sh scripts/launch/gpu_host.sh --config=configs/quickstart.py --workdir=DIR --config.mesh.data=-1
# For several hosts, run it on each with JAX_COORDINATOR_ADDRESS (host 0's name and a free port), JAX_NUM_PROCESSES and
# JAX_PROCESS_ID set, and a workdir that all of them see.
set -eu
cd "$(dirname "$0")/../.."
. scripts/launch/again.sh
# JAX takes three quarters of a GPU by itself; plans state what a run needs (moe plan).
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
[ -z "${JAX_COORDINATOR_ADDRESS:-}" ] || set -- --distributed "$@"
again .venv/bin/python main.py "$@"
