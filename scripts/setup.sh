#!/bin/sh
# Make the virtual environment and install EdgeR1 into it, from nothing: scripts/setup.sh VENV [EXTRA ...]
# EXTRA names dependency groups of pyproject.toml, such as dev or parity.
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift

say() { printf '%s\n' "$*" >&2; }

usable() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.14 python; do
        if usable "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
}

if ! usable "$venv/bin/python"; then
    python=$(find_python)
    rm -rf "$venv"
    if [ -n "$python" ] && "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        say "Making a virtual environment in $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    elif command -v uv >/dev/null 2>&1; then
        say "Making a virtual environment in $venv with uv"
        uv venv --quiet --seed --python '>=3.11' "$venv"
    elif [ -n "$python" ]; then
        say "edger1: $python cannot make virtual environments: its venv module is missing."
        say "Install it (on Debian and Ubuntu: sudo apt install python3-venv), then run this again."
        exit 1
    else
        say "edger1: no Python of version 3.11 or newer was found."
        say "Install one (macOS: brew install python; Debian, Ubuntu: sudo apt install python3 python3-venv), or uv,"
        say "or name one: make PYTHON=/path/to/python3 ..."
        exit 1
    fi
fi

pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

say "Installing EdgeR1 and what it needs into $venv (about a minute the first time)"
pip install --constraint constraints.txt --upgrade pip
# The build needs first, in the environment itself: an isolated build would fetch MLX a second time.
case $(uname -s) in
Linux) pip install --constraint constraints.txt scikit-build-core nanobind cmake ninja 'mlx[cpu]' ;;
*) pip install --constraint constraints.txt scikit-build-core nanobind ;;
esac
groups=
for group in "$@"; do groups="$groups --group $group"; done
# shellcheck disable=SC2086
PATH="$(pwd)/$venv/bin:$PATH" pip install --constraint constraints.txt --no-build-isolation $groups --editable .
