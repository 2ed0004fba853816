"""``launch/status``: how a run stands, from Slurm and from what the run has written."""

import json
import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scalepeft.checkpoint import RunFolder
from scalepeft.goodput import duration
from scalepeft.lookup import UserError, read_mapping
from scalepeft.records import read_lines

ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "CONFIGURING")
COMPARISON = "design.json"  # what a comparison keeps in its folder
RECENT = 20  # steps that speed and ETA are taken from


def run(run_dirs: list[str], as_json: bool) -> None:
    """Prints the state of each run; a folder of a sweep stands for the runs in it, one of a
    comparison for its cells.

    Raises:
        UserError: a folder that holds neither a run nor a submission, once the others are shown.
    """
    found, wrong = [], []
    for name in run_dirs:
        compared = (Path(name) / COMPARISON).is_file()
        runs = [Path(name)] if compared else _runs(Path(name))
        found += [comparison(folder) if compared else status(folder) for folder in runs]
        wrong += [] if runs else [name]
    if as_json:
        print(json.dumps(found, indent=1))
    elif found:
        print("\n\n".join("\n".join(_lines(one)) for one in found))
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: no events.jsonl and no submission in it; name the run_dir of a"
            " training or a comparison"
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


def comparison(folder: Path) -> dict[str, Any]:
    """How a comparison stands.

    Returns:
        ``cells``: how many are ``done``, ``running`` (their trainer has given a sign of life),
        ``failed``, ``broke`` (tried again by the next call), ``left`` (neither), of ``all``.
        ``jobs``: step of the newest submission -> its Slurm ``job``, and in ``states`` how many of
        its tasks are in which.
    """
    from scalepeft.compare.cells import Runner, reported, sweep
    from scalepeft.compare.design import Design
    from scalepeft.preemption import StopFlag

    runner = Runner(folder, Design.read(folder / COMPARISON), StopFlag())
    cells = [*sweep(runner.design), *reported(runner.design)]
    count = dict.fromkeys(("done", "running", "failed", "broke", "left"), 0)
    going = _begun(folder)
    for cell in cells:
        held = runner.result(cell)
        count[held["state"] if held else "left"] += 1
    count["running"] = min(going, count["left"])
    count["left"] -= count["running"]
    jobs = {}
    for step, job in _newest_jobs(folder).items():
        states = Counter(_word(task) for task in _ask_all(job))
        jobs[step] = {"job": job, "states": dict(states)}
    return {"run": str(folder), "cells": {**count, "all": len(cells)}, "jobs": jobs}


def _begun(folder: Path) -> int:
    """Cells that are begun and whose trainer has given a sign of life."""
    found = 0
    for file in folder.glob("cells/*/*/cell.json"):
        held = read_mapping(file, json.loads, f"remove {file.parent}: it is run again")
        if held.get("state") == "begun":
            found += status(file.parent)["state"].lower().startswith("running")
    return found


def _word(task: dict[str, str]) -> str:
    """Slurm's state of a job with its reason."""
    reason = task.get("Reason", "None")
    return task["JobState"] + (f" ({reason})" if reason not in ("None", "") else "")


def job_of(folder: Path) -> tuple[str, str] | None:
    """The first Slurm job that has still to do with a run, with its state: any step of the newest
    submission, or the job that the run was last started in; None where all have ended.
    """
    events = read_lines(folder / "events.jsonl", "event", "time")
    started = _job(folder, [e for e in events if e["event"] == "start"])
    for job in dict.fromkeys([started, *_newest_jobs(folder).values()]):
        for task in _ask_all(job) if job else ():
            if task["JobState"] in ACTIVE:
                return str(job), task["JobState"]
    return None


def _newest_jobs(folder: Path) -> dict[str, str]:
    """Step of the newest submission -> its job, in the order in which they were queued."""
    files = sorted(folder.glob("submissions/*/*.job"), key=lambda p: p.stat().st_mtime_ns)
    own = [f for f in files if f.parent == files[-1].parent]
    return {f.stem: f.read_text().strip() for f in own}


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
    return next(iter(_ask_all(job)), {})


def _ask_all(job: str) -> list[dict[str, str]]:
    """The same of each task of an array; of another job the one."""
    if shutil.which("scontrol"):
        text = _output("scontrol", "-o", "show", "job", job)
        if found := [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines()]:
            return [task for task in found if "JobState" in task]
    if shutil.which("sacct"):  # scontrol forgets a job minutes after its end
        text = _output("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList")
        rows = [line.partition("|") for line in reversed(text.strip().splitlines())]
        return [{"JobState": state.split()[0], "NodeList": nodes} for state, _, nodes in rows]
    return []


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
        word = _word(slurm)
        return f"{word}, last sign of life {ago} ago" if ago and word == "RUNNING" else word
    if not events:
        return "not started"
    if events[-1]["event"] in ("finished", "stopped"):
        return f"{events[-1]['event']} {ago} ago"
    alive = last is not None and time.time() - last < max(60.0, 5 * (step_seconds or 0))
    return f"running, last sign of life {ago} ago" if alive else f"no sign of life for {ago}"


def _comparison_lines(one: dict[str, Any]) -> Iterator[str]:
    yield f"comparison {one['run']}"
    count = dict(one["cells"])
    total = count.pop("all")
    said = ", ".join(f"{n} {state}" for state, n in count.items() if n)
    yield f"  cells     {said} of {total}"
    for step, job in one["jobs"].items():
        states = ", ".join(f"{n} {state}" for state, n in job["states"].items())
        yield f"  {step:9} Slurm job {job['job']}: {states or 'not known to a Slurm here'}"


def _lines(one: dict[str, Any]) -> Iterator[str]:
    if "cells" in one:
        yield from _comparison_lines(one)
        return
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
