# shellcheck shell=bash
# What the launchers share; they source it. Each names itself in `launcher` and defines
# usage(), which prints how it is called and ends with exit code 2.

launcher=${launcher:?}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$launcher: needs bash 4.4 or newer, this is $BASH_VERSION" >&2
  exit 2
fi

refuse() {
  echo "$launcher: $1" >&2
  usage
}

say() {
  echo "[launcher] $*" >&2
}

# Prints a command as it could be typed.
show() {
  printf '%q ' "$@"
  echo
}

config=""
flags=()

# Takes an argument that is not the launcher's own: the config, or a flag of the program.
take() {
  case "$1" in
    --config=*) refuse "give the config as it is: ${1#--config=}" ;;
    --?*=* | --no?*) flags+=("$1") ;;
    -*) refuse "$1 has no value; write --flag=value" ;;
    *)
      [[ -z "$config" ]] || refuse "$1 is one config too many"
      config=$1
      ;;
  esac
}

# Refuses a missing config; the argument is put before its path to look for it.
check_config() {
  [[ -n "$config" ]] || refuse "which config?"
  [[ -f "$1$config" && "$config" == *.py ]] || refuse "no config $config"
}

# check_number --flag VALUE LEAST
check_number() {
  if [[ ! "$2" =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    refuse "$1=$2 is not a whole number of $3 or more"
  fi
}

# Whether an exit code asks for the same command again: 75 preempted and saved, 76 a peer
# died or a step hung, 134 (SIGABRT) jax itself noticed a dead peer.
asks_again() {
  [[ "$1" == 75 || "$1" == 76 || "$1" == 134 ]]
}

# The most telling of several exit codes, given in the order in which they came: first
# what is to be mended, then what is to be started again, then whatever came first. (If
# one process is killed, its peers end with 76, and that is what to act upon.)
most_telling() {
  local telling code
  for telling in 2 1 75 76 134; do
    for code in "$@"; do
      ((code != telling)) || { echo "$code" && return; }
    done
  done
  for code in "$@"; do
    ((code == 0)) || { echo "$code" && return; }
  done
  echo 0
}

# Starts a program in the background; $! is its id. It gets a process group of its own: Ctrl-C then reaches
# the launcher alone, which passes it on once; a second signal would not wait for the save.
start() {
  local dies_with_launcher=()
  # For the one death that no trap sees, kill -9 of the launcher.
  if setpriv --pdeathsig KILL true 2>/dev/null; then
    dies_with_launcher=(setpriv --pdeathsig KILL)
  fi
  set -m
  "${dies_with_launcher[@]}" "$@" </dev/null &
  set +m
}

# Compiled programs are kept, also short ones: a resumed run starts in seconds.
keep_compiled() {
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-.jax_cache}"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
}

use_gpus() {
  # Without it a box whose driver is broken would quietly train on the CPU.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
  # The default of 3/4 of the memory leaves a quarter unused; some is kept for the
  # libraries, which allocate beside XLA.
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
}
