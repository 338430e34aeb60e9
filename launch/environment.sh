# shellcheck shell=bash
# Sourced by the scripts: makes .venv once from launch/lock.txt, whose hashes pip
# checks, and installs again only when that or setup.py has changed.
#
#   ensure_environment           what the quickstart needs
#   ensure_environment test      and what the tests need
#   ensure_environment test,tpu  and further extras of setup.py, not locked
#
# PYTHON names the interpreter (default: the first of python3, python3.13,
# python3.12, python3.11 that is 3.11 to 3.13), VENV the folder (.venv). Which
# index pip asks is its own configuration.

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

# Lines of the lock: all, or those of the quickstart, or of setuptools alone,
# which builds what has no wheel.
locked() {
  case $1 in
    all) cat launch/lock.txt ;;
    quickstart) sed '/^# for the tests/,$d' launch/lock.txt ;;
    setuptools) sed -n '/^setuptools==/,/[^\\]$/p' launch/lock.txt ;;
  esac
}

ensure_environment() {
  local extras=${1:-} part=quickstart stamp wanted python step
  local further=$extras
  VENV=${VENV:-.venv}
  stamp=$VENV/.installed
  wanted="$extras $(cat setup.py launch/lock.txt | cksum)"
  # Extras add up: what an earlier call installed stays.
  if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then
    return 0
  fi
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || return 1
    echo "Making $VENV with $("$python" --version)" >&2
    "$python" -m venv --clear "$VENV" || { rm -rf "$VENV"; return 1; }
  fi
  case $extras in test | test,*) part=all further=${further#test} ;; esac
  further=${further#,}
  echo "Installing gemma_jax${extras:+[$extras]} into $VENV" >&2
  for step in setuptools "$part"; do
    "$VENV/bin/python" -m pip install --quiet --require-hashes --no-deps \
      --no-build-isolation -r <(locked "$step") || return 1
  done
  "$VENV/bin/python" -m pip install --quiet --no-deps --no-build-isolation \
    -e . || return 1
  if [ -n "$further" ]; then
    "$VENV/bin/python" -m pip install --quiet -e ".[$further]" || return 1
  fi
  echo "$wanted" >> "$stamp"
}
