#!/bin/sh
# One TPU VM, or every worker of a TPU slice: run the same line on each of them.
#   sh scripts/launch/tpu_vm.sh --config=configs/mixtral_8x7b.py --workdir=BUCKET/run1
# On a slice of several hosts, or on several slices, start it on all workers at once, for instance with
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd REPOSITORY && sh scripts/launch/tpu_vm.sh ..."
# JAX finds the other workers by itself. Started again after a preemption, the same line goes on at the last checkpoint.
set -eu
cd "$(dirname "$0")/../.."
. scripts/launch/again.sh
again .venv/bin/python main.py --distributed "$@"
