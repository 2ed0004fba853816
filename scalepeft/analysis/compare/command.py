"""Compare methods: the same data, batches, budget and sweep for each, over seeds."""

import dataclasses
import json
import statistics
from pathlib import Path

from scalepeft.analysis.compare import design as designs
from scalepeft.analysis.compare import table
from scalepeft.analysis.compare.cells import SETTLED, Cell, Runner, reported, sweep
from scalepeft.analysis.compare.design import Design
from scalepeft.analysis.compare.options import Options
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.files import write_atomically, writing
from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED, StopFlag
from scalepeft.core.text import duration
from scalepeft.models import dimensions, shapes
from scalepeft.run.lease import check_free

FILE = "design.json"


def run(options: Options, stop: StopFlag) -> int:
    """Run what is missing, print the table, write compare.json and .md; return 0, 75 after a
    signal, 1 where a cell of the sweep broke. Raises UserError: an option, the config, or every
    method.
    """
    out = Path(options.out)
    if options.league:
        from scalepeft.analysis.compare import league  # draws

        league.write(Path(options.league), out)
        return FINISHED
    design = prepare(options)
    keep(out, design)
    cells, number = [*sweep(design), *reported(design)], options.cell
    if number is not None and number >= len(cells):
        raise UserError(f"--cell {number}: there are 0 to {len(cells) - 1}")
    runner = Runner(out, design, stop)
    chosen = [] if options.table else cells if number is None else [cells[number]]
    broken: list[Cell] = []
    again = "the same command goes on with the cells that are left"
    if code := stop.guard(lambda: broken.extend(_run(runner, chosen)), "comparison", again):
        return code
    if number is not None:  # a task of a job array: a crash is its failure too
        return BROKEN if broken else FINISHED
    if broken and broken[0].lr is not None:
        what = f"no rate is chosen without (logs: {out}/cells); the same command tries again"
        say(f"stopped: broke: {'; '.join(map(str, broken))}: {what}")
        return BROKEN
    _finish(runner)
    return FINISHED


def prepare(options: Options) -> Design:
    """The comparison that is asked for, or that of ``OUT``. Raises UserError: a mistake in it."""
    if not options.settings and options.methods is None:
        unset = Options([], options.out, cell=options.cell, table=options.table)
        if changed := [f"--{k}" for k, v in vars(unset).items() if getattr(options, k) != v]:
            listed = ", ".join(changed)
            raise UserError(f"{listed}: only with the config and --methods of the comparison")
        return Design.read(Path(options.out) / FILE)
    values, shared = designs.read_settings(options.settings)
    if not options.methods:
        raise UserError("--methods is missing: names of configs/adapters by comma, e.g. hoft,lora")
    reference = designs.read_method(options.reference, shared)
    methods = [designs.read_method(name, shared, options.lrs) for name in options.methods]
    labels = [m.label for m in methods]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"--methods {','.join(options.methods)}: {twice[0]} appears twice")
    values["train"]["lr"] = methods[0].rates[0]
    config = cfg.from_dict({**values, "adapter": methods[0].adapter, "run_dir": "cells"})
    source = dimensions.find(config.model)
    with source.folder(source.layers) as folder:
        base = shapes.meta_model(str(folder))
    target = None
    if options.budget == "parameters":
        target = designs.target_parameters(base, reference, options.rank)
    seed = config.train.seed
    return Design(
        values={k: v for k, v in cfg.to_dict(config).items() if k != "adapter"},
        methods=[designs.fit_method(base, method, target, options.lrs) for method in methods],
        lrs=options.lrs,
        sweep_seed=seed,
        seeds=[seed + 1 + i for i in range(options.seeds)],
        budget=options.budget,
        target=target,
        reference=reference.label,
        evaluate=options.evaluate,
        files=designs.read_inputs(config, options.evaluate),
    )


def keep(out: Path, design: Design) -> None:
    """Keep the design in ``OUT``; UserError: it cannot be written, another's cell runs there."""
    file = out / FILE
    if rank() or (file.is_file() and file.read_text() == design.text()):
        return
    for holder in out.glob("cells/*/*/holder*.json"):
        check_free(holder.parent)
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, design.text())


def arguments(design: Design) -> dict[str, list[str]]:
    """Words for ``compare`` of each step as jobs, a word a task: sweep, then seeds, then table."""
    first, then = len(sweep(design)), len(reported(design))
    words = [f"--cell={number}" for number in range(first + then)]
    steps = {"sweep": words[:first], "seeds": words[first:], "table": ["--table"]}
    return {name: tasks for name, tasks in steps.items() if tasks}


def _run(runner: Runner, cells: list[Cell]) -> list[Cell]:
    """Run the cells left; return those that broke. No seed is run after one of the sweep."""
    left = [cell for cell in cells if runner.result(cell)["state"] not in SETTLED]
    there, walls, broken = len(cells) - len(left), list[float](), list[Cell]()
    if there:
        say(f"{there} of {len(cells)} cells are there already")
    for number, cell in enumerate(left, there + 1):
        if broken and cell.lr is None and broken[0].lr is not None:
            break
        result = runner.run(cell)
        name = dataclasses.replace(cell, lr=result.get("lr", cell.lr))
        text = f"{name}: {result['state']}: {result.get('reason')}"
        if result["state"] == "broke":
            broken.append(cell)
        elif result["state"] == "done":
            walls.append(result["wall"])
            text = f"{name}: held-out loss {result['loss']:.4f}, {result['seconds']:.1f} s"
        rest = (len(cells) - number) * statistics.mean(walls or [0.0])
        eta = f", about {duration(rest)} left" if rest else ""
        say(f"cell {number} of {len(cells)}: {text}{eta}")
    return broken


def _finish(runner: Runner) -> None:
    """Print the table of what there is and write it. Raise UserError if no method has a result."""
    design, out = runner.design, runner.out
    result = table.summarize(runner)
    if not any("loss" in row for row in result["methods"]):
        reasons = {note for row in result["methods"] for note in row["notes"]}
        raise UserError(f"no method has a result: {'; '.join(sorted(reasons))[:600]}")
    if rank():
        return
    print(table.render(result, design, "terminal"), flush=True)
    full = {"design": dataclasses.asdict(design), **result}
    write_atomically(out / "compare.json", json.dumps(full, indent=1) + "\n")
    write_atomically(out / "compare.md", table.render(result, design, "markdown"))
    cells = [*result["sweep"], *result["cells"]]
    spent = duration(sum(c.get("wall", 0.0) for c in cells))
    print(f"{out}: compare.json, compare.md; {spent} in all runs", flush=True)
    if failed := sum(c["state"] == "failed" for c in cells):
        fix = f"runs again once its folder in {out}/cells is removed"
        print(f"{failed} cells failed; what failed for a reason that is gone {fix}")
