"""The cells of a comparison: each an ordinary run of its own, by the ordinary trainer, in a process
of its own.

``OUT/cells/METHOD/lr=R,seed=S`` is the run folder. ``cell.json`` in it is written last and holds
the hash of all that decides the result; a cell whose hash still fits is never run again. A cell
that was killed goes on at the trainer's own checkpoint.
"""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft import config as cfg
from scalepeft.checkpoint import write_atomically
from scalepeft.compare.children import child, lock, measured, rank, why
from scalepeft.compare.design import AT_THE_END, CALIBRATION_STEPS, Design, Method
from scalepeft.config import RunConfig
from scalepeft.holder import check_free
from scalepeft.lookup import UserError
from scalepeft.preemption import FINISHED, USER_ERROR, StopFlag, Stopping
from scalepeft.progress import say
from scalepeft.records import read_lines, slurm_start

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


def chosen(method: Method, swept: dict[float, dict[str, Any] | None]) -> tuple[float, str] | None:
    """(the rate with the lowest held-out loss in the sweep, where it lies: ``lowest``, ``highest``
    or empty); None where no rate trained. A rate that failed bounds the sweep as well as one that
    lost.
    """
    if len(method.rates) == 1:
        return method.rates[0], ""
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
        if missing := [str(lr) for lr, result in rates.items() if result is None]:
            raise UserError(
                f"--cell {cell.index}: the sweep of {method.label} lacks lr {', '.join(missing)};"
                " run its cells first"
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
        return self._held_result(self._calibrating(method))

    def _held_result(self, config: RunConfig) -> dict[str, Any] | None:
        """What ``cell.json`` says, if it is of this very config and data."""
        try:
            held: dict[str, Any] = json.loads((Path(config.run_dir) / "cell.json").read_text())
            same = held["hash"] == self._hash(config) and held["state"] != "begun"
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return held if same else None

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
        values = {k: v for k, v in cfg.to_dict(config).items() if k not in ("run_dir", "pipeline")}
        known = [values, self.design.inputs, self.design.evaluate]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell has come to under this very config; None where it has not been run."""
        method = self.design.method(cell.method)
        if method.refused:
            return {"state": "failed", "reason": method.refused}
        if cell.lr is None:
            swept = self.swept(method)
            if None in swept.values():
                return None  # nothing is chosen from half a sweep
            found = chosen(method, swept)
            if found is None:
                return {"state": "failed", "reason": "no rate of the sweep trained"}
            cell = dataclasses.replace(cell, lr=found[0])
        if self.design.budget == "time":
            speed = self.calibrated(method)
            if speed is None or speed["state"] != "done":
                return speed
        return self._held_result(self.config(cell))

    def work(self, cells: list[Cell], done: Callable[[Cell, dict[str, Any]], None]) -> None:
        """Runs the cells that have no result; those that another comparison runs are waited for.

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
                if held is None:
                    busy.append(cell)
                else:
                    done(dataclasses.replace(cell, lr=held.get("lr", cell.lr)), held)
            if len(busy) == len(waiting):
                self._say_once(f"waiting for cells that another comparison runs: {len(busy)}")
                time.sleep(1)
            waiting = busy

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
        begun = time.time()
        state, reason_text = self._train(config, about)
        result = {**about, "state": state, "reason": reason_text}
        if state == "done":
            result |= measured(folder, self.design.evaluate and cell.seed in self.design.seeds)
            if result["loss"] is None:
                result |= {"state": "failed", "reason": "diverged: held-out loss is not finite"}
        result["wall"] = time.time() - begun
        if not rank():
            write_atomically(folder / "cell.json", json.dumps(result, indent=1) + "\n")
        return result

    def _train(self, config: RunConfig, about: dict[str, Any]) -> tuple[str, str]:
        """Trains a run folder to its end; returns (state, reason)."""
        folder = Path(config.run_dir)
        if not rank():
            self._prepare(folder, about)
        file = self.out / "configs" / f"{about['hash'][:16]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, cfg.dump(config))  # every rank the same
        commands = [["train", str(file)]]
        if self.design.evaluate and about["seed"] in self.design.seeds:
            commands.append(["evaluate", str(folder)])
        for command in commands:
            folder.mkdir(parents=True, exist_ok=True)
            log = folder / ("log.txt" if not rank() else f"log-{rank()}.txt")
            while True:
                self._wait_until_free(folder)
                start = log.stat().st_size if log.is_file() else 0
                code = child(command, log, self.stop)
                if code == USER_ERROR and self._held(folder):
                    continue  # another start was faster
                break
            if code != FINISHED:
                return why(code, log, start)
        return "done", ""

    def _prepare(self, folder: Path, about: dict[str, Any]) -> None:
        """Sets what another config has made of this cell aside, and says so."""
        file = folder / "cell.json"
        try:
            old = json.loads(file.read_text())["hash"] if file.is_file() else None
        except (OSError, ValueError, KeyError, TypeError):
            old = "?"
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
        about = {"hash": self._hash(config), "method": method.label, "seed": None}
        state, reason = self._train(config, about)
        held = {**about, "state": state, "reason": reason}
        if state == "done":
            rows = read_lines(Path(config.run_dir) / "metrics.jsonl", "seconds")
            held["seconds_a_step"] = statistics.median(row["seconds"] for row in rows[2:])
        if not rank():
            file = Path(config.run_dir) / "cell.json"
            write_atomically(file, json.dumps(held, indent=1) + "\n")
        return held
