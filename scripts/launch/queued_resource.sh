#!/bin/sh
# A TPU slice of several hosts through Google Cloud's queued resources; `gcloud` must be set to a project and a zone.
#   sh scripts/launch/queued_resource.sh create NAME v5p-128 v2-alpha-tpuv5 [--spot]   asks for the slice; `state NAME` shows it
#   sh scripts/launch/queued_resource.sh install NAME https://HOST/REPOSITORY.git      clones and installs on every worker
#   sh scripts/launch/queued_resource.sh start NAME --config=... --workdir=SHARED/run1 starts the run on every worker
#   sh scripts/launch/queued_resource.sh keep NAME v5p-128 v2-alpha-tpuv5 https://HOST/REPOSITORY.git [--spot] -- --config=... --workdir=SHARED/run1
#       creates, installs and starts, and does so again each time the slice was deleted or suspended; run it in tmux
#   sh scripts/launch/queued_resource.sh log NAME                                      last lines of worker 0
#   sh scripts/launch/queued_resource.sh stop NAME                                     saves a checkpoint, then ends
#   sh scripts/launch/queued_resource.sh delete NAME
# The run goes on when the connection ends; it restarts itself after a preemption notice or a lost host
# (scripts/launch/again.sh). `keep` ends when the run does, and looks every POLL_SECONDS (60).
set -eu
usage() {
    sed -n '2,11s/^# //p' "$0" >&2
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
    on_workers all "{ [ -d moe ] || git clone$(quoted "$1") moe; } && cd moe && sh scripts/install.sh && .venv/bin/pip install -c constraints.txt 'jax[tpu]' gcsfs google-cloud-storage"
    ;;
start)
    # nohup and closed standard streams: the run outlives the connection. The launcher's number is kept for `stop`.
    on_workers all "cd moe && { nohup sh scripts/launch/tpu_vm.sh$(quoted "$@") > moe.log 2>&1 < /dev/null & echo \$! > moe.pid; }"
    ;;
keep)
    [ $# -ge 4 ] || usage
    type=$1 version=$2 repository=$3 options=
    shift 3
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        options="$options $1"
        shift
    done
    [ $# -ge 2 ] || usage
    shift
    while :; do
        state=$(sh "$0" state "$name" 2>/dev/null) || state=ABSENT
        case $state in
        ABSENT)
            # shellcheck disable=SC2086  # options are several words
            sh "$0" create "$name" "$type" "$version" $options || :
            ;;
        SUSPENDED | FAILED) sh "$0" delete "$name" --quiet || : ;;
        ACTIVE)
            run=$(on_workers 0 'if [ ! -f moe/moe.pid ]; then echo new; elif kill -0 "$(cat moe/moe.pid)" 2>/dev/null; then echo running; else echo ended; fi') || run=unreachable
            case $run in
            new) sh "$0" install "$name" "$repository" && sh "$0" start "$name" "$@" || : ;;
            ended)
                sh "$0" log "$name"
                echo "the run has ended; free the slice: sh $0 delete $name" >&2
                exit 0
                ;;
            esac
            ;;
        esac
        sleep "${POLL_SECONDS:-60}"
    done
    ;;
log) on_workers 0 'tail -n 20 moe/moe.log' ;;
stop) on_workers all 'kill -TERM "$(cat moe/moe.pid)"' ;;
delete) gcloud compute tpus queued-resources delete "$name" --force "$@" ;;
*) usage ;;
esac
