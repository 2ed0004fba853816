"""``scalepeft score``: any system's output files against references, with the code of evaluate."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft import __version__
from scalepeft.build import task_of
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides, marks_of
from scalepeft.core.files import writing
from scalepeft.core.log import say
from scalepeft.data import rows as readers
from scalepeft.data.bitext import lines_of
from scalepeft.data.tasks.base import Example
from scalepeft.eval import scores
from scalepeft.eval.score_options import Options

KEYS = (
    "prediction", "output_pred", "hypothesis", "mt", "generated_text", "response", "text", "output",
)  # fmt: skip
"""Where rows of JSON may hold the text; the first one that they have."""


def run(options: Options) -> None:
    """Print the scores; write them where ``out`` is given. Predictions end at the protocol's stop
    texts. Raises UserError: an unknown task, broken files, predictions of other references.
    """
    config = _config(options)
    task = task_of(config)
    examples = task.examples("test")
    texts = match(read(options.predictions, options.key), examples, options, len(task.skipped))
    ended_at = {id_: scores.cut_at(text, config.evaluate.stop) for id_, text in texts.items()}
    summary, rows = scores.summarize(task, examples, ended_at)
    found = {key: getattr(options, key) for key in ("task", "predictions", "references")}
    found |= {"protocol": config.data.protocol, **summary}
    found |= {"task_version": task.version, "versions": {"scalepeft": __version__}}
    if options.out is not None:
        folder = Path(options.out)
        with writing(f"--out {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            scores.write(folder, found, rows)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for line in [*task.notes, *(f"left out: {where}" for where in task.skipped[:3])]:
        print(line)
    print("\n".join(scores.lines(found)))


def _config(options: Options) -> cfg.RunConfig:
    decided = marks_of(cfg.config_class("data", options.task))
    for setting in options.settings:
        key = setting.partition("=")[0]
        if key == "evaluate.stop":
            continue
        if not key.startswith("data."):
            raise UserError(f"{setting}: for score, settings are data.KEY=VALUE, evaluate.stop")
        marks = decided.get(cfg.renamed_key(key).removeprefix("data."))
        if marks is not None and Decides.SCORES not in marks:
            raise UserError(f"{setting}: decides nothing in score, which makes no predictions")
    files = (options.sources, options.references)
    data = {"name": options.task, "test": [readers.PAIR.join(filter(None, files))]}
    # Nothing is trained: what a run needs besides is of no effect.
    values = {"run_dir": "-", "data": data, "train": {"max_steps": 1}}
    return config_files.overlay(values, options.settings)


@dataclass(frozen=True)
class Prediction:
    """A text, the id it came with, and where it stands."""

    text: str
    id: str | None
    row: int


def read(file: str, key: str | None) -> list[Prediction]:
    """Read predictions. Raise UserError: unreadable, empty, or a row without a text in it."""
    if not Path(file).is_file():
        raise UserError(f"--predictions {file}: {readers.absent(Path(file))}")
    text = "" if (rows := readers.is_rows(file)) else readers.read_text(file)
    listed = readers.read_rows(file) if rows or _is_json(text) else enumerate(lines_of(text), 1)
    found = []
    for number, row in listed:
        try:
            found.append(_prediction(row, key, number))
        except UserError as error:
            raise UserError(f"{file}, row {number}: {error}") from None
    if not found:
        raise UserError(f"--predictions {file}: is empty")
    return found


def _is_json(text: str) -> bool:
    """A text may begin with a quote or a bracket too: its lines decide."""
    array = re.match(r'\s*(\[\s*["\[{\]]|\{\s*["}])', text)
    lines = (line.lstrip()[:1] for line in text.split("\n"))
    return array is not None or {*lines} - {""} in ({'"'}, {"{"}, {'"', "{"})


def _prediction(row: Any, key: str | None, number: int) -> Prediction:
    if isinstance(row, str):
        row, key = {"text": row}, "text"
    elif not isinstance(row, dict):
        wrong = f"must be a text or an object, not {type(row).__name__}"
        raise UserError(row.reason if isinstance(row, readers.BrokenRow) else wrong)
    used = key or next((k for k in KEYS if k in row), None)
    if used not in row:
        there = readers.one_line(", ".join(map(str, row)))
        fix = "name the one that holds the text with --key"
        raise UserError(f"no key {used or ', '.join(KEYS)}; it has {there}; {fix}")
    if not isinstance(row[used], str):
        raise UserError(f"'{used}' must be text, not {type(row[used]).__name__}")
    readers.check_utf8(row[used], "the text")
    return Prediction(row[used], None if row.get("id") is None else str(row["id"]), number)


def match(
    predictions: list[Prediction], examples: list[Example], options: Options, skipped: int
) -> dict[str, str]:
    """Example id -> prediction, by ids that come, else by order. Raises UserError: neither fits."""
    file, of = options.predictions, options.references
    known = {e.id for e in examples}
    by_id = {p.id: p for p in reversed(predictions) if p.id is not None}
    fault = ""
    if odd := next((p for p in predictions if p.id is None or by_id[p.id] is not p), None):
        fault = f"row {odd.row}: has no id, others have"
        if odd.id is not None:
            fault = f"row {odd.row}: id {odd.id} appears in row {by_id[odd.id].row} already"
    if known & by_id.keys():
        missing = [e.id for e in examples if e.id not in by_id]
        if fault:
            raise UserError(f"{file}, {fault}; a row can be scored once")
        if missing:
            said = f"rows of {of} have no prediction, the first is {missing[0]}"
            raise UserError(f"{file}: {len(missing)} of {len(examples)} {said}")
        if others := [p.id for p in predictions if p.id not in known]:
            said = f"predictions are of no row of {of} and left out, the first is {others[0]}"
            say(f"{file}: {len(others)} {said}")
        return {e.id: by_id[e.id].text for e in examples}
    # A predictions.jsonl of evaluate is not in the order of the rows.
    if ours := next((p.id for p in predictions if p.id and re.search(r"#\d+$", p.id)), None):
        what = f"its ids ({ours}, ...) are not those of {of} ({examples[0].id}, ...)"
        raise UserError(f"{file}: {what}; give the file that was predicted for")
    if skipped:
        raise UserError(
            f"{of}: {skipped} broken rows were left out, so the order no longer tells which"
            " prediction belongs to which row; repair them, or give the predictions ids"
        )
    if len(predictions) != len(examples):
        raise UserError(
            f"{file} has {len(predictions)} predictions, {of} {len(examples)} rows; they must match"
            f" one by one, or by id{f' ({fault})' if fault and by_id else ''}"
        )
    return {e.id: p.text for e, p in zip(examples, predictions, strict=True)}
