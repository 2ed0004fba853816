"""The report's sections, from the facts: what a reader asks first comes first."""

import time
from functools import partial

from scalepeft.analysis.report import plots
from scalepeft.analysis.report.blocks import Block, Cards, Document, Section, Table, Text
from scalepeft.analysis.report.draw import picture
from scalepeft.analysis.report.examples import examples
from scalepeft.analysis.report.facts import Evaluation, Run, not_comparable, same_rows
from scalepeft.analysis.report.origins import configs, origins
from scalepeft.analysis.report.scored import paired, scored, with_interval
from scalepeft.analysis.report.values import about, base_of, method_of, standing, step_of
from scalepeft.core.text import duration
from scalepeft.eval import scores


def build(runs: list[Run]) -> Document:
    """The report of one run, or of several beside each other."""
    names = ", ".join(run.name for run in runs)
    one = len(runs) == 1
    title = runs[0].name if one else f"{len(runs)} runs: {names}"
    when = time.strftime("%Y-%m-%d %H:%M %Z")
    sections = [
        Section("What this is", _summary(runs)),
        Section("Scores", scored(runs)),
        Section("Training", _training(runs)),
        Section("Where the time went", _time(runs)),
        Section("Settings", configs(runs)),
        Section("Examples", examples(runs)),
        Section("Origins", origins(runs)),
    ]
    places = ", ".join(str(run.folder) for run in runs)
    return Document(title, f"scalepeft report of {places}, as of {when}", sections)


def _summary(runs: list[Run]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        mark = "" if len(runs) == 1 else f"{run.name}: "
        blocks += [Text(mark + problem, warns=True) for problem in run.problems]
    if len(runs) == 1:
        return [*_cards(runs[0]), *blocks, Table(["", ""], about(runs[0]), "ll")]
    rows = []
    for run in runs:
        tuned = _first(run, ("tuned", "merged"))
        rows.append(
            [
                run.name, method_of(run), base_of(run, short=True),
                *_split(standing(run))[:1], step_of(run),
                with_interval(tuned.metric) if tuned else "not evaluated",
                f"{run.held_out[-1][1]:.3f}" if run.held_out else "–",
                duration(run.goodput.wall) if run.goodput else "–",
            ]
        )  # fmt: skip
    head = ["run", "method", "base", "status", "step", "score", "held-out loss", "wall time"]
    return [Table(head, rows, "llllrrrr"), *blocks]


def _cards(run: Run) -> list[Block]:
    items: list[tuple[str, str, str]] = []
    tuned, base = _first(run, ("tuned", "merged")), _first(run, ("base",))
    blocks: list[Block] = []
    for found in [e for e in (tuned, base) if e]:
        low_high = scores.between(found.metric)
        note = f"95 % interval {low_high}, {found.scores['count']:,} rows"
        pooled = found.scores["metrics"][found.scores["headline"]]
        if "mean" in found.scores:
            note += f"; over all rows {scores.shown(pooled)}"
        elif found.mean is not None:
            mean = scores.shown({**pooled, "value": found.mean})
            note += f"; mean of {len(found.scores['sources'])} sources {mean}"
        items.append((f"{found.metric_name}, {found.which}", scores.shown(found.metric), note))
    if tuned and base and tuned.task == base.task:
        blocks += _verdict(tuned, base)
    if run.held_out:
        (first, begin), (last, end) = run.held_out[0], run.held_out[-1]
        note = f"at step {last}; {begin:.3f} at step {first}" if last != first else f"step {last}"
        items.append(("Held-out loss", f"{end:.3f}", note))
    if run.goodput:
        spent = f"of {duration(run.goodput.wall)} went into steps that count"
        items.append(("Goodput", f"{run.goodput.share:.0%}", spent))
    items.append(("Status", *_split(standing(run))))
    return [Cards(items), *blocks]


def _split(state: str) -> tuple[str, str]:
    """The word that matters, and the rest."""
    word, _, rest = state.partition(" " if state.startswith(("finished", "stopped")) else ", ")
    return word, rest


def _verdict(tuned: Evaluation, base: Evaluation) -> list[Block]:
    """What tuned against base says, and what spoils the comparison."""
    if wrong := not_comparable(tuned, base):
        words = ", ".join(wrong)
        text = f"{tuned.which} and base must not be compared: they differ in {words}."
        return [Text(f"{text} Evaluate both again with the same settings.", warns=True)]
    blocks: list[Block] = []
    name, one, other = tuned.metric_name, tuned.metric, base.metric
    if pairs := paired(tuned, base):
        gain, low, high = (100 * v for v in pairs)
        sure = low > 0 or high < 0
        text = f"{name}: {gain:+.1f} percentage points against the base, 95 % interval"
        text += f" {low:+.1f} to {high:+.1f} (paired, over the same rows)"
        blocks.append(Text(text + ("." if sure else "; that may be chance.")))
    else:
        gain = one["value"] - other["value"]
        unit = f"{100 * gain:+.1f} percentage points" if one["share"] else f"{gain:+.2f} points"
        apart = one["ci95"][0] > other["ci95"][1] or other["ci95"][0] > one["ci95"][1]
        meaning = "do not overlap" if apart else "overlap"
        blocks.append(Text(f"{name}: {unit} against the base; the 95 % intervals {meaning}."))
    for found in (tuned, base):
        missing, count = found.scores["no_answer_found"], found.scores["count"]
        if count and missing > 0.2 * count:
            text = f"{found.which}: no answer was found in {missing:,} of {count:,} predictions;"
            blocks.append(Text(f"{text} they count as wrong.", warns=True))
    return blocks


def _first(run: Run, kinds: tuple[str, ...]) -> Evaluation | None:
    return next((e for kind in kinds for e in run.evaluations if e.which == kind), None)


def _training(runs: list[Run]) -> list[Block]:
    trained = [run for run in runs if run.metrics]
    waiting = [Text(f"{run.name}: no step was made yet.") for run in runs if not run.metrics]
    if not trained:
        return [*waiting]
    alt = "loss and tokens a second over steps"
    note = "Dashed lines: the run was stopped or killed and resumed." if len(runs) == 1 else ""
    found: list[Block] = [
        picture("curves", alt, partial(plots.curves, trained), note),
        picture("rates", "learning rate and gradient norm", partial(plots.rates, trained)),
    ]
    if len(trained) > 1 and not same_rows(trained):
        text = "The runs have other training or held-out rows, prompts or lengths than each other:"
        found.append(Text(f"{text} their losses must not be compared.", warns=True))
    skipped = [(run, run.skipped) for run in trained if run.skipped]
    for run, steps in skipped:
        listed = ", ".join(map(str, steps[:10])) + (", …" if len(steps) > 10 else "")
        text = f"{run.name}: {len(steps):,} steps were skipped because loss or gradient was not"
        found.append(Text(f"{text} finite (step {listed}).", warns=True))
    return [*waiting, *found]


def _time(runs: list[Run]) -> list[Block]:
    known = [run for run in runs if run.goodput]
    without = [
        Text(f"{run.name}: no figures: no step was made yet, or its records are older than them.")
        for run in runs
        if not run.goodput
    ]
    if not known:
        return [*without]
    bar = picture("goodput", "shares of wall time", partial(plots.wall_time, known))
    return [bar, _shares(known, len(runs) == 1), *without]


def _shares(runs: list[Run], one: bool) -> Table:
    """Of one run times and shares, a line each; of several the shares, a line a run."""
    spent = [(run.name, run.goodput) for run in runs if run.goodput]
    if one:
        _, held = spent[0]
        parts = [(name, getattr(held, key)) for name, (key, _) in plots.SHARES.items()]
        rows = [[n, duration(took), f"{took / held.wall:.1%}"] for n, took in parts]
        return Table(["", "time", "share"], [*rows, ["wall time", duration(held.wall), ""]], "lrr")
    rows = [
        [name, *(f"{getattr(held, key) / held.wall:.1%}" for key, _ in plots.SHARES.values()),
         duration(held.wall)]
        for name, held in spent
    ]  # fmt: skip
    return Table(["run", *plots.SHARES, "wall time"], rows, "l" + "r" * (len(plots.SHARES) + 1))
