"""``scalepeft bench model``: every method beside HF PEFT's and the frozen base alone.

A step is forward, backward and AdamW; inputs need a gradient, as in every block but the first. With
nf4 PEFT's stand on ``Linear4bit``; with int8 on our storage, as bitsandbytes' rounds activations.
"""

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from scalepeft.analysis.bench.entries import REFERENCE, ROW, Entry, layers_of, make_case, measure
from scalepeft.analysis.bench.methods import choose
from scalepeft.analysis.bench.options import Options
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically, writing
from scalepeft.core.text import table
from scalepeft.models.hub import PRECISIONS
from scalepeft.run.provenance import device_name, versions

ROW_FIELDS = "label family settings reason parameters".split()
COLUMNS = {
    "parameters": ("parameters", ",d"), "ms": ("median_ms", ".1f"),
    "x peft-lora": ("x_peft_lora", ".2f"), "x base": ("x_base", ".2f"),
}  # fmt: skip


def check(options: Options) -> None:
    """Raise UserError for numbers and devices that cannot be used, or without PEFT."""
    for name in ("rank", "tokens", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    if options.tokens % min(ROW, options.tokens):
        near = options.tokens // ROW * ROW
        raise UserError(f"--tokens {options.tokens}: is cut into rows of {ROW}; take {near}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; take --device cpu")
    if importlib.util.find_spec("peft") is None:
        fix = "pip install 'scalepeft[dev]'"
        raise UserError(f"scalepeft bench compares with HF PEFT, which is not installed: {fix}")


def make_folder(out: str) -> Path:
    """Return the folder of ``--out``, made. Raise UserError if it cannot be."""
    with writing(f"--out {out}", "name a folder to write to"):
        Path(out).mkdir(parents=True, exist_ok=True)
    return Path(out).resolve()


def run(options: Options) -> dict[str, Any]:
    """Measure, print a table, write bench.json to ``out``; return it. Raises as ``check``."""
    check(options)
    bf16, cuda = options.precision == "bf16", torch.cuda.is_available() and options.device != "cpu"
    entries = choose(options.methods, layers_of(options.shape), options.rank, bf16)
    folder = None if options.out is None else make_folder(options.out)
    device = torch.device("cuda" if cuda else "cpu")
    result: dict[str, Any] = {
        "options": asdict(options),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": "forward, backward, AdamW",
    }
    print(
        f"bench {options.what} {options.shape}: {options.tokens} tokens, rank {options.rank},"
        f" {options.precision}, quant {options.quant}; {result['device']}, {result['threads']}"
        f" threads, {result['date']}\n{', '.join(map(' '.join, result['versions'].items()))}"
    )
    dtype = PRECISIONS[options.precision]
    case = make_case(options.shape, options.tokens, dtype, device, options.quant)
    measure(case, entries, options.repeats)
    result["cases"] = [summary(case.title, entries)]
    print(*_table(result["cases"][0]), sep="\n", flush=True)
    if folder is not None:
        write_atomically(folder / "bench.json", json.dumps(result, indent=1) + "\n")
        print(f"\nwrote {folder / 'bench.json'}")
    return result


def summary(title: str, entries: list[Entry]) -> dict[str, Any]:
    """Return the figures of one case; ratios over the rounds that both ran."""
    by_label, rows = {e.label: e for e in entries}, []
    for e in entries:
        row = {key: value for key, value in vars(e).items() if key in ROW_FIELDS}
        ms = row["times_ms"] = [1e3 * t for t in e.times]
        row["median_ms"] = median(ms) if ms else None
        row["iqr_ms"] = float(np.ptp(np.percentile(ms, [25, 75]))) if ms else None
        row["x_peft_lora"] = e.ratio(by_label.get(REFERENCE))
        row["x_base"] = e.ratio(by_label["base"])
        rows.append(row)
    return {"title": title, "noise": rows[0]["iqr_ms"] / rows[0]["median_ms"], "entries": rows}


def _table(case: dict[str, Any]) -> list[str]:
    """Return a line for each entry, with why where one was left out."""
    rows = [["", *COLUMNS, "rounds"]]
    for r in case["entries"]:
        figures = [(r[key], form) for key, form in COLUMNS.values()]
        cells = ["n/a" if value is None else format(value, form) for value, form in figures]
        cells = [f"n/a  {r['reason']}"] if r["reason"] else [*cells, str(len(r["times_ms"]))]
        rows.append([r["label"], *cells])
    noise = f"noise (interquartile range of base's times) {case['noise']:.1%}"
    return ["", f"{case['title']}; {noise}", *table(rows, indent="")]
