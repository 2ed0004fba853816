"""A contender of ``bench train`` as a process, which imports what its own users do: trains by
FOLDER/work.json and writes FOLDER/found.json, with the clocks at the end of each step.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ticks: list[tuple[float, float]] = []  # seconds of the epoch, and of this process's CPUs


def tick(*_: Any, **__: Any) -> None:
    """The end of a step, the device having finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ticks.append((time.time(), time.process_time()))


def scalepeft(folder: Path, work: dict[str, Any]) -> tuple[list[float], Any, int]:
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
    train.run(config := from_dict(work["config"] | {"run_dir": str(folder / "run")}), StopFlag())
    logged = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in logged], work["rows"], config.train.global_batch


def incumbent(folder: Path, work: dict[str, Any], trl: bool) -> tuple[list[float], Any, int]:
    """HF's Trainer on padded rows; TRL's on packed lines, of about as many tokens a step."""
    import peft
    import transformers as hf

    rows, adapter, micro = work["rows"], peft.get_peft_config(work["adapter"]), work["micro_batch"]
    size, cutoff = work["global_batch"], work["cutoff"]
    if trl:
        size = max(1, round(sum(len(row["input_ids"]) for row in rows) / len(rows) * size / cutoff))
    micro = next(n for n in range(min(micro, size), 0, -1) if size % n == 0)
    arguments: dict[str, Any] = {
        **work["arguments"], "output_dir": str(folder / "run"), "num_train_epochs": 1,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": size // micro,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    model = hf.AutoModelForCausalLM.from_pretrained(work["base"], **work["load"])
    tokenizer = hf.AutoTokenizer.from_pretrained(work["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    more: dict[str, Any] = {
        "callbacks": [type("Tick", (hf.TrainerCallback,), {"on_step_end": tick})]
    }
    if trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        more |= {"peft_config": adapter, "processing_class": tokenizer}
        settings = SFTConfig(**arguments, max_length=cutoff, packing=True)
        trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), **more)
    else:
        adapted, settings = peft.get_peft_model(model, adapter), hf.TrainingArguments(**arguments)
        trainer = hf.Trainer(adapted, settings, hf.DataCollatorForSeq2Seq(tokenizer), rows, **more)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.train_dataset, size


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    work = json.loads((folder / "work.json").read_text())
    trained = (
        scalepeft(folder, work) if name == "scalepeft" else incumbent(folder, work, name == "trl")
    )
    steps, (losses, lines, size) = [], trained
    for i, (loss, (at, cpu)) in enumerate(zip(losses, ticks, strict=True)):
        part = [lines[j] for j in range(i * size, min((i + 1) * size, len(lines)))]
        tokens = sum(len(line["input_ids"]) for line in part)
        learned = sum(label >= 0 for line in part for label in line["labels"])
        steps.append({"loss": loss, "tokens": tokens, "learned": learned, "at": at, "cpu": cpu})

    from scalepeft.run.provenance import peak_memory

    (folder / "found.json").write_text(json.dumps({"steps": steps, **peak_memory()}))
