#!/bin/bash
# A Ray cluster inside one Slurm job, one study on it, and both end together.
#   sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00 cluster/slurm.sh STUDY.yaml s3://BUCKET/medssl
# Slurm sends SIGTERM five minutes before the time is up: a pretraining writes a checkpoint and ends; the same sbatch goes on.
# Store credentials: export them before sbatch (Slurm passes your environment on), or use ~/.aws. Needs medssl[cluster] on all
# nodes (a module, a virtual environment on a shared disk, or a container).
#SBATCH --job-name=medssl
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail
study=${1:?usage: sbatch cluster/slurm.sh STUDY.yaml STORE}
store=${2:?usage: sbatch cluster/slurm.sh STUDY.yaml STORE}

umask 077
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(head -n 1 <<<"$nodes")
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs of a shared node do not meet; above Ray's worker ports
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false \
  --num-cpus="$cpus" --num-gpus="$gpus" --block &
for _ in $(seq 60); do
  ray status --address "$address:$port" >/dev/null 2>&1 && break
  sleep 2
done
for node in $(tail -n +2 <<<"$nodes"); do
  srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
    ray start --address="$address:$port" --num-cpus="$cpus" --num-gpus="$gpus" --block &
done

medssl run "$study" --store "$store" --address "$address:$port" --set compute.wait_for_nodes_minutes=10 &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # the signal ended `wait`, not the driver
  code=0
  wait "$driver" || code=$?
done
exit "$code"
