"""What ``scalepeft score`` was asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What ``scalepeft score`` was asked for.

    Attributes:
        task: commonsense, math, translation or sft
        predictions: FILE: text, line i for row i of the references, or json (lines), each a
            text or an object; objects that all have an ``id`` of the references go by it
        references: FILE: rows of the task, or text lines where the task takes them
        sources: FILE: source text of a translation, line i for line i of the references
        settings: data.KEY=VALUE: e.g. data.protocol=; evaluate.stop=
        key: of the predictions' objects that holds the text
        out: FOLDER: for scores.json and scored.jsonl
        json: print scores.json, not a table
    """

    task: str
    predictions: str
    references: str
    sources: str | None
    settings: list[str]
    key: str | None
    out: str | None
    json: bool
