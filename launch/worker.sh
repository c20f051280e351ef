#!/usr/bin/env bash
# Run by tpu.sh on each worker. gcloud repeats a command whose connection dropped, so running one twice is safe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kept=runs/launch
mkdir -p "$kept"

# The command line is checked too: after a reboot, the process id may belong to another program.
training() {
  [[ -s $kept/train.pid ]] && pid=$(<"$kept/train.pid") && grep -qaF ilvr_jax.train "/proc/$pid/cmdline" 2>/dev/null
}

case ${1:-} in
  install)
    # The runtime images contain Python 3.10, and uv installs a newer one; newer images protect the system's packages.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --allow-existing --python=3.12 .venv
    .venv/bin/python -m pip install --quiet -r requirements.txt 'jax[tpu]'
    ;;
  run)
    shift
    if training; then
      if cmp -s "$kept/arguments" <(printf '%s\0' "$@"); then
        echo "This training already runs on $(hostname)." && exit
      fi
      echo "Another training runs on $(hostname); launch/tpu.sh stop ends it." >&2 && exit 1
    fi
    printf '%s\0' "$@" >"$kept/arguments"
    nohup .venv/bin/python -m ilvr_jax.train --distributed "$@" >>"$kept/train.log" 2>&1 </dev/null &
    echo $! >"$kept/train.pid"
    ;;
  stop)
    training || { echo "No training runs on $(hostname)." && exit; }
    # Only once: a second signal would end the trainer before it has saved.
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
  *) echo "The command of worker.sh must be install, run or stop, got '${1:-}'." >&2 && exit 2 ;;
esac
