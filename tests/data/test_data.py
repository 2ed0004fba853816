"""Rows -> examples -> tokens -> micro-batches: what broken files say, and which rank gets what."""

import copy
import dataclasses
import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenized import prepare, tokenize

from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.data import loader, packing, rows, token_file
from scalepeft.data import tokens as data
from scalepeft.data.packing import padded
from scalepeft.data.rows import fill
from scalepeft.data.tasks import base
from scalepeft.data.tasks.commonsense import Commonsense, CommonsenseConfig
from scalepeft.eval.generation import Generator
from scalepeft.models import hub, tiny
from scalepeft.models import hub as models
from scalepeft.parallel.ranks import Ranks

ROWS = [
    {
        "instruction": f"Which one, café {i}?\n\nAnswer format: answer1/answer2",
        "input": "",
        "output": f"the correct answer is answer{1 + i % 2}",
        "answer": f"answer{1 + i % 2}",
    }
    for i in range(6)
]


ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


REAL = [
    *(f"{name}/test.json.gz" for name in ("boolq", "piqa", "social_i_qa", "winogrande")),
    "openbookqa/test.json.gz",
    "ARC-Easy/test.json.gz",
    "ARC-Challenge/test.json.gz",
    "hellaswag/test.reconstructed.json.gz",
]


def commonsense(*files: Path | str, **settings: Any) -> Commonsense:
    return Commonsense(CommonsenseConfig(train=[str(f) for f in files], **settings))


def lines_with(file: Path, **changes: Any) -> Path:
    """Three rows as json lines; the second one changed, a value of ``...`` removes the key."""
    second = {k: v for k, v in {**ROWS[1], **changes}.items() if v is not ...}
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], second, ROWS[2])))
    return file


def error(task: Commonsense) -> str:
    with pytest.raises(UserError) as caught:
        task.examples("train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", ARRAY),
        ("lines.jsonl", LINES),
        ("array.json.gz", gzip.compress(ARRAY, mtime=0)),
        ("lines.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("lines.json", LINES),
        ("array.jsonl", ARRAY),
        ("gzip-in-disguise.json", gzip.compress(ARRAY, mtime=0)),
        ("bom.json", b"\xef\xbb\xbf" + ARRAY),
        ("bom.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINES, mtime=0)),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("crlf.json", ARRAY.replace(b"\n", b"\r\n")),
        ("no-last-newline.jsonl", LINES.rstrip()),
    ],
)
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(rows.read_rows(str(tmp_path / name))) == list(enumerate(ROWS, 1))


def test_row_numbers_of_json_lines_are_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n  \n{"a": 2}\n')
    assert list(rows.read_rows(str(tmp_path / "a.jsonl"))) == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_line_separator_inside_a_string_ends_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert list(rows.read_rows(str(tmp_path / "a.jsonl"))) == [(1, {"a": "x\u2028y\x85z"})]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (gzip.compress(ARRAY, mtime=0)[:-20], ["cannot be read"]),
        (gzip.compress(ARRAY, mtime=0)[:12], ["cannot be read"]),
        (b"\x1f\x8bnot gzip at all", ["cannot be read"]),
        (ARRAY[:-5], ["broken JSON", "line", "column"]),
        (b"", ["no usable row"]),
        (b"[]", ["no usable row"]),
    ],
)
def test_a_file_broken_as_a_whole_is_named(
    tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    for on_error in ("stop", "skip"):
        message = error(commonsense(tmp_path / "bad.json", on_error=on_error))
        assert [p for p in ["bad.json", *parts] if p not in message] == [], message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"output": ...}, "key 'output' is missing; the row has instruction, input, answer"),
        ({"instruction": ...}, "key 'instruction' is missing"),
        ({"output": None}, "'output' must be text, not NoneType"),
        ({"output": ""}, "'output' is empty"),
        ({"output": " \n"}, "'output' is empty"),
        ({"instruction": ["a"]}, "'instruction' must be text, not list"),
        ({"answer": 2}, "'answer' must be text, not int (2)"),
        ({"answer": "answer9"}, "'answer' is 'answer9'; allowed: true, false"),
        ({"answer": "answer1 "}, "'answer' is 'answer1 '"),
    ],
)
def test_a_broken_row_is_named_or_skipped(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    file = lines_with(tmp_path / "bad.json", **changes)
    message = error(commonsense(file))
    assert f"{file}, row 2: {reason}" in message
    assert "data.on_error=skip" in message
    task = commonsense(file, on_error="skip")
    assert [e.id.rsplit("#")[1] for e in task.examples("train")] == ["1", "3"]
    assert len(task.skipped) == 1
    assert f"{file}, row 2: {reason}" in task.skipped[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"instruction": "cut', "broken JSON at column"),
        (LINES.splitlines()[1].replace("é".encode(), b"\xe9"), "'instruction' is not valid UTF-8"),
        (b"[1, 2]", "a row must be an object with keys, not list"),
        (b"null", "a row must be an object with keys, not NoneType"),
        (b"{}", "key 'instruction' is missing; the row has no keys"),
    ],
)
def test_a_broken_line_is_named_or_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    good = LINES.splitlines()[0]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([good, line, good]))
    assert f"bad.jsonl, row 2: {reason}" in error(commonsense(tmp_path / "bad.jsonl"))
    task = commonsense(tmp_path / "bad.jsonl", on_error="skip")
    assert (len(task.examples("train")), len(task.skipped)) == (2, 1)


def test_reading_again_counts_skipped_rows_afresh(tmp_path: Path) -> None:
    task = commonsense(lines_with(tmp_path / "a.json", answer=""), on_error="skip")
    for _ in range(2):
        task.examples("train")
        assert len(task.skipped) == 1


def test_an_absent_input_is_no_error(tmp_path: Path) -> None:
    assert len(commonsense(lines_with(tmp_path / "a.json", input=...)).examples("train")) == 3


def test_patterns_are_sorted_recursive_and_take_files_only(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "aa/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ARRAY)
    (tmp_path / "a-folder.json").mkdir()  # sorts before the files
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert rows.expand([f"{tmp_path}/*.json"], "data.train") == files
    found = rows.expand([f"{tmp_path}/**/*.json"], "data.train")
    assert found == sorted([*files, str(tmp_path / "aa/c.json")])


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    file = tmp_path / "part[1].json"
    file.write_bytes(ARRAY)
    assert rows.expand([str(file)], "data.train") == [str(file)]


@pytest.mark.parametrize(
    ("source", "what"),
    [("gone.json", "no such file"), ("*.gone", "no such file"), ("folder", "a folder, not a file")],
)
def test_a_source_without_a_file_is_named(tmp_path: Path, source: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    message = error(commonsense(tmp_path / source))
    assert f"data.train: {tmp_path / source}: {what}" in message


def test_a_split_without_sources_is_named() -> None:
    assert "data.train is empty" in error(commonsense())


def test_example_ids_differ_over_files_of_one_name_and_a_file_listed_twice(tmp_path: Path) -> None:
    files = [tmp_path / part / "deep/test.json" for part in ("x", "y")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(ARRAY)
    examples = commonsense(*files, files[0]).examples("train")
    assert len({e.id for e in examples}) == len(examples) == 3 * len(ROWS)
    assert {e.meta["source"] for e in examples} >= {"x/deep/test.json", "y/deep/test.json"}


def test_a_hub_source_may_be_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(LINES)
    assert list(rows.read_rows(f"hf://{folder}")) == list(enumerate(ROWS, 1))
    assert len(commonsense(f"hf://{folder}::train").examples("train")) == len(ROWS)
    assert f"hf://{folder}::tset" in error(commonsense(f"hf://{folder}::tset"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.jsonl").write_bytes(LINES + b'{"instruction": "cut')
    assert f"hf://{broken}" in error(commonsense(f"hf://{broken}"))
    assert "hf://: names no data set" in error(commonsense("hf://"))
    (tmp_path / "empty").mkdir()
    assert f"hf://{tmp_path}/empty" in error(commonsense(f"hf://{tmp_path}/empty"))


def test_braces_in_the_data_stay_and_unknown_fields_are_refused() -> None:
    values = {"instruction": "a {output} {x}", "output": "b"}
    assert fill("{instruction}|{1}{output}", values, "data.prompt") == "a {output} {x}|{1}b"
    with pytest.raises(
        UserError, match=r"data.prompt uses \{question\}; rows have \{instruction\}"
    ):
        fill("{question}", values, "data.prompt")


@pytest.mark.parametrize(
    ("prediction", "extracted"),
    [
        ("the correct answer is answer1", "answer1"),
        ("answer2 or answer1", "answer2"),
        ("\n\nanswer1</s>", "answer1"),
        ("the correct answer is Answer1", None),
        ("answer", None),
        ("", None),
    ],
)
def test_the_first_answer_word_counts(prediction: str, extracted: str | None) -> None:
    example = commonsense("x").example(ROWS[0], "f#1", "train")
    got = commonsense("x").score(prediction, example)
    assert got == base.Score(extracted, extracted == "answer1")


@pytest.mark.parametrize("name", REAL)
def test_every_real_row_parses_and_its_own_output_is_right(shared_data: Path, name: str) -> None:
    task = commonsense(shared_data / "llm_adapters/dataset" / name)
    examples = task.examples("train")
    assert len(examples) > 400
    assert [e.id for e in examples if not task.score(e.completion, e).correct] == []
    answers = sorted({e.meta["answer"] for e in examples})
    for example in examples:
        other = next(a for a in answers if a != example.meta["answer"])
        assert not task.score(f"the correct answer is {other}", example).correct


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    folder = tiny.make(0)
    return models.load_tokenizer(hub.ModelConfig(), folder)


@pytest.fixture(scope="module")
def bos_tokenizer(shared_data: Path) -> Any:
    folder = shared_data / "models/stories260K/hf"
    return models.load_tokenizer(hub.ModelConfig(path=str(folder)), folder)


def settings(*given: str) -> config.RunConfig:
    base_settings = ["run_dir=x", "data.name=commonsense", "train.max_steps=4"]
    return config_files.load(None, [*base_settings, *given])[0]


def examples(lengths: Iterator[int] | list[int]) -> list[base.Example]:
    return [
        base.Example(f"f#{i}", f"Which of these is number {i}? " * n, f"the correct answer is {i}")
        for i, n in enumerate(lengths)
    ]


def row(tokens: data.TokenSet, i: int) -> list[int]:
    return tokens.row(i).tolist()


def check_mask(found: list[base.Example], tokenizer: Any) -> None:
    response = tokenize(found, tokenizer, settings().data)
    everything = tokenize(found, tokenizer, settings("data.train_on=all").data)
    for i, example in enumerate(found):
        ids = row(response, i)
        start = int(response.label_start[i])
        assert tokenizer.decode(ids[start:]).strip() == f"{example.completion}</s>"
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[:start] == data.encode([example.prompt], tokenizer)[0][0]
        assert row(everything, i) == ids
        assert int(everything.label_start[i]) == 1
    lengths = response.offsets.diff()
    labels = int((lengths - response.label_start)[[0, 2]].sum())
    assert response.count([0, 2]) == (labels, int(lengths[[0, 2]].sum()))
    assert everything.count([1]) == (int(lengths[1]) - 1, int(lengths[1]))
    assert (response.dropped, response.cut) == (0, 0)


def test_the_mask_begins_with_the_completion_and_ends_with_end_of_text(tokenizer: Any) -> None:
    check_mask(examples([1, 2, 3]), tokenizer)


def test_the_mask_with_a_tokenizer_that_puts_bos_first(bos_tokenizer: Any) -> None:
    check_mask(examples([1, 2, 3]), bos_tokenizer)
    first = row(tokenize(examples([1]), bos_tokenizer, settings().data), 0)[:2]
    assert first[0] == bos_tokenizer.bos_token_id != first[1]


def test_an_end_of_text_that_the_tokenizer_appends_is_not_in_the_prompt(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id

    class Closing:
        """Adds end-of-text after every text, as some tokenizers do."""

        eos_token_id = eos

        def __call__(
            self, texts: list[str], verbose: bool, add_special_tokens: bool = True
        ) -> dict[str, Any]:
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return {"input_ids": [[*i, eos] if add_special_tokens else i for i in ids]}

    plain = tokenize(examples([1, 2]), tokenizer, settings().data)
    closing = tokenize(examples([1, 2]), Closing(), settings().data)
    assert closing.fingerprint() == plain.fingerprint()


def test_training_prompts_are_the_tokens_that_generation_starts_from(bos_tokenizer: Any) -> None:
    from transformers import LlamaConfig

    seen = {}

    class Model:
        config = LlamaConfig(max_position_embeddings=512)

        def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.update(ids=input_ids, mask=kwargs["attention_mask"])
            return input_ids

    found = examples([1, 3])
    evaluate = settings("evaluate.num_beams=2").evaluate
    generate = Generator(Model(), bos_tokenizer, evaluate, torch.device("cpu"), False)
    next(generate.stream([e.prompt for e in found]))
    tokens = tokenize(found, bos_tokenizer, settings().data)
    for i in range(2):
        generated_from = seen["ids"][i][seen["mask"][i].bool()].tolist()
        assert row(tokens, i)[: int(tokens.label_start[i])] == generated_from


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_the_cut_leaves_every_row_a_label_token_and_counts(tokenizer: Any, train_on: str) -> None:
    found = examples(list(range(1, 9)))
    whole = tokenize(found, tokenizer, settings(f"data.train_on={train_on}").data)
    lengths = whole.offsets.diff()
    for cutoff in range(8, int(lengths.max()) + 2):
        given = settings(f"data.train_on={train_on}", f"data.cutoff={cutoff}")
        tokens = tokenize(found, tokenizer, given.data)
        kept = (whole.label_start < cutoff).nonzero()[:, 0].tolist()
        assert tokens.cut == int((lengths > cutoff).sum())
        assert tokens.dropped == len(found) - len(kept)
        assert len(tokens) == len(kept) == len(tokens.offsets) - 1
        assert [row(tokens, i) for i in range(len(kept))] == [row(whole, i)[:cutoff] for i in kept]
        assert (tokens.offsets.diff() > tokens.label_start).all()


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **kwargs)


def cached(counting: Counting, cache: Path, *given: str, lengths: Any = (1, 2, 30)) -> Any:
    before = counting.calls
    file = cache.parent / f"{cache.name}-rows.json"
    said = {"input": "", "output": "the correct answer is answer1", "answer": "answer1"}
    asked = [f"Which of these is number {i}? " * n for i, n in enumerate(lengths)]
    file.write_text(json.dumps([{"instruction": text, **said} for text in asked]))
    words = [
        f"data.cache={cache}",
        "data.cutoff=64",
        f"data.train={file}",
        "data.prompt={instruction}",
    ]
    task = Commonsense(settings(*words, "data.prompt={instruction}", *given).data, counting)
    tokens, _ = token_file.read(token_file.split_file(task, "train", counting, []))
    return tokens, counting.calls > before


def test_the_second_call_reads_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    counting, killed = Counting(tokenizer), tmp_path / "tokens/killed.host.1.tmp"
    killed.parent.mkdir()
    killed.touch()
    os.utime(killed, (0, 0))
    first, made = cached(counting, tmp_path)
    again, made_again = cached(counting, tmp_path)
    assert (made, made_again) == (True, False)
    assert again.fingerprint() == first.fingerprint()
    assert (again.dropped, again.cut) == (first.dropped, first.cut) == (1, 1)
    assert [t.dtype for t in (again.tokens, again.offsets, again.label_start)] == [
        torch.int32, torch.int64, torch.int32
    ]  # fmt: skip
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".safetensors"]


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "flipped", "other"])
def test_a_damaged_cache_is_made_again(tokenizer: Any, tmp_path: Path, damage: str) -> None:
    counting = Counting(tokenizer)
    whole = cached(counting, tmp_path)[0].fingerprint()  # nothing stays mapped
    (file,) = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    elif damage == "other":
        from safetensors.torch import save

        content = bytearray(save({"x": torch.zeros(2)}))
    else:
        content = {"empty": content[:0], "cut": content[:-4], "garbage": content[::-1]}[damage]
    file.write_bytes(content)
    again, made = cached(counting, tmp_path)
    assert made
    assert again.fingerprint() == whole
    assert not cached(counting, tmp_path)[1], "the damaged file was not replaced"


def test_whatever_decides_the_tokens_is_in_the_key(
    tokenizer: Any, bos_tokenizer: Any, tmp_path: Path
) -> None:
    counting = Counting(tokenizer)
    cached(counting, tmp_path)
    assert cached(counting, tmp_path, lengths=(1, 2, 29))[1]
    assert cached(counting, tmp_path, lengths=(1, 2))[1]
    assert cached(counting, tmp_path, "data.train_on=all")[1]
    assert cached(counting, tmp_path, "data.cutoff=63")[1]
    assert cached(Counting(bos_tokenizer), tmp_path)[1]
    sibling = copy.deepcopy(tokenizer)
    sibling.add_tokens(["number"])
    assert cached(Counting(sibling), tmp_path)[1]
    assert not cached(counting, tmp_path, "data.workers=2")[1]
    assert not cached(counting, tmp_path)[1]


def test_a_cache_that_cannot_be_written_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache: .*file/tokens cannot be written"):
        cached(Counting(tokenizer), tmp_path / "file")


def prepared(file: Path, tokenizer: Any, *given: str, vocabulary: int = 768) -> Any:
    chosen = settings(f"data.train={file}", f"data.cache={file.parent}", *given)
    return prepare(Commonsense(chosen.data), tokenizer, vocabulary, chosen.train.seed)


def test_held_out_rows_are_disjoint_and_a_function_of_the_seed(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(ARRAY)
    whole, none, _ = prepared(tmp_path / "a.json", tokenizer)
    assert none is None
    splits = []
    for seed in (0, 0, 1, 2, 3):
        given = ["data.valid_size=2", f"train.seed={seed}"]
        train, valid, report = prepared(tmp_path / "a.json", tokenizer, *given)
        parts = [[row(t, i) for i in range(len(t))] for t in (train, valid)]
        assert [len(p) for p in parts] == [4, 2]
        assert sorted(parts[0] + parts[1]) == sorted(row(whole, i) for i in range(6))
        assert "data: 4 training rows, 2 held out" in report
        splits.append(parts)
    assert splits[0] == splits[1]
    assert any(s != splits[0] for s in splits[2:])
    with pytest.raises(UserError, match=r"data\.valid_size=6 leaves nothing of the 6"):
        prepared(tmp_path / "a.json", tokenizer, "data.valid_size=6")


def test_what_was_left_out_is_reported(tokenizer: Any, tmp_path: Path) -> None:
    file = lines_with(tmp_path / "a.json", answer="")
    _, _, report = prepared(file, tokenizer, "data.on_error=skip", f"data.valid={file}")
    assert any("data.train: left out" in line and "row 2" in line for line in report)
    assert any("data.valid: left out" in line and "row 2" in line for line in report)


def test_a_cutoff_that_leaves_nothing_and_a_foreign_tokenizer_are_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(ARRAY)
    with pytest.raises(UserError, match=r"data\.cutoff=8"):
        prepared(tmp_path / "a.json", tokenizer, "data.cutoff=8")
    whole, _, _ = prepared(tmp_path / "a.json", tokenizer)
    largest = int(whole.tokens.max())
    prepared(tmp_path / "a.json", tokenizer, vocabulary=largest + 1)
    with pytest.raises(UserError, match=rf"model.tokenizer.*{largest}.*has {largest} ids"):
        prepared(tmp_path / "a.json", tokenizer, vocabulary=largest)


def test_the_order_is_a_permutation_per_epoch_and_a_function_of_seed_and_epoch() -> None:
    order = loader.Order(50, seed=3)
    epochs = [[order[e * 50 + i] for i in range(50)] for e in range(4)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert epochs[0] != list(range(50))
    fresh = loader.Order(50, seed=3)
    assert [fresh[i] for i in reversed(range(200))][::-1] == [
        row for epoch in epochs for row in epoch
    ]
    other = loader.Order(50, seed=4)
    assert [other[i] for i in range(50)] not in epochs


def token_set(rows: int = 23) -> data.TokenSet:
    """Rows of ragged length whose first token is the row's number."""
    lengths = [3 + 5 * i % 17 for i in range(rows)]
    tokens = torch.cat([torch.full((n,), i + 1, dtype=torch.int32) for i, n in enumerate(lengths)])
    starts = torch.tensor([1 + i % 2 for i in range(rows)], dtype=torch.int32)
    return data.TokenSet(tokens, torch.tensor([0, *lengths]).cumsum(0), starts, 0, 0, 0)


def loaded(
    world_size: int = 1, rank: int = 0, first: int = 0, steps: int = 6, workers: int = 0, **kw: Any
) -> list[tuple[int, list[loader.MicroBatch], int]]:
    ranks = Ranks(rank, world_size, rank)
    return [
        (b.step, b.micro, b.label_tokens)
        for b in loader.Loader(
            token_set(), ranks, first, steps, global_batch=12, micro_batch=2, workers=workers, **kw
        )
    ]


def samples(micro: list[loader.MicroBatch]) -> list[tuple[int, ...]]:
    """(token, number of tokens, number of labels) of every row, so that padding does not matter."""
    return [
        (int(ids[0]), int((ids != 0).sum()), int((labels != data.IGNORED).sum()))
        for batch in micro
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_batch_of_one_process(world_size: int) -> None:
    alone = loaded()
    parts = [loaded(world_size, rank) for rank in range(world_size)]
    assert len(alone) == 6
    for i, (step, micro, labels) in enumerate(alone):
        per_rank = [samples(p[i][1]) for p in parts]
        assert len({len(p) for p in per_rank}) == 1
        joined = [s for row_of_ranks in zip(*per_rank, strict=True) for s in row_of_ranks]
        assert joined == samples(micro)
        assert {p[i][0] for p in parts} == {step} == {i}
        assert {p[i][2] for p in parts} == {labels}


def test_an_epoch_is_seen_once_over_steps() -> None:
    seen = [s[0] for _, micro, _ in loaded(steps=4) for s in samples(micro)]
    assert sorted(seen[:23]) == list(range(1, 24))
    assert sorted(seen[23:46]) == list(range(1, 24))
    assert seen[:23] != seen[23:46]


def same(a: list[Any], b: list[Any]) -> bool:
    def flat(found: list[Any]) -> list[Any]:
        return [
            (step, n, m.samples.tolist(), m.input_ids.tolist(), m.labels.tolist())
            for step, micro, n in found
            for m in micro
        ]

    return len(flat(a)) > 0 and flat(a) == flat(b)


@pytest.mark.parametrize("first", [1, 3, 5])
def test_resuming_gives_the_batches_that_were_left(first: int) -> None:
    assert same(loaded(2, 1, first, 6 - first), loaded(2, 1)[first:])


def test_worker_processes_change_nothing() -> None:
    assert same(loaded(workers=2), loaded())


def test_the_loader_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded()
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_tokens_and_padding() -> None:
    tokens = token_set()
    for _, micro, count in loaded():
        assert count == sum(s[2] for s in samples(micro))
        for batch in micro:
            assert batch.input_ids.shape == batch.labels.shape
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            longest = int((batch.input_ids != 0).sum(1).max())
            assert batch.input_ids.shape[1] == padded(longest)
            for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                number = int(ids[0]) - 1
                wanted = torch.full_like(ids, data.IGNORED)
                start, length = int(tokens.label_start[number]), len(row(tokens, number))
                wanted[start:length] = ids[start:length]
                assert torch.equal(labels, wanted)
                assert ids[:length].tolist() == row(tokens, number)


def test_without_shuffling_the_last_batch_is_short_and_nothing_repeats() -> None:
    found = loaded(steps=2, shuffle=False)
    assert [s[0] for _, micro, _ in found for s in samples(micro)] == list(range(1, 24))
    per_rank = [loaded(3, r, steps=2, shuffle=False) for r in range(3)]
    seen = [s[0] for p in per_rank for _, micro, _ in p for s in samples(micro)]
    assert sorted(seen) == list(range(1, 24))


def test_the_fingerprint_sees_tokens_cuts_and_labels() -> None:
    tokens = token_set()
    changed = [
        dataclasses.replace(tokens, tokens=tokens.tokens + 1),
        dataclasses.replace(tokens, label_start=tokens.label_start + 1),
        dataclasses.replace(
            tokens, offsets=tokens.offsets.clone().index_fill_(0, torch.tensor(1), 4)
        ),
    ]
    assert len({t.fingerprint() for t in [tokens, *changed]}) == 4
    assert (
        dataclasses.replace(tokens, tokens=tokens.tokens.clone()).fingerprint()
        == tokens.fingerprint()
    )


LENGTHS = [120, 31, 77, 300, 12, 64, 64, 90, 8, 41, 150, 33, 58, 205, 19, 70]


@pytest.mark.parametrize("width", [64.0, 3072.0, float("inf")])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [300, 512, 4096])
def test_rows_are_dealt_once_within_the_budget(ranks: int, tokens: int, width: float) -> None:
    dealt = packing.micro_batches(LENGTHS, ranks, tokens, width)
    assert len(dealt) == ranks and len({len(micro) for micro in dealt}) == 1
    batches = [batch for micro in dealt for batch in micro]
    assert sorted(i for batch in batches for line in batch for i in line) == list(range(16))
    for batch in batches:
        longest = max((sum(LENGTHS[i] for i in line) for line in batch), default=0)
        assert padded(longest) * len(batch) <= tokens or sum(map(len, batch)) == 1


def test_ranks_get_about_as_many_tokens() -> None:
    """A global batch of 64 rows with the lengths of real sets, on 8 ranks: who waits for whom."""
    generator = torch.Generator().manual_seed(0)
    for mean, spread in ((126, 0.25), (94, 0.6), (234, 0.4)):
        drawn = torch.randn(64, generator=generator) * spread
        lengths = (mean * drawn.exp()).int().clamp(8, 512).tolist()
        dealt = packing.deal(lengths, range(len(lengths)), 8)
        sums = [sum(lengths[i] for i in part) for part in dealt]
        assert 1 - sum(sums) / 8 / max(sums) < 0.05


def test_packed_lines_hold_the_rows_of_the_step() -> None:
    tokens = token_set()
    padded_labels = [count for *_, count in loaded()]
    for world in (1, 2, 3):
        parts = [loaded(world, rank, micro_tokens=64, width=256.0) for rank in range(world)]
        for i, of_ranks in enumerate(zip(*parts, strict=True)):
            found = []
            for _, micro, count in of_ranks:
                assert count == padded_labels[i]
                for batch in micro:
                    found += packed_rows(batch)
            wanted = loader.Loader(tokens, Ranks(), i, 1, global_batch=12, micro_batch=2)
            assert sorted(s for s, _ in found) == [s for s, _ in wanted.step_pairs(i)]
            for sample, (ids, labels) in found:
                number = wanted.order[sample]
                start = int(tokens.label_start[number])
                assert ids == row(tokens, number)
                assert labels == [data.IGNORED] * start + ids[start:]


def packed_rows(batch: loader.MicroBatch) -> list[tuple[int, tuple[list[int], list[int]]]]:
    """(sample, (tokens, labels)) of every row; padding behind them is a segment of its own."""
    assert batch.positions is not None and batch.places is not None
    kept = batch.labels.flatten()[batch.places]
    assert (kept != data.IGNORED).all() and len(kept) == (batch.labels != data.IGNORED).sum()
    found = []
    lines = zip(batch.input_ids, batch.labels, batch.samples, batch.positions, strict=True)
    for ids, labels, samples, positions in lines:
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in itertools.pairwise(begins):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if ids[begin]:  # no token of a row is 0 here
                assert len(set(samples[begin:end].tolist())) == 1
                texts = ids[begin:end].tolist(), labels[begin:end].tolist()
                found.append((int(samples[begin]), texts))
            else:
                assert (labels[begin:end] == data.IGNORED).all()
    return found
