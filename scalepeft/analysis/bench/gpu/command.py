"""``scalepeft bench gpu``: the sections in the order of their worth; one that fails is a result."""

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from scalepeft.analysis.bench.command import make_folder
from scalepeft.analysis.bench.gpu import exactness, running, training
from scalepeft.analysis.bench.gpu.session import Session
from scalepeft.core import errors
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.core.slurm import output_of
from scalepeft.core.text import table
from scalepeft.run.provenance import commit, device_name, versions


def environment(session: Session) -> dict[str, Any]:
    """Versions, commit, device and driver."""
    libraries = ("torch", "transformers", "peft", "pydantic", "bitsandbytes", "deepspeed", "triton")
    found: dict[str, Any] = {"device": device_name(session.device), "tiny": session.tiny}
    found |= {"commit": commit(), "CUDA": torch.version.cuda, "cores": os.cpu_count()}
    found |= versions(*libraries)
    if session.cuda:
        query = "--query-gpu=driver_version,memory.total,clocks.sm,power.draw"
        said = output_of("nvidia-smi", query, "--format=csv,noheader").strip()
        found |= {"NCCL": str(torch.cuda.nccl.version()), "nvidia-smi": said}
    return found


SECTIONS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "env": environment, "quant": exactness.storage, "exactness": exactness.methods,
    "training": training.training, "plan": training.plan, "running": running.resumed,
    "choices": training.choices, "generation": training.generation,
    "collectives": running.one_rank,
}  # fmt: skip


def run(out: str | None, seconds: float | None, only: str | None, tiny: bool | None) -> int:
    """Runs the sections (``only``: names by comma) in ``seconds`` (500), writes gpu.json after each
    and gpu.md into ``out``; returns 1 if one is a fault. Raises UserError: an option.
    """
    names = [name.strip() for name in (only or ",".join(SECTIONS)).split(",")]
    for name in names:
        if name not in SECTIONS:
            raise errors.unknown("section (--only)", name, SECTIONS)
    if not tiny and not torch.cuda.is_available():
        raise UserError("bench gpu: torch sees no CUDA device here; add --tiny to try it")
    if seconds is not None and not 0 < seconds < math.inf:
        raise UserError(f"--seconds {seconds}: expected a number above 0, such as 500")
    folder = make_folder(out or "gpu-bench")
    session = Session(folder, seconds or 500, bool(tiny))
    warnings.simplefilter("ignore")
    lines = [f"# scalepeft bench gpu{' --tiny' * session.tiny}: {device_name(session.device)}"]
    for name in (name for name in SECTIONS if name in names):
        session.keep(name, session.attempt(SECTIONS[name]))
        found = session.results[name]
        say(f"bench gpu: {name}: {'fault' if has_fault(found) else 'done'}")
        lines += ["", f"## {name}", "", "```", *lines_of(found), "```"]
    write_atomically(folder / "gpu.md", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return BROKEN if has_fault(session.results) else FINISHED


def has_fault(value: Any) -> bool:
    """True if a result, or one inside it, is a fault."""
    return isinstance(value, dict) and ("fault" in value or any(map(has_fault, value.values())))


def lines_of(section: dict[str, Any]) -> list[str]:
    """A line for each figure, then one for each row; of a row without figures, why."""
    plain = [(k, _cell(v)) for k, v in section.items() if not isinstance(v, dict) and k != "where"]
    rows = {key: v for key, v in section.items() if isinstance(v, dict)}
    why = {key: v.get("skipped") or v.get("fault") for key, v in rows.items()}
    figures = [v for key, v in rows.items() if not why[key]]
    columns = dict.fromkeys(c for v in figures for c, x in v.items() if not isinstance(x, dict))
    cells: list[list[str]] = [["", *columns]] if columns else []
    for key, v in rows.items():
        cells.append([key, *([why[key]] if why[key] else [_cell(v.get(c)) for c in columns])])
    return [*table(plain), *table(cells)]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
