#!/bin/bash
# LLaMA-3.1-70B in NF4, HOFT of rank 16, commonsense rows, on 2 nodes of 8 GPUs. From the checkout:
#   sbatch slurm/hoft_llama70b.sh
#   sbatch slurm/hoft_llama70b.sh train.max_steps=50 model=tiny     whatever follows is laid over the settings below
#SBATCH --job-name=hoft_llama70b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@300
# 300 s before the time limit the run saves and requeues itself: scalepeft plan says what a step and a save need.

CONFIG=commonsense_hoft_llama-3.1-70b  # a recipe: model, data, engine and what you need for it; or a YAML of yours
SETTINGS=(
    run_dir=runs/hoft_llama70b
)
source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"
exit 2  # only reached where that is no checkout: call sbatch in it, or export SCALEPEFT_ROOT
