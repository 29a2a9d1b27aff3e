#!/bin/sh
# Installs this package in editable mode into .venv, with the versions of constraints.txt. Usage: sh scripts/install.sh [dev]
# Uses the first Python >= 3.12 found, whatever `python3` is; "dev" adds what tests, lint and type checks need.
set -eu
cd "$(dirname "$0")/.."

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

python=
for candidate in python3.13 python3.12 /usr/bin/python3.13 /usr/bin/python3.12 python3.14 \
    python3 /usr/bin/python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "install: no Python 3.12 or newer found. Debian 13, Ubuntu 24.04 or newer: apt install python3 python3-venv;" \
        "elsewhere: uv python install 3.13" >&2
    exit 1
fi

if ! [ -x .venv/bin/python ] || ! fits .venv/bin/python; then
    rm -rf .venv
    if ! "$python" -m venv .venv 2>/dev/null; then
        rm -rf .venv
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "install: $python cannot make virtual environments. On Debian: apt install python$version-venv" >&2
        exit 1
    fi
fi
extras=
[ "${1:-}" = dev ] && extras="[dev]"
echo "install: $("$python" --version), this package$extras into .venv" >&2
rm -f .venv/failed
{ .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".$extras" || touch .venv/failed; } |
    awk '/^(Collecting|Downloading|Installing|Building)/ { print "install: " substr($0, 1, 72); fflush() }' >&2
if [ -e .venv/failed ]; then
    echo "install: pip failed, see above. Where it misses a compiler, use x86-64 or ARM Linux with glibc 2.28 or newer, or" \
        "macOS on ARM: there all compiled dependencies are wheels, and none is needed" >&2
    exit 1
fi
version=$(cd / && "$OLDPWD/.venv/bin/moe" --version) || {
    echo "install: .venv/bin/moe does not start; another package named moe may be in .venv. Remove .venv and try again" >&2
    exit 1
}
echo "install: $version is ready. Next, for a first model in a few minutes:" >&2
echo "  .venv/bin/moe train --config=quickstart --workdir=/tmp/quickstart" >&2
