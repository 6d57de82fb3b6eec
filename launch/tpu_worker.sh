#!/usr/bin/env bash
# What launch/tpu_pod.sh asks of a worker of the pod; it is copied there and called by it.
set -eEuo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: bash tpu_worker.sh VERB

  install [URL [BRANCH]]  the code, from ~/boot_jax.tar.gz or a repository, and its needs
  start FLAGS...          run boot_jax.main with these flags, detached
  status FLAGS...         print "worker: " and what has become of the run: running, ended
                          CODE, or lost; busy, if one with other flags is running
  log FROM                print what the run has printed, from byte FROM on
  stop                    ask the run to save and end, and kill it a minute later

All is in ~/boot_jax. The exit code is 3 if it could not be done.
TEXT
  exit 3
}

trap 'exit 3' ERR
mkdir -p ~/boot_jax
cd ~/boot_jax

# The run holds the lock as long as it lives; unlike a process id it cannot be mistaken,
# after a reboot for example.
running() {
  ! flock --nonblock lock true
}

install() {
  if running; then
    echo "a run is going on, its code must stay as it is" >&2
    exit 3
  fi
  rm -rf checkout
  if (($# > 0)); then
    git clone --quiet --depth=1 ${2:+"--branch=$2"} "$1" checkout
  else
    mkdir checkout
    tar -xzf ~/boot_jax.tar.gz -C checkout
  fi
  # The Python of a TPU's image is too old: uv brings one. The variable is for images
  # whose pip refuses to install for the user; older ones ignore it.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
  PATH=~/.local/bin:$PATH
  uv venv --quiet --allow-existing --python=3.11 venv
  # The versions that are tested, also when a TPU is created again weeks later.
  uv pip install --quiet --python=venv/bin/python --constraint=checkout/constraints.txt \
    "jax[tpu]" --editable=checkout
}

start() {
  exec 9>>lock
  flock --nonblock 9 || return 0 # started already, before a connection was lost
  rm -f code
  printf '%s' "$*" >flags
  # Without it a worker whose TPU is broken would quietly train on the CPU.
  export JAX_PLATFORMS=tpu,cpu
  # Compiled programs are kept, also short ones: a resumed run starts in seconds.
  export JAX_COMPILATION_CACHE_DIR=~/boot_jax/compiled
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  # A file would hold the lines back.
  export PYTHONUNBUFFERED=1
  # A session of its own outlives the connection. The shell outlives TERM, to write down
  # the exit code.
  # shellcheck disable=SC2016 # expanded by the shell that is started
  setsid bash -c '
    trap : TERM
    cd checkout && ../venv/bin/python -m boot_jax.main "$@"
    echo "$?" >~/boot_jax/code
  ' run "$@" >>log 2>&1 </dev/null &
  echo "$!" >pid
}

status() {
  if running && [[ ! -s code ]]; then
    [[ "$*" != "$(<flags)" ]] || echo "worker: running"
    [[ "$*" == "$(<flags)" ]] || echo "worker: busy"
  elif [[ -s code ]]; then
    echo "worker: ended $(<code)"
  else
    echo "worker: lost"
  fi
}

log() {
  [[ ! -f log ]] || tail -c "+$(($1 + 1))" log
}

stop() {
  local seconds
  for ((seconds = 0; seconds < ${STOP_SECONDS:-60}; seconds++)); do
    running || return 0
    ((seconds > 0)) || kill -TERM -- "-$(<pid)" || true
    sleep 1
  done
  kill -KILL -- "-$(<pid)" || true
}

case "${1:-}" in
  install | start | status | log | stop) "$@" ;;
  *) usage ;;
esac
