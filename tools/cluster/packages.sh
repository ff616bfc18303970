#!/usr/bin/env bash
# Install the Debian packages that a node of the test cluster needs. As root only; anybody else is told their names.
set -euo pipefail

packages=(containerd runc containernetworking-plugins nftables iptables conntrack iproute2 util-linux)

is_there() { [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

missing=()
for package in "${packages[@]}"; do
    is_there "$package" || missing+=("$package")
done
((${#missing[@]})) || exit 0

if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    printf 'cluster: nodes need these Debian packages, and root to install them: %s\n' "${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# Debian would start a containerd for the whole machine; the nodes start their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
