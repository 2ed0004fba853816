r"""SHOFT with TRL's SFTTrainer, packed; stops at any signal, and goes on.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml \
        examples/trl_sft_shoft.py MODEL ROWS.json OUT

ROWS.json is a list of {"prompt": ..., "completion": ...}; loss on the completions. Under Slurm, or
launch/local.sh, a rank a process: docs/integrations/trainer.md.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from scalepeft.integrations.peft import SHOFTConfig
from scalepeft.integrations.trainer import PreemptionCallback, last_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("rows", type=Path)
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
arguments = SFTConfig(
    options.out, max_steps=options.steps, max_length=512, packing=True, learning_rate=2e-4,
    per_device_train_batch_size=4, warmup_steps=options.steps // 10, bf16=True, save_steps=100,
    logging_steps=1, report_to="none", use_cpu=options.cpu,
)  # fmt: skip
targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(options.model),
    arguments,
    train_dataset=Dataset.from_list(json.loads(options.rows.read_text())),
    processing_class=tokenizer,
    peft_config=SHOFTConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"),
    callbacks=[PreemptionCallback()],
)
trainer.train(resume_from_checkpoint=last_checkpoint(options.out))
trainer.save_model(f"{options.out}/adapter")
