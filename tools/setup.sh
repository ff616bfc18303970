#!/usr/bin/env bash
# Build .venv: what requirements.lock names, each file checked against its hash, and this project, editable.
# `make setup` runs it: tools/setup.sh [PYTHON]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:-python3}
bin=.venv/bin

fail() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# uv does not read pip's settings; a machine behind a mirror usually has only those.
take_over_from_pip() {
    local value
    value=$("$bin/python" -m pip config get "$1" 2>/dev/null || "$bin/python" -m pip config get ":env:.${1#*.}" 2>/dev/null) || return 0
    [[ -n ${!2:-} || -z $value ]] || export "$2=$value"
}

create_environment() {
    "$python" -m venv --clear .venv 2>/dev/null && return
    # Debian ships venv without pip in it unless python3-venv is there; a system pip can fill the gap.
    "$python" -m venv --clear --without-pip .venv 2>/dev/null ||
        fail "$python cannot create a virtual environment (on Debian: apt-get install python3-venv)"
    "$python" -m pip --python "$bin/python" install --quiet pip ||
        fail "$python has no pip for the virtual environment (on Debian: apt-get install python3-venv)"
}

if ! is_new_enough "$python"; then
    found=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) || found="not there"
    fail "Python 3.11 or newer is needed and $python is $found; name another one: make setup PYTHON=python3.12"
fi
is_new_enough "$bin/python" && "$bin/python" -m pip --version >/dev/null 2>&1 || create_environment

take_over_from_pip global.index-url UV_DEFAULT_INDEX
take_over_from_pip global.extra-index-url UV_INDEX
take_over_from_pip global.cert SSL_CERT_FILE
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} # torch's parts are large and mirrors slow

# The installer is locked like everything else: its lines of the lock are all that pip installs.
locked_uv=$(mktemp)
trap 'rm -f "$locked_uv"' EXIT
awk '/^[a-z]/ { ours = /^uv==/ } ours && !/^ *#/' requirements.lock >"$locked_uv"
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement "$locked_uv" ||
    fail "uv could not be installed"

"$bin/uv" pip install --python "$bin/python" --require-hashes --no-deps --requirement requirements.lock
# Without isolation: the build backend is the locked one, too.
"$bin/uv" pip install --python "$bin/python" --quiet --no-deps --no-build-isolation --editable .
