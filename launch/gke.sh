#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk; launch/README.md explains how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

: "${NUM_SLICES:=1}" "${MAX_RESTARTS:=3}" "${SPOT:=0}"
read_command PROJECT ZONE CLUSTER WORKLOAD TPU_TYPE IMAGE NUM_SLICES MAX_RESTARTS SPOT : "$@"
needed=(PROJECT=my-project ZONE=us-west4-a CLUSTER=my-cluster)
case $command in
  create) needed+=(WORKLOAD=my-run TPU_TYPE=v5litepod-16 IMAGE=us-docker.pkg.dev/my-project/my-folder/ilvr-jax:1) ;;
  delete | logs) needed+=(WORKLOAD=my-run) ;;
  list) ;;
  *) refuse "The command of launch/gke.sh must be create, list, logs or delete, got $(quoted "$command")." ;;
esac
check_variables "${needed[@]}"
check_numbers NUM_SLICES='[1-9][0-9]*' MAX_RESTARTS='[0-9]+' SPOT='0|1'
where=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")
step=$command
go_on="repeat launch/gke.sh $command$options"

case $command in
  create)
    ((${#arguments[@]})) ||
      refuse "Give the trainer's arguments after --, for example: launch/gke.sh create -- --config=configs/base.py --workdir=/mnt/my-bucket/my-run"
    # xpk writes the command into YAML, where Kubernetes expands dollar signs before the shell does.
    [[ ${arguments[*]} != *[[:cntrl:]]* && ${arguments[*]} != *\$* ]] ||
      refuse "Arguments of the trainer must not contain a dollar sign or a line break, which xpk does not pass on."
    spot=()
    ((SPOT)) && spot=(--spot)
    # exec: the signal before a node is removed must reach Python, which saves and is then restarted.
    call xpk workload create "${where[@]}" --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
      --docker-image="$IMAGE" --max-restarts="$MAX_RESTARTS" --termination-grace-period-seconds=120 \
      ${spot[@]+"${spot[@]}"} --command="exec $(quoted python -m ilvr_jax.train --distributed "${arguments[@]}")"
    ;;
  list) call xpk workload list "${where[@]}" ;;
  delete) call xpk workload delete "${where[@]}" --workload="$WORKLOAD" ;;
  logs)  # newest first; from Cloud Logging, which keeps them after the workload is deleted
    call gcloud logging read "resource.type=\"k8s_container\" AND resource.labels.cluster_name=\"$CLUSTER\" AND labels.\"k8s-pod/jobset_sigs_k8s_io/jobset-name\"=\"$WORKLOAD\"" \
      --project="$PROJECT" --freshness=30d --limit=1000 --format='value(timestamp,resource.labels.pod_name,textPayload)'
    ;;
esac
