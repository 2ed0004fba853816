"""How a run stands."""

import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

from scalepeft.core.files import read_lines
from scalepeft.core.slurm import ACTIVE, ask_all, state_word
from scalepeft.core.text import duration
from scalepeft.run.checkpoint import steps_of
from scalepeft.run.goodput import starts_of

RECENT = 20  # steps that speed and ETA are taken from


def status(folder: Path) -> dict[str, Any]:
    """How a run stands: ``state`` is Slurm's word and reason, or of the last event; speeds are
    medians of the last steps; ``lost_seconds`` went to restarts; ``eta_seconds`` is without more.
    """
    starts, last = starts_of(folder)
    keys = ("step", "seconds", "tokens_per_second")
    rows = read_lines(folder / "metrics.jsonl", *keys, newest_first=True)
    recent = list(islice(rows, RECENT))
    step = recent[0]["step"] if recent else 0
    total = starts[-1].get("steps") if starts else None
    seconds, speed = (
        statistics.median(row[key] for row in recent) if recent else None
        for key in ("seconds", "tokens_per_second")
    )
    job = _job(folder, starts)
    slurm = next(iter(ask_all(job) if job else ()), {})
    losses = ("waited", "startup", "load", "recomputed")
    state = _state(slurm, last, recent[:1], seconds)
    coming = state.split()[0].rstrip(",") in (*ACTIVE, "running")
    return {
        "run": str(folder),
        "state": state,
        "job": job,
        "nodes": slurm.get("NodeList"),
        "restarts": max(0, len(starts) - 1),
        "step": step,
        "steps": total,
        "saved": max(steps_of(folder), default=0),
        "tokens_per_second": speed,
        "step_seconds": seconds,
        "lost_seconds": sum(e.get(key, 0.0) for e in starts[1:] for key in losses),
        "stages": _stages(folder),
        "eta_seconds": (total - step) * seconds if total and seconds and coming else None,
    }


def _stages(folder: Path) -> dict[str, str]:
    """Stage of a pipeline -> done or begun, in the order of time; empty without one."""
    files = sorted((folder / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime)
    found = (f.stem.partition(".") for f in files if not f.stem.startswith("holder"))
    return {name: end or "done" for name, _, end in found if end in ("", "begun")}


def job_of(folder: Path) -> tuple[str, str] | None:
    """The first active Slurm job of a run, its last start's or a newest submission's, and state."""
    started = _job(folder, starts_of(folder)[0])
    for job in dict.fromkeys([started, *newest_jobs(folder).values()]):
        for task in ask_all(job) if job else ():
            if task["JobState"] in ACTIVE:
                return str(job), task["JobState"]
    return None


def newest_jobs(folder: Path) -> dict[str, str]:
    """Step of the newest submission -> its job, in the order in which they were queued."""
    files = sorted(folder.glob("submissions/*/*.job"), key=lambda p: p.stat().st_mtime_ns)
    own = [f for f in files if f.parent == files[-1].parent]
    return {f.stem: f.read_text().strip() for f in own}


def _job(folder: Path, starts: list[dict[str, Any]]) -> str | None:
    """The newest Slurm job that was to train this run, as Slurm calls it."""
    files = {p.stat().st_mtime: p for p in folder.glob("submissions/*/train.job")}
    submitted = max(files, default=0.0)
    if starts and "job" in starts[-1] and submitted < starts[-1]["time"]:
        return str(starts[-1]["job"])
    return files[submitted].read_text().strip() if files else None


def _state(
    slurm: dict[str, str],
    event: dict[str, Any],
    rows: list[dict[str, Any]],
    step_seconds: float | None,
) -> str:
    last = max((r["time"] for r in (event, *rows) if "time" in r), default=None)
    ago = duration(max(0.0, time.time() - last)) if last else None
    if "JobState" in slurm:
        word = state_word(slurm)
        return f"{word}, last sign of life {ago} ago" if ago and word == "RUNNING" else word
    if not event:
        return "not started"
    if event["event"] in ("finished", "stopped"):
        return f"{event['event']} {ago} ago"
    alive = last is not None and time.time() - last < max(60.0, 5 * (step_seconds or 0))
    return f"running, last sign of life {ago} ago" if alive else f"no sign of life for {ago}"
