"""``launch/status``: how a run stands, from Slurm and from what the run has written."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping
from scalepeft.core.slurm import _ask_all, _word
from scalepeft.core.text import duration
from scalepeft.run.status import _newest_jobs, status

COMPARISON = "design.json"  # what a comparison keeps in its folder


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


def comparison(folder: Path) -> dict[str, Any]:
    """How a comparison stands.

    Returns:
        ``cells``: how many are ``done``, ``running`` (their trainer has given a sign of life),
        ``failed``, ``broke`` (tried again by the next call), ``left`` (neither), of ``all``.
        ``jobs``: step of the newest submission -> its Slurm ``job``, and in ``states`` how many of
        its tasks are in which.
    """
    from scalepeft.analysis.compare.cells import Runner, reported, sweep
    from scalepeft.analysis.compare.design import Design
    from scalepeft.core.preemption import StopFlag

    runner = Runner(folder, Design.read(folder / COMPARISON), StopFlag())
    cells = [*sweep(runner.design), *reported(runner.design)]
    count = dict.fromkeys(("done", "running", "failed", "broke", "left"), 0)
    going = _begun(folder)
    for cell in cells:
        state = runner.result(cell)["state"]
        count["left" if state == "missing" else state] += 1
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
    for run in {file.parent for file in folder.glob("cells/*/*/*.begun.json")}:
        if (run / "events.jsonl").is_file():
            found += status(run)["state"].lower().startswith("running")
    return found


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
