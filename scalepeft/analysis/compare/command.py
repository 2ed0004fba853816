"""Compare methods: the same data, batches, budget and sweep for each, over seeds, with intervals.

A cell is one ordinary training run. The sweep's cells run under one seed and choose each method's
rate by held-out loss; what is reported comes from fresh seeds at that rate.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.adapters import inject
from scalepeft.analysis.compare import design as designs
from scalepeft.analysis.compare import plots, table
from scalepeft.analysis.compare.cells import FINAL, Cell, Runner, reported, sweep
from scalepeft.analysis.compare.design import AT_THE_END, Design, Method
from scalepeft.analysis.compare.worker import left, lock
from scalepeft.build import task_of
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED, STOPPED, StopFlag, Stopping, tell_job
from scalepeft.models import hub as models

FILE = "design.json"
BUDGETS = ("parameters", "time", "steps")


@dataclass(frozen=True)
class Options:
    """What to compare; see ``scalepeft compare --help``."""

    settings: list[str]
    out: str
    methods: str | None = None
    reference: str = "lora"
    rank: int | None = None
    parameters: int | None = None
    budget: str = "parameters"
    seconds: float | None = None
    lrs: str = "x0.3,x1,x3"
    seeds: int = 3
    evaluate: bool = False
    cell: int | None = None
    table: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        """Takes the fields from the command line."""
        return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})

    @classmethod
    def parse(cls, words: list[str], settings: list[str], out: str) -> "Options":
        """From ``methods=hoft,lora``, ``seeds=3``, ``evaluate``: for ``launch/submit --compare``.

        Raises:
            UserError: no such option, or not a number where one belongs.
        """
        kinds = {"rank": int, "parameters": int, "seconds": float, "seeds": int}
        texts = ("methods", "reference", "budget", "lrs")
        found: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if key == "evaluate" and not equals:
                found[key] = True
            elif key not in (*texts, *kinds) or not value:
                allowed = ", ".join(f"{name}=..." for name in (*texts, *kinds))
                raise UserError(f"--compare {word}: expected {allowed} or evaluate")
            else:
                try:
                    found[key] = kinds.get(key, str)(value)
                except ValueError:
                    raise UserError(f"--compare {word}: expected a number") from None
        if found.get("budget", "parameters") not in BUDGETS:
            raise UserError(f"--compare budget={found['budget']}: one of {', '.join(BUDGETS)}")
        return cls(settings, out, **found)

    def check(self) -> None:
        """Refuses numbers that cannot be used, and options without effect.

        Raises:
            UserError: names the option, what is allowed and what to do.
        """
        for name in ("rank", "parameters", "seconds", "seeds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} {value:g}: must be more than 0")
        if (self.budget == "time") != (self.seconds is not None):
            raise UserError("--budget time and --seconds S belong together; give both or none")
        for name in ("rank", "parameters"):
            if getattr(self, name) is not None and self.budget != "parameters":
                raise UserError(f"--{name} has no effect with --budget {self.budget}; remove it")
        if self.rank is not None and self.parameters is not None:
            raise UserError("give one of --rank and --parameters, not both")
        if "=" in self.out:
            raise UserError(f"--out {self.out}: a folder whose name has '=' reads as a setting")
        if self.cell is not None and self.table:
            raise UserError("give one of --cell and --table, not both")


def run(options: Options, stop: StopFlag) -> int:
    """Runs what is missing, then prints the table and writes ``compare.json``, ``.md``, ``.png``.

    Returns:
        The exit code: 0, 75 after a signal, or 1 where a cell of the sweep broke twice.

    Raises:
        UserError: an option, the config or every method is at fault.
    """
    design = prepare(options)
    out = Path(options.out)
    with kept(out, design):
        runner = Runner(out, design, stop)
        try:
            if options.cell is not None:
                return _one(runner, options.cell)
            if not options.table and not _all(runner):
                return BROKEN
        except Stopping:
            say("stopped; the same command goes on with the cells that are left")
            tell_job("stopped", "comparison")
            return STOPPED
        finally:
            stop.saved = True
        result = finish(runner)
    if not any("loss" in row for row in result["methods"]):
        reasons = {note for row in result["methods"] for note in row["notes"]}
        raise UserError(f"no method has a result: {'; '.join(sorted(reasons))[:600]}")
    return FINISHED


def prepare(options: Options) -> Design:
    """The comparison that the options describe, or without a config that of ``OUT``."""
    options.check()
    if not options.settings and options.methods is None:
        given = [k for k, v in vars(Options([], "")).items() if getattr(options, k) != v]
        if extra := set(given) - {"out", "cell", "table"}:
            names = ", ".join(f"--{name}" for name in sorted(extra))
            raise UserError(f"{names}: only with the config and --methods of the comparison")
        return Design.read(Path(options.out) / FILE)
    if options.methods is None:
        raise UserError("--methods is missing: names of configs/adapters by comma, e.g. hoft,lora")
    path, settings = None, options.settings
    if settings and "=" not in settings[0]:
        path, *settings = settings
    values, own = designs.read_settings(path, settings)
    methods = _methods(options, own)
    values = _checked(values, methods[0], options)
    config = cfg.from_dict(values)
    base = designs.bare(config)
    target = options.parameters
    if options.budget == "parameters" and target is None:
        target = designs.target_of(base, options.reference, options.rank, own)
    seed = config.train.seed
    values.pop("adapter")
    return Design(
        values=values,
        methods=designs.sized(base, methods, target, options.budget == "parameters"),
        lrs=options.lrs,
        sweep_seed=seed,
        seeds=[seed + 1 + i for i in range(options.seeds)],
        budget=options.budget,
        seconds=options.seconds,
        target=target,
        reference=Path(options.reference).stem,
        evaluate=options.evaluate,
        inputs=designs.inputs(config, options.evaluate),
    )


def _methods(options: Options, own: dict[str, Any]) -> list[Method]:
    assert options.methods is not None
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    if not names:
        raise UserError(f"--methods '{options.methods}': names none")
    designs.named(options.reference)
    found: list[Method] = []
    for name in names:
        label, adapter, lr = designs.named(name)
        if label in [m.label for m in found]:
            raise UserError(f"--methods {options.methods}: {label} stands there twice")
        settings = cfg.to_dict(inject.adapter_config({**adapter, **own}))
        found.append(Method(label, settings, lr, designs.rates(options.lrs, lr)))
    return found


def _checked(values: dict[str, Any], first: Method, options: Options) -> dict[str, Any]:
    """The resolved config as nested values. Raises UserError: nothing to hold out, no test rows."""
    train = {**(values.get("train") or {}), "lr": first.rates[0]}
    if options.budget == "time":
        train |= {"max_steps": 1, "epochs": None}  # each method has its own number
    if not train.get("eval_every"):
        train["eval_every"] = AT_THE_END
    full = {**values, "train": train, "adapter": first.adapter, "run_dir": "cells"}
    data = full.get("data") or {}
    if not data.get("valid") and not data.get("valid_size"):
        raise UserError(
            "a comparison is by held-out loss: set data.valid=FILES, or data.valid_size=ROWS to"
            " take them out of data.train"
        )
    if train.get("stop_at"):
        raise UserError(f"train.stop_at={train['stop_at']}: no cell could finish; remove it")
    config = cfg.from_dict(full)
    models.check_place(config.model.path)
    task = task_of(config)
    splits = ["train", *(["valid"] if config.data.valid else [])]
    for split in [*splits, *(["test"] if options.evaluate else [])]:
        task.examples(split)  # type: ignore[arg-type]
    return cfg.to_dict(config)


@contextmanager
def kept(out: Path, design: Design) -> Iterator[None]:
    """Keeps the design in ``OUT``; two comparisons there must be of the same.

    Raises:
        UserError: another one is running there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not rank() and not _same(out, design):
            with lock(out / ".lock") as alone:
                if not alone and not _same(out, design):
                    raise UserError(
                        f"--out {out}: a comparison with other settings is running there; wait for"
                        " it, or take another folder"
                    )
                write_atomically(out / FILE, design.text())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    with lock(out / ".lock", shared=True):
        yield


def _same(out: Path, design: Design) -> bool:
    return (out / FILE).is_file() and (out / FILE).read_text() == design.text()


def arguments(design: Design) -> dict[str, list[str]]:
    """Words for ``scalepeft compare`` of each step of a comparison that is run as jobs, a word for
    each task: ``sweep`` (none where there is one rate), ``seeds`` (after it), ``table`` (at last).
    """
    first, then = sweep(design), reported(design)
    named = {"sweep": first, "seeds": then}
    found = {name: [f"--cell={c.index}" for c in cells] for name, cells in named.items() if cells}
    return {**found, "table": ["--table"]}


def _one(runner: Runner, index: int) -> int:
    """Runs one cell, in a task of a job array; a crash is the task's failure too."""
    cells = [*sweep(runner.design), *reported(runner.design)]
    if not 0 <= index < len(cells):
        raise UserError(f"--cell {index}: there are 0 to {len(cells) - 1}")

    ends: list[str] = []

    def done(cell: Cell, held: dict[str, Any]) -> None:
        ends.append(held["state"])
        say(f"cell {index}: {cell}: {_in_words(held)}")

    runner.work([cells[index]], done)
    return BROKEN if "broke" in ends else FINISHED


def _all(runner: Runner) -> bool:
    """The sweep, then the seeds; ends early where no method can be trained at all.

    Returns:
        False where the sweep has a cell that broke: no rate is chosen from the others.
    """
    design = runner.design
    first, then = sweep(design), reported(design)
    cells = [*first, *then]
    have = [c for c in cells if (held := runner.result(c)) and held["state"] in FINAL]
    if have:
        say(f"{len(have)} of {len(cells)} cells are there already")
    count, walls = len(have), list[float]()
    failed: list[Cell] = []

    def done(cell: Cell, held: dict[str, Any]) -> None:
        nonlocal count
        if cell.index in [c.index for c in have]:
            return
        count += 1
        if held["state"] == "done":
            walls.append(held["wall"])
        elif held["state"] == "failed" or cell not in first or not design.swept:
            failed.append(cell)
        rest = left(walls, len(cells) - count)
        say(f"cell {count} of {len(cells)}: {cell}: {_in_words(held)}{rest}")
        if len(failed) == len(design.methods) and not (walls or have):
            runner.forget(failed)
            raise UserError(f"no method can be trained: {held['reason']}")

    runner.work(first, done)
    broken = [c for c in first if (held := runner.result(c)) and held["state"] == "broke"]
    if broken:
        say(
            f"stopped: broke: {'; '.join(map(str, broken))}: no rate is chosen without (logs:"
            f" {runner.out}/cells); the same command tries again"
        )
        return False
    runner.work(then, done)
    return True


def _in_words(held: dict[str, Any]) -> str:
    if held["state"] != "done":
        return f"{held['state']}: {held['reason']}"
    return f"held-out loss {held['loss']:.4f}, {held['seconds']:.1f} s"


def finish(runner: Runner) -> dict[str, Any]:
    """Prints the table of what there is and writes it with the plot."""
    design = runner.design
    result = table.summarise(runner)
    if rank():
        return result
    print(table.text(result, design), flush=True)
    full = {"design": dataclasses.asdict(design), **result}
    out = runner.out
    write_atomically(out / "compare.json", json.dumps(full, indent=1) + "\n")
    write_atomically(out / "compare.md", table.markdown(result, design))
    names = "compare.json, compare.md"
    if any("loss" in row for row in result["methods"]):
        plots.plot(result, design, out / "compare.png")
        names += ", compare.png"
    print(f"\n{out}: {names}; {table.spent(result)} in all runs", flush=True)
    if again := [c for c in (*result["sweep"], *result["cells"]) if c["state"] == "failed"]:
        print(
            f"{len(again)} cells failed; what failed for a reason that is gone runs again once its"
            f" folder in {out}/cells is removed"
        )
    return result
