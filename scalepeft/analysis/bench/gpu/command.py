"""``scalepeft bench gpu``: the sections in the order of their worth; one that fails is a result."""

import math
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalepeft.analysis.bench.gpu import exactness, running, training
from scalepeft.analysis.bench.gpu.session import Session
from scalepeft.core import errors
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.core.text import table
from scalepeft.run.provenance import commit, device_name, versions


def environment(session: Session) -> dict[str, Any]:
    """Versions, commit, device and driver."""
    libraries = ("torch", "transformers", "peft", "pydantic", "bitsandbytes", "deepspeed", "triton")
    found: dict[str, Any] = {"device": device_name(session.device), "commit": commit()}
    found |= {"CUDA": torch.version.cuda, "cores": os.cpu_count(), **versions(*libraries)}
    if session.cuda:
        query = "--query-gpu=driver_version,memory.total,clocks.sm,power.draw"
        words = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        found |= {"NCCL": str(torch.cuda.nccl.version()), "nvidia-smi": done.stdout.strip()}
    return found


SECTIONS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "env": environment, "quant": exactness.storage, "exactness": exactness.methods,
    "training": training.training, "plan": training.plan, "running": running.resumed,
    "collectives": running.one_rank, "generation": training.generation,
}  # fmt: skip


def run(out: str | None, seconds: float | None, only: str | None, tiny: bool | None) -> int:
    """Runs the sections; ``gpu.json`` is written after each, ``gpu.md`` at the end, and printed.

    Args:
        out: folder of both files, by default ``gpu-bench``.
        seconds: for all sections together, by default 500.
        only: names of sections by comma, by default all.
        tiny: small shapes, for a CPU too.

    Returns:
        The exit code: 1 if a section, or a row of one, is a fault.

    Raises:
        UserError: an option that cannot be used.
    """
    names = [name.strip() for name in (only or ",".join(SECTIONS)).split(",")]
    for name in names:
        if name not in SECTIONS:
            raise errors.unknown("section (--only)", name, SECTIONS)
    if not tiny and not torch.cuda.is_available():
        raise UserError("bench gpu: torch sees no CUDA device here; add --tiny to try it")
    if seconds is not None and not 0 < seconds < math.inf:
        raise UserError(f"--seconds {seconds}: expected a number above 0, such as 500")
    folder = Path(out or "gpu-bench").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a folder to write to") from None
    session = Session(folder, 500 if seconds is None else seconds, bool(tiny))
    warnings.simplefilter("ignore")
    for name in (name for name in SECTIONS if name in names):
        session.keep(name, session.attempt(SECTIONS[name]))
        say(f"bench gpu: {name}: {'fault' if has_fault(session.results[name]) else 'done'}")
    lines = [f"# scalepeft bench gpu{' --tiny' * session.tiny}: {device_name(session.device)}"]
    for name, value in session.results.items():
        lines += ["", f"## {name}", "", "```", *_table(value), "```"]
    write_atomically(folder / "gpu.md", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return BROKEN if has_fault(session.results) else FINISHED


def has_fault(value: Any) -> bool:
    """True if a result, or one inside it, is a fault."""
    return isinstance(value, dict) and ("fault" in value or any(map(has_fault, value.values())))


def _table(value: dict[str, Any]) -> list[str]:
    """A line for each entry; of one that is a fault or was passed over, why. Lists are left out."""
    rows, plain = {}, []
    for key, v in value.items():
        if isinstance(v, dict) and not {"fault", "skipped"} & v.keys():
            rows[key] = v
        elif key != "where":
            plain.append((key, _cell(next(iter(v.values())) if isinstance(v, dict) else v)))
    columns = [c for v in rows.values() for c, x in v.items() if not isinstance(x, dict)]
    columns = list(dict.fromkeys(columns))
    cells = [[key, *(_cell(v.get(c)) for c in columns)] for key, v in rows.items()]
    return [*table(plain), *(table([["", *columns], *cells]) if cells else [])]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
