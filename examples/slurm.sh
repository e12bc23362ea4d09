#!/usr/bin/env bash
# One training on 4 nodes of 8 GPUs by Slurm: sbatch examples/slurm.sh
# A job that is cut off or loses a node goes on where it was when it is submitted again, on any number of GPUs.
#SBATCH --job-name=ham
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

RUN=${RUN:-runs/wrn-28-10}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# batch_size is that of all GPUs together
NEW=(--dataset cifar10 --model wrn_28_10 --method fair --batch-size 2048 --precision bf16 --channels-last on --out "$RUN")
if [ -e "$RUN/config.toml" ]; then WHAT=(--resume "$RUN"); else WHAT=("${NEW[@]}"); fi

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
  --rdzv-id "$SLURM_JOB_ID" -m ham_kernels train "${WHAT[@]}"
