"""Every form in which rows come: the same rows of each, one line for what is none, flat memory."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from scalepeft.core.errors import UserError
from scalepeft.data import bitext, rows
from scalepeft.eval import score_files

ROWS = [
    {"instruction": text, "output": f"the correct answer is {answer}", "answer": answer,
     "when": "2020-01-01"}
    for text, answer in [
        ("Is snow cold, café?", "true"), ('He said "no",\nand "1;2"', "false"), ("007", "answer1"),
        ("NA", "true"), ("", "false"),
    ]
]  # fmt: skip
NUMBERED = list(enumerate(ROWS, 1))
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table(separator: str = ",", rows: list[dict[str, Any]] = ROWS) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as f:
        f.write(content)
    return bytes(out.getvalue())


def arrow(new: Callable[..., Any], pieces: int = 2) -> bytes:
    held = pa.Table.from_pylist(ROWS)
    out = pa.BufferOutputStream()
    with new(out, held.schema) as f:
        for batch in held.to_batches(pieces):
            f.write_batch(batch)
    return bytes(out.getvalue())


def parquet_of(held: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    parquet.write_table(held, out, row_group_size=2)
    return bytes(out.getvalue())


FILES: dict[str, Callable[[], bytes]] = {
    "a.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "a.jsonl": lambda: LINES,
    "a.csv": table,
    "bom.csv": lambda: b"\xef\xbb\xbf" + table(),
    "a.tsv": lambda: table("\t"),
    "tabs.csv": lambda: table("\t"),
    "semicolons.csv": lambda: table(";"),
    "a.parquet": lambda: parquet_of(pa.Table.from_pylist(ROWS)),
    "parquet": lambda: parquet_of(pa.Table.from_pylist(ROWS)),
    "file.arrow": lambda: arrow(ipc.new_file),
    "stream.arrow": lambda: arrow(ipc.new_stream),
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.csv.gz": lambda: gzip.compress(table()),
    "a.jsonl.bz2": lambda: bz2.compress(LINES),
    "a.jsonl.xz": lambda: lzma.compress(LINES),
    "a.jsonl.zst": lambda: zstd(LINES),
    "zst-in-disguise.json": lambda: zstd(LINES),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_form(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(FILES[name]())
    assert list(rows.read_rows(str(file))) == NUMBERED
    if not name.endswith(".tsv"):  # whose form bitext has of CoVoST
        assert list(bitext.read(str(file), "train")) == NUMBERED


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_folders_of_save_to_disk(cache: Path) -> None:
    held = datasets.Dataset.from_list(ROWS)
    held.save_to_disk(cache / "one", num_shards=3)
    datasets.DatasetDict({"train": held, "test": held.select([0])}).save_to_disk(cache / "two")
    for source in ("one", "two:train", "two/train"):
        (named,) = rows.expand([f"{cache}/{source}"], "data.train")
        assert list(rows.read_rows(named)) == NUMBERED
    assert list(rows.read_rows(f"hf://{cache}/two::test")) == NUMBERED[:1]
    assert list(bitext.read(f"{cache}/two:train", "train")) == NUMBERED
    files = rows.paths_of(f"{cache}/one")
    assert [f.name for f in files] == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    assert rows.expand([f"{cache}/tw*/t*"], "data.train") == [f"{cache}/two/{s}" for s in
                                                             ("test", "train")]  # fmt: skip
    for source, said in (
        ("two", f"{cache}/two: name one of its splits, {cache}/two:SPLIT; train, test"),
        ("two:tset", f"{cache}/two:tset: no split 'tset'. Did you mean 'test'?"),
        ("one:train", f"{cache}/one:train: the set has no splits; name it as {cache}/one"),
    ):
        assert said in refused(lambda s=source: rows.expand([f"{cache}/{s}"], "data.train"))
    files[1].unlink()
    assert f"{files[1]}: no such file" in refused(lambda: rows.expand([f"{cache}/one"], "d"))
    (cache / "one/state.json").write_text("{}")
    assert "state.json: cannot be read" in refused(lambda: rows.paths_of(f"{cache}/one"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_folders_of_files_keep_texts(cache: Path, kind: str) -> None:
    """Pandas takes true for a truth value, 007 for 7, NA for nothing. (JSON's reader makes a date
    of one, which a task refuses by the field's name.)
    """
    content = {"csv": table(), "jsonl": LINES, "parquet": FILES["parquet"]()}[kind]
    (cache / "set").mkdir()
    (cache / f"set/train.{kind}").write_bytes(content)
    (cache / f"set/test.{kind}").write_bytes(content)

    def read(source: str) -> list[Any]:
        return [{**row, "when": str(row["when"])[:10]} for _, row in rows.read_rows(source)]

    assert read(f"hf://{cache}/set") == ROWS
    assert read(f"hf://{cache}/set::train[2:4]+test[-1:]") == ROWS[2:4] + ROWS[-1:]
    assert len(rows.paths_of(f"hf://{cache}/set")) == 2
    assert "Unknown split \"tset\". Should be one of ['train', 'test']" in refused(
        lambda: list(rows.read_rows(f"hf://{cache}/set::tset"))
    )
    assert "'small' not found. Available: ['default']" in refused(
        lambda: list(rows.read_rows(f"hf://{cache}/set:small:train"))
    )


def refused(what: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        what()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    return str(caught.value)


not_utf8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
twice = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
BROKEN: dict[str, tuple[bytes, str]] = {
    "cut.parquet": (FILES["parquet"]()[:-40], "cannot be read: Parquet magic bytes not found"),
    "short.parquet": (b"PAR1", "cannot be read"),
    "cut.arrow": (arrow(ipc.new_file)[:-40], "cannot be read"),
    "cut-stream.arrow": (arrow(ipc.new_stream)[:-60], "cannot be read"),
    "cut-after-a-batch.arrow": (arrow(ipc.new_stream)[:-8], "ends without an end mark"),
    "twice.parquet": (parquet_of(twice), "a column appears twice"),
    "utf8.parquet": (parquet_of(pa.table({"a": not_utf8})), "'utf-8' codec can't decode"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "a column appears twice in"),
    "quote.csv": (b'a,b\n1,2\n3,4\n"5,6\n7,8\n', "row 3 (up to line 5): unexpected end of data"),
    "inside.csv": (b'a,b\n"5" x,6\n', "row 1 (up to line 2): ',' expected after '\"'"),
    "mac.csv": (b"a,b\r1,2\r", "row 0 (up to line 1): new-line character"),
    "utf16.csv": (table().decode().encode("utf-16"), "is not text"),
    "cjk-utf16.csv": ("雪冷火熱".encode("utf-16"), "is not text"),
    "zip.csv": (b"PK\x03\x04\x14\0\0\0", "is not text"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-20], "cannot be read: Compressed file ended"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-20], "cannot be read: Compressed file ended"),
    "cut.jsonl.zst": (zstd(LINES)[:-5], "cannot be read: Truncated"),
    "bad.jsonl.xz": (b"\xfd7zXZ\0" + b"x" * 40, "cannot be read"),
    "a.parquet.gz": (gzip.compress(FILES["parquet"]()), "allowed: text in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    message = refused(lambda: list(rows.read_rows(str(tmp_path / name))))
    assert message.startswith(f"{tmp_path}/{name}") and said in message


def test_a_record_of_another_width_is_one_broken_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"a,b\n1,2\n\n3\n5,6,7\n,\0\n")
    narrow, wide = (rows.BrokenRow(f"{n} cells, the header has 2 columns") for n in (1, 3))
    assert [row for _, row in rows.read_rows(str(file))] == [
        {"a": "1", "b": "2"}, narrow, wide, {"a": "", "b": "\0"},
    ]  # fmt: skip
    for content in (b"", b"a,b\n"):
        file.write_bytes(content)
        assert list(rows.read_rows(str(file))) == []


@pytest.mark.parametrize("script", ["set.py", "other.py"])
def test_a_loading_script_is_refused_with_the_copy_to_take(cache: Path, script: str) -> None:
    (cache / "set").mkdir()
    (cache / "set" / script).write_text("raise SystemExit('code of a data set was run')")
    message = refused(lambda: list(rows.read_rows(f"hf://{cache}/set")))
    assert f"scripts are no longer supported, but found {script}" in message
    assert "hf://DATASET@refs/convert/parquet:CONFIG:SPLIT" in message


def test_a_set_without_network_says_what_to_fetch(cache: Path) -> None:
    (cache / "set").mkdir()
    (cache / "set/train.parquet").write_bytes(FILES["parquet"]())
    made = datasets.load_dataset_builder(str(cache / "set"))
    made.download_and_prepare()
    kept = cache / "datasets/known___set/default/0.0.0"  # as a run with a network leaves it
    kept.mkdir(parents=True)
    Path(made.cache_dir).rename(kept / "abc")
    for part in (kept / "abc").glob("*.arrow"):
        part.rename(part.with_name("set-train.arrow"))
    sources = [
        "hf://known/set@v1",
        "hf://a/b",
        "hf://a/b@v1:x:train",
        "hf://a/b@refs/convert/parquet:x:train[:9]",
    ]
    code = f"""
from scalepeft.data import rows
for source in {sources}:
    try:
        list(rows.read_rows(source))
    except rows.UserError as error:
        print(error)
print(len(list(rows.read_rows("hf://known/set"))), len(rows.content("hf://known/set")))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    *lines, count = done.stdout.splitlines()
    assert count == "5 64", done.stderr
    for source, said in zip(sources, lines, strict=True):
        assert said.startswith(f"{source}: cannot be read: ") and "run scalepeft fetch" in said


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    for read in (lambda s: list(rows.read_rows(s)), lambda s: rows.expand([s], "data.train")):
        assert "a pipe or device, not a file" in refused(lambda r=read: r(f"{tmp_path}/a.json"))


def test_content_is_that_of_the_bytes(cache: Path) -> None:
    (cache / "a.json").write_bytes(LINES)
    (cache / "b.json").write_bytes(LINES)
    first = rows.content(f"{cache}/a.json")
    assert first == rows.content(f"{cache}/b.json")
    (cache / "b.json").write_bytes(LINES + b"\n")
    assert first != rows.content(f"{cache}/b.json")
    datasets.Dataset.from_list(ROWS).save_to_disk(cache / "set")
    before = rows.content(f"{cache}/set")
    (data,) = rows.paths_of(f"{cache}/set")
    data.write_bytes(data.read_bytes() + b"\0")
    assert before != rows.content(f"{cache}/set")
    (cache / "folder").mkdir()
    (cache / "folder/train.csv").write_bytes(table())
    before = rows.content(f"hf://{cache}/folder")
    (cache / "folder/train.csv").write_bytes(table(rows=ROWS[1:]))
    assert before != rows.content(f"hf://{cache}/folder")
    assert rows.content(f"hf://{cache}/folder") != rows.content(f"hf://{cache}/folder::test")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_rows_are_streamed(tmp_path: Path, name: str) -> None:
    """20 MB of rows in less than 4 MB, of pyarrow's own too."""
    many = [{"a": f"{i} " + "x" * 2000, "b": "y"} for i in range(10_000)]
    lines = "".join(json.dumps(row) + "\n" for row in many).encode()
    file = tmp_path / name
    if name == "a.parquet":
        held = pa.Table.from_pylist(many)
        parquet.write_table(held, file, compression="none", use_dictionary=False)
        del held
    else:
        made = {"a.csv": table(rows=many), "a.jsonl.gz": gzip.compress(lines, 1)}
        file.write_bytes(made.get(name, lines))
    next(iter(rows.read_rows(str(file))))  # what is imported is not counted
    before, held_by_arrow = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        number = 0
        for number, _ in rows.read_rows(str(file)):  # noqa: B007
            held_by_arrow = max(held_by_arrow, pa.total_allocated_bytes() - before)
        assert number == 10_000 and held_by_arrow < 4e6
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_options_of_a_sets_card_are_kept(cache: Path) -> None:
    """Without a header the first record is a row, not the columns' names."""
    (cache / "set").mkdir()
    (cache / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: own\n  data_files: a.csv\n  names: [a, b]\n---\n"
    )
    (cache / "set/a.csv").write_bytes(b"x,y\nz,w\n")
    assert [row["a"] for _, row in rows.read_rows(f"hf://{cache}/set:own")] == ["x", "z"]


def test_predictions_and_pairs_in_tables(tmp_path: Path) -> None:
    for name in ("p.csv", "p.parquet"):
        told = [{"id": str(i), "prediction": f"it is {i}"} for i in range(2)]
        (tmp_path / name).write_bytes(
            table(rows=told) if name == "p.csv" else parquet_of(pa.Table.from_pylist(told))
        )
        found = score_files.read(f"{tmp_path}/{name}", None)
        assert [(p.id, p.text) for p in found] == [("0", "it is 0"), ("1", "it is 1")]
    pair = f"{tmp_path}/p.csv::{tmp_path}/p.csv"
    assert "is no text file" in refused(lambda: list(bitext.read(pair, "train")))
    assert "for translation alone" in refused(lambda: list(rows.read_rows(pair)))
