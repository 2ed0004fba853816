"""A loop of your own around ``scalepeft.inject``: no PEFT, no Trainer.

    python examples/own_loop.py MODEL ROWS.json OUT

ROWS.json is a list of {"instruction": ..., "output": ...}. Saves the adapter for
``scalepeft.load_adapter``, ``scalepeft merge`` and PEFT.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import scalepeft

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("rows", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device)
targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
scalepeft.inject(model, {"name": "hoft", "rank": 16, "target_modules": targets})
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(trained.values(), lr=2e-4, weight_decay=0.0)

rows = json.loads(options.rows.read_text())
texts = [f"{row['instruction']}\n{row['output']}{tokenizer.eos_token}" for row in rows]
for step in range(options.steps):
    some = [texts[(4 * step + i) % len(texts)] for i in range(4)]
    batch = tokenizer(some, padding=True, return_tensors="pt", return_token_type_ids=False)
    batch = batch.to(device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1} loss {loss.item():.4f}")

scalepeft.save_adapter(model, options.out)
layer = model.model.layers[0].self_attn.q_proj
weight, _ = scalepeft.effective_weight(layer)  # W' of layer(x) = W' x
print(f"moved q_proj of block 0 by {(weight - layer.weight).norm() / weight.norm():.2%}")
