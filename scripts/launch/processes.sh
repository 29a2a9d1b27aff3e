#!/bin/sh
# N processes on this machine with fake CPU devices, to rehearse a multi-host run:
#   sh scripts/launch/processes.sh 2 4 --config=configs/quickstart.py --workdir=DIR    (2 processes, 4 devices each)
# SIGTERM or Ctrl-C to this script: all processes save and end. SIGTERM to one Python process, as in a preemption of one
# host: all save and start again.
set -eu
cd "$(dirname "$0")/../.."
. scripts/launch/again.sh
count=$1 devices=$2
shift 2
export JAX_PLATFORMS=cpu JAX_NUM_PROCESSES="$count" JAX_COORDINATOR_ADDRESS="${JAX_COORDINATOR_ADDRESS:-localhost:12321}"
export XLA_FLAGS="--xla_force_host_platform_device_count=$devices"
index=0 pids=
while [ "$index" -lt "$count" ]; do
    JAX_PROCESS_ID=$index
    export JAX_PROCESS_ID
    again .venv/bin/python main.py --distributed "$@" &
    pids="$pids $!"
    index=$((index + 1))
done
trap 'for pid in $pids; do kill -TERM "$pid" 2>/dev/null || :; done' TERM INT HUP
worst=0
for pid in $pids; do
    finished "$pid"
    [ "$code" -eq 0 ] || worst=$code
done
exit "$worst"
