"""``scalepeft bench train``: a whole run beside HF's Trainer with PEFT, and TRL's SFTTrainer, each
in a process of its own, in turns; at a rate of 1e-8 the losses tell whether all did the same work.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from scalepeft.adapters import inject
from scalepeft.analysis.bench.command import make_folder
from scalepeft.analysis.bench.gpu.command import has_fault, lines_of
from scalepeft.analysis.bench.methods import peft_fields
from scalepeft.build import task_of
from scalepeft.config import files
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.data import loader, token_file
from scalepeft.models import shapes
from scalepeft.models.hub import PRECISIONS, open_base
from scalepeft.parallel.ranks import Ranks, pick_device
from scalepeft.run.provenance import device_name, versions

NEEDS = {"scalepeft": "", "trainer": "accelerate peft", "trl": "accelerate peft datasets trl"}
WARM = 2  # steps before those whose speed counts
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative, of the mean loss
FIXED = ["run_dir=unset", "train.epochs=null", "train.lr=1e-8", "train.schedule=constant",
         "train.warmup_steps=0", "train.save_every=1000000", "train.eval_every=0",
         "train.stop_at=null", "train.wandb=null"]  # fmt: skip


def run(settings: list[str], out: str | None, repeats: int | None) -> int:
    """Measures in ``repeats`` (3) rounds, prints a table, writes train.json and .md into ``out``;
    returns 1 if one failed, or did other work. Raises UserError: settings that cannot be compared.
    """
    path, own = files.config_first(settings)
    config, _ = files.load(path, ["train.max_steps=12", *own, *FIXED])
    if config.engine.name != "single" or config.model.quant != "none":
        raise UserError("bench train compares engine=single and model.quant=none alone")
    if (rounds := 3 if repeats is None else repeats) < 1:
        raise UserError(f"--repeats {rounds}: must be 1 or more")
    folder = None if out is None else make_folder(out)
    absent = [n for n, libraries in NEEDS.items() if not all(map(find_spec, libraries.split()))]
    found: dict[str, Any] = {name: {"skipped": f"needs {NEEDS[name]}"} for name in absent}
    runs: dict[str, list[Any]] = {name: [] for name in NEEDS if name not in absent}
    turns = [*runs]
    with tempfile.TemporaryDirectory() as work:
        Path(work, "work.json").write_text(json.dumps(_work(config)))
        for turn in range(rounds):
            for name in turns:
                say(f"bench train: round {turn + 1} of {rounds}: {name}")
                runs[name].append(_measure(name, work))
            turns.append(turns.pop(0))
    tolerance = TOLERANCE[config.train.precision]
    found |= {name: _summary(runs["scalepeft"], its, tolerance) for name, its in runs.items()}
    head = versions("torch", "transformers", "accelerate", "peft", "trl")
    head["device"] = device_name(pick_device(config.engine.device, 0))
    head |= {"threads": str(torch.get_num_threads()), "date": time.strftime("%Y-%m-%d %H:%M %z")}
    shown = ["# scalepeft bench train", "", "```", *lines_of(head), *lines_of(found), "```", ""]
    text = "\n".join(shown)
    print(text, end="", flush=True)
    if folder is not None:
        everything = {**head, "config": cfg.to_dict(config), "summary": found, "runs": runs}
        write_atomically(folder / "train.json", json.dumps(everything, indent=1) + "\n")
        write_atomically(folder / "train.md", text)
    return BROKEN if has_fault(found) else FINISHED


def _work(config: cfg.RunConfig) -> dict[str, Any]:
    """What the contenders read: config, rows as tokens in their order, HF's words for the rest."""
    base, train = open_base(config.model, Ranks()), config.train
    task = task_of(config, base.tokenizer)
    rows = token_file.files(task, base.tokenizer, base.vocab_size, base.ends)
    tokens, _, _ = token_file.prepared(rows, task.config, train.seed)
    order = loader.Order(len(tokens), train.seed)
    taken = [order[i] for i in range((train.max_steps or 0) * train.global_batch)]
    fields = peft_fields(inject.inject(shapes.meta_model(str(base.folder)), config.adapter))
    if fields is None:
        raise UserError(f"adapter={config.adapter.name}: HF PEFT has no such method; take lora")
    attention = config.model.attention
    return {
        "config": cfg.to_dict(config), "base": str(base.folder),
        "use_cpu": pick_device(config.engine.device, 0).type == "cpu",
        "rows": [{"input_ids": tokens.row(r).tolist(), "labels": tokens.labels(r).tolist()}
                 for r in taken],
        "adapter": {"task_type": "CAUSAL_LM", **fields},
        "load": {"dtype": str(PRECISIONS[train.precision])[6:],
                 "attn_implementation": None if attention == "auto" else attention},
    }  # fmt: skip


def _measure(name: str, work: str) -> dict[str, Any]:
    """A run of a contender, or why there is none (``fault``)."""
    shutil.rmtree(f"{work}/run", ignore_errors=True)
    load, began = os.getloadavg()[0], time.time()
    words = [sys.executable, "-m", "scalepeft.analysis.bench.contender", name, work]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"fault": f"exit {done.returncode}: {' '.join(done.stderr.split())[-300:]}"}
    found = json.loads(Path(work, "found.json").read_text())
    if len(steps := found["steps"]) <= WARM:
        return {"fault": f"{len(steps)} steps with these rows: raise train.max_steps"}
    warm, last, learned = steps[WARM - 1], steps[-1], sum(step["learned"] for step in steps)
    tokens = sum(step["tokens"] for step in steps[WARM:])
    return {
        "tokens/CPU s": tokens / (last["cpu"] - warm["cpu"]),
        "tokens/s": tokens / (last["at"] - warm["at"]),
        "start-up s": steps[0]["at"] - began, "start-up CPU s": steps[0]["cpu"],
        "peak MiB": (found["peak_memory"] or found["peak_resident"] or 0) / 2**20, "load": load,
        "loss": sum(step["loss"] * step["learned"] for step in steps) / learned,
        "learned": learned, "steps": steps,
    }  # fmt: skip


def _summary(ours: list[Any], its: list[Any], tolerance: float) -> dict[str, Any]:
    """Medians over the rounds, speeds also from lowest to highest and in times of ours."""
    if faults := [run for run in (*ours, *its) if "fault" in run]:
        return {"fault": faults[0]["fault"]}
    a, b = ours[0], its[0]
    if a["learned"] != b["learned"] or not abs(b["loss"] / a["loss"] - 1) <= tolerance:
        work = "loss {loss:.6f} of {learned} learned tokens".format_map
        return {"fault": f"other work: {work(b)}, not {work(a)}"}
    row: dict[str, Any] = {}
    for key in ("tokens/CPU s", "tokens/s"):
        values = sorted(run[key] for run in its)
        ratios = [theirs[key] / mine[key] for mine, theirs in zip(ours, its, strict=True)]
        row |= {key: round(median(values)), f"{key}, range": f"{values[0]:.0f}-{values[-1]:.0f}"}
        row |= {f"{key}, x ours": round(median(ratios), 2)}
    for key in ("start-up s", "start-up CPU s", "peak MiB", "load"):
        row[key] = round(median(run[key] for run in its), 1)
    return row | {"loss": f"{b['loss']:.5f}", "learned": b["learned"], "rounds": len(its)}
