"""Rows of files: JSON, json lines, csv, and what ``tables`` reads; plain or compressed."""

import bz2
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from scalepeft.core.errors import UserError
from scalepeft.core.files import digest
from scalepeft.data import tables

PAIR = "::"  # between two parallel files, line i of one belonging to line i of the other
CELL = 2**26  # characters; a longer cell of a csv is a quote that nothing closes


def paths_of(source: str) -> list[Path]:
    """The files of a source; none for a data set of the hub that is no local folder."""
    if (files := tables.saved(source)) is not None:
        return files
    if not source.startswith("hf://"):
        return [Path(p) for p in source.split(PAIR)]
    folder = Path(tables.hub_name(source)[0] or "/dev/null")
    inside = (folder / name for name in glob.glob("**", root_dir=folder, recursive=True))
    return sorted(path for path in inside if path.is_file())


def content(source: str) -> str:
    """A digest of what a source holds: of its files, or what ``datasets`` knows a hub set by."""
    hub = source.startswith("hf://")
    if files := paths_of(source):
        with tables.explained(source):
            parts = [f"{file if hub else file.suffix} {digest(file)}" for file in files]
    else:
        made, split = tables.builder(source)
        parts = [made.dataset_name, made.config_id, str(made.config.version), made.hash, split]
    return hashlib.sha256("\n".join([source * hub, *parts]).encode()).hexdigest()


def expand(sources: list[str], key: str) -> list[str]:
    """Resolves patterns, but of ``hf://`` and pairs. Raises UserError where one matches no file."""
    files: list[str] = []
    for source in sources:
        gone = [path for path in paths_of(source) if not path.is_file()]
        named = sorted(glob.glob(source, recursive=True)) if gone else [source]
        matches = [name for name in named if all(path.is_file() for path in paths_of(name))]
        if not matches:
            raise UserError(f"{key}: {gone[0]}: {absent(gone[0])}")
        files += matches
    return files


def absent(path: Path) -> str:
    """Says of a path that is no file what it is."""
    what = "a pipe or device, not a file" if path.exists() else "no such file"
    if path.is_dir():
        what = f"a folder, not a file; name its files as {path}/*, or a data set as hf://{path}"
    return f"{what} (from {Path.cwd()})"


def source_labels(files: list[str]) -> list[str]:
    """Names sources in example ids: the path's last two parts, more where two would be the same."""
    for parts in range(2, 64):
        labels = [f if f.startswith("hf://") else "/".join(Path(f).parts[-parts:]) for f in files]
        if len(set(labels)) == len(set(files)):
            break
    # A file listed twice is trained on twice, under its own ids.
    times = [labels[: i + 1].count(label) for i, label in enumerate(labels)]
    return [f"{label}({n})" if n > 1 else label for label, n in zip(labels, times, strict=True)]


def read_rows(source: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row) of a source, streamed but for a JSON array; the content
    decides, not the file name, but for ``.csv`` and ``.tsv``. A line that is no JSON, an object
    with a key twice and a csv record of another width are ``BrokenRow``s; of json lines the number
    is the line's. Raises UserError: it cannot be read, or is of no format.
    """
    if (files := tables.saved(source)) is not None:
        yield from enumerate(chain.from_iterable(map(tables.rows, files)), 1)
    elif source.startswith("hf://"):
        with tables.explained(source):
            yield from enumerate(tables.prepared(*tables.builder(source)), 1)
    elif PAIR in source:
        raise UserError(f"{source}: a pair of files joined by {PAIR} is for translation alone")
    elif _head(source).startswith(tables.MAGIC):
        yield from enumerate(tables.rows(Path(source)), 1)
    elif ends(source, ".csv", ".tsv"):
        yield from enumerate(_csv_rows(source), 1)
    else:
        yield from _json_rows(source)


def is_rows(source: str) -> bool:
    """Whether a source is rows for every task, and no text that may hold something else."""
    known = source.startswith("hf://") or tables.saved(source) is not None
    named = known or ends(source, ".json", ".jsonl", ".csv")
    return named or _head(source).startswith(tables.MAGIC)


def ends(file: str, *suffixes: str) -> bool:
    """Whether a file's name ends so, but for what compressed it."""
    return re.sub(r"\.(gz|bz2|xz|zst)$", "", file.lower()).endswith(suffixes)


def _json_rows(source: str) -> Iterator[tuple[int, Any]]:
    with open_text(source) as lines:
        bare = (line.lstrip(" \t\r\n\ufeff").strip() for line in lines)
        first = next(filter(None, bare), "")
        if first[:1] not in ("", "[", "{", '"') and not any(s[:1] in ("{", '"') for s in bare if s):
            raise UserError(
                f"{source}: is neither JSON nor JSON lines (it begins with"
                f" {read_text(source, 200).strip()[:40]!r}); allowed: one array of objects, one"
                " object per line, or a csv or tsv that is named so"
            )
    if first[:1] == "[" or (first[:1] == "{" and isinstance(_parsed(first), BrokenRow)):
        whole = _parsed(read_text(source))
        if isinstance(whole, list | dict):
            yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
            return
        if first[:1] == "[":
            fix = "an array must parse as a whole (json lines can be skipped row by row)"
            raise UserError(f"{source}: {whole.reason}; {fix}")
    with open_text(source) as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix("\ufeff").removesuffix("\n")  # BOMs of files put together
            if line.strip():
                yield number, _parsed(line)


def _csv_rows(source: str) -> Iterator[Any]:
    """Records of a csv by their header; what alone of comma, tab, ; and | is in that separates."""
    csv.field_size_limit(CELL)
    with open_text(source) as lines:
        first = next(lines, "")
        found = [s for s in "\t,;|" if s in first]
        separator = found[0] if len(found) == 1 else "\t" if ends(source, ".tsv") else ","
        records = csv.reader(chain([first], lines), delimiter=separator, strict=True)
        number, columns = 0, list[str]()
        try:
            columns = next(filter(None, records), [])
            if len(set(columns)) < len(columns):
                raise UserError(f"{source}: a column appears twice in {columns}")
            for number, cells in enumerate(filter(None, records), 1):  # noqa: B007
                yield record(columns, cells)
        except csv.Error as error:
            where = f"row {number + bool(columns)} (up to line {records.line_num})"
            quotes = 'a cell in quotes ends with one, and has "" for each inside'
            raise UserError(f"{source}, {where}: {error}; {quotes}") from None


def record(columns: list[str], cells: list[str]) -> "dict[str, str] | BrokenRow":
    """A row of cells by the names in the header."""
    if len(cells) == len(columns):
        return dict(zip(columns, cells, strict=True))
    return BrokenRow(f"{len(cells)} cells, the header has {len(columns)} columns")


def _parsed(text: str) -> Any:
    """A value of JSON, or why it is none."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return BrokenRow(f"broken JSON at {line}column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:  # ValueError: numbers of thousands of digits
        return BrokenRow(f"broken JSON: {str(error)[:80]}")


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A dict; json would take the last of two equal keys without a word."""
    held = dict(pairs)
    if len(held) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return BrokenRow(f"key '{twice}' appears twice in one object")
    return next((value for value in held.values() if isinstance(value, BrokenRow)), held)


def read_text(source: str, length: int = -1) -> str:
    """Return a file's text, or its first so many characters; see ``open_text``."""
    with open_text(source) as f:
        return f.read(length)


@contextmanager
def open_text(source: str) -> Iterator[TextIO]:
    """Open a file's text, uncompressed, by lines that end with LF; bytes that are not UTF-8 come
    out as lone surrogates, for ``check_utf8``. Raises UserError: unreadable, or no text, also
    later.
    """
    with tables.explained(source), _binary(source, _head(source)) as raw:
        start = raw.peek(16)[:16]
        # UTF-16, zip, parquet inside gzip, zeros after a crash
        if re.search(rb"[\0-\x08\x0e-\x1f]|^\xff\xfe|^\xfe\xff", start):
            raise UserError(
                f"{source}: is not text (it begins with {start!r}); allowed: text in UTF-8, plain"
                " or compressed by gzip, bzip2, xz or zstd; parquet and arrow, uncompressed"
            )
        yield io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="\n")


def _binary(source: str, head: bytes) -> io.BufferedReader:
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # of the libraries for zstd the one that is there

        return io.BufferedReader(pyarrow.input_stream(source, compression="zstd"))
    kinds: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opened = next((kind for magic, kind in kinds.items() if head.startswith(magic)), open)
    return io.BufferedReader(opened(source, "rb"))


def _head(source: str) -> bytes:
    """The first bytes of a file; what is none is refused, a pipe would be waited for."""
    if not Path(source).is_file():
        raise UserError(f"{source}: {absent(Path(source))}")
    with tables.explained(source), open(source, "rb") as f:
        return f.read(10)


@dataclass(frozen=True)
class BrokenRow:
    """A line that did not parse, in place of its row."""

    reason: str


def text_field(row: Any, key: str, required: bool = True) -> str:
    """``row[key]`` as text, "" for a null that may be; UserError: missing, empty, not UTF-8."""
    if isinstance(row, BrokenRow):
        raise UserError(row.reason)
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object with keys, not {type(row).__name__}")
    if key not in row and required:
        there = ", ".join(map(str, row)) or "no keys"
        raise UserError(f"key '{key}' is missing; the row has {there}")
    value = row.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        shown = reprlib.repr(value)[:40]
        raise UserError(f"'{key}' must be text, not {type(value).__name__} ({shown})")
    if required and not value.strip():
        raise UserError(f"'{key}' is empty")
    check_utf8(value, f"'{key}'")
    if "\0" in value:
        raise UserError(f"'{key}' holds a NUL character")
    return value


def one_line(reason: str) -> str:
    """A reason fit for one line of a terminal or a file, whatever the row put into it."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in reason[:2000])
    return shown if len(shown) <= 500 else f"{shown[:400]} ... {shown[-80:]}"


def check_utf8(value: str, what: str) -> None:
    """Refuses text that was no UTF-8 in its file."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not valid UTF-8") from None


def fill(template: str, values: dict[str, str], key: str) -> str:
    """Replaces ``{name}`` of these names alone. Raises UserError: a field that rows do not have."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            allowed = ", ".join(f"{{{name}}}" for name in values)
            raise UserError(f"{key} uses {match[0]}; rows have {allowed}")
        return values[match[1]]

    return re.sub(r"\{([a-z_]+)\}", value, template)
