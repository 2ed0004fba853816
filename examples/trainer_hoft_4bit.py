"""HOFT on a base in 4 bits with transformers' Trainer; stops at any signal, and goes on.

    python examples/trainer_hoft_4bit.py MODEL ROWS.json OUT

MODEL is a folder or a hub id; ROWS.json is a list of {"instruction": ..., "output": ...}. The same
command continues a run that was stopped (exit code 75) or killed.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers as hf
from peft import get_peft_model, prepare_model_for_kbit_training

from scalepeft.integrations.peft import HOFTConfig
from scalepeft.integrations.trainer import PreemptionCallback, last_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("rows", type=Path)
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

tokenizer = hf.AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
four_bits = hf.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = hf.AutoModelForCausalLM.from_pretrained(options.model, quantization_config=four_bits)
model = prepare_model_for_kbit_training(
    model, gradient_checkpointing_kwargs={"use_reentrant": False}
)
config = HOFTConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()


def tokenize(row):
    prompt = tokenizer(row["instruction"] + "\n")["input_ids"]
    answer = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


arguments = hf.TrainingArguments(
    options.out, max_steps=options.steps, per_device_train_batch_size=4, learning_rate=2e-4,
    warmup_steps=options.steps // 10, bf16=True, save_steps=100, logging_steps=1,
    report_to="none", use_cpu=options.cpu,
)  # fmt: skip
rows = [tokenize(row) for row in json.loads(options.rows.read_text())]
collator, calls = hf.DataCollatorForSeq2Seq(tokenizer), [PreemptionCallback()]
trainer = hf.Trainer(model, arguments, collator, rows, callbacks=calls)
trainer.train(resume_from_checkpoint=last_checkpoint(options.out))
trainer.save_model(f"{options.out}/adapter")
