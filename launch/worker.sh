#!/usr/bin/env bash
# What tpu.sh runs on each worker. gcloud repeats a command whose connection dropped, so each can run twice unharmed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kept=runs/launch
mkdir -p "$kept"

# By its command line too: after a restart of the machine the number may be another program's.
training() {
  [[ -s $kept/train.pid ]] && pid=$(<"$kept/train.pid") && grep -qaF ilvr_jax.train "/proc/$pid/cmdline" 2>/dev/null
}

case ${1:-} in
  install)
    # The runtime images bring Python 3.10, and uv a newer one; newer images guard the system's packages.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --allow-existing --python=3.12 .venv
    .venv/bin/python -m pip install --quiet -r requirements.txt 'jax[tpu]'
    ;;
  run)
    shift
    if training; then
      if cmp -s "$kept/arguments" <(printf '%s\0' "$@"); then
        echo "This training runs on $(hostname) already and was left as it is." && exit
      fi
      echo "Another training runs on $(hostname); launch/tpu.sh stop ends it." >&2 && exit 1
    fi
    printf '%s\0' "$@" >"$kept/arguments"
    nohup .venv/bin/python -m ilvr_jax.train --distributed "$@" >>"$kept/train.log" 2>&1 </dev/null &
    echo $! >"$kept/train.pid"
    ;;
  stop)
    training || { echo "No training runs on $(hostname)." && exit; }
    # Once only: a second signal would end the trainer before it has saved.
    if [[ ! -f $kept/stopped.pid || $(<"$kept/stopped.pid") != "$pid" ]]; then
      echo "$pid" >"$kept/stopped.pid"
      kill -TERM "$pid"
    fi
    for ((second = 0; second < 600; second++)); do
      training || exit 0
      sleep 1
    done
    echo "The training on $(hostname) has not ended 10 minutes after SIGTERM." >&2 && exit 1
    ;;
  *) echo "worker.sh takes install, run or stop, not '${1:-}'." >&2 && exit 2 ;;
esac
