"""``scalepeft bench train``: a whole run beside transformers' Trainer with PEFT and TRL's SFTTrainer.

Each contender trains the same base and method on the same rows in a process of its own, all in
turns, in every round in another order. At a rate of 1e-8 all stay at the base, so that their losses
tell whether they did the same work.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from scalepeft.adapters import inject
from scalepeft.analysis.bench.command import make_folder
from scalepeft.build import task_of
from scalepeft.config import files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.core.text import table
from scalepeft.data import token_file
from scalepeft.data.loader import Order
from scalepeft.export.peft import common_fields
from scalepeft.models import quant, shapes
from scalepeft.models.hub import Base, open_base
from scalepeft.parallel.ranks import Ranks, pick_device
from scalepeft.run.provenance import device_name, versions

OURS = "scalepeft"
NEEDS = {OURS: "", "trainer": "accelerate peft", "trl": "accelerate peft datasets trl"}
STEPS, WARM = 12, 2  # by default; those before the ones whose speed counts
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative, between losses
FIXED = ("train.epochs=null", "train.lr=1e-8", "train.schedule=constant", "train.warmup_steps=0",
         "train.eval_every=0", "train.wandb=null", "train.tensorboard=false")  # fmt: skip
COLUMNS = {
    "tokens/CPU s": ".0f", "tokens/s": ".0f", "start-up s": ".1f", "start-up CPU s": ".1f",
    "peak MiB": ",.0f", "loss": ".5f", "learned tokens": ",d",
}  # fmt: skip
Runs = list[dict[str, Any]]


def run(settings: list[str], out: str | None, repeats: int | None) -> int:
    """Measures, prints a table, writes ``train.json`` and ``train.md`` into ``out``.

    Args:
        settings: of a run, as for train; of ``train.max_steps`` 12 unless they say so.
        out: a folder, or None.
        repeats: rounds, by default 3.

    Returns:
        The exit code: 1 if a contender failed, or did other work than scalepeft.

    Raises:
        UserError: settings that cannot be compared.
    """
    if repeats is not None and repeats < 1:
        raise UserError(f"--repeats {repeats}: must be 1 or more")
    steps = files.load_partly(settings)[0].train.max_steps or STEPS
    fixed = [*settings, *FIXED, f"train.max_steps={steps}", f"train.save_every={steps}"]
    config = files.load_partly(fixed)[0]
    if config.engine.name != "single" or config.model.quant != "none":
        raise UserError("bench train: is for engine=single and model.quant=none")
    if steps <= WARM:
        raise UserError(f"train.max_steps={steps}: speed counts from step {WARM + 1} on")
    folder = None if out is None else make_folder(out)
    absent = {name: [lib for lib in needs.split() if importlib.util.find_spec(lib) is None]
              for name, needs in NEEDS.items()}  # fmt: skip
    left_out = {n: f"not installed: {', '.join(libs)}" for n, libs in absent.items() if libs}
    runs: dict[str, Runs] = {name: [] for name in NEEDS if name not in left_out}
    with tempfile.TemporaryDirectory() as work:
        _prepare(config, Path(work))
        for turn in range(repeats or 3):
            names = [name for name in runs if name not in left_out]
            first = turn % len(names)
            for name in [*names[first:], *names[:first]]:
                if why := _measure(name, Path(work), runs[name]):
                    left_out[name] = f"fault: {why}"
                say(f"bench train: round {turn + 1}: {name} {left_out.get(name, 'done')}")
    found = {
        "config": cfg.to_dict(config), "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device_name(pick_device(config.engine.device, 0)),
        "threads": torch.get_num_threads(), "runs": runs, "left out": left_out,
        "versions": versions("torch", "transformers", "accelerate", "peft", "trl"),
    }  # fmt: skip
    for name in [name for name in runs if runs[OURS] and runs[name] and name not in left_out]:
        if why := _other_work(runs[OURS][0], runs[name][0], TOLERANCE[config.train.precision]):
            left_out[name] = f"fault: {why}"
    lines = _report(found)
    print(*lines, sep="\n", flush=True)
    if folder is not None:
        write_atomically(folder / "train.json", json.dumps(found, indent=1) + "\n")
        write_atomically(folder / "train.md", "\n".join(lines) + "\n")
    return BROKEN if any(why.startswith("fault") for why in left_out.values()) else FINISHED


def _prepare(config: RunConfig, work: Path) -> None:
    """Writes what the contenders read: the config, and the rows as tokens in their order."""
    base, seed, train = (
        open_base(config.model, Ranks(device="cpu")),
        config.train.seed,
        config.train,
    )
    task = task_of(config, base.tokenizer)
    tokens, _, _ = token_file.prepare(task, base.tokenizer, base.vocab_size, seed, base.ends)
    order = Order(len(tokens), seed)
    taken = [order[i] for i in range((train.max_steps or STEPS) * train.global_batch)]
    arguments = {
        "learning_rate": train.lr, "lr_scheduler_type": "constant", "seed": seed,
        "max_grad_norm": train.max_grad_norm, "bf16": train.precision == "bf16",
        "gradient_checkpointing": config.engine.activation_checkpointing,
        "use_cpu": pick_device(config.engine.device, 0).type == "cpu",
    }  # fmt: skip
    description = {
        "rows": [{"input_ids": tokens.row(r).tolist(), "labels": tokens.labels(r).tolist()}
                 for r in taken],
        "base": str(base.folder), "tokenizer": config.model.tokenizer or str(base.folder),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[train.precision],
        "attention": config.model.attention, "adapter": _of_peft(config, base),
        "global_batch": train.global_batch, "micro_batch": train.micro_batch,
        "cutoff": config.data.cutoff, "arguments": arguments,
    }  # fmt: skip
    (work / "config.yaml").write_text(cfg.dump(config))
    (work / "work.json").write_text(json.dumps(description))


def _of_peft(config: RunConfig, base: Base) -> dict[str, Any]:
    """The same method on the same layers as HF PEFT's config. Raises UserError: it has none."""
    model = inject.inject(shapes.meta_model(str(base.folder)), config.adapter)
    exported = {
        name: layer.adapter.to_peft(quant.Frozen(layer))
        for name, layer in inject.adapted_layers(model)
    }
    fields = {name: made[0] for name, made in exported.items() if made is not None}
    if not fields or len(fields) < len(exported):
        raise UserError(f"adapter={config.adapter.name}: HF PEFT has none; take adapter=lora")
    return {"task_type": "CAUSAL_LM", **common_fields(model, fields)}


def _measure(name: str, work: Path, runs: Runs) -> str:
    """Appends a run of a contender; returns why it failed, or an empty text."""
    shutil.rmtree(work / "run", ignore_errors=True)
    load, began = os.getloadavg()[0], time.time()
    words = [sys.executable, "-m", "scalepeft.analysis.bench.contender", name, str(work)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return " ".join(["", *done.stderr.strip().splitlines()][-1].split())[:300]
    found = json.loads((work / "found.json").read_text())
    if len(steps := found["steps"]) <= WARM:
        return f"has {len(steps)} steps of these rows, {WARM + 1} are needed: raise train.max_steps"
    first = steps[WARM - 1]
    tokens = sum(step["tokens"] for step in steps[WARM:])
    labels = sum(step["labels"] for step in steps)
    runs.append({
        "start-up s": steps[0]["wall"] - began, "start-up CPU s": steps[0]["cpu"],
        "tokens/s": tokens / (steps[-1]["wall"] - first["wall"]),
        "tokens/CPU s": tokens / (steps[-1]["cpu"] - first["cpu"]),
        "peak MiB": (found["peak_memory"] or found["peak_resident"] or math.nan) / 2**20,
        "loss": sum(step["loss"] * step["labels"] for step in steps) / labels,
        "learned tokens": labels, "load": load, **found,
    })  # fmt: skip
    return ""


def _other_work(ours: dict[str, Any], its: dict[str, Any], tolerance: float) -> str:
    """What tells the work of two runs apart; empty if nothing. Losses are compared step by step
    where both have the same rows in each step, else over all rows.
    """
    if ours["learned tokens"] != its["learned tokens"]:
        return f"{its['learned tokens']} learned tokens, not {ours['learned tokens']}"
    pairs = [(ours["loss"], its["loss"])]
    mine, other = ours["steps"], its["steps"]
    if [step["tokens"] for step in mine] == [step["tokens"] for step in other]:
        pairs = [(a["loss"], b["loss"]) for a, b in zip(mine, other, strict=True)]
    apart = [f"loss {b:.6f}, not {a:.6f}" for a, b in pairs if not abs(a - b) <= tolerance * abs(a)]
    return next(iter(apart), "")


def _report(found: dict[str, Any]) -> list[str]:
    """A line for each contender: medians over the rounds, and in how many of ours its time is."""
    runs, train = found["runs"], found["config"]["train"]
    loads = [run["load"] for done in runs.values() for run in done] or [math.nan]
    rows = [["", *COLUMNS, "rounds"]]
    for name in NEEDS:
        cells = [_cell(runs, name, column) for column in COLUMNS] if runs.get(name) else []
        rows.append([name, *([*cells, str(len(runs[name]))] if cells else ["left out"])])
    return [
        f"# scalepeft bench train: {found['device']}, {found['threads']} threads, {found['date']}",
        "", ", ".join(map(" ".join, found["versions"].items())), "",
        f"{train['max_steps']} steps of {train['global_batch']} rows, {train['precision']}; speed"
        f" from step {WARM + 1} on, tokens without padding; medians (lowest to highest); load"
        f" {min(loads):.1f} to {max(loads):.1f}", "", "```", *table(rows, indent=""), "```",
        *(f"{name}: {why}" for name, why in found["left out"].items()),
    ]  # fmt: skip


def _cell(runs: dict[str, Runs], name: str, column: str) -> str:
    """The median of a figure, for speeds with its spread and the median ratio to ours."""
    form, values = COLUMNS[column], [run[column] for run in runs[name]]
    text = format(median(values), form)
    if "tokens/" in column:
        text += f" ({min(values):{form}} to {max(values):{form}})"
        pairs = zip(runs[OURS], runs[name], strict=False)
        text += f" {median(its[column] / our[column] for our, its in pairs):.2f}x"
    return text
