#!/usr/bin/env bash
# One box with one or more GPUs: one process drives them all.
set -euo pipefail
launcher=launch/gpu.sh

usage() {
  cat >&2 <<'TEXT'
usage: launch/gpu.sh [--dry-run] CONFIG [--restarts=N] [--workdir=DIR]
           [other flags of boot_jax.main]

  CONFIG        a file, such as configs/cifar10.py
  --restarts=N  how often a run that ends with 75, 76 or 134 is started again (0)
  --dry-run     print the command, do not run it

All GPUs are used; CUDA_VISIBLE_DEVICES=0,1 chooses. PYTHON names the interpreter. A run
that is stopped through the launcher (TERM, Ctrl-C) saves and is not started again.
TEXT
  exit 2
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run=false
restarts=0
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --restarts=*) restarts=${argument#*=} ;;
    *) take "$argument" ;;
  esac
done
check_config ""
check_number --restarts "$restarts" 0

use_gpus
keep_compiled
command=("${PYTHON:-python}" -m boot_jax.main "--config=$config" "${flags[@]}")
if $dry_run; then
  show "${command[@]}"
  exit 0
fi
((restarts > 0)) || exec "${command[@]}"

stopped=false
pass_on() {
  stopped=true
  kill -s "$1" "$pid" 2>/dev/null || true
}
trap 'kill -KILL -- "-$pid" 2>/dev/null || true' EXIT

for ((restart = 1; ; restart++)); do
  start "${command[@]}"
  pid=$!
  trap 'pass_on INT' INT
  trap 'pass_on TERM' TERM HUP
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.1 || true # which a Ctrl-C ends, too
  done
  code=0
  wait "$pid" || code=$?
  if $stopped || ! asks_again "$code" || ((restart > restarts)); then
    exit "$code"
  fi
  say "exit code $code: starting again, $restart of $restarts"
done
