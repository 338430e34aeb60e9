#!/usr/bin/env bash
# Fine-tunes the real Gemma 3 270M on questions about travelling in Seoul, and
# shows what it says before and after. Makes .venv on the first run.
#
#   bash launch/quickstart.sh [--config.FIELD=VALUE ...]
#
# WORKDIR is where the run is kept (default runs/quickstart); the same command
# again resumes it, or shows the finished one.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment
exec "$VENV/bin/python" -m launch.quickstart \
  --workdir="${WORKDIR:-runs/quickstart}" "$@"
