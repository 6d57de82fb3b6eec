#!/usr/bin/env bash
# One box with one or more GPUs: one process drives them all.
set -euo pipefail

usage() {
  echo "usage: launch/gpu.sh [--dry-run] CONFIG [flags of boot_jax.main]" >&2
  echo "       CONFIG is a file such as configs/cifar10.py" >&2
  exit 2
}

dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then
  dry_run=true
  shift
fi
[[ $# -ge 1 && -f "$1" ]] || usage
config=$1
shift

# Compiled programs are kept: a resumed run starts in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-.jax_cache}"

command=("${PYTHON:-python}" -m boot_jax.main "--config=$config" "$@")
if $dry_run; then
  echo "${command[*]}"
  exit 0
fi
exec "${command[@]}"
