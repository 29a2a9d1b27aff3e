# shellcheck shell=sh
# Sourced by launchers: `again COMMAND` runs a command and repeats it while it exits with 75 ("restart me",
# docs/runs.md).
#
# SIGTERM, SIGHUP or Ctrl-C to this shell is passed on as one SIGTERM, and the command is not started again. The command
# runs in a session of its own, so that Ctrl-C does not reach it directly: a second signal would end it without a
# checkpoint. A systemd unit needs KillMode=mixed.
again() {
    stopping=''
    trap 'stopping=asked' TERM INT HUP
    while :; do
        setsid "$@" &
        child=$!
        trap 'stop_it' TERM INT HUP
        [ -z "$stopping" ] || stop_it # a signal came before the child's process id was known
        finished "$child"
        trap 'stopping=asked' TERM INT HUP
        if [ "$code" -ne 75 ] || [ -n "$stopping" ]; then return "$code"; fi
        echo "started again after exit code 75" >&2
    done
}

stop_it() {
    trap '' TERM INT HUP # ignore signals between these lines
    [ "$stopping" = told ] || kill -TERM "$child" || :
    stopping=told
}

# Waits for a process even if signals arrive meanwhile; leaves its exit code in $code.
finished() {
    code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do
        code=0
        wait "$1" || code=$?
    done
}
