#!/usr/bin/env bash
# Runs the tests in .venv, which it makes and fills from launch/lock.txt if need be.
#
#   bash tests/run.sh                    everything that this machine can run
#   bash tests/run.sh tests/lora -k merge     arguments go to pytest
#   bash tests/run.sh -n 0 --pdb         in one process, to debug
#   EXTRAS=tpu,parity bash tests/run.sh --heavy       the long ones as well
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment "test${EXTRAS:+,$EXTRAS}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# A module's tests stay together: they share what it compiles.
exec "$VENV/bin/python" -m pytest \
  --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
