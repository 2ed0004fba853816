#!/bin/bash
# LLaMA-3.1-8B in NF4, SHOFT, MetaMathQA, on 8 GPUs of one node. From the checkout:
#   sbatch slurm/shoft_llama8b_math.sh
#   sbatch slurm/shoft_llama8b_math.sh train.lr=5e-4     whatever follows is laid over the settings below
#SBATCH --job-name=shoft_llama8b_math
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

CONFIG=configs/runs/math_shoft.yaml  # adapter, data and schedule
SETTINGS=(
    model=llama-3.1-8b      # a gated hub id; or model.path=FOLDER
    engine=ddp              # every GPU holds the base, about 6 GB; engine=fsdp2 shares it out
    data.train=data/MetaMathQA-395K.json
    data.test=data/gsm8k/test.jsonl    # its questions must not be among the training rows
    run_dir=runs/shoft_llama8b_math
    train.micro_batch=2
)
source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"
exit 2  # only reached where that is no checkout: call sbatch in it, or export SCALEPEFT_ROOT
