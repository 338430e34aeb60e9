#!/usr/bin/env bash
# Pins what is installed, each file by its hash; needs nothing but Python 3.11
# to 3.13 and a package index. Versions that still fit stay, unless --upgrade.
#
#   bash launch/lock.sh [--upgrade]
#
# lock.txt              of launch/environment.sh, for every platform: what the
#                       quickstart needs, then what the tests need beside it
# tpu_requirements.txt  of launch/tpu_vm.sh, for Python 3.11 on Linux
# uv.txt                uv itself, for launch/tpu_vm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
UV_VERSION=0.13.9
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$(find_python)" -m venv "$scratch/uv"
"$scratch/uv/bin/python" -m pip install --quiet "uv==$UV_VERSION"

# compile FILE ARGUMENT ... starts from the pins of launch/FILE.
compile() {
  local file=$1
  cp "launch/$file" "$scratch/$file" 2>/dev/null || true
  "$scratch/uv/bin/uv" pip compile --quiet --no-header --no-annotate \
    --python-version 3.11 --generate-hashes -o "$scratch/$file" "${@:2}"
}
# put FILE writes what comes in under a heading.
put() {
  { echo '# Made by bash launch/lock.sh; for --require-hashes.'; cat; } \
    > "$scratch/new"
  cp "$scratch/new" "launch/$1"
}
# part 0|1: lines of the packages that the quickstart does not need, or needs.
part() {
  awk -v wanted="$1" 'NR == FNR { sub("==.*", ""); needed[$0]; next }
    /^[^ ]/ { split($1, name, "=="); is_needed = (name[1] in needed) }
    is_needed == wanted' <(grep '^[^ #]' "$scratch/quickstart.txt") \
    <(grep -v '^#' "$scratch/lock.txt")
}

compile uv.txt - <<< "uv==$UV_VERSION"
put uv.txt < "$scratch/uv.txt"
compile tpu_requirements.txt setup.py --extra tpu --extra gcs \
  --python-platform x86_64-manylinux_2_35 "$@"
put tpu_requirements.txt < "$scratch/tpu_requirements.txt"
# setuptools builds what has no wheel, and this package.
compile lock.txt setup.py - --universal --extra gemma3-270m --extra test \
  "$@" <<< 'setuptools>=68'
compile quickstart.txt setup.py - --universal --extra gemma3-270m \
  -c "$scratch/lock.txt" <<< 'setuptools>=68'
{ part 1; echo '# for the tests'; part 0; } | put lock.txt
