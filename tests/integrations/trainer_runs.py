"""Runs of Trainer and SFTTrainer, as one rank or as a function.

    python tests/integrations/trainer_runs.py '[{"out": ..., ...}, ...]'

Each run leaves ``losses.json`` and ``held.json`` (what the ranks held) in its folder, and the
adapter in ``final/``.
"""
# ruff: noqa: E402  (accelerate is told about the ranks before anything asks it)

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

SHARDED = "SCALEPEFT_TEST_SHARDED_ON_CPU"
if SHARDED in os.environ:
    # On a CPU accelerate gives up FSDP2 and ZeRO-3 without a word. Told that the ranks are GPUs, of
    # which it then asks no more than the name of the device, it runs both, over gloo.
    def told(self: Any, *_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = told
    os.environ.update({"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"})
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler then

import peft
import transformers as hf
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch.distributed.tensor import DTensor

import scalepeft.integrations.peft  # noqa: F401  (registers HOFT and the rest)
from scalepeft.integrations.trainer import PreemptionCallback, last_checkpoint
from scalepeft.models import quant

TARGETS = ["q_proj", "v_proj", "down_proj"]


def base(folder: str, load: str) -> Any:
    """The base in fp32, in bitsandbytes' 4 bits, or in our NF4."""
    if load == "bnb":
        four = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=four)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if load == "nf4":
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                quant.quantize(layer, quant.NF4())
    return model


def config_class(method: str) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]


def settings(method: str, **more: Any) -> Any:
    if method == "lora":
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules=TARGETS, **more
        )
    rank = {"r": 4} if method in ("hoft", "shoft") else {}
    words = {"task_type": "CAUSAL_LM", **rank, "target_modules": TARGETS, **more}
    return config_class(method)(**words)


def rows(count: int = 24) -> list[dict[str, Any]]:
    made = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 20, (count,), generator=made).tolist()
    ids = [torch.randint(5, 12, (length,), generator=made).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


class Slow(hf.TrainerCallback):
    """Marks and draws out each step, so that signals meet one."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.seconds = out, seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (self.out / f"rank-{args.process_index}-step-{state.global_step}").touch()
        time.sleep(self.seconds)


def held(model: torch.nn.Module) -> dict[str, Any]:
    found = dict(model.named_parameters())
    trained = [p for p in found.values() if p.requires_grad]
    return {
        "parameters": len(found), "trained": len(trained), "wrapper": type(model).__name__,
        "dtensors": sum(isinstance(p, DTensor) for p in found.values()),
        "ds_ids": sum(hasattr(p, "ds_id") for p in found.values()),
    }  # fmt: skip


def run(
    out: str, folder: str, method: str = "hoft", load: str = "fp32", trl: bool = False,
    slow: float = 0.0, **words: Any,
) -> list[float]:  # fmt: skip
    """Trains, or goes on from the newest whole checkpoint; returns the logged losses."""
    Path(out).mkdir(parents=True, exist_ok=True)
    hf.set_seed(0)
    model, tokenizer = base(folder, load), hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments: dict[str, Any] = {
        "output_dir": out, "use_cpu": SHARDED not in os.environ, "max_steps": 6, "seed": 0,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False, **words,
    }  # fmt: skip
    calls: list[Any] = [PreemptionCallback(), *([Slow(Path(out), slow)] if slow else [])]
    more: dict[str, Any] = {"train_dataset": rows(), "callbacks": calls}
    if trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        more |= {"train_dataset": Dataset.from_list(rows()), "peft_config": settings(method)}
        config = SFTConfig(**{"max_length": 32, "activation_checkpointing": False} | arguments)
        trainer: Any = SFTTrainer(model, config, processing_class=tokenizer, **more)
    else:
        collator = hf.DataCollatorForSeq2Seq(tokenizer)
        adapted = peft.get_peft_model(model, settings(method))
        trainer = hf.Trainer(adapted, hf.TrainingArguments(**arguments), collator, **more)
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    trainer.save_model(f"{out}/final")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if trainer.args.process_index == 0:
        Path(out, "losses.json").write_text(json.dumps(losses))
        Path(out, "held.json").write_text(json.dumps(held(trainer.model_wrapped)))
    return losses


@torch.no_grad()
def loaded_logits(folder: str, adapter: Path) -> torch.Tensor:
    """Of a saved adapter, as a user loads it."""
    model = peft.PeftModel.from_pretrained(base(folder, "fp32"), adapter).eval()
    return model(torch.arange(5, 37)[None]).logits


if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        run(**words)
