"""Every score of the runs: a plot and a table for each task, signatures, what departs."""

from functools import partial
from typing import Any

from scalepeft.analysis.report import plots
from scalepeft.analysis.report.blocks import Block, Fold, Heading, Picture, Table, Text
from scalepeft.analysis.report.draw import picture
from scalepeft.analysis.report.examples import rows_of, source_of
from scalepeft.analysis.report.facts import Evaluation, Run, not_comparable
from scalepeft.analysis.report.values import shown
from scalepeft.core.stats import paired_difference
from scalepeft.eval import scores

COMET = "COMET"
NOTHING = "Nothing was evaluated yet: scalepeft evaluate RUN_DIR, and once more with --base."


def with_interval(metric: dict[str, Any]) -> str:
    """A metric's value and interval as text."""
    return f"{scores.shown(metric)} ({scores.between(metric)})"


def scored(runs: list[Run]) -> list[Block]:
    """A heading, a plot and a table for each task."""
    blocks: list[Block] = []
    for task in dict.fromkeys(e.task for run in runs for e in run.evaluations):
        found = [(run, e) for run in runs for e in run.evaluations if e.task == task]
        blocks += [Heading(task), *_task(task, found, len(runs) == 1)]
    return blocks or [Text(NOTHING)]


def _task(task: str, found: list[tuple[Run, Evaluation]], one: bool) -> list[Block]:
    blocks: list[Block] = [_score_plot(task, found, one)]
    table = _by_source(found) if one else _by_run(found)
    blocks.append(table)
    if not one:
        blocks.append(Fold("every source", [_by_source(found, with_run=True)]))
        for run, evaluation in found[1:]:
            if wrong := not_comparable(found[0][1], evaluation):
                text = f"{run.name}, {evaluation.which}: differs from {found[0][0].name},"
                text += f" {found[0][1].which}, in {', '.join(wrong)}: not to be compared."
                blocks.append(Text(text, warns=True))
    for _, evaluation in found:
        mark = evaluation.which if one else f"{_.name}, {evaluation.which}"
        cut = evaluation.scores.get("prompts_cut")
        if cut:
            blocks.append(Text(f"{mark}: {cut:,} prompts were too long and lost their beginning."))
        for key, pair in (evaluation.scores.get("deviations") or {}).items():
            if isinstance(pair, list) and len(pair) == 2:
                name = evaluation.scores.get("protocol")
                text = f"{mark}: departs from protocol {name}: {key} is {shown(pair[1])}, not"
                blocks.append(Text(f"{text} {shown(pair[0])}.", warns=True))
    signatures = dict.fromkeys(
        f"{name}: {metric['signature']}"
        for _, e in found
        for name, metric in e.scores["metrics"].items()
        if metric.get("signature")
    )
    signatures |= dict.fromkeys(
        f"COMET: {e.comet['model']}"
        + (f", unbabel-comet {version}" if (version := e.comet.get("version")) else "")
        for _, e in found
        if e.comet
    )
    return blocks + [Text(signature) for signature in signatures]


def _score_plot(task: str, found: list[tuple[Run, Evaluation]], one: bool) -> Picture:
    rows: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = []
    name = found[0][1].scores["headline"]

    def held(some: list[tuple[Run, Evaluation]]) -> list[tuple[str, dict[str, Any]]]:
        metrics = [(e.which, e.scores["metrics"]) for _, e in some]
        return [(which, known[name]) for which, known in metrics if name in known]

    if one:
        sources = dict.fromkeys(s for _, e in found for s in e.scores["sources"])
        for source in sources if len(sources) > 1 else ():
            parts = [(e.which, e.scores["sources"].get(source)) for _, e in found]
            rows.append(
                (source, [(w, p["metrics"][name]) for w, p in parts if p and name in p["metrics"]])
            )
        rows.append(("all rows", held(found)))
        if means := [(e.which, e.scores["mean"]) for _, e in found if "mean" in e.scores]:
            rows.append((f"mean of {len(sources)}", means))
    else:
        for run in {id(run): run for run, _ in found}.values():
            rows.append((run.name, held([pair for pair in found if pair[0] is run])))
    title = f"{task}: {name} with 95 % intervals"
    return picture(f"scores-{task}", title, partial(plots.intervals, title, rows))


def paired(one: Evaluation, other: Evaluation) -> tuple[float, float, float] | None:
    """Difference of the first metric of two evaluations of the same rows, with its 95 % interval.

    Sources are averaged where the metric is their mean (``stats.paired_difference``).

    Returns:
        (difference, low, high); None for metrics that are no shares, or without scored rows.
    """
    if not one.metric["share"]:
        return None
    held = [_right(e) for e in (one, other)]
    whole = one.scores.get("count") == len(held[0])  # neither file is of another evaluation
    if not held[0] or not whole or held[0].keys() != held[1].keys():
        return None
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for key, (source, right) in held[0].items():
        label = source if "mean" in one.scores else ""
        groups.setdefault(label, []).append((right, held[1][key][1]))
    return paired_difference(groups.values())


def _right(e: Evaluation) -> dict[str, tuple[str, bool]]:
    """Example id -> (source, right) of scored.jsonl."""
    rows = rows_of(e.folder / "scored.jsonl")
    return {
        r["id"]: (source_of(r), r["correct"]) for r in rows if isinstance(r.get("correct"), bool)
    }


def _metrics(found: list[tuple[Run, Evaluation]]) -> list[str]:
    names = list(dict.fromkeys(m for _, e in found for m in e.scores["metrics"]))
    return [*names, COMET] if any("bleu" in name.lower() for name in names) else names


def _cell(e: Evaluation, metric: str, source: str | None = None) -> str:
    """A metric over a source, or over all rows."""
    if metric == COMET:
        return _comet(e, source)
    held = (e.scores if source is None else e.scores["sources"][source])["metrics"]
    return with_interval(held[metric]) if metric in held else "–"


def _by_source(found: list[tuple[Run, Evaluation]], with_run: bool = False) -> Table:
    """A row for each source and subject, then over all rows, then the unweighted mean."""
    names = _metrics(found)
    rows: list[list[str]] = []

    def add(label: str, part: dict[str, Any], run: Run, e: Evaluation, cells: list[str]) -> None:
        who = f"{run.name}, {e.which}" if with_run else e.which
        counts = [f"{part[key]:,}" if part else "" for key in ("count", "no_answer_found")]
        rows.append([label, who, counts[0], *cells, counts[1]])

    sources = dict.fromkeys(s for _, e in found for s in e.scores["sources"])
    for source in sources if len(sources) > 1 else ():
        for run, e in found:
            if part := e.scores["sources"].get(source):
                add(source, part, run, e, [_cell(e, m, source) for m in names])
    for run, e in found:
        add("all rows", e.scores, run, e, [_cell(e, m) for m in names])
    for run, e in found:
        if mean := e.scores.get("mean_of_sources"):
            held = e.scores["metrics"]
            cells = [
                scores.shown({**held[m], "value": mean[m]}) if m in mean and m in held else ""
                for m in names
            ]
            add(f"unweighted mean of {len(e.scores['sources'])} sources", {}, run, e, cells)
    head = ["source", "model", "rows", *(f"{m} (95 % interval)" for m in names), "no answer"]
    return Table(head, rows, "llr" + "r" * (len(names) + 1))


def _by_run(found: list[tuple[Run, Evaluation]]) -> Table:
    """A row for each run and subject: over all rows, and the mean of the sources."""
    names = _metrics(found)
    with_mean = any(e.mean is not None for _, e in found)
    rows = []
    for run, e in found:
        mean = (
            "–"
            if e.mean is None
            else scores.shown({**e.scores["metrics"][e.scores["headline"]], "value": e.mean})
        )
        part = [mean] if with_mean else []
        counts = f"{e.scores['count']:,}", f"{e.scores['no_answer_found']:,}"
        cells = [_cell(e, m) for m in names]
        rows.append([run.name, e.which, counts[0], *cells, *part, counts[1]])
    head = ["run", "model", "rows", *(f"{m} (95 % interval)" for m in names)]
    head += ["mean of sources"] if with_mean else []
    return Table([*head, "no answer"], rows, "llr" + "r" * (len(names) + with_mean + 1))


def _comet(e: Evaluation, source: str | None = None) -> str:
    if e.comet is None:
        return "not computed"
    if source is None:
        low, high = e.comet["ci95"]
        return f"{e.comet['score']:.2f} ({low:.2f} to {high:.2f})"
    value = (e.comet.get("sources") or {}).get(source)
    return f"{value:.2f}" if isinstance(value, float) else "–"
