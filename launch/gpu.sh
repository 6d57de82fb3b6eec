#!/usr/bin/env bash
# One box with one or more GPUs: one process drives them all.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: launch/gpu.sh [--dry-run] CONFIG [--workdir=DIR] [other flags of boot_jax.main]

  CONFIG     a file, such as configs/cifar10.py
  --dry-run  print the command, do not run it

All GPUs are used; CUDA_VISIBLE_DEVICES=0,1 chooses. PYTHON names the interpreter.
TEXT
  exit 2
}

refuse() {
  echo "launch/gpu.sh: $1" >&2
  usage
}

config=""
dry_run=false
flags=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --config=*) refuse "give the config as it is: ${argument#--config=}" ;;
    --?*=* | --no?*) flags+=("$argument") ;;
    -*) refuse "$argument has no value; write --flag=value" ;;
    *)
      [[ -z "$config" ]] || refuse "$argument is one config too many"
      [[ -f "$argument" && "$argument" == *.py ]] || refuse "no config $argument"
      config=$argument
      ;;
  esac
done
[[ -n "$config" ]] || refuse "which config?"

# Without it a box whose driver is broken would quietly train on the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
# Compiled programs are kept, also short ones: a resumed run starts in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-.jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# The default of 3/4 of the memory leaves a quarter unused; some is kept for the
# libraries, which allocate beside XLA.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

command=("${PYTHON:-python}" -m boot_jax.main "--config=$config" "${flags[@]}")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
