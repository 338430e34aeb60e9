#!/usr/bin/env bash
# Runs one command on all workers of a Cloud TPU slice, and starts it again
# after a preemption.
#
#   bash launch/tpu_vm.sh run --name=mine --zone=us-west4-a --type=v5e-8 --spot \
#     -- python -m launch.train --config=experiments/dolly_lora.py \
#        --workdir=gs://bucket/mine
#
# Actions
#   run      create and setup as needed, then start; the same command resumes
#   create   the slice, and wait for it
#   setup    copy this checkout and install it, pinned, on all workers
#   start    the command after --, in tmux on all workers
#   status   the slice's state; what each worker does
#   logs     the last lines of one worker's log (--follow to stay)
#   stop     ask the command to save and end (Ctrl-C in each tmux)
#   delete   the slice
#
# Options
#   --name --zone    of the slice; --project if not gcloud's own
#   --type           v5e-8, v5p-8, v6e-8, v4-8 ...; chips for v5e and v6e, cores
#                    for v3, v4 and v5p
#   --spot           cheaper, may be preempted
#   --queued         request a queued resource instead of an immediate one
#   --runtime        image; default by type
#   --worker         for logs; default 0
#   --follow         for logs
#   --print          show the gcloud commands and run none
#
# Needs gcloud, logged in, and git. A run that is to survive a preemption keeps
# its workdir in gs://; training resumes from there.
set -euo pipefail
cd "$(dirname "$0")/.."

POLL_SECS=${POLL_SECS:-20}
SESSION=gemma_jax

fail() {
  echo "error: $1" >&2
  exit 1
}

# Calls gcloud, or with --print shows the command.
run_gcloud() {
  if [ -n "$print" ]; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    gcloud "$@"
  fi
}

tpu_vm() {
  local verb=$1
  shift
  run_gcloud compute tpus tpu-vm "$verb" "$@" "${where[@]}"
}

queued_resource() {
  local verb=$1
  shift
  run_gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}"
}

# on_workers all 'shell commands'
on_workers() {
  tpu_vm ssh "$name" --worker="$1" --command="$2"
}

# v5e-8 → what the API calls it.
accelerator_type() {
  case $type in
    v5e-*) echo "v5litepod-${type#v5e-}" ;;
    v3-* | v4-* | v5p-* | v6e-* | v5litepod-*) echo "$type" ;;
    *) fail "--type: got '$type', expected e.g. v5e-8, v5p-8, v6e-8 or v4-8" ;;
  esac
}

runtime_version() {
  if [ -n "$runtime" ]; then
    echo "$runtime"
    return
  fi
  case $type in
    v5e-* | v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# The slice's state, or nothing if there is none (always so with --print).
state() {
  [ -n "$print" ] && return
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
    --format='value(state)' 2>/dev/null || true
}

queued_state() {
  [ -n "$print" ] && return
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

create() {
  local accelerator version spot_flag=()
  accelerator=$(accelerator_type)
  version=$(runtime_version)
  [ -n "$spot" ] && spot_flag=(--spot)
  if [ -z "$queued" ]; then
    tpu_vm create "$name" --accelerator-type="$accelerator" \
      --version="$version" "${spot_flag[@]}"
    return
  fi
  queued_resource create "$name" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$version" \
    "${spot_flag[@]}"
  wait_in_queue
}

wait_in_queue() {
  local now
  [ -n "$print" ] && return
  while now=$(queued_state); [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING)
        fail "the queued resource $name is $now; see gcloud compute tpus \
queued-resources describe $name" ;;
    esac
    echo "queued resource $name: ${now:-unknown}" >&2
    sleep "$POLL_SECS"
  done
}

delete() {
  if [ -n "$queued" ] || [ -n "$(queued_state)" ]; then
    queued_resource delete "$name" --force --quiet
  else
    tpu_vm delete "$name" --quiet
  fi
}

# Creates the slice if it is missing; replaces a preempted one.
ensure_slice() {
  local now
  if [ -n "$queued" ]; then
    now=$(queued_state)
    case $now in
      ACTIVE | '') ;;
      SUSPENDED | SUSPENDING | FAILED) delete; now= ;;
      *) wait_in_queue; return ;;
    esac
    if [ "$now" = ACTIVE ] && [ "$(state)" = READY ]; then return; fi
    if [ "$now" = ACTIVE ]; then delete; fi
    create
    return
  fi
  now=$(state)
  case $now in
    READY) return ;;
    '') ;;
    PREEMPTED | TERMINATED | STOPPED) delete ;;
    *) fail "the slice $name is $now; try again when it is READY" ;;
  esac
  create
}

# Does not replace code under a running command.
setup() {
  local archive=${TMPDIR:-/tmp}/gemma_jax-$name.tar.gz install
  [ -n "$print" ] || pack "$archive"
  tpu_vm scp "$archive" "$name:gemma_jax.tar.gz" --worker=all
  [ -n "$print" ] || rm "$archive"
  install="set -e
if tmux has-session -t $SESSION 2>/dev/null; then
  echo 'running: its code is left as it is'; exit
fi
mkdir -p gemma_jax logs
find gemma_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
tar -xzf gemma_jax.tar.gz -C gemma_jax
cd gemma_jax
export PATH=\$HOME/.local/bin:\$PATH
command -v uv ||
  python3 -m pip install --quiet --user --require-hashes -r launch/uv.txt
[ -d .venv ] || uv venv --python 3.11 .venv
uv pip install --quiet --require-hashes -r launch/tpu_requirements.txt
uv pip install --quiet --no-deps -e ."
  on_workers all "$install"
}

# Files that git tracks, as they are here, and new ones that it does not ignore.
pack() {
  local file
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      if [ -e "$file" ]; then printf '%s\0' "$file"; fi
    done | tar -czf "$1" --no-recursion --null -T -
}

# A worker that already runs the command is left alone.
start() {
  local command inner
  [ ${#command_line[@]} -gt 0 ] || fail 'no command: expected one after --'
  command=$(printf '%q ' "${command_line[@]}")
  inner="cd ~/gemma_jax; export PATH=\$PWD/.venv/bin:\$PATH
{ date; echo $(printf '%q' "$command"); $command; echo exit code \$?; } \
>> ~/logs/run.log 2>&1"
  on_workers all "tmux has-session -t $SESSION 2>/dev/null ||
tmux new-session -d -s $SESSION bash -c $(printf '%q' "$inner")"
}

status() {
  local now
  now=$(state)
  if [ -z "$print" ]; then
    echo "$name: ${now:-not there}"
    [ "$now" = READY ] || return 0
  fi
  on_workers all "hostname
tmux has-session -t $SESSION 2>/dev/null && echo running || echo not running
tail -n 1 ~/logs/run.log"
}

logs() {
  on_workers "$worker" "tail -n 50 ${follow:+-f }~/logs/run.log"
}

stop() {
  on_workers all "tmux send-keys -t $SESSION C-c"
}

action=${1:-}
[ "$action" = --print ] && { print=yes; shift; action=${1:-}; }
case $action in
  run | create | setup | start | status | logs | stop | delete) shift ;;
  *) fail "action: got '$action', expected run, create, setup, start, status, \
logs, stop or delete" ;;
esac
print=${print:-} name='' zone='' project='' type='' runtime=''
spot='' queued='' worker=0 follow='' command_line=()
while [ $# -gt 0 ]; do
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --runtime=* | --worker=*)
      option=${1%%=*}
      printf -v "${option#--}" '%s' "${1#*=}" ;;
    --spot | --queued | --follow | --print) printf -v "${1#--}" yes ;;
    --)
      shift
      command_line=("$@")
      break ;;
    *) fail "option: got '$1'; bash launch/tpu_vm.sh explains itself at its \
top" ;;
  esac
  shift
done
[ -n "$name" ] || fail '--name: missing'
[ -n "$zone" ] || fail '--zone: missing'
where=(--zone="$zone")
[ -n "$project" ] && where+=(--project="$project")
case $action in
  run | create) [ -n "$type" ] || fail '--type: missing, expected e.g. v5e-8'
                accelerator_type > /dev/null ;;
esac
[ -n "$print" ] || command -v gcloud > /dev/null ||
  fail 'gcloud: not found; see https://cloud.google.com/sdk/docs/install'

case $action in
  run)
    [ ${#command_line[@]} -gt 0 ] || fail 'no command: expected one after --'
    ensure_slice
    setup
    start ;;
  *) "$action" ;;
esac
