"""The report of runs as one plain context, and that as HTML and as Markdown by two templates.

All texts in the context are plain. What a template writes of them is escaped unless it is marked,
and control characters are made visible.
"""

import base64
import re
import time
from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scalepeft.analysis.report import figures, provenance, scores
from scalepeft.analysis.report.examples import examples
from scalepeft.analysis.report.load import Run, same_rows
from scalepeft.core.text import duration, visible
from scalepeft.eval.scores import between
from scalepeft.eval.scores import shown as score


def html(context: dict[str, Any]) -> str:
    """Return the report as one HTML file: no script, no network, light and dark."""
    return _environment(visible).get_template("report.html.j2").render(context)


def markdown(context: dict[str, Any]) -> str:
    """Return the report as Markdown, with its plots as PNGs beside it."""
    made = _environment(line).get_template("report.md.j2").render(context)
    return made.strip() + "\n"


def _environment(text: Callable[[str], str]) -> Environment:
    """Templates whose every value goes through ``text``."""
    environment = Environment(
        loader=PackageLoader("scalepeft.analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else text(str(value)),
    )
    environment.filters |= {"fenced": fenced, "data_uri": _data_uri}
    return environment


def line(value: str) -> Markup:
    """Return any text as one line of Markdown: neither markup nor HTML."""
    text = escape(" ".join(visible(value).split()), quote=False)
    text = re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", text)
    return Markup(re.sub(r"^(\d*)([-+.)])(?= )", r"\1\\\2", text))


def fenced(value: str) -> Markup:
    """Return text between fences that are longer than any within it."""
    text = visible(value)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{text}\n{fence}")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def context(runs: list[Run]) -> dict[str, Any]:
    """Return what the templates write: texts, lists, tables and plots."""
    one, names = len(runs) == 1, ", ".join(run.name for run in runs)
    places = ", ".join(str(run.folder) for run in runs)
    when = time.strftime("%Y-%m-%d %H:%M %Z")
    summary = _one(runs[0]) if one else _several(runs)
    summary["warnings"] += [
        problem if one else f"{run.name}: {problem}" for run in runs for problem in run.problems
    ]
    return {
        "title": runs[0].name if one else f"{len(runs)} runs: {names}",
        "subtitle": f"scalepeft report of {places}, as of {when}",
        "summary": summary,
        "tasks": scores.tasks(runs),
        "training": _training(runs),
        "time": _time(runs),
        "settings": provenance.settings(runs),
        "examples": examples(runs),
        "origins": [provenance.origin(run) for run in runs],
    }


def pictures(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all plots of a context, in their order."""
    plots = [task["picture"] for task in made["tasks"]]
    return plots + made["training"]["pictures"] + made["time"]["pictures"]


def _several(runs: list[Run]) -> dict[str, Any]:
    rows = []
    for run in runs:
        tuned = scores.subject(run, "tuned", "merged")
        method, base = provenance.method_of(run), provenance.base_of(run, short=True)
        status, step = provenance.standing(run)[0], provenance.step_of(run)
        best = scores.with_interval(tuned.first[1]) if tuned else "not evaluated"
        held_out = f"{run.held_out[-1][1]:.3f}" if run.held_out else "–"
        wall = duration(run.goodput.wall) if run.goodput else "–"
        rows.append([run.name, method, base, status, step, best, held_out, wall])
    head = ["run", "method", "base", "status", "step", "score", "held-out loss", "wall time"]
    table = {"head": head, "rows": rows, "align": "llllrrrr"}
    return {"remarks": [], "cards": [], "verdict": "", "warnings": [], "table": table}


def _one(run: Run) -> dict[str, Any]:
    """The figures that a reader looks for first, as (label, value, note), and what they say."""
    cards: list[tuple[str, str, str]] = []
    tuned, base = scores.subject(run, "tuned", "merged"), scores.subject(run, "base")
    for found in [e for e in (tuned, base) if e]:
        name, metric = found.first
        note = f"95 % interval {between(metric)}, {found.scores['count']:,} rows"
        if "mean" in found.scores:
            note += f"; over all rows {score(found.scores['metrics'][found.scores['headline']])}"
        elif mean := found.means.get(name):
            note += f"; mean of {len(found.scores['sources'])} sources {mean}"
        cards.append((f"{name}, {found.which}", score(metric), note))
    if run.held_out:
        (first, begin), (last, end) = run.held_out[0], run.held_out[-1]
        note = f"at step {last}; {begin:.3f} at step {first}" if last != first else f"step {last}"
        cards.append(("Held-out loss", f"{end:.3f}", note))
    if run.goodput:
        spent = f"of {duration(run.goodput.wall)} went into steps that count"
        cards.append(("Goodput", f"{run.goodput.share:.0%}", spent))
    cards.append(("Status", *provenance.standing(run)))
    said, warnings = "", list[str]()
    if tuned and base and tuned.task == base.task:
        said, warnings = scores.verdict(tuned, base)
    table = {"head": ["", ""], "rows": provenance.about(run), "align": "ll"}
    return {"remarks": [], "cards": cards, "verdict": said, "warnings": warnings, "table": table}


def _training(runs: list[Run]) -> dict[str, Any]:
    trained = [run for run in runs if run.metrics]
    remarks = [f"{run.name}: no step was made yet." for run in runs if not run.metrics]
    warnings, plots = [], []
    if trained:
        note = "Dashed lines: the run was stopped or killed and resumed." if len(runs) == 1 else ""
        alt = "loss and tokens a second over steps"
        plots.append(figures.picture("curves", alt, partial(figures.curves, trained), note))
        alt = "learning rate and gradient norm"
        plots.append(figures.picture("rates", alt, partial(figures.rates, trained)))
    if len(trained) > 1 and not same_rows(trained):
        text = "The runs have other training or held-out rows, prompts or lengths than each other:"
        warnings.append(f"{text} their losses must not be compared.")
    for run, steps in [(run, run.skipped) for run in trained if run.skipped]:
        listed = ", ".join(map(str, steps[:10])) + (", …" if len(steps) > 10 else "")
        text = f"{run.name}: {len(steps):,} steps were skipped because loss or gradient was not"
        warnings.append(f"{text} finite (step {listed}).")
    return {"remarks": remarks, "warnings": warnings, "pictures": plots}


def _time(runs: list[Run]) -> dict[str, Any]:
    """Of one run times and shares, a line each; of several the shares, a line a run."""
    known = [(run, run.goodput) for run in runs if run.goodput]
    text = "no figures: no step was made yet, or its records are older than them."
    remarks = [f"{run.name}: {text}" for run in runs if not run.goodput]
    if not known:
        return {"remarks": remarks, "warnings": [], "pictures": [], "table": None}
    bars = partial(figures.wall_time, [run for run, _ in known])
    took = [[getattr(spent, key) for key, _ in figures.SHARES.values()] for _, spent in known]
    shares = [[f"{t / s.wall:.1%}" for t in ts] for ts, (_, s) in zip(took, known, strict=True)]
    walls = [duration(spent.wall) for _, spent in known]
    if len(runs) == 1:
        head, spans = ["", "time", "share"], [*map(duration, took[0]), *walls]
        columns = [[*figures.SHARES, "wall time"], spans, [*shares[0], ""]]
        rows = [list(row) for row in zip(*columns, strict=True)]
    else:
        head = ["run", *figures.SHARES, "wall time"]
        names = [run.name for run, _ in known]
        rows = [[n, *s, wall] for n, s, wall in zip(names, shares, walls, strict=True)]
    return {
        "remarks": remarks,
        "warnings": [],
        "pictures": [figures.picture("goodput", "shares of wall time", bars)],
        "table": {"head": head, "rows": rows, "align": "l" + "r" * (len(head) - 1)},
    }
