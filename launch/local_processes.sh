#!/usr/bin/env bash
# Several CPU processes on this machine, as if they were many hosts: to try and to test.
set -euo pipefail
launcher=launch/local_processes.sh

usage() {
  cat >&2 <<'TEXT'
usage: launch/local_processes.sh [--dry-run] [--processes=N] [--devices=D] [--port=P]
           [--grace=SECONDS] CONFIG [--workdir=DIR] [other flags of boot_jax.main]

  CONFIG           a file, such as configs/digits.py
  --processes=N    how many (2)
  --devices=D      CPU devices of each process (1)
  --port=P         where they meet (0: one that is free)
  --grace=SECONDS  how long the others may go on once one has failed (120)
  --dry-run        print the commands, do not run them

What process I prints comes out as lines that begin with [I]. TERM and INT are passed on
to every process. The exit code is 0 if all processes end with 0, else the most telling:
2 or 1 (something is wrong), then 75, 76 or 134 (the same command again), then any other;
128 and the signal's number for a process that was killed. PYTHON names the interpreter.
TEXT
  exit 2
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run=false
processes=2
devices=1
port=0
grace=120
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --processes=*) processes=${argument#*=} ;;
    --devices=*) devices=${argument#*=} ;;
    --port=*) port=${argument#*=} ;;
    --grace=*) grace=${argument#*=} ;;
    *) take "$argument" ;;
  esac
done
check_config ""
check_number --processes "$processes" 1
check_number --devices "$devices" 1
check_number --port "$port" 0
check_number --grace "$grace" 0
((port < 65536)) || refuse "--port=$port is not a port"

# A port that nobody listens on, below those that systems hand out by themselves.
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000))
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# Sets command to what process $1 runs.
set_command() {
  local who=(--distributed=off)
  if ((processes > 1)); then
    who=("--coordinator_address=127.0.0.1:$port" "--num_processes=$processes")
    who+=("--process_id=$1")
  fi
  local settings=(
    JAX_PLATFORMS=cpu
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    # XLA's threads: before jax 0.12 several CPU devices of one process can wait for each
    # other for ever on a machine of few cores.
    NPROC=32
    # A pipe would hold the lines back.
    PYTHONUNBUFFERED=1
  )
  command=(env "${settings[@]}" "${PYTHON:-python}" -m boot_jax.main)
  command+=("--config=$config" "${flags[@]}" "${who[@]}")
}

keep_compiled
((processes == 1 || port > 0)) || port=$(free_port)
if $dry_run; then
  for ((i = 0; i < processes; i++)); do
    set_command "$i"
    show "${command[@]}"
  done
  exit 0
fi

pids=()
readers=()
pipes=$(mktemp -d)

# Whatever happens, nothing is left: not a process, not a child of one.
clean_up() {
  for pid in "${pids[@]}"; do
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
  wait "${readers[@]}" || true # for the last lines
  rm -rf "$pipes"
}
trap clean_up EXIT

for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/$i"
  # The signals that stop a run must not stop those who print its last words.
  (trap '' INT TERM HUP && exec sed -u "s/^/[$i] /" <"$pipes/$i") &
  readers+=("$!")
  set_command "$i"
  start "${command[@]}" >"$pipes/$i" 2>&1
  pids+=("$!")
  say "process $i: pid $!"
done

running=("${pids[@]}")
pass_on() {
  say "$1 is passed on"
  for pid in "${running[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

codes=()
deadline=""
while true; do
  sleep 0.1 || true # which a Ctrl-C ends, too
  for i in "${!running[@]}"; do
    ! kill -0 "${running[i]}" 2>/dev/null || continue
    code=0
    wait "${running[i]}" || code=$?
    unset "running[i]"
    codes+=("$code")
    say "process $i: exit code $code"
    if [[ -z "$deadline" && "$code" != 0 && "$code" != 75 ]]; then
      deadline=$((SECONDS + grace))
    fi
  done
  ((${#running[@]} > 0)) || exit "$(most_telling "${codes[@]}")"
  if [[ -n "$deadline" ]] && ((SECONDS >= deadline)); then
    say "$grace s after the first failure: killing ${running[*]}"
    # They may be deaf to TERM while they wait for the process that has failed.
    kill -KILL "${running[@]}" 2>/dev/null || true
  fi
done
