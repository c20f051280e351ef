#!/usr/bin/env bash
# Trains on a Cloud TPU slice that a queued resource holds; launch/README.md explains how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

: "${SPOT:=0}" "${POLL_SECONDS:=30}"
read_command PROJECT ZONE NAME ACCELERATOR RUNTIME SPOT POLL_SECONDS : "$@"
lost=(create wait copy install run)
case $command in
  create | wait | copy | install | run | logs | stop | delete) steps=("$command") ;;
  up) steps=("${lost[@]}") ;;
  resume) steps=(lost delete "${lost[@]}") ;;
  *) refuse "The command of launch/tpu.sh must be up, create, wait, copy, install, run, logs, stop, resume or delete, got $(quoted "$command")." ;;
esac
check_variables PROJECT=my-project ZONE=us-west4-a NAME=my-run ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
check_numbers SPOT='0|1' POLL_SECONDS='[0-9]+'

# shellcheck disable=SC2153  # the env file sets it
kept=runs/launch/$NAME  # ignored by git
where=(--project="$PROJECT" --zone="$ZONE" --quiet)

on_all_workers() { call gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }

# The arguments of the training are stored, so that resume can repeat them.
if [[ " ${steps[*]} " == *" run "* ]]; then
  if ((${#arguments[@]} == 0)) && [[ -s $kept/arguments ]]; then
    while IFS= read -r -d '' argument; do arguments+=("$argument"); done <"$kept/arguments"
  fi
  ((${#arguments[@]})) ||
    refuse "Give the trainer's arguments after --, for example: launch/tpu.sh $command -- --config=configs/base.py --workdir=/mnt/my-bucket/my-run"
  [[ " ${arguments[*]}" =~ \ --workdir[=\ ]/ ]] ||
    say "Note: checkpoints are lost with the workers unless --workdir is a mounted folder that all workers share."
  if ((!dry_run)); then
    mkdir -p "$kept"
    printf '%s\0' "${arguments[@]}" >"$kept/arguments"
  fi
fi

describe() { call gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'; }

step_create() {
  local spot=()
  ((SPOT)) && spot=(--spot)
  call gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"} "${where[@]}"
}

step_wait() {
  ((dry_run)) && describe && return
  local state before=""
  while true; do
    state=$(describe)
    [[ $state == "$before" ]] || say "$NAME is $state."
    before=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        say "$NAME is $state and will not become ACTIVE; launch/tpu.sh resume$options deletes it and creates it again."
        exit 1
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# Ends the script unless the slice was lost, so resume never deletes a slice that is still usable.
step_lost() {
  ((dry_run)) && describe && return
  local state
  state=$(describe)
  while [[ $state == SUSPENDING ]]; do
    say "$NAME is SUSPENDING." && sleep "$POLL_SECONDS"
    state=$(describe)
  done
  [[ $state == SUSPENDED || $state == FAILED ]] && return
  say "$NAME is $state, not SUSPENDED or FAILED, so nothing was deleted; to use it, run launch/tpu.sh wait$options and then run$options."
  exit 1
}

step_copy() {
  ((dry_run)) || mkdir -p "$kept"
  [[ -z $(git status --porcelain --untracked-files=no) ]] || say "Note: only the last commit is copied, without later changes."
  call git archive --format=tar.gz --output="$kept/source.tar.gz" HEAD
  call gcloud compute tpus tpu-vm scp "$kept/source.tar.gz" "$NAME:ilvr-jax.tar.gz" "${where[@]}" --worker=all
  on_all_workers "mkdir -p ilvr-jax && tar -xzf ilvr-jax.tar.gz -C ilvr-jax"
}

step_install() { on_all_workers "bash ilvr-jax/launch/worker.sh install"; }

step_run() { on_all_workers "$(quoted bash ilvr-jax/launch/worker.sh run "${arguments[@]}")"; }

step_stop() { on_all_workers "bash ilvr-jax/launch/worker.sh stop"; }

# One worker at a time, since scp can fetch from only one.
step_logs() {
  local count=1 worker
  local count_them=(gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" --format='value(networkEndpoints.len())')
  if ((dry_run)); then
    call "${count_them[@]}"
  else
    count=$(call "${count_them[@]}")
    mkdir -p "$kept/logs"
  fi
  for ((worker = 0; worker < count; worker++)); do
    call gcloud compute tpus tpu-vm scp "$NAME:ilvr-jax/runs/launch/train.log" "$kept/logs/worker-$worker.log" \
      "${where[@]}" --worker="$worker"
  done
  if ((dry_run)); then say "The last command is repeated for every other worker."; else say "The logs are in $kept/logs."; fi
}

step_delete() { call gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force; }

for ((at = 0; at < ${#steps[@]}; at++)); do
  step=${steps[at]}
  go_on="repeat launch/tpu.sh $step$options"
  [[ $step == create ]] && go_on+=" (skip it if $NAME exists)"
  [[ $step == lost || ($step == delete && $command == resume) ]] && go_on="repeat launch/tpu.sh resume$options"
  [[ $step == lost || $step == delete ]] || for later in "${steps[@]:at+1}"; do go_on+=", then launch/tpu.sh $later$options"; done
  "step_$step"
done
