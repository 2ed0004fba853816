"""The cells of a comparison: ordinary runs in OUT/cells, each stage done once for its inputs."""

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from scalepeft.adapters.layout import ABOUT
from scalepeft.analysis.compare.design import Design, Method
from scalepeft.config import changes
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides
from scalepeft.core.files import read_json, read_lines, write_atomically
from scalepeft.core.launch import rank, world_size
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, STOPPED, USER_ERROR, StopFlag, Stopping
from scalepeft.eval import scores
from scalepeft.run.lease import Lease, check_free, claim
from scalepeft.run.stage import Stage, set_aside

WARM = ["scalepeft.train", "scalepeft.eval.evaluate", "transformers.models.llama.modeling_llama"]
LOST = 255  # multiprocessing's exit code of a process whose fork server is gone
SETTLED = ("done", "failed")  # states of a cell that is not run again
Result = dict[str, Any]
"""Of a cell: ``state``, the figures of ``read_result`` if it is done, else ``reason``."""


@dataclass(frozen=True)
class Cell:
    """One run: a method at a rate (None: the one that the sweep chooses) under a seed."""

    method: str
    lr: float | None
    seed: int

    def __str__(self) -> str:
        rate = "chosen lr" if self.lr is None else f"lr={self.lr:g}"
        return f"{self.method} {rate},seed={self.seed}"


def sweep(design: Design) -> list[Cell]:
    """The cells that choose the rates, all methods' lowest first; none where there is one."""
    turns = range(len(design.methods[0].rates)) if design.swept else ()
    return [Cell(m.label, m.rates[i], design.sweep_seed) for i in turns for m in design.methods]


def reported(design: Design) -> list[Cell]:
    """Return the cells whose numbers are reported."""
    return [Cell(m.label, None, seed) for seed in design.seeds for m in design.methods]


def choose(method: Method, swept: dict[float, Result]) -> Result:
    """Return as ``lr`` the rate with the lowest held-out loss in the sweep, with a ``remark`` where
    it lies at the sweep's edge (a rate that failed bounds the sweep as well as one that lost); or
    the ``state`` of the cells that need it, and the ``reason``.
    """
    if len(method.rates) == 1:
        return {"lr": method.rates[0], "remark": ""}
    lacking = [f"lr {lr:g} ({r['reason']})" for lr, r in swept.items() if r["state"] not in SETTLED]
    if lacking:
        return {"state": "missing", "reason": f"the sweep lacks {', '.join(lacking)}"}
    losses = {lr: r["loss"] for lr, r in swept.items() if r["state"] == "done"}
    if not losses:
        return {"state": "failed", "reason": "no rate of the sweep trained"}
    best = min(losses, key=lambda lr: (losses[lr], lr))
    edge = {method.rates[0]: "lowest", method.rates[-1]: "highest"}.get(best)
    return {"lr": best, "remark": f"best rate is the {edge} of the sweep: widen it" if edge else ""}


def cell_inputs(config: cfg.RunConfig, files: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return stage -> what decides its result: settings, and files by content wherever they lie."""
    training = changes.deciding(config, *changes.LEARNED, Decides.LENGTH)
    if "base" not in files:  # not a folder: the name is all there is to know it by
        training |= {"model.path": config.model.path, "model.revision": config.model.revision}
    if "tokenizer" in files:
        training.pop("model.tokenizer", None)
    training["files"] = {name: known for name, known in files.items() if name != "test"}
    scored = changes.deciding(config, *changes.EVALUATED, but=(Decides.FILES,))
    evaluation = {"training": training, **scored, "test": files.get("test")}
    return {"training": training, "evaluation": evaluation}


class Runner:
    """Runs cells in ``OUT/cells`` and finds what is there already."""

    def __init__(self, out: Path, design: Design, stop: StopFlag) -> None:
        self.out, self.design, self.stop = out, design, stop

    def config(self, cell: Cell) -> cfg.RunConfig:
        """Return the config of a cell whose rate is known."""
        assert cell.lr is not None
        config = self.design.config(self.design.method(cell.method), cell.lr, cell.seed)
        folder = self.out / "cells" / cell.method / f"lr={cell.lr:g},seed={cell.seed}"
        return replace(config, run_dir=str(folder))

    def swept(self, method: Method) -> dict[float, Result]:
        """Return rate -> result of the sweep's cell."""
        cells = [c for c in sweep(self.design) if c.method == method.label]
        return {c.lr: self.result(c) for c in cells if c.lr is not None}

    def stages(self, config: cfg.RunConfig) -> list[tuple[Stage, dict[str, Any]]]:
        """Return the stages of a cell with their inputs."""
        scored = self.design.evaluate and config.train.seed in self.design.seeds
        inputs, folder = cell_inputs(config, self.design.files), Path(config.run_dir)
        names = ["training", "evaluation"] if scored else ["training"]
        return [(Stage(folder, name, root=folder), inputs[name]) for name in names]

    def result(self, cell: Cell) -> Result:
        """What a cell has come to under these inputs: ``done``, ``failed`` (it would come again),
        ``broke`` (the next call tries again) or ``missing``.
        """
        method = self.design.method(cell.method)
        if method.refused:
            return {"state": "failed", "reason": method.refused}
        if cell.lr is None:
            choice = choose(method, self.swept(method))
            if "lr" not in choice:
                return choice
            cell = replace(cell, lr=choice["lr"])
        config = self.config(cell)
        result: Result = {"state": "done", "lr": cell.lr, "wall": 0.0}
        for stage, inputs in self.stages(config):
            if not stage.is_done(inputs):
                note = stage.begun() if stage.is_begun(inputs) else {}
                if note.get("state") != "broke" and note.get("config") != cfg.dump(config):
                    note = {"state": "missing", "reason": "not run yet"}
                return {"lr": cell.lr, "state": note["state"], "reason": note["reason"]}
            manifest = stage.done()
            result |= manifest["result"]
            result["wall"] += manifest["seconds"]
        return result

    def run(self, cell: Cell) -> Result:
        """Run a cell if it is missing or broke. Raises UserError: it has no rate, or is in use."""
        self.stop.check()
        result = self.result(cell)
        if result["state"] in SETTLED:
            return result
        if "lr" not in result:
            fix = "no rate is chosen without it: run its cells first"
            raise UserError(f"{cell}: {result['reason']}; {fix}")
        config = self.config(replace(cell, lr=result["lr"]))
        all(self._run_stage(stage, inputs, config) for stage, inputs in self.stages(config))
        result = self.result(cell)
        changed = {"state": "broke", "reason": "its files have changed"}
        return result if result["state"] != "missing" else result | changed

    def _run_stage(self, stage: Stage, inputs: dict[str, Any], config: cfg.RunConfig) -> bool:
        """Do what is not done; True if done. Other inputs' runs are set aside, by rank 0 alone."""
        if stage.is_done(inputs):
            return True
        if not rank():
            known, folder = stage.is_begun(inputs), stage.root
            check_free(folder)
            if stage.name == "training" and not known and (folder / "config.yaml").exists():
                changed = stage.changes(inputs) or "of an older version, or changed by hand"
                kept = set_aside(folder.parent, [folder.name])
                say(f"{folder}: was run with other inputs ({changed}): kept in {kept}, run again")
            if not known or "state" in stage.begun():
                stage.begin(inputs)
        started = time.time()
        state, reason = self._execute(stage.name, config)
        while rank() and not stage.is_done(inputs) and "state" not in stage.begun():
            self.stop.check()
            time.sleep(0.2)  # what rank 0 records goes for all, else they would part here
        if rank():
            return stage.is_done(inputs)
        result, outputs = read_result(config, stage.name) if state == "done" else ({}, [])
        if result.get("loss", 0.0) is None:
            state, reason = "failed", "diverged: held-out loss is not finite"
        if state == "done":
            stage.finish(inputs, outputs, started, result=result)
        else:  # under another config a failure is tried again: it may come from any setting
            stage.note(state=state, reason=reason, config=cfg.dump(config))
        return state == "done"

    def _execute(self, name: str, config: cfg.RunConfig) -> tuple[str, str]:
        """Train or evaluate in a child process; return (state, reason)."""
        folder, text, lease = Path(config.run_dir), cfg.dump(config), None
        folder.mkdir(parents=True, exist_ok=True)
        if name == "training":
            file = self.out / "configs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)  # every rank the same
            # What differs from a run that was begun is harmless: the inputs were compared.
            command = ["train", str(file), "--resume-with-changes"]
        else:  # the run may be older than what its evaluation may change
            allowed, values = changes.for_evaluation(), changes.flatten(cfg.to_dict(config))
            kept = [(key, value) for key, value in values if changes.matches_key(key, allowed)]
            words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in kept]
            command = ["evaluate", str(folder), *words]
            if not rank():  # training takes the lease itself; two evaluations would mix their rows
                lease = Lease(folder, claim(folder))
        log = folder / ("log.txt" if not rank() else f"log-{rank()}.txt")
        start = log.stat().st_size if log.is_file() else 0
        try:
            code = run_child(command, log, self.stop)
        finally:
            if lease:
                lease.release()
        if code == USER_ERROR:
            check_free(folder)  # another start was faster: no failure of the cell
        return ("done", "") if code == FINISHED else failure_reason(code, log, start)


def run_child(arguments: list[str], log: Path, stop: StopFlag) -> int:
    """The exit code of ``scalepeft ARGUMENTS``. Raises Stopping: it was told to stop."""
    processes, main, forwarded = _processes(), sys.modules["__main__"], False
    ended, held = processes.Pipe(duplex=False)  # open as long as it lives, its server or not
    process = processes.Process(target=_child, args=(arguments, log, held))
    sys.modules["__main__"] = ModuleType("__main__")  # a script's own would be run there again
    process.start()
    sys.modules["__main__"] = main
    held.close()
    while process.exitcode in (None, LOST) and not ended.poll(0.1):
        if stop.signal is not None and not forwarded:
            with suppress(ProcessLookupError):
                os.kill(process.pid, stop.signal)
            forwarded = True
    process.join()
    if process.exitcode == STOPPED or (forwarded and process.exitcode != FINISHED):
        raise Stopping
    return int(process.exitcode)


@cache
def _processes() -> Any:
    """New interpreters; on a CPU forks of one with ``WARM``: OpenBLAS ends its threads for them."""
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    warm = world_size() == 1 and not torch.cuda.is_available()
    processes = multiprocessing.get_context("forkserver" if warm else "spawn")
    processes.set_forkserver_preload(WARM)
    return processes


def _child(arguments: list[str], log: Path, _held: Connection) -> None:
    """``python -m scalepeft ARGUMENTS``, which prints into ``log``."""
    os.setsid()  # Ctrl-C reaches it once, through us
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv[1:] = arguments
    runpy.run_module("scalepeft", run_name="__main__", alter_sys=True)


def failure_reason(code: int, log: Path, start: int) -> tuple[str, str]:
    """(state, reason) of a child that ended so and wrote ``log`` from ``start`` on."""
    if code < 0:
        more = " (out of memory?)" if -code == signal.SIGKILL else ""
        return "broke", f"killed by {signal.Signals(-code).name}{more}"
    text = log.read_bytes()[start:].decode(errors="replace").strip()
    errors = re.findall("(scalepeft: error|FloatingPointError): (.*)", text)
    for kind, reason in reversed(errors):
        if kind == "FloatingPointError":
            return "failed", f"diverged: {reason}"
        if code == USER_ERROR:
            return "failed", reason
    last = text.splitlines()[-1].strip() if text else "printed nothing"
    return "broke", f"exit code {code}: {last}"[:300]


def read_result(config: cfg.RunConfig, name: str) -> tuple[dict[str, Any], list[Path]]:
    """The figures of a finished stage, and the files that they are from: of a training the held-out
    ``loss`` after the last step (None: not finite), ``seconds`` of its steps, ``peak_memory`` in
    bytes, of ``cuda`` or ``resident``, sha256 of its adapter; of an evaluation its ``metric``.
    """
    folder = Path(config.run_dir)
    if name == "evaluation":
        file = folder / "eval" / config.data.name / "scores.json"
        headline, metric = scores.first(scores.read(file))
        return {"metric": headline, "score": metric["value"], "share": metric["share"]}, [file]
    files = [folder / "metrics.jsonl", folder / "validation.jsonl"]
    steps = list(read_lines(files[0], "step", "seconds", "tokens_per_second"))
    held_out = list(read_lines(files[1], "step", "loss"))
    events = list(read_lines(folder / "events.jsonl", "event"))
    start = next(e for e in reversed(events) if e["event"] == "start")
    cuda = [e["peak_memory"] for e in events if e.get("peak_memory")]
    resident = [e["peak_resident"] for e in events if e.get("peak_resident")]
    seconds = sum(row["seconds"] for row in steps)
    last = held_out[-1] if held_out and held_out[-1]["step"] == steps[-1]["step"] else {}
    result = {
        "loss": last.get("loss"),
        "rows": last.get("rows"),
        "parameters": start["parameters"],
        "device": start["per_rank"][0]["device"],
        "ranks": start["world_size"],
        "versions": start["versions"],
        "steps": steps[-1]["step"],
        "seconds": seconds,
        "tokens_per_second": sum(r["tokens_per_second"] * r["seconds"] for r in steps) / seconds,
        "peak_memory": max(cuda or resident, default=None),
        "memory": "cuda" if cuda else "resident",
        "digest": read_json(folder / "adapter" / ABOUT).get("sha256"),
    }
    return result, files
