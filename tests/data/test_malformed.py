"""Malformed data of every kind, over the three tasks: named with file and row under ``stop``, left
out and counted under ``skip``, and the good rows as if the others had never been there.
"""

import codecs
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import call
from tokenized import tokenize

from scalepeft.build import task_of
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.data import token_file
from scalepeft.data.tasks.base import Task, prepared_for, to_prepared
from scalepeft.eval import score_files as score
from scalepeft.models import hub, tiny
from scalepeft.models import hub as models

TASKS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    # a good row, its key of what is asked, of what is answered, settings
    "commonsense": (
        {"instruction": "Is ice cold, café?", "output": "it is true", "answer": "true"},
        "instruction", "output", {},
    ),
    "math": (
        {"query": "7 plus 5, café?", "response": "It is 12.\nThe answer is: 12"},
        "query", "response", {"test_rows": "keep"},
    ),
    "translation": (
        {"source": "Der Schnee, café", "target": "The snow, café"},
        "source", "target", {"source_language": "de", "target_language": "en"},
    ),
}  # fmt: skip


EVERY = pytest.mark.parametrize("name", TASKS)


def task(name: str, *files: Path | str, **settings: Any) -> Task:
    values = {"name": name, "train": [str(f) for f in files], **TASKS[name][3], **settings}
    return task_of(config.from_dict({"run_dir": "x", "train": {"max_steps": 1}, "data": values}))


def error(made: Task) -> str:
    with pytest.raises(UserError) as caught:
        made.examples("train")
    said = str(caught.value)
    assert said.isprintable() and len(said) < 1500, said
    return said


def good(name: str, number: int) -> bytes:
    """A good row, which differs from the others."""
    row, asked, _, _ = TASKS[name]
    return json.dumps({**row, asked: f"{row[asked]} {number}"}, ensure_ascii=False).encode()


def expected(name: str, file: Path, *numbers: int) -> list[tuple[str, str]]:
    """(id, question) of these rows."""
    row, asked, _, _ = TASKS[name]
    return [(f"{file.parent.name}/{file.name}#{i}", f"{row[asked]} {i}") for i in numbers]


def found(made: Task) -> list[tuple[str, str]]:
    return [(e.id, e.meta["question"]) for e in made.examples("train")]


Spoil = Callable[[dict[str, Any], str, str], str | bytes]


def with_value(value: Any) -> Spoil:
    return lambda row, asked, _: json.dumps({**row, asked: value})


def raw(old: str, new: bytes) -> Spoil:
    def spoil(row: dict[str, Any], asked: str, answered: str) -> bytes:
        line = json.dumps(row, ensure_ascii=False).encode()
        changed = line.replace(old.format(asked=asked, answered=answered).encode(), new)
        assert changed != line
        return changed

    return spoil


ROWS: dict[str, tuple[Spoil, str]] = {
    # what the row is made of, what is said of it ({asked}: the task's key)
    "cut in the middle": (lambda r, *_: json.dumps(r)[:-9], "broken JSON at column"),
    "python's repr": (lambda r, *_: repr(r), "Expecting property name"),
    "trailing comma": (lambda r, *_: json.dumps(r)[:-1] + ",}", "broken JSON at column"),
    "a comment": (lambda r, *_: "// " + json.dumps(r), "broken JSON at column"),
    "two in a line": (lambda r, *_: json.dumps(r) * 2, "Extra data"),
    "plain text": (lambda r, *_: "so, it is", "column 1: Expecting value"),
    "NUL bytes alone": (lambda *_: b"\0" * 40, "broken JSON at column 1"),
    "a NUL byte": (raw("café", b"caf\0e"), "broken JSON at column"),
    "an escaped NUL": (with_value("a\0b"), "'{asked}' holds a NUL character"),
    "latin-1": (raw("é", b"\xe9"), "'{asked}' is not valid UTF-8"),
    "a lone surrogate": (with_value("a\ud800"), "'{asked}' is not valid UTF-8"),
    "a surrogate as a key": (
        lambda r, a, _: json.dumps({k + "\udfff" * (k == a): v for k, v in r.items()}),
        "{asked}\\udfff",
    ),
    "a control character": (raw("café", b"a\tb"), "Invalid control character"),
    "a number": (with_value(7), "'{asked}' must be text, not int (7)"),
    "a huge float": (raw('"{asked}": "', b'"x": 1e999, "x": "'), "key 'x' appears twice"),
    "digits without end": (
        lambda r, a, _: json.dumps({**r, a: 1}).replace("1,", "1" * 5000 + ","),
        "broken JSON: Exceeds the limit",
    ),
    "null": (with_value(None), "'{asked}' must be text, not NoneType"),
    "an object": (with_value({"a": 1}), "'{asked}' must be text, not dict"),
    "a blank text": (with_value(" \u3000\n\t"), "'{asked}' is empty"),
    "nested too deep": (
        lambda r, a, _: json.dumps({**r, a: 1}).replace("1,", "[" * 10**5 + "]" * 10**5 + ","),
        "broken JSON: maximum recursion depth exceeded",
    ),
    "a key twice": (
        lambda r, a, _: json.dumps(r)[:-1] + f', "{a}": "other"}}',
        "key '{asked}' appears twice in one object",
    ),
    "a key twice inside": (
        lambda r, *_: json.dumps(r)[:-1] + ', "more": {"a": 1, "a": 1}}',
        "key 'a' appears twice in one object",
    ),
    "no such key": (
        lambda r, a, _: json.dumps({k: v for k, v in r.items() if k != a}), "the row has ",
    ),
    "a row as a text": (lambda r, *_: json.dumps(json.dumps(r)), "an object with keys, not str"),
    "a megabyte of keys": (
        lambda r, *_: json.dumps({f"key{i}": 1 for i in range(50_000)}), " ... ",
    ),
    "no keys": (lambda *_: "{}", "the row has no keys"),
}  # fmt: skip


@EVERY
@pytest.mark.parametrize("case", ROWS)
def test_a_broken_row_is_named_and_costs_nothing_but_itself(
    tmp_path: Path, name: str, case: str
) -> None:
    row, asked, answered, _ = TASKS[name]
    spoil, said = ROWS[case]
    line = spoil(row, asked, answered)
    line = line if isinstance(line, bytes) else line.encode()
    file = tmp_path / "rows.json"  # lines, whatever its name says
    file.write_bytes(b"\n".join((good(name, 1), b"", line, good(name, 4), b"")))
    message = error(task(name, file))
    assert message.startswith(f"{file}, row 3: "), message
    assert said.format(asked=asked) in message
    assert message.endswith("; repair it, or data.on_error=skip leaves it out")
    made = task(name, file, on_error="skip")
    assert found(made) == expected(name, file, 1, 4)
    assert len(made.skipped) == 1
    assert made.skipped[0].isprintable() and message.startswith(made.skipped[0])


@EVERY
@pytest.mark.parametrize("key", [1, 2])
@pytest.mark.parametrize("value", [None, "", " ", 5, [], {}, float("nan")], ids=repr)
def test_every_required_key_must_hold_text(tmp_path: Path, name: str, key: int, value: Any) -> None:
    row, required = TASKS[name][0], str(TASKS[name][key])
    (tmp_path / "a.json").write_text(json.dumps([row, {**row, required: value}, row]))
    message = error(task(name, tmp_path / "a.json"))
    assert f"a.json, row 2: '{required}' " in message


OWN: list[tuple[str, dict[str, Any], str]] = [
    ("commonsense", {"answer": "answer1"}, "'output' says none of the answers, 'answer' answer1"),
    ("commonsense", {"answer": "false"}, "'output' says true, 'answer' false"),
    ("commonsense", {"answer": "TRUE"}, "'answer' is 'TRUE'; allowed: true, false"),
    ("commonsense", {"answer": None}, "'answer' must be text, not NoneType"),
    ("commonsense", {"answer": ["true"]}, "'answer' must be text, not list"),
    ("math", {"query": ..., "response": ..., "question": "q", "answer": "5 #### 5 apples"},
     "'answer' has '5 apples' after ####; expected a number"),
    ("math", {"query": ..., "response": ..., "problem": "q", "solution": "it is 5"},
     "'solution' has no \\boxed{} answer"),
    ("math", {"query": ..., "response": ..., "problem": "q", "solution": "s",
              "answer": float("inf")}, "'answer' is inf"),
    ("math", {"query": ..., "response": ..., "instruction": "q", "output": "o",
              "answer": float("nan")}, "'answer' is"),
    ("math", {"query": ..., "response": ..., "instruction": "q", "output": "o",
              "answer": True}, "'answer' must be text, not bool"),
    ("translation", {"target": "a\nb"}, "the translation holds a line break"),
    ("translation", {"source": ..., "target": ..., "translation": {"de": "a"}},
     "'translation' has de, not 'en' (data.target_language)"),
    ("translation", {"source": ..., "target": ..., "translation": {}}, "'translation' has nothing"),
    ("translation", {"source": ..., "target": ..., "translation": None}, "the row has translation"),
    ("translation", {"source": ..., "target": ..., "translation": [{"de": "a", "en": "b"}]},
     "the row has translation"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), OWN)
def test_rows_that_are_broken_for_one_task(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    row = {k: v for k, v in {**TASKS[name][0], **changes}.items() if v is not ...}
    file = tmp_path / "a.json"
    file.write_text(json.dumps([json.loads(good(name, 1)), row, json.loads(good(name, 3))]))
    assert f"{file}, row 2: {said}" in error(task(name, file))
    made = task(name, file, on_error="skip")
    assert found(made) == expected(name, file, 1, 3)
    assert [said in where for where in made.skipped] == [True]


FINE: dict[str, Callable[[list[bytes]], bytes]] = {
    "mixed line ends": lambda rows: rows[0] + b"\r\n" + b"\n".join(rows[1:]),
    "boms of files put together": lambda rows: b"\n".join(codecs.BOM_UTF8 + r for r in rows),
    "an array in one line": lambda rows: b"[" + b",".join(rows) + b"]",
    "space around": lambda rows: b" \t" + b" \r\n".join(rows) + b"\r\n \r\n",
    "other keys": lambda rows: b"\n".join(
        r[:-1] + b', "id": 3, "x": null, "prepared": "yes", "y": [{"z": NaN}]}' for r in rows
    ),
    "gzips put together": lambda rows: b"".join(gzip.compress(r + b"\n") for r in rows),
}


@EVERY
@pytest.mark.parametrize("case", FINE)
def test_harmless_oddities_lose_nothing(tmp_path: Path, name: str, case: str) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(FINE[case]([good(name, i) for i in (1, 2, 3)]))
    made = task(name, file)
    assert found(made) == expected(name, file, 1, 2, 3)
    assert made.skipped == []


@EVERY
def test_text_comes_as_it_stands(tmp_path: Path, name: str) -> None:
    """Separators of Unicode, quotes, other scripts, an emoji of two escapes; null where nothing
    needs to stand.
    """
    row, asked, _, _ = TASKS[name]
    text = 'a\u2028b\x85c\u200bd "e" \\n {f} \U0001f600 ﷽'
    content = json.dumps({**row, asked: text, "input": None})  # \\ud83d\\ude00
    (tmp_path / "a.jsonl").write_text(content + "\n" + json.dumps({**row, asked: text + "!"}))
    rows = found(task(name, tmp_path / "a.jsonl"))
    assert [question for _, question in rows] == [text, text + "!"]


@EVERY
def test_rows_of_a_megabyte_are_read(tmp_path: Path, name: str) -> None:
    row, asked, _, _ = TASKS[name]
    long = "and ice " * 2**17 + "?"
    (tmp_path / "a.json").write_text(json.dumps([{**row, asked: long}, row]))
    rows = found(task(name, tmp_path / "a.json"))
    assert [question for _, question in rows] == [long, row[asked]]


def test_rows_of_a_megabyte_are_cut_and_counted(tmp_path: Path) -> None:
    row, file = TASKS["translation"][0], tmp_path / "a.json"
    long = {**row, "target": "and ice " * 2**17}
    file.write_bytes(good("translation", 1) + b"\n" + json.dumps(long).encode())
    made = task("translation", file)
    tokenizer = models.load_tokenizer(hub.ModelConfig(), tiny.make(0))
    tokens = tokenize(made.examples("train"), tokenizer, made.config)
    assert (len(tokens), tokens.cut, tokens.lost) == (2, 1, 0)
    assert tokens.offsets.diff()[1] == made.config.cutoff == 512
    (line,) = token_file.cut_rows(tokens, made.config, "train")
    assert "1 rows longer than data.cutoff=512 were cut" in line


LINES = b'{"a": "b"}\n' * 50


FILES: dict[str, tuple[bytes, str]] = {
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "is neither JSON nor JSON lines (it begins with 'version https://git-lfs",
    ),
    "error page": (
        b"\n<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
        "is neither JSON nor JSON lines (it begins with '<!DOCTYPE html>\\n<html><body>404",
    ),
    "csv": (b"instruction,output\na,b\n", "is neither JSON nor JSON lines"),
    "parquet": (b"PAR1\x15\x04\x15", "cannot be read: Parquet file size is 7 bytes"),
    "zip": (b"PK\x03\x04\x14\0\0", "is not text"),
    "utf-16": (LINES.decode().encode("utf-16"), "is not text"),
    "zeros": (b"\0" * 4096, "is not text"),
    "cut gzip": (gzip.compress(LINES)[:-9], "cannot be read: Compressed file ended before"),
    "spoilt gzip": (gzip.compress(LINES)[:-8] + b"\0" * 8, "cannot be read: CRC check failed"),
    "gzip and more": (gzip.compress(LINES) + b"more", "cannot be read: Not a gzipped file"),
    "nothing": (b"", "no usable row, the file is empty"),
    "a mark alone": (codecs.BOM_UTF8, "no usable row, the file is empty"),
    "blank": (b" \r\n\n\t\n", "no usable row, the file is empty"),
    "an empty array": (b" [ ]\n", "no usable row, the file is empty"),
    "an empty gzip": (gzip.compress(b""), "no usable row, the file is empty"),
    "two arrays": (b'[{"a": 1}]\n[{"a": 1}]', "at line 2, column 1: Extra data; an array must"),
    "cut array": (b'[\n{"a": "1"},\n{"a": "2', "at line 3, column 7: Unterminated string"),
    "array of arrays": (b'[["a", "b"], ["c", "d"]]', "row 1: a row must be an object with keys"),
    "rows over lines": (b'{\n"a": 1\n}\n{\n"a": 2\n}\n', "row 1: broken JSON at column 2"),
    "no rows": (b'"a"\n', "row 1: a row must be an object with keys, not str"),
}  # fmt: skip


@EVERY
@pytest.mark.parametrize("case", FILES)
def test_a_file_of_which_nothing_can_be_used_is_named(tmp_path: Path, name: str, case: str) -> None:
    content, said = FILES[case]
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    for on_error in ("stop", "skip"):
        message = error(task(name, file, on_error=on_error))
        assert str(file) in message and said in message, message


@EVERY
def test_an_empty_file_among_others_is_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").write_bytes(good(name, 1))
    (tmp_path / "b.json").write_bytes(b"")
    message = error(task(name, f"{tmp_path}/*.json"))
    assert message == (
        f"{tmp_path}/b.json: no usable row, the file is empty; copy it again, or"
        " data.on_error=skip leaves it out"
    )
    made = task(name, f"{tmp_path}/*.json", on_error="skip")
    assert found(made) == expected(name, tmp_path / "a.json", 1)
    assert made.skipped == [f"{tmp_path}/b.json: no usable row, the file is empty"]


@EVERY
def test_broken_rows_alone_are_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").write_text("{}\n[]\n1\n")
    message = error(task(name, tmp_path / "a.json", on_error="skip"))
    assert f"no usable row in {tmp_path}/a.json: 3 left out, the first is {tmp_path}/a" in message


PAIRS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "utf-16": ({"a": b"x\n", "b": "ä\n".encode("utf-16")}, "a::b", "b: is not text"),
    "a folder": ({"a": b"x\n", "c/d": b""}, "a::c", "c: a folder, not a file"),
    "three and two": ({"a": b"1\n2\n3", "b": b"1\n2\n"}, "a::b", "a has 3 lines, "),
    "one ends blank": ({"a": b"1\n2\n", "b": b"1\n2\n\n"}, "a::b", "a has 2 lines, "),
    "a line within": ({"a": b"1\n\n3\n", "b": b"1\n2\n3\n"}, "a::b", ", row 2: 'source' is empty"),
    "zeros within": (
        {"a": b"a line of a text\n\0\0\n", "b": b"1\n2\n"}, "a::b", ", row 2: 'source' holds a NUL",
    ),
    "quoted tsv": (
        {"a.tsv": b'"path"\t"sentence"\t"translation"\n"1"\t"a"\t"b"\n'}, "a.tsv",
        "no column sentence, translation; its first line has",
    ),
    "header alone": ({"a.tsv": b"path\tsentence\ttranslation\n"}, "a.tsv", "no usable row"),
    "commas": ({"a.tsv": b"path,sentence,translation\n1,a,b\n"}, "a.tsv", "no column sentence"),
    "a tab too many": (
        {"a.tsv": b"path\tsentence\ttranslation\n1\ta\tb\tc\n"}, "a.tsv",
        "a.tsv, row 2: 4 cells, the header has 3 columns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_text_and_tsv_files_of_translations(tmp_path: Path, case: str) -> None:
    files, source, said = PAIRS[case]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    source = "::".join(f"{tmp_path}/{part}" for part in source.split("::"))
    assert said in error(task("translation", source))


@EVERY
def test_no_spoilt_row_ends_in_a_traceback(tmp_path: Path, name: str) -> None:
    """Rows with values swapped for anything: each gives an example or is named, none is lost."""
    rng = random.Random(0)
    row, _, _, _ = TASKS[name]
    odd: list[Any] = [
        None, True, 0, -1.5, 1e400, float("nan"), "", " ", "\0", "\ud800", "a\nb", "x" * 5000, [],
        {}, [None], [[1]], {"text": None, "label": [1]}, {"de": 1, "en": None}, {"": {}}, "{0}",
        "\\boxed{", "#### ", "The answer is: ", "\\boxed{}", "5", {"text": ["a"], "label": "A"},
    ]  # fmt: skip
    keys = [
        *row, "question", "answer", "problem", "solution", "choices", "label", "answerKey", "input",
        "passage", "endings", "goal", "sol1", "sol2", "ctx", "activity_label", "translation", "de",
        "en", "de-en", "sentence", "type", "original_question", "output", "instruction", "prepared",
        "meta", "id", "prompt", "", "sentence_deu_Latn",
    ]  # fmt: skip
    lines = []
    for _ in range(1500):
        changed = dict(row) if rng.random() < 0.5 else {}
        changed |= {rng.choice(keys): rng.choice(odd) for _ in range(rng.randint(1, 6))}
        lines.append(json.dumps(changed))
    (tmp_path / "a.json").write_text("\n".join([json.dumps(row), *lines]))
    made = task(name, tmp_path / "a.json", on_error="skip", duplicates="keep")
    count = len(made.examples("train"))
    assert count + len(made.skipped) == 1501 and len(made.skipped) > 100
    assert all(where.isprintable() for where in made.skipped)
    for example in made.examples("train"):
        json.dumps(vars(example), ensure_ascii=False).encode()  # as prepare writes it


def prepared(name: str, folder: Path) -> tuple[Task, list[dict[str, Any]]]:
    file = folder / "raw.json"
    file.write_bytes(b"\n".join(good(name, i) for i in (1, 2, 3)))
    made = task(name, file)
    key = prepared_for(made, "train")
    return made, [to_prepared(e, key) for e in made.examples("train")]


@EVERY
def test_prepared_rows_that_somebody_changed(tmp_path: Path, name: str) -> None:
    made, rows = prepared(name, tmp_path)
    assert json.loads(json.dumps(rows)) == rows
    file = tmp_path / "train.jsonl"

    def write(*content: dict[str, Any]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in content))

    write(*rows)
    assert task(name, file).examples("train") == made.examples("train")
    changes: list[dict[str, Any]] = [
        {"prompt": "another"}, {"completion": None}, {"id": 5}, {"id": []}, {"meta": None},
        {"meta": {**rows[1]["meta"], "question": "another"}},
        {"meta": {k: v for k, v in rows[1]["meta"].items() if k != "source"}},
        {"sum": 3}, {"prepared": "x"}, {"prepared": None},
        *({key: ...} for key in rows[1] if key != "prepared"),
    ]  # fmt: skip
    said = "a prepared row of another task, prompt or version, or changed after scalepeft pipeline"
    for change in changes:
        changed = {k: v for k, v in {**rows[1], **change}.items() if v is not ...}
        write(rows[0], changed, rows[2])
        message = error(task(name, file))
        assert f"{file}, row 2: {said}" in message and "--from prepare" in message, message
        skipping = task(name, file, on_error="skip")
        assert [e.id for e in skipping.examples("train")] == [rows[0]["id"], rows[2]["id"]]
        assert len(skipping.skipped) == 1
    write(*rows, rows[1])
    assert f"row 4: id {rows[1]['id']} stood in row 2 already" in error(task(name, file))


def matched(folder: Path, content: bytes, skipped: int = 0) -> dict[str, str]:
    """What ``scalepeft score`` makes of predictions of three references."""
    file = folder / "out.txt"
    file.write_bytes(content)
    made = prepared("commonsense", folder)[0]
    options = score.Options("commonsense", str(file), "ref", None, [], None, None, False)
    return score.match(score.read(str(file), None), made.examples("train"), options, skipped)


def given(folder: Path, *ids: int | str | None) -> bytes:
    named = [f"{folder.name}/raw.json#{i}" if isinstance(i, int) else i for i in ids]
    rows = [{"id": i, "prediction": f"p{n}"} for n, i in enumerate(named, 1)]
    return "".join(json.dumps({k: v for k, v in r.items() if v}) + "\n" for r in rows).encode()


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ((1, 2, 3, 2), "row 4: id {}#2 appears in row 2 already; a row can be scored once"),
        ((2, 2, 2), "row 2: id {}#2 appears in row 1 already"),
        ((1, None, 3), "row 2: has no id, others have"),
        ((1, 2), "1 of 3 rows of ref have no prediction, the first is {}#3"),
        ((1, 2, "x"), "1 of 3 rows of ref have no prediction, the first is {}#3"),
        (("a", "b", "c", "a"), "4 predictions, ref 3 rows; they must match one by one, or by"
         " id (row 4: id a appears in row 1 already)"),
    ],
)  # fmt: skip
def test_ids_of_predictions(tmp_path: Path, ids: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        matched(tmp_path, given(tmp_path, *ids))
    assert said.format(f"{tmp_path.name}/raw.json") in str(caught.value)


def test_predictions_of_no_row_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = matched(tmp_path, given(tmp_path, 3, "x", 1, 2, "y"))
    assert list(texts.values()) == ["p3", "p4", "p1"]
    said = capsys.readouterr().err
    assert "2 predictions are of no row of ref and left out, the first is x" in said


def test_lines_that_begin_like_json_are_text(tmp_path: Path) -> None:
    """Translations begin with a quote or a bracket every few hundred lines."""
    for lines in (
        ['"Yes," he said.', "No.", '"Yes."'],
        ["[Applause]", "{so}", "3"],
        ["[1] see", "", ""],
    ):
        content = ("\n".join(lines) + "\n").encode()
        assert list(matched(tmp_path, content).values()) == lines
    with pytest.raises(UserError, match=r"out\.txt: is not text"):
        matched(tmp_path, FILES["utf-16"][0])
    with pytest.raises(UserError, match="a folder, not a file"):
        score.read(str(tmp_path), None)


SHORT = ["model=tiny", "adapter=hoft", "adapter.rank=4", "train.precision=fp32", "train.lr=1e-3",
         "train.global_batch=4", "train.micro_batch=4", "train.max_steps=2", "data.cutoff=512",
         "evaluate.max_new_tokens=4", "--until"]  # fmt: skip


def pipeline(folder: Path, name: str, until: str, *more: str) -> tuple[int, str]:
    settings = [f"data.{k}={v}" for k, v in TASKS[name][3].items()]
    files = [f"data.train={folder}/train.json", f"data.test={folder}/test.json"]
    done = call("pipeline", f"run_dir={folder}/run", f"data={name}", *SHORT, until, *settings,
                *files, *more)  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def held(run: Path) -> dict[str, bytes]:
    """What a training and the prepared rows are."""
    found = [*run.glob("data/*.jsonl"), *run.glob("adapter/*"), *run.glob("checkpoints/*/*")]
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted(found) if f.is_file()}


@pytest.mark.parametrize(
    "name", [n if n == "math" else pytest.param(n, marks=pytest.mark.slow) for n in TASKS]
)
def test_prepare_stops_at_a_broken_row_and_goes_on_once_it_is_repaired(
    tmp_path: Path, name: str
) -> None:
    whole = b"\n".join(good(name, i) for i in range(1, 7))
    broken = whole.replace(good(name, 4), b"{'a': 1}")
    (tmp_path / "train.json").write_bytes(broken)
    (tmp_path / "test.json").write_bytes(good(name, 9))
    run = tmp_path / "run"
    code, text = pipeline(tmp_path, name, "prepare")
    assert code == 2, text
    assert text.splitlines()[-1] == (
        f"scalepeft: error: {tmp_path}/train.json, row 4: broken JSON at column 2: Expecting"
        " property name enclosed in double quotes; repair it, or data.on_error=skip leaves it out"
    )
    assert held(run) == {}
    code, text = pipeline(tmp_path, name, "prepare", "data.on_error=skip")
    assert code == 0 and "data.train: 1 broken rows left out, listed in" in text, text
    ids = [json.loads(line)["id"] for line in (run / "data/train.jsonl").read_text().splitlines()]
    assert [i.rsplit("#")[1] for i in ids] == ["1", "2", "3", "5", "6"]
    listed = (run / "data/train.left-out.txt").read_text()
    assert (
        listed.startswith(f"{tmp_path}/train.json, row 4: broken JSON")
        and len(listed.splitlines()) == 1
    )
    assert json.loads((run / "data/summary.json").read_text())["train"]["left_out"] == 1
    # What was left out is not forgotten: who now says stop is stopped.
    assert pipeline(tmp_path, name, "prepare")[0] == 2
    (tmp_path / "train.json").write_bytes(whole)
    code, text = pipeline(tmp_path, name, "prepare")
    assert code == 0, text
    assert len((run / "data/train.jsonl").read_text().splitlines()) == 6
    assert not (run / "data/train.left-out.txt").exists()


@pytest.mark.slow
def test_a_prepare_that_fails_loses_nothing(tmp_path: Path) -> None:
    """A finished training stands while its data are broken, and counts again once they are not."""
    name = "commonsense"
    whole = b"\n".join(good(name, i) for i in range(1, 9))
    (tmp_path / "train.json").write_bytes(whole)
    (tmp_path / "test.json").write_bytes(good(name, 9))
    code, text = pipeline(tmp_path, name, "train")
    assert code == 0, text
    before = held(tmp_path / "run")
    assert {name.split("/")[0] for name in before} == {"data", "adapter", "checkpoints"}
    for content in (whole[:-4], FILES["error page"][0]):
        (tmp_path / "train.json").write_bytes(content)
        code, text = pipeline(tmp_path, name, "train")
        assert code == 2 and f"error: {tmp_path}/train.json" in text.splitlines()[-1], text
        assert held(tmp_path / "run") == before
    (tmp_path / "train.json").write_bytes(whole)
    code, text = pipeline(tmp_path, name, "train", "data.on_error=skip")
    assert code == 0 and "train: done already" in text, text
    assert held(tmp_path / "run") == before
    # A prepared row that somebody changed is made again.
    file = tmp_path / "run/data/train.jsonl"
    file.write_text(file.read_text().replace("is true", "is false"))
    code, text = pipeline(tmp_path, name, "train")
    assert code == 0 and "train: done already" in text, text
    assert held(tmp_path / "run") == before
