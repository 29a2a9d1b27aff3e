#!/bin/sh
# One TPU VM, or every worker of a TPU slice, with the same line on each of them.
#   sh scripts/launch/tpu_vm.sh --config=configs/mixtral_8x7b.py --workdir=SHARED/run1
# On a slice of several hosts, or on several slices, start it on all workers at once, so that it outlives the connection:
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd REPOSITORY && \
#       { nohup sh scripts/launch/tpu_vm.sh ... > moe.log 2>&1 < /dev/null & }"
# which scripts/launch/queued_resource.sh does. SHARED is a folder that all workers see, or gs://BUCKET/NAME. For several
# slices, run it on the workers of all of them, with --config.mesh.data (or --config.mesh.pipeline, where it is above 1)
# a multiple of their number.
# JAX finds the other workers. Run again after a preemption, the same line resumes at the last checkpoint.
set -eu
cd "$(dirname "$0")/../.."
. scripts/launch/again.sh
again .venv/bin/python main.py --distributed "$@"
