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
from scalepeft.core.slurm import ask_all, state_word
from scalepeft.core.text import duration
from scalepeft.run.status import newest_jobs, status

COMPARISON = "design.json"  # what a comparison keeps in its folder


def run(run_dirs: list[str], as_json: bool) -> None:
    """Prints the state of each run, of those of a sweep, and of a comparison's cells. Raises
    UserError, once the others are shown: a folder that holds neither a run nor a submission.
    """
    runs = {name: _runs(Path(name)) for name in run_dirs}
    stands = [
        comparison(folder) if (folder / COMPARISON).is_file() else status(folder)
        for folders in runs.values()
        for folder in folders
    ]
    if as_json:
        print(json.dumps(stands, indent=1))
    elif stands:
        print("\n\n".join("\n".join(_lines(one)) for one in stands))
    if wrong := [name for name, folders in runs.items() if not folders]:
        fix = "name the run_dir of a training or a comparison"
        raise UserError(f"{', '.join(wrong)}: no events.jsonl and no submission in it; {fix}")


def _runs(folder: Path) -> list[Path]:
    """The run or comparison, or the runs of a sweep, those that have not begun yet too."""
    if any((folder / name).is_file() for name in ("events.jsonl", COMPARISON)):
        return [folder]
    run_dirs = {p.parent for p in folder.glob("*/events.jsonl")}
    for file in folder.glob("submissions/*/configs/*.yaml"):
        name = Path(read_mapping(file, yaml.safe_load, "submit again").get("run_dir", "")).name
        run_dirs.add(folder if name == folder.name else folder / name)
    return sorted(run_dirs)


def comparison(folder: Path) -> dict[str, Any]:
    """In which states how many of a comparison's ``cells`` are, and of each step of the newest
    submission its Slurm ``job`` and how many of its tasks are in which of ``states``.
    """
    from scalepeft.analysis.compare.cells import Runner, reported, sweep
    from scalepeft.analysis.compare.design import Design
    from scalepeft.core.preemption import StopFlag

    runner = Runner(folder, Design.read(folder / COMPARISON), StopFlag())
    cells = [*sweep(runner.design), *reported(runner.design)]
    states = Counter(runner.result(cell)["state"] for cell in cells)
    begun = {file.parent for file in folder.glob("cells/*/*/*.begun.json")}
    stands = (status(run)["state"] for run in begun if (run / "events.jsonl").is_file())
    alive = sum(state.lower().startswith("running") for state in stands)
    states["running"] = min(alive, states["missing"])
    states["left"] = states["missing"] - states["running"]
    jobs = {
        step: {"job": job, "states": dict(Counter(map(state_word, ask_all(job))))}
        for step, job in newest_jobs(folder).items()
    }
    count = {state: states[state] for state in ("done", "running", "failed", "broke", "left")}
    return {"run": str(folder), "cells": {**count, "all": len(cells)}, "jobs": jobs}


def _lines(one: dict[str, Any]) -> list[str]:
    kind, rows = ("comparison", _of_cells) if "cells" in one else ("run", _of_run)
    return [f"{kind} {one['run']}", *(f"  {label:9} {text}" for label, text in rows(one))]


def _of_cells(one: dict[str, Any]) -> Iterator[tuple[str, str]]:
    count = dict(one["cells"])
    total = count.pop("all")
    yield "cells", ", ".join(f"{n} {state}" for state, n in count.items() if n) + f" of {total}"
    for step, job in one["jobs"].items():
        states = ", ".join(f"{n} {state}" for state, n in job["states"].items())
        yield step, f"Slurm job {job['job']}: {states or 'not known to a Slurm here'}"


def _of_run(one: dict[str, Any]) -> Iterator[tuple[str, str]]:
    nodes = f" on {one['nodes']}" if one["nodes"] else ""
    yield "state", one["state"] + (f" (Slurm job {one['job']}{nodes})" if one["job"] else "")
    of = f" of {one['steps']:,} ({one['step'] / one['steps']:.1%})" if one["steps"] else ""
    yield "step", f"{one['step']:,}{of}, saved at step {one['saved']:,}"
    if one["step_seconds"]:
        yield "speed", f"{one['tokens_per_second']:,.0f} tok/s, {one['step_seconds']:.2f} s a step"
    if one["stages"]:
        yield "stages", ", ".join(f"{name} {word}" for name, word in one["stages"].items())
    yield "restarts", f"{one['restarts']}, time lost to them {duration(one['lost_seconds'])}"
    if (eta := one["eta_seconds"]) is not None:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + eta))
        when = f", {end}" if one["state"].lower().startswith("running") else " once it runs"
        yield "ETA", f"{duration(eta)}{when}, without further restarts"
