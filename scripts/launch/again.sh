# Sourced: `again COMMAND` runs it as long as it ends with 75, which says "start me again" (docs/restarts.md).
again() {
    while :; do
        code=0
        "$@" || code=$?
        [ "$code" -eq 75 ] || return "$code"
        echo "started again after exit code 75" >&2
    done
}
