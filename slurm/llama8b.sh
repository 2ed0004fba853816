#!/bin/bash
# LLaMA-3.1-8B in NF4 on 8 GPUs of one node: HOFT on commonsense rows, or another recipe. From the checkout:
#   sbatch slurm/llama8b.sh
#   sbatch slurm/llama8b.sh adapter=hut run_dir=runs/hut     whatever follows is laid over the settings below
#   CONFIG=math_shoft_llama-3.1-8b sbatch slurm/llama8b.sh     scalepeft init --list has the recipes
#SBATCH --job-name=llama8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@180
# 180 s before the time limit the run saves and requeues itself: scalepeft plan says what a step and a save need.

CONFIG=${CONFIG:-commonsense_hoft_llama-3.1-8b}  # a recipe: model, data, engine and what you need for it; or a YAML of yours
SETTINGS=()
source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"
exit 2  # only reached where that is no checkout: call sbatch in it, or export SCALEPEFT_ROOT
