#!/bin/sh
# N processes on this machine with fake CPU devices, to rehearse a run of several hosts:
#   sh scripts/launch/processes.sh 2 4 --config=configs/quickstart.py --workdir=DIR    (2 processes, 4 devices each)
set -eu
cd "$(dirname "$0")/../.."
count=$1 devices=$2
shift 2
export JAX_PLATFORMS=cpu JAX_NUM_PROCESSES="$count" JAX_COORDINATOR_ADDRESS=localhost:12321
export XLA_FLAGS="--xla_force_host_platform_device_count=$devices"
index=1
while [ "$index" -lt "$count" ]; do
    JAX_PROCESS_ID=$index .venv/bin/python main.py --distributed "$@" >/dev/null &
    index=$((index + 1))
done
JAX_PROCESS_ID=0 .venv/bin/python main.py --distributed "$@"
wait
