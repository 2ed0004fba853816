"""A contender of ``bench train`` as a process, which imports what its own users do: trains by
FOLDER/work.json and writes FOLDER/found.json, with the clocks at the end of each step.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

ticks: list[tuple[float, float]] = []  # seconds of the epoch, and of this process's CPUs


def tick(*_: Any, **__: Any) -> None:
    """The end of a step, the device having finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ticks.append((time.time(), time.process_time()))


def scalepeft(out: Path, work: dict[str, Any]) -> tuple[list[float], Any, int]:
    """``scalepeft train``: losses of the steps, the rows in their order, how many a step takes."""
    from scalepeft import train
    from scalepeft.config.schema import from_dict
    from scalepeft.core.preemption import StopFlag

    class Timed(train.Trainer):
        def step(self, *words: Any) -> Any:
            done = super().step(*words)
            tick()
            return done

    vars(train)["Trainer"] = Timed
    train.run(config := from_dict(work["config"] | {"run_dir": str(out)}), StopFlag())
    logged = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in logged], work["rows"], config.train.global_batch


def incumbent(out: Path, work: dict[str, Any], trl: bool) -> tuple[list[float], Any, int]:
    """HF's Trainer on padded rows; TRL's on packed lines, of about as many tokens a step."""
    import peft
    import transformers as hf

    rows, adapter, config = work["rows"], peft.get_peft_config(work["adapter"]), work["config"]
    train, cutoff = config["train"], config["data"]["cutoff"]
    size = train["global_batch"]
    if trl:
        size = max(1, round(sum(len(row["input_ids"]) for row in rows) / len(rows) * size / cutoff))
    micro = next(n for n in range(min(train["micro_batch"], size), 0, -1) if size % n == 0)
    arguments: dict[str, Any] = {
        "learning_rate": train["lr"], "max_grad_norm": train["max_grad_norm"],
        "bf16": train["precision"] == "bf16", "seed": train["seed"], "use_cpu": work["use_cpu"],
        "gradient_checkpointing": config["engine"]["activation_checkpointing"],
        "output_dir": str(out), "num_train_epochs": 1,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": size // micro,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    never, named = {"trust_remote_code": False}, config["model"]["tokenizer"] or work["base"]
    model = hf.AutoModelForCausalLM.from_pretrained(work["base"], **never, **work["load"])
    tokenizer = hf.AutoTokenizer.from_pretrained(named, **never)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        trainer: Any = SFTTrainer(
            model, SFTConfig(**arguments, max_length=cutoff, packing=True),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter,
        )  # fmt: skip
    else:
        adapted, settings = peft.get_peft_model(model, adapter), hf.TrainingArguments(**arguments)
        trainer = hf.Trainer(adapted, settings, hf.DataCollatorForSeq2Seq(tokenizer), rows)
    trainer.add_callback(type("Tick", (hf.TrainerCallback,), {"on_step_end": tick}))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.train_dataset, size


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    work = json.loads((folder / "work.json").read_text())
    run = scalepeft if name == "scalepeft" else partial(incumbent, trl=name == "trl")
    steps, (losses, lines, size) = [], run(folder / "run", work)
    for i, (loss, (at, cpu)) in enumerate(zip(losses, ticks, strict=True)):
        part = [lines[j] for j in range(i * size, min((i + 1) * size, len(lines)))]
        tokens = sum(len(line["input_ids"]) for line in part)
        learned = sum(label >= 0 for line in part for label in line["labels"])
        steps.append({"loss": loss, "tokens": tokens, "learned": learned, "at": at, "cpu": cpu})

    from scalepeft.run.provenance import peak_memory

    (folder / "found.json").write_text(json.dumps({"steps": steps, **peak_memory()}))
