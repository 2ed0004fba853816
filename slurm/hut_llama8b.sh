#!/bin/bash
# LLaMA-3.1-8B in NF4, HUT of rank 1, commonsense rows, on 8 GPUs of one node. From the checkout:
#   sbatch slurm/hut_llama8b.sh
#   sbatch slurm/hut_llama8b.sh train.lr=5e-3     whatever follows is laid over the settings below
#SBATCH --job-name=hut_llama8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@180
# 180 s before the time limit the run saves and requeues itself: give a step and a save twice their time.

CONFIG=configs/runs/commonsense_hoft.yaml  # data and schedule; the adapter below replaces HOFT
SETTINGS=(
    adapter=hut
    model=llama-3.1-8b      # a gated hub id; or model.path=FOLDER
    engine=ddp              # every GPU holds the base, about 6 GB; engine=fsdp2 shares it out
    data.train=data/commonsense_170k.json
    run_dir=runs/hut_llama8b
    train.micro_batch=2
)
source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"
exit 2  # only reached where that is no checkout: call sbatch in it, or export SCALEPEFT_ROOT
