# shellcheck shell=sh
# Sourced: `again COMMAND` runs it as long as it ends with 75, which says "start me again" (docs/restarts.md).
#
# SIGTERM, SIGHUP or Ctrl-C to this shell reaches the command as one SIGTERM, and it is not started again: as the first
# process of a container this shell would otherwise keep the signal to itself. A second SIGTERM would end the command
# without a checkpoint; so it has a session of its own, which Ctrl-C does not reach. A systemd unit needs KillMode=mixed.
again() {
    stopping=''
    trap 'stopping=asked' TERM INT HUP
    while :; do
        setsid "$@" &
        child=$!
        trap 'stop_it' TERM INT HUP
        [ -z "$stopping" ] || stop_it # a signal came before the child's number was known
        finished "$child"
        trap 'stopping=asked' TERM INT HUP
        if [ "$code" -ne 75 ] || [ -n "$stopping" ]; then return "$code"; fi
        echo "started again after exit code 75" >&2
    done
}

stop_it() {
    trap '' TERM INT HUP # whatever comes now would come between these lines
    [ "$stopping" = told ] || kill -TERM "$child" || :
    stopping=told
}

# Waits for a process, whatever signals come meanwhile; its exit code is then in $code.
finished() {
    code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do
        code=0
        wait "$1" || code=$?
    done
}
