#!/usr/bin/env bash
# Runs the tests in .venv, which it makes and fills from setup.py if need be.
#
#   bash tests/run.sh                    the suite, in two processes
#   bash tests/run.sh tests/test_lora.py -k merge     arguments go to pytest
#   EXTRAS=tpu,parity bash tests/run.sh --heavy       the long ones as well
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment "gemma3_270m,test${EXTRAS:+,$EXTRAS}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# A module stays in one process: what it compiles, its tests share.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec "$VENV/bin/python" -m pytest "$@"
