"""A contender of ``scalepeft bench train``, in a process of its own: it trains on the rows of
FOLDER/work.json and writes into FOLDER/found.json what each step took.

Run as ``python -m scalepeft.analysis.bench.contender NAME FOLDER``; a contender imports what its
own users import.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


class Clock:
    """Seconds of the epoch and of this process's CPUs at the end of each step."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """The end of a step, the device having finished."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ticks.append((time.time(), time.process_time()))


Trained = tuple[list[float], Any, int]
"""Loss of each step, the rows or packed lines in their order, and how many of them a step takes."""


def scalepeft(folder: Path, work: dict[str, Any], clock: Clock) -> Trained:
    """What ``scalepeft train`` does, with FOLDER/config.yaml."""
    from scalepeft import train
    from scalepeft.config import files
    from scalepeft.core.files import read_lines
    from scalepeft.core.preemption import StopFlag

    class Timed(train.Trainer):
        def step(self, *words: Any) -> tuple[float | None, float | None]:
            done = super().step(*words)
            clock.tick()
            return done

    vars(train)["Trainer"] = Timed
    config, _ = files.load(str(folder / "config.yaml"), [f"run_dir={folder}/run"])
    train.run(config, StopFlag())
    losses = [row["loss"] for row in read_lines(folder / "run" / "metrics.jsonl")]
    return losses, work["rows"], config.train.global_batch


def incumbent(folder: Path, work: dict[str, Any], clock: Clock, trl: bool) -> Trained:
    """``transformers.Trainer`` on padded rows, or TRL's on packed lines of about as many tokens a
    step as the others', in forwards of as many lines.
    """
    import peft
    import torch
    import transformers as hf

    class Tick(hf.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    size, micro = work["global_batch"], work["micro_batch"]
    tokens = sum(len(row["input_ids"]) for row in work["rows"]) * size / len(work["rows"])
    if trl:
        size = max(1, round(tokens / work["cutoff"]))
    micro = next(n for n in range(min(micro, size), 0, -1) if size % n == 0)
    arguments: dict[str, Any] = {
        **work["arguments"], "output_dir": str(folder / "hf"), "num_train_epochs": 1,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": size // micro,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    more = {k: v for k, v in {"attn_implementation": work["attention"]}.items() if v != "auto"}
    dtype = getattr(torch, work["dtype"])
    model = hf.AutoModelForCausalLM.from_pretrained(work["base"], dtype=dtype, **more)
    tokenizer = hf.AutoTokenizer.from_pretrained(work["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapter = peft.get_peft_config(work["adapter"])
    trainer: Any
    if trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        settings = SFTConfig(**arguments, max_length=work["cutoff"], packing=True)
        trainer = SFTTrainer(
            model, settings, train_dataset=Dataset.from_list(work["rows"]), peft_config=adapter,
            processing_class=tokenizer, callbacks=[Tick()],
        )  # fmt: skip
    else:
        trainer = hf.Trainer(
            peft.get_peft_model(model, adapter), hf.TrainingArguments(**arguments),
            hf.DataCollatorForSeq2Seq(tokenizer), work["rows"], callbacks=[Tick()],
        )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.train_dataset, size


def main(name: str, folder: Path) -> None:
    """Trains, and writes for each step loss, tokens, learned tokens, and clock at its end."""
    work, clock = json.loads((folder / "work.json").read_text()), Clock()
    if name == "scalepeft":
        losses, lines, size = scalepeft(folder, work, clock)
    else:
        losses, lines, size = incumbent(folder, work, clock, name == "trl")
    steps, parts = [], [[lines[j] for j in range(i, min(i + size, len(lines)))]
                        for i in range(0, len(lines), size)]  # fmt: skip
    for loss, part, (wall, cpu) in zip(losses, parts, clock.ticks, strict=True):
        labels = sum(label >= 0 for line in part for label in line["labels"])
        tokens = sum(len(line["input_ids"]) for line in part)
        steps.append({"loss": loss, "tokens": tokens, "labels": labels, "wall": wall, "cpu": cpu})

    from scalepeft.run.provenance import peak_memory

    (folder / "found.json").write_text(json.dumps({"steps": steps, **peak_memory()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
