# shellcheck shell=bash
# Sourced by the scripts: makes .venv once, installs the extras asked for, and
# reinstalls only when setup.py has changed.
#
#   ensure_environment EXTRAS        e.g. ensure_environment gemma3-270m,test
#
# PYTHON names the interpreter (default: the first of python3, python3.13,
# python3.12, python3.11 that is 3.11 to 3.13), VENV the folder (.venv).

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys, ensurepip
sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 with venv found (tried \
${PYTHON:-python3, python3.13, python3.12, python3.11}); set PYTHON to one." >&2
  return 1
}

ensure_environment() {
  local extras=$1 stamp wanted python
  VENV=${VENV:-.venv}
  stamp=$VENV/.installed
  wanted="$extras $(cksum < setup.py)"
  # Extras add up: what an earlier call installed stays.
  if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then
    return 0
  fi
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || return 1
    echo "Making $VENV with $("$python" --version)" >&2
    "$python" -m venv --clear "$VENV" || { rm -rf "$VENV"; return 1; }
    "$VENV/bin/python" -m pip install --quiet --upgrade pip || return 1
  fi
  echo "Installing gemma_jax[$extras] into $VENV" >&2
  "$VENV/bin/python" -m pip install --quiet -e ".[$extras]" || return 1
  echo "$wanted" >> "$stamp"
}
