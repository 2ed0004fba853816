"""Compare methods: the same data, batches, budget and sweep for each, over seeds, with intervals.

A cell is one ordinary training run. The sweep's cells run under one seed and choose each method's
rate by held-out loss; what is reported comes from fresh seeds at that rate.
"""

import argparse
import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.adapters import inject
from scalepeft.analysis.compare import design as designs
from scalepeft.analysis.compare import plots, table
from scalepeft.analysis.compare.cells import Cell, Runner, reported, sweep
from scalepeft.analysis.compare.design import AT_THE_END, Design, Method
from scalepeft.build import task_of
from scalepeft.config import schema as cfg
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically
from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED, STOPPED, StopFlag, Stopping, tell_job
from scalepeft.core.slurm import slurm_start
from scalepeft.core.text import duration
from scalepeft.models import hub
from scalepeft.run.lease import check_free

FILE = "design.json"


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        settings: as for train, without an adapter
        out: FOLDER: for runs and results
        methods: A,B,C: files of configs/adapters by name, or YAML files
        reference: that others are held against
        rank: of the reference, whose size is the budget (16)
        parameters: N: the budget as a number
        budget: what is equal: steps, or parameters too (each method at the size nearest to these)
        lrs: rates for all (1e-4,3e-4), or factors on each method's usual one
        seeds: reported runs of each method
        evaluate: score data.test too, in the reported runs
        cell: N: run this one cell of OUT alone
        table: run nothing; print what there is
    """

    settings: list[str]
    out: str
    methods: str | None = None
    reference: str = "lora"
    rank: int | None = None
    parameters: int | None = None
    budget: str = "parameters"
    lrs: str = "x0.3,x1,x3"
    seeds: int = 3
    evaluate: bool = False
    cell: int | None = None
    table: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        """Take the fields from the command line."""
        return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})

    @classmethod
    def parse(cls, words: list[str], settings: list[str], out: str) -> "Options":
        """Read ``methods=hoft,lora``, ``seeds=3``, ``evaluate``: for ``launch/submit --compare``.

        Raises:
            UserError: no such option, or not a number where one belongs.
        """
        numbers = ("rank", "parameters", "seeds")
        allowed = ("methods", "reference", "budget", "lrs", *numbers)
        values: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if word == "evaluate":
                values[key] = True
            elif key == "seconds":
                values["budget"] = "time"  # check says what became of it
            elif key not in allowed or not value:
                listed = ", ".join(f"{name}=..." for name in allowed)
                raise UserError(f"--compare {word}: expected {listed} or evaluate")
            elif key in numbers and not value.lstrip("-").isdecimal():
                raise UserError(f"--compare {word}: expected a number")
            else:
                values[key] = int(value) if key in numbers else value
        return cls(settings, out, **values)

    def check(self) -> None:
        """Raise UserError if an option cannot be used or has no effect."""
        if self.budget == "time":
            raise UserError(
                "--budget time was removed; take --budget steps: the table and the plot show each"
                " method's seconds"
            )
        if self.budget not in ("parameters", "steps"):
            raise UserError(f"--budget {self.budget}: one of parameters, steps")
        for name in ("rank", "parameters", "seeds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} {value}: must be more than 0")
            if name != "seeds" and value is not None and self.budget != "parameters":
                raise UserError(f"--{name} has no effect with --budget {self.budget}; remove it")
        if self.rank is not None and self.parameters is not None:
            raise UserError("give one of --rank and --parameters, not both")
        if "=" in self.out:
            raise UserError(f"--out {self.out}: a folder whose name has '=' reads as a setting")
        if self.cell is not None and self.table:
            raise UserError("give one of --cell and --table, not both")


def run(options: Options, stop: StopFlag) -> int:
    """Run what is missing, then print the table and write ``compare.json``, ``.md``, ``.png``.

    Returns:
        The exit code: 0, 75 after a signal, or 1 where a cell of the sweep (or --cell's) broke.

    Raises:
        UserError: an option, the config or every method is at fault.
    """
    design = prepare(options)
    out = Path(options.out)
    keep(out, design)
    runner = Runner(out, design, stop)
    try:
        if options.cell is not None:
            return _run_one(runner, options.cell)
        if not options.table and not _run_all(runner):
            return BROKEN
    except Stopping:
        say("stopped; the same command goes on with the cells that are left")
        tell_job("stopped", "comparison")
        return STOPPED
    finally:
        stop.saved = True
    result = _finish(runner)
    if not any("loss" in row for row in result["methods"]):
        reasons = {note for row in result["methods"] for note in row["notes"]}
        raise UserError(f"no method has a result: {'; '.join(sorted(reasons))[:600]}")
    return FINISHED


def prepare(options: Options) -> Design:
    """Return the comparison that the options describe, or without a config that of ``OUT``.

    Raises:
        UserError: an option, the config, or the data.
    """
    options.check()
    if not options.settings and options.methods is None:
        unset = Options([], options.out, cell=options.cell, table=options.table)
        if changed := [k for k, v in vars(unset).items() if getattr(options, k) != v]:
            names = ", ".join(f"--{name}" for name in changed)
            raise UserError(f"{names}: only with the config and --methods of the comparison")
        return Design.read(Path(options.out) / FILE)
    path, settings = None, options.settings
    if settings and "=" not in settings[0]:
        path, *settings = settings
    values, shared = designs.read_settings(path, settings)
    methods = _methods(options, shared)
    config = _checked(values, methods[0], options.evaluate)
    base = designs.bare_model(config)
    target = options.parameters
    if options.budget == "parameters" and target is None:
        target = designs.target_parameters(base, options.reference, options.rank, shared)
    seed = config.train.seed
    return Design(
        values={k: v for k, v in cfg.to_dict(config).items() if k != "adapter"},
        methods=[designs.fit_method(base, method, target) for method in methods],
        lrs=options.lrs,
        sweep_seed=seed,
        seeds=[seed + 1 + i for i in range(options.seeds)],
        budget=options.budget,
        target=target,
        reference=Path(options.reference).stem,
        evaluate=options.evaluate,
        files=designs.read_inputs(config, options.evaluate),
    )


def _methods(options: Options, shared: dict[str, Any]) -> list[Method]:
    names = [name.strip() for name in (options.methods or "").split(",") if name.strip()]
    if not names:
        raise UserError("--methods is missing: names of configs/adapters by comma, e.g. hoft,lora")
    designs.read_method(options.reference)
    methods: list[Method] = []
    for name in names:
        label, adapter, lr = designs.read_method(name)
        if label in [m.label for m in methods]:
            raise UserError(f"--methods {options.methods}: {label} appears twice")
        settings = cfg.to_dict(inject.adapter_config({**adapter, **shared}))
        methods.append(Method(label, settings, lr, designs.parse_rates(options.lrs, lr)))
    return methods


def _checked(values: dict[str, Any], first: Method, evaluate: bool) -> RunConfig:
    """Return the resolved config. Raise UserError if nothing is held out or a file is at fault."""
    train = {**(values.get("train") or {}), "lr": first.rates[0]}
    train["eval_every"] = train.get("eval_every") or AT_THE_END
    data = values.get("data") or {}
    if not data.get("valid") and not data.get("valid_size"):
        raise UserError(
            "a comparison is by held-out loss: set data.valid=FILES, or data.valid_size=ROWS to"
            " take them out of data.train"
        )
    if train.get("stop_at"):
        raise UserError(f"train.stop_at={train['stop_at']}: no cell could finish; remove it")
    config = cfg.from_dict({**values, "train": train, "adapter": first.adapter, "run_dir": "cells"})
    hub.check_place(config.model.path)
    task = task_of(config)
    task.examples("train")
    if config.data.valid:
        task.examples("valid")
    if evaluate:
        task.examples("test")
    return config


def keep(out: Path, design: Design) -> None:
    """Keep the design in ``OUT``.

    Raises:
        UserError: ``OUT`` cannot be written, or a cell of another design is running there.
    """
    file = out / FILE
    if rank() or (file.is_file() and file.read_text() == design.text()):
        return
    for holder in out.glob("cells/*/*/holder.json"):
        check_free(holder.parent, *slurm_start())
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, design.text())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None


def arguments(design: Design) -> dict[str, list[str]]:
    """Return the words for ``scalepeft compare`` of each step of a comparison that is run as jobs,
    a word a task: ``sweep`` (none where there is one rate), ``seeds`` after it, ``table`` at last.
    """
    steps = {"sweep": sweep(design), "seeds": reported(design)}
    words = {name: [f"--cell={c.index}" for c in cells] for name, cells in steps.items() if cells}
    return {**words, "table": ["--table"]}


def _run_one(runner: Runner, index: int) -> int:
    """Run one cell, in a task of a job array; a crash is the task's failure too."""
    cells = [*sweep(runner.design), *reported(runner.design)]
    if not 0 <= index < len(cells):
        raise UserError(f"--cell {index}: there are 0 to {len(cells) - 1}")
    ((cell, result),) = runner.work([cells[index]])
    say(f"cell {index}: {_in_words(cell, result)}")
    return BROKEN if result["state"] == "broke" else FINISHED


def _run_all(runner: Runner) -> bool:
    """Run the sweep, then the seeds; return False where a cell of the sweep broke: no rate is
    chosen from the others.
    """
    first, then = sweep(runner.design), reported(runner.design)
    total = len(first) + len(then)
    results = {cell.index: runner.result(cell) for cell in [*first, *then]}
    finished = {i for i, r in results.items() if r and r["state"] != "broke"}
    if finished:
        say(f"{len(finished)} of {total} cells are there already")
    walls: list[float] = []
    for cells in (first, then):
        broken = []
        for cell, result in runner.work(cells):
            if result["state"] == "broke":
                broken.append(str(cell))
            if cell.index in finished:
                continue
            finished.add(cell.index)
            walls += [result["wall"]] if result["state"] == "done" else []
            rest = (total - len(finished)) * statistics.mean(walls) if walls else 0
            eta = f", about {duration(rest)} left" if rest else ""
            say(f"cell {len(finished)} of {total}: {_in_words(cell, result)}{eta}")
        if broken and cells is first:
            say(
                f"stopped: broke: {'; '.join(broken)}: no rate is chosen without (logs:"
                f" {runner.out}/cells); the same command tries again"
            )
            return False
    return True


def _in_words(cell: Cell, result: dict[str, Any]) -> str:
    if result["state"] != "done":
        return f"{cell}: {result['state']}: {result['reason']}"
    return f"{cell}: held-out loss {result['loss']:.4f}, {result['seconds']:.1f} s"


def _finish(runner: Runner) -> dict[str, Any]:
    """Print the table of what there is and write it with the plot."""
    design, out = runner.design, runner.out
    result = table.summarize(runner)
    if rank():
        return result
    print(table.text(result, design), flush=True)
    full = {"design": dataclasses.asdict(design), **result}
    write_atomically(out / "compare.json", json.dumps(full, indent=1) + "\n")
    write_atomically(out / "compare.md", table.markdown(result, design))
    names = "compare.json, compare.md"
    if any("loss" in row for row in result["methods"]):
        plots.plot(result, design, out / "compare.png")
        names += ", compare.png"
    cells = [*result["sweep"], *result["cells"]]
    spent = duration(sum(c.get("wall", 0.0) for c in cells))
    print(f"\n{out}: {names}; {spent} in all runs", flush=True)
    if failed := sum(c["state"] == "failed" for c in cells):
        print(
            f"{failed} cells failed; what failed for a reason that is gone runs again once its"
            f" folder in {out}/cells is removed"
        )
    return result
