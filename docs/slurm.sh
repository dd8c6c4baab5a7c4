#!/usr/bin/env bash
# One policy on the GPUs of several machines: sbatch docs/slurm.sh [section.key=value ...]
#
# Ends two minutes before its time is up, saved, and puts itself into the queue again; --resume goes on bit for bit. All
# machines must see the same files ($ROBOFACTORY_HOME): demonstrations are recorded before, and the main process saves.
# Samples of a step = machines x GPUs x dataloader.batch_size x training.gradient_accumulate_every: on another number of
# GPUs keep that product, and the run goes on as it was.

#SBATCH --job-name=robofactory
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the project}"
main_machine="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

srun .venv/bin/python -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$main_machine:29500" \
    -m robofactory.training.train --policy openvla --task LiftBarrier-rf --agent_id 0 --resume "$@" &
training=$!

stopped=0
trap 'stopped=1; kill -TERM "$training"' TERM # srun passes it on; every process finishes its step, and saves
code=0
wait "$training" || code=$?
if ((stopped)); then
    wait "$training" || true
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
