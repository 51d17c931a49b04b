#!/usr/bin/env bash
# Two machines on one: network namespaces joined by a switch, each a host of a Ray cluster, and a client beside them.
#
#   sudo loadtest/two_hosts.sh [arguments of python -m loadtest.two_hosts]
#
# Makes the namespaces, runs loadtest/two_hosts.py in the client's, and takes all of it away again, whatever happens.
# Needs Linux, root and iproute2; nft for the firewall (nftables). PYTHON names the environment's Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

if [[ $(uname -s) != Linux ]] || ((EUID != 0)) || ! command -v ip >/dev/null; then
  echo "skipped: two hosts need Linux, root and iproute2"
  exit 0
fi
prefix=sa$$
namespaces=("$prefix-net" "$prefix-a" "$prefix-b" "$prefix-client")

tidy() {
  for namespace in "${namespaces[@]}"; do
    # What still runs in it, and only that.
    ip netns pids "$namespace" 2>/dev/null | xargs --no-run-if-empty kill -9 2>/dev/null || true
    ip netns delete "$namespace" 2>/dev/null || true
  done
}
trap tidy EXIT

if ! ip netns add "$prefix-net"; then
  echo "skipped: this machine allows no network namespaces"
  exit 0
fi
ip -n "$prefix-net" link add switch type bridge
ip -n "$prefix-net" link set switch up
number=1
for name in a b client; do
  ip netns add "$prefix-$name"
  ip link add eth0 netns "$prefix-$name" type veth peer name "port-$name" netns "$prefix-net"
  ip -n "$prefix-net" link set "port-$name" master switch up
  ip -n "$prefix-$name" address add "10.77.0.$number/24" dev eth0
  ip -n "$prefix-$name" link set lo up
  ip -n "$prefix-$name" link set eth0 up
  ip -n "$prefix-$name" route add default dev eth0
  number=$((number + 1))
done
ip netns exec "$prefix-client" "$python" -m loadtest.two_hosts --prefix "$prefix" "$@"
