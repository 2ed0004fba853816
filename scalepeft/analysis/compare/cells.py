"""The cells of a comparison: each an ordinary run of its own, by the ordinary trainer, in a process
of its own.

``OUT/cells/METHOD/lr=R,seed=S`` is the run folder. ``cell.json`` in it is written last and holds
a hash of what decides the training and one of what decides the evaluation; a cell for which both
still fit is never run again, one for which the second does not is evaluated again and not trained.
A cell that was killed goes on at the trainer's own checkpoint.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.analysis.compare import keys
from scalepeft.analysis.compare.design import AT_THE_END, CALIBRATION_STEPS, Design, Method
from scalepeft.analysis.compare.worker import child, lock, measured, why
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_lines, write_atomically
from scalepeft.core.launch import rank, world_size
from scalepeft.core.log import say
from scalepeft.core.preemption import FINISHED, USER_ERROR, StopFlag, Stopping
from scalepeft.core.slurm import slurm_start
from scalepeft.run.lease import check_free

FINAL = ("done", "failed")
"""States that stay: ``failed`` is a mistake or a divergence, which would come again. ``broke`` (a
crash, no memory) is tried again by the next call."""


@dataclass(frozen=True)
class Cell:
    """One run: a method at a rate under a seed; ``lr`` None stands for the rate that the sweep
    chooses.
    """

    index: int
    method: str
    lr: float | None
    seed: int

    def __str__(self) -> str:
        rate = "chosen lr" if self.lr is None else f"lr={self.lr:g}"
        return f"{self.method} {rate},seed={self.seed}"


def sweep(design: Design) -> list[Cell]:
    """The cells that choose the rates, the lowest rate of all methods first; none where there is
    one rate.
    """
    labels = [m.label for m in design.methods]
    turns = range(len(design.methods[0].rates)) if design.swept else ()
    pairs = [(label, turn) for turn in turns for label in labels]
    return [
        Cell(i, label, design.method(label).rates[turn], design.sweep_seed)
        for i, (label, turn) in enumerate(pairs)
    ]


def reported(design: Design) -> list[Cell]:
    """The cells whose numbers are reported, counted on from the sweep's."""
    first = len(sweep(design))
    pairs = [(seed, m.label) for seed in design.seeds for m in design.methods]
    return [Cell(first + i, label, None, seed) for i, (seed, label) in enumerate(pairs)]


def lacking(swept: dict[float, dict[str, Any] | None]) -> dict[float, str]:
    """Rate -> why the sweep says nothing of it: it was not run, or its run broke, which tells
    nothing of the rate.
    """
    return {
        lr: "not run yet" if result is None else f"broke: {result['reason']}"
        for lr, result in swept.items()
        if result is None or result["state"] == "broke"
    }


def chosen(method: Method, swept: dict[float, dict[str, Any] | None]) -> tuple[float, str] | None:
    """(the rate with the lowest held-out loss in the sweep, where it lies: ``lowest``, ``highest``
    or empty); None where no rate trained, or before all of them were tried. A rate that failed
    bounds the sweep as well as one that lost; one whose run broke was not tried.
    """
    if len(method.rates) == 1:
        return method.rates[0], ""
    if lacking(swept):
        return None
    losses = {lr: r["loss"] for lr, r in swept.items() if r and r["state"] == "done"}
    if not losses:
        return None
    best = min(losses, key=lambda lr: (losses[lr], lr))
    where = {method.rates[0]: "lowest", method.rates[-1]: "highest"}
    return best, where.get(best, "")


class Runner:
    """Runs cells in ``OUT/cells``, and finds what is there already."""

    def __init__(self, out: Path, design: Design, stop: StopFlag) -> None:
        self.out, self.design, self.stop = out, design, stop
        self._said: set[str] = set()

    def poll(self) -> None:
        """Raises Stopping after a signal."""
        if self.stop.signal is not None:
            raise Stopping

    def folder(self, cell: Cell) -> Path:
        """The run folder."""
        assert cell.lr is not None
        return self.out / "cells" / cell.method / f"lr={cell.lr:g},seed={cell.seed}"

    def settled(self, cell: Cell) -> Cell:
        """The cell with its rate, which may be the sweep's to choose.

        Raises:
            UserError: the sweep is not through.
        """
        if cell.lr is not None:
            return cell
        method = self.design.method(cell.method)
        rates = self.swept(method)
        if missing := lacking(rates):
            listed = ", ".join(f"lr {lr:g} ({reason})" for lr, reason in missing.items())
            raise UserError(
                f"--cell {cell.index}: the sweep of {method.label} lacks {listed}; no rate is"
                " chosen without it: run its cells first"
            )
        found = chosen(method, rates)
        return cell if found is None else dataclasses.replace(cell, lr=found[0])

    def swept(self, method: Method) -> dict[float, dict[str, Any] | None]:
        """Rate -> result of the sweep's cell, None where it is missing."""
        cells = [c for c in sweep(self.design) if c.method == method.label]
        return {c.lr: self.result(c) for c in cells if c.lr is not None}

    def config(self, cell: Cell) -> RunConfig:
        """The run's config, with as many steps as the budget gives the method."""
        assert cell.lr is not None
        method = self.design.method(cell.method)
        config = self.design.config(method, cell.lr, cell.seed, self.steps(method))
        return dataclasses.replace(config, run_dir=str(self.folder(cell)))

    def steps(self, method: Method) -> int | None:
        """Steps of a method under ``--budget time``; None where the config's stand."""
        if self.design.budget != "time":
            return None
        measured_by = self.calibrated(method)
        assert measured_by and measured_by["state"] == "done" and self.design.seconds
        return max(1, int(self.design.seconds / measured_by["seconds_a_step"]))

    def calibrated(self, method: Method) -> dict[str, Any] | None:
        """What the short run of ``--budget time`` has measured; None where it is missing."""
        config = self._calibrating(method)
        return self._held_result(config, keys.speed(config, self.design.inputs))

    def _held_result(self, config: RunConfig, hashed: str) -> dict[str, Any] | None:
        """What ``cell.json`` says, if it is of this very training and evaluation."""
        held = _read(Path(config.run_dir))
        if held.get("hash") != hashed or held["state"] == "begun":
            return None
        if held["state"] == "failed":  # it may have come from what decides no result
            return held if held["attempt"] == self._attempt(config) else None
        stale = held.get("evaluation") != self._evaluation(config)
        return None if stale and self._evaluated(config) else held

    def _evaluated(self, config: RunConfig) -> bool:
        return self.design.evaluate and config.train.seed in self.design.seeds

    def _evaluation(self, config: RunConfig) -> str | None:
        known = self.design.inputs
        return keys.evaluation(config, known) if self._evaluated(config) else None

    def _attempt(self, config: RunConfig) -> str:
        return keys.attempt(config, self.design.inputs, self._evaluated(config))

    def _calibration(self, method: Method) -> Path:
        return self.out / "cells" / method.label / "calibration"

    def _calibrating(self, method: Method) -> RunConfig:
        config = self.design.config(
            method, method.rates[0], self.design.sweep_seed, CALIBRATION_STEPS
        )
        # As little beside the steps as can be; what is measured is a step.
        train = dataclasses.replace(config.train, eval_every=AT_THE_END, warmup_steps=0)
        folder = str(self._calibration(method))
        return dataclasses.replace(config, run_dir=folder, train=train)

    def _hash(self, config: RunConfig) -> str:
        return keys.training(config, self.design.inputs)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell has come to under this very config; None where it has not been run."""
        method = self.design.method(cell.method)
        if method.refused:
            return {"state": "failed", "reason": method.refused}
        if cell.lr is None:
            swept = self.swept(method)
            if lacking(swept):
                return None  # nothing is chosen from half a sweep
            found = chosen(method, swept)
            if found is None:
                return {"state": "failed", "reason": "no rate of the sweep trained"}
            cell = dataclasses.replace(cell, lr=found[0])
        if self.design.budget == "time":
            speed = self.calibrated(method)
            if speed is None or speed["state"] != "done":
                return speed
        config = self.config(cell)
        return self._held_result(config, self._hash(config))

    def work(self, cells: list[Cell], done: Callable[[Cell, dict[str, Any]], None]) -> None:
        """Runs the cells that have no result; those that another comparison runs are waited for.
        A cell of the sweep that breaks is tried once more: without it no rate can be chosen.

        Raises:
            Stopping: a signal came; what there was to save is saved.
        """
        waiting = list(cells)
        while waiting:
            busy = []
            for cell in waiting:
                self.poll()
                held = self.result(cell)
                if held is None or held["state"] not in FINAL:
                    held = self._locked(self.settled(cell))
                    # The ranks of a job could not agree on it: one may have failed, one broken.
                    if held and held["state"] == "broke" and self._blocks(cell):
                        say(f"{cell}: broke: {held['reason']}; tried once more")
                        held = self._locked(cell)
                if held is None:
                    busy.append(cell)
                else:
                    done(dataclasses.replace(cell, lr=held.get("lr", cell.lr)), held)
            if len(busy) == len(waiting):
                self._say_once(f"waiting for cells that another comparison runs: {len(busy)}")
                time.sleep(1)
            waiting = busy

    def _blocks(self, cell: Cell) -> bool:
        return cell.lr is not None and self.design.swept and world_size() == 1

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say(text)

    def forget(self, cells: list[Cell]) -> None:
        """Lets cells that failed run again."""
        for cell in cells:
            if cell.lr is not None and self.folder(cell).is_dir():
                about = {"hash": self._hash(self.config(cell)), "state": "begun"}
                write_atomically(self.folder(cell) / "cell.json", json.dumps(about) + "\n")

    def _locked(self, cell: Cell) -> dict[str, Any] | None:
        """Runs a cell; None where another comparison is at it."""
        folder = self.folder(cell)
        if rank():  # the first rank of a job keeps the books
            return self._run(cell, folder)
        with lock(folder.with_name(f".{folder.name}.lock")) as mine:
            if not mine:
                return None
            held = self.result(cell)  # it may just have become ready
            return held if held and held["state"] in FINAL else self._run(cell, folder)

    def _run(self, cell: Cell, folder: Path) -> dict[str, Any]:
        method = self.design.method(cell.method)
        if self.design.budget == "time":
            speed = self.calibrated(method)
            if speed is None or speed["state"] not in FINAL:
                speed = self._calibrate(method)
            if speed["state"] != "done":
                return speed
        config = self.config(cell)
        about = {
            "hash": self._hash(config),
            "method": cell.method,
            "lr": cell.lr,
            "seed": cell.seed,
        }
        held = _read(folder)
        trained = held.get("hash") == about["hash"] and held.get("trained", False)
        begun, wall = time.time(), held.get("wall", 0.0) if trained else 0.0
        result = {**about, "trained": trained, **self._work(config, about, trained)}
        result |= {"evaluation": self._evaluation(config), "attempt": self._attempt(config)}
        result["wall"] = wall + time.time() - begun
        if not rank():
            write_atomically(folder / "cell.json", json.dumps(result, indent=1) + "\n")
        return result

    def _work(self, config: RunConfig, about: dict[str, Any], trained: bool) -> dict[str, Any]:
        """Trains and evaluates what is not there; returns the state and what was measured."""
        folder = Path(config.run_dir)
        if not trained:
            state, reason = self._train(config, about)
            if state != "done":
                return {"state": state, "reason": reason}
        state, reason = "done", ""
        if self._evaluated(config):
            settings = keys.evaluate_settings(config, folder)
            state, reason = self._child(["evaluate", str(folder), *settings], folder)
        scored = self._evaluated(config) and state == "done"
        found = measured(folder, config.data.name if scored else None)
        if found["loss"] is None:
            reason = "diverged: held-out loss is not finite"
            return {**found, "state": "failed", "reason": reason, "trained": False}
        return {**found, "state": state, "reason": reason, "trained": True}

    def _train(self, config: RunConfig, about: dict[str, Any]) -> tuple[str, str]:
        """Trains a run folder to its end; returns (state, reason)."""
        folder = Path(config.run_dir)
        if not rank():
            self._prepare(folder, about)
        file = self.out / "configs" / f"{about['hash'][:16]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, cfg.dump(config))  # every rank the same
        # What differs from a run that was begun is harmless: the hash was compared.
        return self._child(["train", str(file), "--resume-with-changes"], folder)

    def _child(self, command: list[str], folder: Path) -> tuple[str, str]:
        """Runs a command of scalepeft on a run folder; returns (state, reason)."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / ("log.txt" if not rank() else f"log-{rank()}.txt")
        while True:
            self._wait_until_free(folder)
            start = log.stat().st_size if log.is_file() else 0
            code = child(command, log, self.stop)
            if code == USER_ERROR and self._held(folder):
                continue  # another start was faster
            return ("done", "") if code == FINISHED else why(code, log, start)

    def _prepare(self, folder: Path, about: dict[str, Any]) -> None:
        """Sets what another config has made of this cell aside, and says so."""
        file = folder / "cell.json"
        old = _read(folder).get("hash", "?") if file.is_file() else None
        if old != about["hash"] and any(folder.glob("checkpoints/step-*")):
            number = 1 + len(list(folder.parent.glob(f"{folder.name}.old-*")))
            folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
            say(
                f"{folder}: was run with another config, data or base: kept as"
                f" {folder.name}.old-{number}, run again"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**about, "state": "begun"}, indent=1) + "\n")

    def _held(self, folder: Path) -> str:
        try:
            check_free(folder, *slurm_start())
        except UserError as error:
            return str(error)
        return ""

    def _wait_until_free(self, folder: Path) -> None:
        while held := "" if rank() else self._held(folder):
            self.poll()
            self._say_once(f"waiting: {held}")
            time.sleep(0.5)

    def _calibrate(self, method: Method) -> dict[str, Any]:
        """Measures the seconds of a step in a short run; returns what its ``cell.json`` holds."""
        folder = self._calibration(method)
        while not rank():
            with lock(folder.with_name(".calibration.lock")) as mine:
                if mine:
                    held = self.calibrated(method)  # it may just have become ready
                    return held if held and held["state"] in FINAL else self._measure(method)
            self.poll()
            time.sleep(0.5)
        return self._measure(method)

    def _measure(self, method: Method) -> dict[str, Any]:
        config = self._calibrating(method)
        about = {
            "hash": keys.speed(config, self.design.inputs),
            "attempt": self._attempt(config),
            "method": method.label,
            "seed": None,
        }
        state, reason = self._train(config, about)
        held = {**about, "state": state, "reason": reason}
        if state == "done":
            rows = read_lines(Path(config.run_dir) / "metrics.jsonl", "seconds")
            held["seconds_a_step"] = statistics.median(row["seconds"] for row in rows[2:])
        if not rank():
            file = Path(config.run_dir) / "cell.json"
            write_atomically(file, json.dumps(held, indent=1) + "\n")
        return held


def _read(folder: Path) -> dict[str, Any]:
    """A run folder's ``cell.json``; empty where there is none, or a broken one."""
    try:
        held: dict[str, Any] = json.loads((folder / "cell.json").read_text())
        whole = {"hash", "state"} <= held.keys()
    except (OSError, ValueError, AttributeError):
        return {}
    return held if whole else {}
