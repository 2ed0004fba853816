"""Files of translations: CoVoST's tsv, parallel text files, reference lines, JSON rows."""

import re
from collections.abc import Iterator
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.data.rows import PAIR, BrokenRow, ends, is_rows, read_rows, read_text, record
from scalepeft.data.tasks.base import Split

Numbered = Iterator[tuple[int, Any]]
COVOST_SPLITS = {"train": ("train", "train_covost"), "valid": ("dev",), "test": ("test",)}
"""Ours -> column ``split`` of CoVoST-2's own files, as its get_covost_splits.py reads it."""


class ReferenceLine(str):
    """A line of the target language alone: enough to score a translation, not to make one."""


def read(source: str, split: Split) -> Numbered:
    """Yields (row number, row) of a source: as ``read_rows``, of a tsv, of ``A::B`` two text files
    or CoVoST-2's and Common Voice's tsv, of another file reference lines, for the test alone.
    Raises UserError: unreadable, not a pair, missing columns, a text file alone to train on.
    """
    files = [source] if source.startswith("hf://") else source.split(PAIR)
    if len(files) > 2:
        raise UserError(f"{source}: {len(files)} files joined by {PAIR}; a pair is two")
    rows = len(files) == 1 and is_rows(source)
    texts = [] if rows else [read_text(file) for file in files]
    if len(texts) == 2:
        yield from (_joined if all(map(_is_tsv, files, texts)) else _parallel)(files, texts, split)
    elif rows or re.match(r'\s*\[?\s*\{\s*["}]', texts[0]):
        yield from read_rows(source)
    elif _is_tsv(source, texts[0]):
        yield from _table(source, texts[0], {"sentence", "translation"})
    elif split == "test":
        yield from ((n, ReferenceLine(line)) for n, line in enumerate(lines_of(texts[0]), 1))
    else:
        fix = f"text files come in pairs, as FILE_SOURCE{PAIR}FILE_TARGET"
        raise UserError(f"{source}: neither JSON nor a tsv with a header; {fix}")


def lines_of(text: str) -> list[str]:
    """Lines as sacreBLEU and ``wc -l`` count them: other separators of Unicode belong to a text."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _parallel(files: list[str], texts: list[str], _: Split) -> Numbered:
    for file, text in zip(files, texts, strict=True):
        if not text or ends(file, ".tsv") or is_rows(file):
            raise UserError(
                f"{PAIR.join(files)}: {file} is {'no text file' if text else 'empty'}; a pair is"
                " two text files, or CoVoST-2's translations and Common Voice's validated.tsv"
            )
    first, second = map(lines_of, texts)
    if len(first) != len(second):
        fix = "they must go together line by line"
        raise UserError(f"{files[0]} has {len(first)} lines, {files[1]} {len(second)}: {fix}")
    pairs = enumerate(zip(first, second, strict=True), 1)
    yield from ((number, {"source": one, "target": other}) for number, (one, other) in pairs)


def _is_tsv(file: str, text: str) -> bool:
    columns = set(_header(text))
    return ends(file, ".tsv") or (len(columns) > 1 and bool(columns & {"sentence", "translation"}))


def _header(text: str) -> list[str]:
    return text.partition("\n")[0].removesuffix("\r").split("\t")


def _table(file: str, text: str, needed: set[str]) -> Numbered:
    """(line number, row by column) of a tsv; the first line is its header."""
    columns = _header(text)
    if missing := sorted(needed - set(columns)):
        raise UserError(
            f"{file}: no column {', '.join(missing)}; its first line has"
            f" {', '.join(columns)[:200]}; CoVoST-2's translations alone are named with Common"
            f" Voice's sentences, {file}{PAIR}VALIDATED_TSV"
        )
    for number, line in enumerate(lines_of(text)[1:], 2):
        if line:
            yield number, record(columns, _cells(line))


def _cells(line: str) -> list[str]:
    """Cells of a line without quoting, a backslash before what is to be taken as it is."""
    cells = re.findall(r"(?:^|\t)((?:\\.?|[^\\\t])*)", line)
    return [re.sub(r"\\(.?)", r"\1", cell) for cell in cells]


def _joined(files: list[str], texts: list[str], split: Split) -> Numbered:
    """CoVoST-2's translations with Common Voice's sentences, as get_covost_splits.py joins them."""
    if "translation" not in _header(texts[0]):
        files, texts = files[::-1], texts[::-1]
    wanted: dict[str, Any] = {}
    for number, row in _table(files[0], texts[0], {"path", "translation", "split"}):
        if isinstance(row, BrokenRow):
            yield number, BrokenRow(f"{row.reason} ({files[0]})")
        elif row["split"] in COVOST_SPLITS[split]:
            wanted[row["path"]] = row["translation"]
    if not wanted:
        what = f"no row with split {' or '.join(COVOST_SPLITS[split])} for data.{split}"
        raise UserError(f"{files[0]}: {what}")
    for number, row in _table(files[1], texts[1], {"path", "sentence"}):
        # A broken line of other recordings is not ours to judge; a missing one is found below.
        if not isinstance(row, BrokenRow) and row["path"] in wanted:
            yield number, {"sentence": row["sentence"], "translation": wanted.pop(row["path"])}
    if wanted:
        raise UserError(
            f"{files[1]}: {len(wanted)} sentences of {files[0]} are not in it, the first is"
            f" {next(iter(wanted))}; CoVoST-2 belongs to Common Voice 4.0"
        )
