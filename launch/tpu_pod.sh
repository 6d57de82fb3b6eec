#!/usr/bin/env bash
# A TPU pod of Google Cloud: makes it, installs the code, runs it on every worker, follows
# it, and begins again where it stopped when the pod is preempted.
set -euo pipefail
launcher=launch/tpu_pod.sh

usage() {
  cat >&2 <<'TEXT'
usage: launch/tpu_pod.sh [--dry-run] --name=NAME --zone=ZONE --type=TYPE
           [--version=RUNTIME] [--project=PROJECT] [--spot] [--delete]
           [--repo=FOLDER or URL] [--branch=BRANCH]
           CONFIG --workdir=DIR [other flags of boot_jax.main]

  CONFIG     a file of the checkout, such as configs/imagenet64.py
  --name     of the TPU; one that exists is used, one that does not is created
  --zone     such as us-central1-a
  --type     such as v5litepod-16
  --version  the TPU's software (what Google names for the type)
  --project  (gcloud's own)
  --spot     a cheaper TPU that can be preempted
  --delete   delete the TPU when the run is over; without it, it stays, and costs
  --repo     what runs: a local git checkout, uncommitted changes included (this one), or
             a URL to clone
  --branch   of the URL
  --workdir  a folder on storage that all workers have mounted: an absolute path
  --dry-run  print the first commands, run nothing

A preempted TPU, or one that no longer answers, is deleted and created again; a run that
ends with 75, 76 or 134 is started again; both MAX_RESTARTS times at most (100). Any other
exit code of the run is the script's own. Ctrl-C ends this script, not the run: the same
command follows it again.

Also read from the environment: POLL_SECONDS between two looks (30), MAX_WAITS looks for a
TPU to become ready (240), MAX_TRIES for one that is ready to answer (10), GRACE_SECONDS
for the other workers once one has failed (300).
TEXT
  exit 2
}

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

dry_run=false
name="" zone="" type="" version="" project="" workdir="" branch=""
repo=$here/..
spot=()
delete_at_end=false
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --name=*) name=${argument#*=} ;;
    --zone=*) zone=${argument#*=} ;;
    --type=*) type=${argument#*=} ;;
    --version=*) version=${argument#*=} ;;
    --project=*) project=${argument#*=} ;;
    --spot) spot=(--spot) ;;
    --delete) delete_at_end=true ;;
    --repo=*) repo=${argument#*=} ;;
    --branch=*) branch=${argument#*=} ;;
    --workdir=*) workdir=${argument#*=} ;;
    *) take "$argument" ;;
  esac
done

[[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  refuse "--name=NAME is needed: small letters, digits and hyphens"
[[ -n "$zone" ]] || refuse "--zone=ZONE is needed, such as us-central1-a"
[[ -n "$type" ]] || refuse "--type=TYPE is needed, such as v5litepod-16"
if [[ -z "$version" ]]; then
  # https://cloud.google.com/tpu/docs/runtimes
  case "$type" in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    *) refuse "no software is known for --type=$type; name it with --version=RUNTIME" ;;
  esac
fi
[[ "$workdir" == /?* ]] ||
  refuse "--workdir=/FOLDER is needed: an absolute path that all workers have mounted"
if [[ "$repo" == *://* || "$repo" == *@*:* ]]; then
  [[ "$config" == *.py ]] || refuse "which config? a file of the repository"
  from_url=("$repo" ${branch:+"$branch"})
else
  git -C "$repo" rev-parse --git-dir >/dev/null 2>&1 ||
    refuse "--repo=$repo is neither a git checkout nor a URL"
  [[ -z "$branch" ]] || refuse "--branch=$branch needs --repo=URL"
  check_config "$repo/"
  from_url=()
fi
$dry_run || command -v gcloud >/dev/null || refuse "gcloud is not installed"

poll_seconds=${POLL_SECONDS:-30}
max_waits=${MAX_WAITS:-240}
max_tries=${MAX_TRIES:-10}
max_restarts=${MAX_RESTARTS:-100}
grace_seconds=${GRACE_SECONDS:-300}
[[ "$poll_seconds" =~ ^[0-9]*\.?[0-9]+$ ]] ||
  refuse "POLL_SECONDS=$poll_seconds is no number of seconds"
check_number MAX_WAITS "$max_waits" 1
check_number MAX_TRIES "$max_tries" 1
check_number MAX_RESTARTS "$max_restarts" 0
check_number GRACE_SECONDS "$grace_seconds" 0

run=("--config=$config" "--workdir=$workdir" "${flags[@]}" --distributed=on)
scratch=/tmp/boot_jax.XXXXXX # as it stands in a dry run

# gcloud on TPUs. What it says is kept in a file: it talks much, and it matters if it fails.
tpu() {
  local command=(gcloud compute tpus tpu-vm "$@" "--zone=$zone")
  command+=(${project:+"--project=$project"} --quiet)
  if $dry_run; then
    show "${command[@]}"
  else
    "${command[@]}" </dev/null 2>"$scratch/said"
  fi
}

# on WORKERS VERB ARGUMENTS... calls tpu_worker.sh there, through a shell.
on() {
  local call
  printf -v call ' %q' "${@:2}"
  tpu ssh "$name" "--worker=$1" "--command=bash tpu_worker.sh$call"
}

describe() {
  tpu describe "$name" "--format=value(state)"
}

create() {
  tpu create "$name" "--accelerator-type=$type" "--version=$version" "${spot[@]}"
}

delete() {
  tpu delete "$name"
}

# What git tracks or would add: no environments, no runs. Packed once, so that a run goes
# on with the code it began with.
pack() {
  local file
  git -C "$repo" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      [[ ! -e "$repo/$file" ]] || printf '%s\0' "$file"
    done |
    tar -C "$repo" -czf "$scratch/boot_jax.tar.gz" --null -T -
}

copy() {
  local files=("$here/tpu_worker.sh")
  ((${#from_url[@]} > 0)) || files+=("$scratch/boot_jax.tar.gz")
  tpu scp "${files[@]}" "$name:" --worker=all
}

install() {
  on all install "${from_url[@]}"
}

launch() {
  on all start "${run[@]}"
}

stop() {
  on all stop
}

status() {
  on all status "${run[@]}"
}

if $dry_run; then
  describe
  create
  copy
  status
  install
  launch
  on 0 log 0
  exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'say "the run, if it was started, goes on; the same command follows it"; exit 130' \
  INT TERM HUP

complain() {
  cat "$scratch/said" >&2
}

pause() {
  sleep "$poll_seconds"
}

# Sets state: what gcloud says, or ABSENT, or UNKNOWN.
look() {
  if state=$(describe); then
    known=true
  elif grep -q NOT_FOUND "$scratch/said"; then
    state=ABSENT
    known=true
  else
    state=UNKNOWN
    complain
  fi
}

# Sets answers: a line for each worker.
ask() {
  answers=$(status) && someone_is ""
}

someone_is() {
  grep -q "^worker: $1" <<<"$answers"
}

give_up() {
  say "$2"
  exit "$1"
}

# The end of the run: leaves the TPU, or deletes it.
finish() {
  say "$2"
  if ! $delete_at_end; then
    say "$name is left as it is; while it exists, it costs"
  elif ! delete; then
    complain
    say "$name could not be deleted; delete it, it costs"
  fi
  exit "$1"
}

# Comes back when the TPU is ready.
make_ready() {
  local mistakes="INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|unrecognized"
  local waits was=""
  for ((waits = 0; waits < max_waits; waits++)); do
    look
    [[ "$state" == "$was" ]] || say "$name is $state"
    was=$state
    case "$state" in
      READY) return ;;
      ABSENT)
        say "creating $name"
        seen=0
        if create; then
          continue
        fi
        complain
        # Then it is not for want of a free TPU, and waiting would not help.
        if grep -qE "$mistakes" "$scratch/said"; then
          give_up 2 "$name cannot be created"
        fi
        ;;
      PREEMPTED | TERMINATED)
        say "deleting $name"
        delete || complain
        ;;
      STOPPED) give_up 2 "start $name, or delete it" ;;
      UNKNOWN) $known || give_up 2 "gcloud cannot look for $name" ;;
    esac
    pause
  done
  give_up 76 "no TPU has become ready; the same command tries again"
}

# A step, tried again as long as the TPU is ready and merely does not answer.
try() {
  local code tries
  for ((tries = 1; ; tries++)); do
    code=0
    "$@" || code=$?
    ((code != 0)) || return 0
    complain
    look
    [[ "$state" == READY ]] || return 1
    if ((tries == max_tries)); then
      # 1 and 255 are gcloud's and ssh's own; others come from a worker, which does answer.
      ((code == 1 || code == 255)) || give_up 2 "$1 failed on a worker, $tries times"
      say "$name is ready, but does not answer"
      unreachable=true
      return 1
    fi
    pause
  done
}

show_log() {
  on 0 log "$seen" >"$scratch/log" || true # the next time, then
  cat "$scratch/log"
  seen=$((seen + $(wc -c <"$scratch/log")))
}

# Follows the run until no worker runs. Sets outcome to its exit code; lost if the TPU is.
follow() {
  local codes code deadline="" stops=0
  while true; do
    pause
    try ask || return 0
    show_log
    # A worker that is gone without a code: its machine was started anew, for example.
    mapfile -t codes < <(sed -n 's/^worker: ended //p; s/^worker: lost$/76/p' <<<"$answers")
    if ! someone_is running; then
      outcome=$(most_telling "${codes[@]}")
      return 0
    fi
    for code in "${codes[@]}"; do
      if [[ -z "$deadline" && "$code" != 0 && "$code" != 75 ]]; then
        say "a worker ended with exit code $code; $grace_seconds s for the others"
        deadline=$((SECONDS + grace_seconds))
      fi
    done
    if [[ -n "$deadline" ]] && ((SECONDS >= deadline)); then
      if ((stops++ == 3)); then
        say "some workers cannot be stopped"
        unreachable=true
        return 0
      fi
      say "stopping the others"
      try stop || return 0
    fi
  done
}

# The run, from the copying of the code to its end.
live() {
  outcome=lost
  unreachable=false
  if ! { try copy && try ask; }; then
    return
  fi
  if someone_is busy; then
    give_up 2 "another run is going on there; end it with: gcloud compute tpus tpu-vm ssh \
$name --zone=$zone --worker=all --command='bash tpu_worker.sh stop'"
  elif someone_is running; then
    say "the run is going on already"
  else
    say "installing the code on all workers"
    if ! { try install && try launch; }; then
      return
    fi
  fi
  say "running; the log of worker 0:"
  follow
}

known=false # whether gcloud has ever answered
seen=0      # bytes of the log that were shown
((${#from_url[@]} > 0)) || pack
for ((restarts = 0; ; restarts++)); do
  make_ready
  live
  if [[ "$outcome" == lost ]]; then
    say "the TPU is lost"
    code=76
  elif asks_again "$outcome"; then
    say "exit code $outcome"
    code=$outcome
  else
    finish "$outcome" "exit code $outcome"
  fi
  ((restarts < max_restarts)) || finish "$code" "the most that MAX_RESTARTS allows: $restarts"
  say "starting again, $((restarts + 1)) of at most $max_restarts"
  if $unreachable; then
    say "deleting $name"
    delete || complain
  fi
done
