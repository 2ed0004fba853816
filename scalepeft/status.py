"""``launch/status``: how a run stands, from Slurm and from what the run has written."""

import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scalepeft.checkpoint import RunFolder
from scalepeft.goodput import duration
from scalepeft.lookup import UserError, read_mapping
from scalepeft.records import read_lines

ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "CONFIGURING")
RECENT = 20  # steps that speed and ETA are taken from


def run(run_dirs: list[str], as_json: bool) -> None:
    """Prints the state of each run; a folder of a sweep stands for the runs in it.

    Raises:
        UserError: a folder that holds neither a run nor a submission, once the others are shown.
    """
    found, wrong = [], []
    for name in run_dirs:
        runs = _runs(Path(name))
        found += [status(folder) for folder in runs]
        wrong += [] if runs else [name]
    if as_json:
        print(json.dumps(found, indent=1))
    elif found:
        print("\n\n".join("\n".join(_lines(one)) for one in found))
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: no events.jsonl and no submission in it; name the run_dir of a"
            " training"
        )


def _runs(folder: Path) -> list[Path]:
    """The run, or the runs of a sweep, those that have not begun yet too."""
    if (folder / "events.jsonl").is_file():
        return [folder]
    found = {p.parent for p in folder.glob("*/events.jsonl")}
    for file in folder.glob("submissions/*/configs/*.yaml"):
        run_dir = Path(read_mapping(file, yaml.safe_load, "submit again").get("run_dir", "")).name
        found.add(folder if run_dir == folder.name else folder / run_dir)
    return sorted(found)


def status(folder: Path) -> dict[str, Any]:
    """How a run stands.

    Returns:
        ``state`` (Slurm's word and reason, or what the run's last event says), ``job``, ``nodes``,
        ``restarts``, ``step``, ``steps``, ``saved``, ``tokens_per_second`` and ``step_seconds``
        (medians of the last steps), ``stages`` of a pipeline, ``lost_seconds`` (restarts: waiting,
        start-up, load, recomputed steps), ``eta_seconds`` (without further restarts; None where
        nothing is to come or known).
    """
    events = read_lines(folder / "events.jsonl", "event", "time")
    rows = read_lines(folder / "metrics.jsonl", "step", "seconds", "tokens_per_second")
    starts = [e for e in events if e["event"] == "start"]
    recent = rows[-RECENT:]
    step = rows[-1]["step"] if rows else 0
    total = starts[-1].get("steps") if starts else None
    seconds = statistics.median(r["seconds"] for r in recent) if recent else None
    job = _job(folder, starts)
    slurm = _ask_slurm(job) if job else {}
    lost = sum(
        e.get(k, 0.0) for e in starts[1:] for k in ("waited", "startup", "load", "recomputed")
    )
    state = _state(slurm, events, rows, seconds)
    coming = state.split()[0].rstrip(",") in (*ACTIVE, "running")
    return {
        "run": str(folder),
        "state": state,
        "job": job,
        "nodes": slurm.get("NodeList"),
        "restarts": max(0, len(starts) - 1),
        "step": step,
        "steps": total,
        "saved": max(RunFolder.steps_in(folder / "checkpoints"), default=0),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in recent)
        if recent
        else None,
        "step_seconds": seconds,
        "lost_seconds": lost,
        "stages": _stages(folder),
        "eta_seconds": (total - step) * seconds if total and seconds and coming else None,
    }


def _stages(folder: Path) -> dict[str, str]:
    """Stage of a pipeline -> done or begun, in the order of time; empty without one."""
    files = sorted((folder / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime)
    words = {"begun": "begun", "": "done"}
    found = ((f.stem.partition(".")) for f in files if f.stem != "holder")
    return {name: words[end] for name, _, end in found if end in words}


def job_of(folder: Path) -> tuple[str, str] | None:
    """The newest Slurm job of a run and its state, where a Slurm here knows it."""
    events = read_lines(folder / "events.jsonl", "event", "time")
    job = _job(folder, [e for e in events if e["event"] == "start"])
    state = _ask_slurm(job).get("JobState") if job else None
    return (job, state) if job and state else None


def _job(folder: Path, starts: list[dict[str, Any]]) -> str | None:
    """The newest Slurm job that was to train this run, as Slurm calls it."""
    files = sorted(folder.glob("submissions/*/train.job"), key=lambda p: p.stat().st_mtime)
    submitted = files[-1] if files else None
    if starts and "job" in starts[-1]:
        newest = starts[-1]["time"]
        if submitted is None or submitted.stat().st_mtime < newest:
            return str(starts[-1]["job"])
    return submitted.read_text().strip() if submitted else None


def _ask_slurm(job: str) -> dict[str, str]:
    """JobState, Reason, Restarts, NodeList of a job; empty where no Slurm knows it."""
    if shutil.which("scontrol"):
        text = _output("scontrol", "-o", "show", "job", job)
        if text:
            return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0]))
    if shutil.which("sacct"):  # scontrol forgets a job minutes after its end
        text = _output("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList")
        if text:
            state, _, nodes = text.strip().splitlines()[-1].partition("|")
            return {"JobState": state.split()[0], "NodeList": nodes}
    return {}


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def _state(
    slurm: dict[str, str],
    events: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    step_seconds: float | None,
) -> str:
    last = max((r["time"] for r in (*events[-1:], *rows[-1:]) if "time" in r), default=None)
    ago = duration(max(0.0, time.time() - last)) if last else None
    if "JobState" in slurm:
        reason = slurm.get("Reason", "None")
        word = slurm["JobState"] + (f" ({reason})" if reason not in ("None", "") else "")
        return f"{word}, last sign of life {ago} ago" if ago and word == "RUNNING" else word
    if not events:
        return "not started"
    if events[-1]["event"] in ("finished", "stopped"):
        return f"{events[-1]['event']} {ago} ago"
    alive = last is not None and time.time() - last < max(60.0, 5 * (step_seconds or 0))
    return f"running, last sign of life {ago} ago" if alive else f"no sign of life for {ago}"


def _lines(one: dict[str, Any]) -> Iterator[str]:
    yield f"run {one['run']}"
    job = f" (Slurm job {one['job']}" + (f" on {one['nodes']}" if one["nodes"] else "")
    yield f"  state     {one['state']}{job + ')' if one['job'] else ''}"
    of = f" of {one['steps']:,} ({one['step'] / one['steps']:.1%})" if one["steps"] else ""
    yield f"  step      {one['step']:,}{of}, saved at step {one['saved']:,}"
    if one["step_seconds"]:
        tokens, seconds = one["tokens_per_second"], one["step_seconds"]
        yield f"  speed     {tokens:,.0f} tok/s, {seconds:.2f} s a step"
    if one["stages"]:
        yield f"  stages    {', '.join(f'{name} {word}' for name, word in one['stages'].items())}"
    yield f"  restarts  {one['restarts']}, time lost to them {duration(one['lost_seconds'])}"
    if one["eta_seconds"] is not None:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + one["eta_seconds"]))
        running = "RUNNING" in one["state"] or "running" in one["state"]
        when = f", {end}" if running else " once it runs"
        yield f"  ETA       {duration(one['eta_seconds'])}{when}, without further restarts"
