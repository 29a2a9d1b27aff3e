#!/bin/sh
# A TPU slice of several hosts through Google Cloud's queued resources; `gcloud` must be set to a project and a zone.
#   sh scripts/launch/queued_resource.sh create NAME v5p-128 v2-alpha-tpuv5 [--spot]   asks for the slice; `state NAME` shows it
#   sh scripts/launch/queued_resource.sh install NAME https://HOST/REPOSITORY.git      clones and installs on every worker
#   sh scripts/launch/queued_resource.sh start NAME --config=... --workdir=SHARED/run1 starts the run on every worker
#   sh scripts/launch/queued_resource.sh log NAME                                      last lines of worker 0
#   sh scripts/launch/queued_resource.sh stop NAME                                     saves a checkpoint, then ends
#   sh scripts/launch/queued_resource.sh delete NAME
# The run goes on when the connection ends; it restarts itself after a preemption notice (scripts/launch/again.sh).
set -eu
usage() {
    sed -n '2,9s/^# //p' "$0" >&2
    exit 2
}
[ $# -ge 2 ] || usage
command=$1 name=$2
shift 2

# Quotes words for the shell of a worker.
quoted() {
    for word in "$@"; do
        printf " '%s'" "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
    done
}

on_workers() { gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

case $command in
create)
    [ $# -ge 2 ] || usage
    type=$1 version=$2
    shift 2
    gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
        --runtime-version="$version" "$@"
    ;;
state) gcloud compute tpus queued-resources describe "$name" --format='value(state.state)' ;;
install)
    [ $# -eq 1 ] || usage
    on_workers all "git clone$(quoted "$1") moe && cd moe && sh scripts/install.sh && .venv/bin/pip install -c constraints.txt 'jax[tpu]' gcsfs google-cloud-storage"
    ;;
start)
    # nohup and closed standard streams: the run outlives the connection. The launcher's number is kept for `stop`.
    on_workers all "cd moe && { nohup sh scripts/launch/tpu_vm.sh$(quoted "$@") > moe.log 2>&1 < /dev/null & echo \$! > moe.pid; }"
    ;;
log) on_workers 0 'tail -n 20 moe/moe.log' ;;
stop) on_workers all 'kill -TERM "$(cat moe/moe.pid)"' ;;
delete) gcloud compute tpus queued-resources delete "$name" --force ;;
*) usage ;;
esac
