#!/usr/bin/env bash
# Refuse a change of proto/ that breaks who speaks the wire: against the newest release, or before the first one the commit before.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=$(git -c 'safe.directory=*' describe --tags --abbrev=0 --match 'v*' 2>/dev/null) || base=$(git -c 'safe.directory=*' rev-parse --verify --quiet HEAD~1) || exit 0
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
git -c 'safe.directory=*' archive "$base" proto buf.yaml | tar -x -C "$before"
.venv/bin/buf breaking --against "$before"
