#!/bin/sh
# System packages of the tests (a Slurm cluster on this machine, a browser), with CI=true or INSTALL=1 only and as root.
set -eu
[ "${CI:-}" = true ] || [ "${INSTALL:-}" = 1 ] || exit 0
missing=
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2 nsenter:util-linux chromium:chromium; do
    command -v "${pair%%:*}" > /dev/null || missing="$missing ${pair#*:}"
done
[ -n "$missing" ] || exit 0
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get -q update > /dev/null
# shellcheck disable=SC2086
apt-get -q install --yes --no-install-recommends $missing > /dev/null
