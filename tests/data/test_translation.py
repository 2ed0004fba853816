"""Translation: every file format, masks on a real tokenizer, published scores, COMET by a stand-in
that speaks its format.
"""

import csv
import gzip
import json
import random
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import ROOT, call
from tokenized import tokenize

from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag, Stopping
from scalepeft.data import bitext, languages, loader
from scalepeft.data import tokens as data
from scalepeft.data.tasks import translation
from scalepeft.data.tasks.base import (
    Example,
    Score,
    Scored,
    from_prepared,
    prepared_for,
    to_prepared,
)
from scalepeft.data.tasks.translation import PROTOCOLS, Translation, TranslationConfig
from scalepeft.eval import comet, scores

PAIRS = [
    ("Das ist „gut“.", "This is “good”."),
    ("Kostet 5 €", "Costs €5"),
    ("C:\\neu", "C:\\new"),
]


GERMAN, ENGLISH = zip(*PAIRS, strict=True)


WMT22 = "alma_wmt/outputs/wmt22"


GOLDEN = {
    ("ALMA-13B-LoRA", "de", "en"): (31.26, 56.09, 54.34),
    ("ALMA-13B-LoRA", "en", "de"): (31.49, 59.23, 56.62),
    ("WMT_Winners", "de", "en"): (33.45, 58.48, 56.65),
    ("WMT_Winners", "en", "de"): (38.37, 64.64, 62.24),
}


def task(*files: Path | str, **settings: Any) -> Translation:
    """A task that reads these files for every split; German to English unless said otherwise."""
    listed = [str(f) for f in files]
    settings = {"source_language": "de", "target_language": "en", **settings}
    return Translation(TranslationConfig(train=listed, valid=listed, test=listed, **settings))


def pairs(made: Translation, split: Any = "train") -> list[tuple[str, str]]:
    return [(e.meta["question"], e.meta["reference"]) for e in made.examples(split)]


def error(made: Translation, split: Any = "train") -> str:
    with pytest.raises(UserError) as caught:
        made.examples(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(file: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return file


def tsv(*rows: tuple[str, ...], end: str = "\n") -> str:
    """What pandas writes with QUOTE_NONE and escapechar: the backslash doubled."""
    return "".join("\t".join(c.replace("\\", "\\\\") for c in row) + end for row in rows)


COVOST = [("path", "sentence", "translation", "client_id")]


COVOST += [(f"{i}.mp3", de, en, "c") for i, (de, en) in enumerate(PAIRS)]


FORMATS: dict[str, tuple[str, list[Any]]] = {
    "wmt": ("a.json", [{"translation": {"de": de, "en": en}} for de, en in PAIRS]),
    "turned": ("a.json", [{"translation": {"en": en, "de": de}} for de, en in PAIRS]),
    "named": ("a.json", [{"de-en": {"de": de, "en": en}, "id": 1} for de, en in PAIRS]),
    "named-turned": ("a.json", [{"en-de": {"de": de, "en": en}} for de, en in PAIRS]),
    "of-two": (
        "a.json",
        [{"cs-en": {"cs": "x", "en": "y"}, "de-en": {"de": d, "en": e}} for d, e in PAIRS],
    ),
    "covost": ("a.json", [{"sentence": de, "translation": en, "id": "1"} for de, en in PAIRS]),
    "shots": ("a.json", [{"source": de, "target": en} for de, en in PAIRS]),
    "plain": ("a.json", [{"de": de, "en": en, "id": "7"} for de, en in PAIRS]),
    "flores": (
        "a.json",
        [{"id": 1, "sentence_deu_Latn": d, "sentence_eng_Latn": e} for d, e in PAIRS],
    ),
    "flores-codes": (
        "a.json",
        [{"translation": {"deu_Latn": d, "eng_Latn": e}} for d, e in PAIRS],
    ),
}


@pytest.mark.parametrize("lines", [False, True], ids=["array", "lines"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a"])
@pytest.mark.parametrize("form", FORMATS)
def test_json_rows_of_every_form(tmp_path: Path, form: str, name: str, lines: bool) -> None:
    held = FORMATS[form][1]
    text = "\n".join(map(json.dumps, held)) if lines else json.dumps(held, indent=1)
    assert pairs(task(write(tmp_path / name, text))) == PAIRS


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", ["covost_v2.de_en.train.tsv", "a.tsv.gz", "rows"])
def test_covost_tsv(tmp_path: Path, name: str, end: str) -> None:
    made = task(write(tmp_path / name, "\ufeff" + tsv(*COVOST, end=end)))
    assert pairs(made) == PAIRS
    assert [e.id for e in made.examples("test")] == [
        f"{tmp_path.name}/{name}#{i}" for i in (2, 3, 4)
    ]


def test_tsv_cells_are_those_of_the_csv_module() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        line = "".join(draw.choices('ab"\t\\é ', k=draw.randint(1, 12)))
        if line.endswith("\\") or not line.strip("\\"):
            line += "x"  # csv takes an escape at the end for one of the line's end
        (expected,) = csv.reader(
            [line], delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", strict=True
        )
        assert bitext._cells(line) == expected, line


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("split", "expected"), [("train", "acf"), ("valid", "d"), ("test", "be")])
def test_official_covost_joined_with_common_voice(
    tmp_path: Path, split: str, expected: str, turned: bool
) -> None:
    """Order and splits of get_covost_splits.py: the left join keys are Common Voice's."""
    splits = dict(
        zip("abcdefg", "train test train_covost dev test train none".split(), strict=True)
    )
    covost = tsv(("path", "translation", "split"), *((p, f"T{p}", s) for p, s in splits.items()))
    voice = tsv(
        ("client_id", "path", "sentence", "age"), *(("x", p, f"S{p}", "") for p in "zabcdefg")
    )
    files = [
        write(tmp_path / "covost_v2.de_en.tsv", covost),
        write(tmp_path / "validated.tsv", voice),
    ]
    source = "::".join(map(str, files[::-1] if turned else files))
    assert pairs(task(source), split) == [(f"S{p}", f"T{p}") for p in expected]


def test_first_training_rows_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", tsv(*COVOST))
    made = task(file, train_rows=2)
    assert pairs(made) == PAIRS[:2] and pairs(made, "test") == pairs(made, "valid") == PAIRS


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parallel_text_files(tmp_path: Path, suffix: str, end: str) -> None:
    german, english = (["Ein\u2028Satz", *GERMAN], ["A\u2028sentence", *ENGLISH])
    first = write(tmp_path / f"t.de{suffix}", end.join(german) + end)
    second = write(tmp_path / f"t.en{suffix}", end.join(english))  # without a line's end
    made = task(f"{first}::{second}")
    assert pairs(made) == list(zip(german, english, strict=True))
    ids = [e.id for e in made.examples("test")]
    assert len(set(ids)) == 4 and all(i.endswith(f"t.en{suffix}#{n}") for n, i in enumerate(ids, 1))


MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    # files by name, the source, what the error says of it
    "unequal": (
        {"t.de": "a\nb\nc\n", "t.en": "a\nb\n"},
        "t.de::t.en",
        "t.de has 3 lines, {}t.en 2: they must go together",
    ),
    "an empty file": ({"t.de": "a\n", "t.en": ""}, "t.de::t.en", "{}t.en is empty"),
    "three": ({"t.de": "a\n"}, "t.de::t.de::t.de", "3 files joined by ::; a pair is two"),
    "json in a pair": ({"t.json": "[]", "t.en": "a\n"}, "t.json::t.en", "t.json is no text file"),
    "no such half": ({"t.de": "a\n"}, "t.de::t.en", "t.en: no such file"),
    "text alone": (
        {"t.de": "a\n"},
        "t.de",
        "neither JSON nor a tsv with a header; text files come",
    ),
    "no column": (
        {"t.tsv": "path\tsentence\n1\ta\n"},
        "t.tsv",
        "t.tsv: no column translation; its first line has path, sentence",
    ),
    "translations alone": (
        {"t.tsv": "path\ttranslation\tsplit\n1\ta\ttrain\n"},
        "t.tsv",
        "no column sentence; its first line has path, translation, split; CoVoST-2's translations"
        " alone are named with Common Voice's sentences, {}t.tsv::VALIDATED_TSV",
    ),
    "another split": (
        {"t.tsv": "path\ttranslation\tsplit\n1\ta\tdev\n", "v.tsv": "path\tsentence\n1\tb\n"},
        "t.tsv::v.tsv",
        "t.tsv: no row with split train or train_covost for data.train",
    ),
    "another Common Voice": (
        {"t.tsv": "path\ttranslation\tsplit\n1\ta\ttrain\n", "v.tsv": "path\tsentence\n2\tb\n"},
        "t.tsv::v.tsv",
        "v.tsv: 1 sentences of {}t.tsv are not in it, the first is 1;",
    ),
    "broken array": ({"t.json": '[{"a": 1},'}, "t.json", "t.json: broken JSON"),
    "no gzip": ({"t.json.gz": b"\x1f\x8bnothing"}, "t.json.gz", "t.json.gz: cannot be read"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named(tmp_path: Path, case: str) -> None:
    files, source, expected = MALFORMED[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    source = "::".join(f"{tmp_path}/{name}" for name in source.split("::"))
    for on_error in ("stop", "skip"):  # nothing of such a file can be used
        assert expected.format(f"{tmp_path}/") in error(task(source, on_error=on_error))


def row(**changes: Any) -> str:
    held = {"translation": {"de": "Hallo", "en": "Hello"}} | changes
    return json.dumps({key: value for key, value in held.items() if value is not ...})


BROKEN: dict[str, tuple[str, str | bytes, str]] = {
    # what each second row is in place of a good one, in which format, what is said of it
    "language": (
        "json",
        row(translation={"cs": "a", "fr": "b"}),
        "'translation' has cs, fr, not 'de' (data.source_language)",
    ),
    "target language": (
        "json",
        row(translation={"de": "a", "fr": "b"}),
        "'translation' has de, fr, not 'en' (data.target_language)",
    ),
    "named": (
        "json",
        row(translation=..., **{"cs-en": {"cs": "a", "en": "b"}}),
        "'cs-en' has cs, en",
    ),
    "scripts": (
        "json",
        row(translation={"de": "a", "eng_Latn": "x", "eng_Deva": "x"}),
        "'translation' has de, eng_Latn, eng_Deva, not 'en'",
    ),
    "no pair": (
        "json",
        row(translation=..., text="a"),
        "the row has text; a pair is one of {transl",
    ),
    "empty target": ("json", row(translation={"de": "a", "en": " "}), "'en' is empty"),
    "empty source": ("json", row(translation={"de": "", "en": "a"}), "'de' is empty"),
    "null": ("json", row(translation={"de": "a", "en": None}), "'en' must be text, not NoneType"),
    "number": (
        "json",
        row(translation=..., source="a", target=5),
        "'target' must be text, not int",
    ),
    "a list": ("json", "[1, 2]", "a row must be an object with keys, not list"),
    "no keys": ("json", "{}", "key 'translation' is missing; the row has no keys"),
    "no json": ("json", "{broken", "broken JSON"),
    "two lines": (
        "json",
        row(translation={"de": "a", "en": "b\nc"}),
        "the translation holds a line break",
    ),
    "old mac": (
        "json",
        row(translation={"de": "a", "en": "b\rc"}),
        "the translation holds a line break",
    ),
    "surrogate": ("json", row(translation={"de": "a\udc00", "en": "b"}), "'de' is not valid UTF-8"),
    "bytes": ("json", b'{"source": "a", "target": "\xff"}', "'target' is not valid UTF-8"),
    "too few cells": ("tsv", "1.mp3\tHallo", "2 cells, the header has 4 columns"),
    "tab in a cell": ("tsv", "1.mp3\tHal\tlo\tHello\tc", "5 cells, the header has 4 columns"),
    "empty cell": ("tsv", "1.mp3\tHallo\t\tc", "'translation' is empty"),
    "latin-1": ("tsv", b"1.mp3\tSch\xf6n\tNice\tc", "'sentence' is not valid UTF-8"),
    "empty line": ("pair", "", "'source' is empty"),
    "blank line": ("pair", " \t", "'source' is empty"),
    "bad line": ("pair", b"\xe9", "'source' is not valid UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named_and_costs_nothing_but_itself(tmp_path: Path, case: str) -> None:
    form, broken, expected = BROKEN[case]
    bad = broken if isinstance(broken, bytes) else broken.encode()
    good, source, place = row().encode(), tmp_path / "t.json", 2
    if form == "json":
        write(source, b"\n".join((good, bad, good)))
    elif form == "tsv":
        source, place, line = tmp_path / "t.tsv", 3, b"0.mp3\tHallo\tHello\tc"
        write(source, b"\n".join((b"path\tsentence\ttranslation\tclient_id", line, bad, line)))
    else:
        first = write(tmp_path / "t.de", b"\n".join((b"Hallo", bad, b"Hallo")))
        second = write(tmp_path / "t.en", "Hello\nx\nHello")
        source = f"{first}::{second}"
    for split in ("train", "test"):
        said = error(task(source), split)
        assert said.startswith(f"{source}, row {place}: {expected}"), said
        assert said.endswith("; repair it, or data.on_error=skip leaves it out")
        made = task(source, on_error="skip")
        assert pairs(made, split) == [("Hallo", "Hello")] * 2
        assert [s.startswith(f"{source}, row {place}: {expected}") for s in made.skipped] == [True]


def test_a_row_of_a_megabyte_and_quotes_as_they_are(tmp_path: Path) -> None:
    long = "wörter " * 150_000 + "x"
    held = [("path", "sentence", "translation"), ("1", '"Ja', 'Yes" he'), ("2", long, "long")]
    assert pairs(task(write(tmp_path / "t.tsv", tsv(*held)))) == [
        ('"Ja', 'Yes" he'),
        (long, "long"),
    ]


def test_reference_lines_are_for_a_test_alone_and_have_no_prompt(tmp_path: Path) -> None:
    file = write(tmp_path / "ref.en", "[Music]\r\n{really}\n")
    (first, second) = task(file).examples("test")
    assert (first.prompt, first.completion, second.completion) == ("", "[Music]", "{really}")
    assert first.meta == {"source": first.id[:-2], "question": "", "reference": "[Music]"}
    assert "text files come in pairs" in error(task(file), "valid")
    assert "row 2: 'the line' is empty" in error(task(write(file, "a\n\nb")), "test")


def test_prompts_of_alma_byte_for_byte(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", tsv(*COVOST))
    first = task(file).examples("train")[0]
    # as in run_llmmt.py's get_prompt: prefix, source, suffix, and no space before the target
    assert first.prompt == (
        "Translate this from German to English:\nGerman: Das ist „gut“.\nEnglish:"
    )
    assert first.completion == "This is “good”."
    named = task(
        file, source_name="Low German", prompt="{source_language}>{target_language} {source}"
    )
    assert named.examples("train")[0].prompt == "Low German>English Das ist „gut“."
    assert "data.prompt uses {target}" in error(task(file, prompt="{source} {target}"))
    assert json.loads(json.dumps(first.meta)) == first.meta
    assert (
        from_prepared(
            to_prepared(first, prepared_for(task(file), "train")), prepared_for(task(file), "train")
        )
        == first
    )


@pytest.mark.parametrize("direction", [("de", "en"), ("en", "de"), ("zh", "en"), ("cs", "en")])
def test_masks_token_by_token_on_a_real_tokenizer(
    shared_data: Path, direction: tuple[str, str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizer/mistral_v1")
    tokenizer.pad_token = tokenizer.eos_token  # as ALMA sets it, and loses its EOS label by it
    source, target = direction
    folder = next(
        (shared_data / "alma_wmt/human_written_data").glob(f"*/test.{source}-{target}.json.gz")
    )
    made = task(folder, source_language=source, target_language=target, **PROTOCOLS["alma"].data)
    examples = made.examples("test")[:150]
    tokens = tokenize(examples, tokenizer, made.config)
    assert len(tokens) == len(examples) and not tokens.dropped and not tokens.cut
    (batch,) = loader._Rows(tokens, False)[[[[(i, i)] for i in range(len(examples))]]]
    joined = []
    for example, ids, labels in zip(examples, *batch[:2], strict=True):
        learned = (labels != data.IGNORED).nonzero().flatten().tolist()
        start, end = learned[0], learned[-1]
        assert learned == list(range(start, end + 1)) and torch.equal(labels[learned], ids[learned])
        assert ids[0] == tokenizer.bos_token_id and start > 0, "BOS is no label"
        assert ids[end] == tokenizer.eos_token_id and (ids[end + 1 :] == 0).all(), "the real EOS is"
        assert (
            ids[1:end].tolist()
            == tokenizer(example.prompt + example.completion, add_special_tokens=False)["input_ids"]
        )
        assert tokenizer.decode(ids[1:end]) == example.prompt + example.completion
        before, through = (tokenizer.decode(ids[1:stop]) for stop in (start, start + 1))
        assert example.prompt.startswith(before), "nothing of the target is unlearned"
        assert len(through) > len(example.prompt), "the first label reaches into the target"
        if before == example.prompt:
            prompt = tokenizer(example.prompt)["input_ids"]
            assert ids[:start].tolist() == prompt, "generation starts from these very tokens"
        else:
            joined.append(through[len(before) :])
    # A quote or bracket at the start of the target is one token with the prompt's colon.
    assert len(joined) < len(examples) / 20 and all(t[0] == ":" and len(t) > 1 for t in joined)


def test_lines_of_an_output() -> None:
    made, example = task("x"), Example("a", "", "", {"reference": "r"})
    for text, found in {
        "Hello there": "Hello there",
        " Hello \nGerman: more": "Hello",
        "\n Hello\nx": "Hello",
        "\n\nHello": "Hello",
        "\n\n\nHello": None,  # ALMA looks no further than the third line
        " \n": None,
        "": None,
        "a\u2028b": "a\u2028b",
    }.items():
        assert made.score(text, example) == Score(found, None)


def summed(made: Translation, texts: list[str]) -> dict[str, Any]:
    examples = made.examples("test")
    return scores.summarize(
        made, examples, {e.id: t for e, t in zip(examples, texts, strict=True)}
    )[0]


@pytest.mark.parametrize(
    "system", [pytest.param(s, marks=[pytest.mark.full] * (i > 0)) for i, s in enumerate(GOLDEN)]
)
def test_golden_values(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, system: tuple[str, str, str]
) -> None:
    monkeypatch.setattr(translation, "RESAMPLES", 1)  # the values alone
    name, source, target = system
    stem = f"{source}{target}/test.{source}-{target}"
    test = shared_data / WMT22 / "wmt-testset" / stem
    made = task(f"{test}.{source}.gz::{test}.{target}.gz", source_language=source,
                target_language=target)  # fmt: skip
    outputs = gzip.decompress((shared_data / WMT22 / name / f"{stem}.{target}.gz").read_bytes())
    found = summed(made, outputs.decode().split("\n")[:-1])["metrics"]
    assert tuple(round(m["value"], 2) for m in found.values()) == GOLDEN[system]


def test_a_target_without_spaces_is_counted_by_characters(tmp_path: Path) -> None:
    targets = ["ฉันชอบกินข้าวกับเพื่อนที่บ้าน", "วันนี้อากาศดีมากจริงๆ"]
    rows = [row(translation={"en": str(i), "th": text}) for i, text in enumerate(targets)]
    outputs = ["ฉันชอบกินข้าวกับเพื่อนที่โรงเรียน", "วันนี้อากาศดีจริงๆ"]
    file = write(tmp_path / "a.json", "\n".join(rows))
    made = task(file, source_language="en", target_language="th")
    found = summed(made, outputs)["metrics"]["BLEU"]
    assert round(found["value"], 2) == 80.45 and "|tok:char|" in found["signature"]


@pytest.mark.full
def test_golden_values_by_the_command(shared_data: Path) -> None:
    folder = shared_data / WMT22
    stem = "deen/test.de-en"
    done = call(
        "score", "--task", "translation", "--json",
        "--predictions", f"{folder}/ALMA-13B-LoRA/{stem}.en.gz",
        "--references", f"{folder}/wmt-testset/{stem}.en.gz",
        "data.source_language=de", "data.target_language=en",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["headline"] == "BLEU" and (found["count"], found["no_answer_found"]) == (1984, 0)
    metrics = found["metrics"]
    values = tuple(round(metrics[name]["value"], 2) for name in ("BLEU", "chrF2", "chrF++"))
    assert values == GOLDEN["ALMA-13B-LoRA", "de", "en"]
    # As `sacrebleu REF -i OUT -m bleu chrf --confidence` of 2.6.0 prints them.
    chrf = "nrefs:1|bs:1000|seed:12345|case:mixed|eff:yes|nc:6"
    for name, mean, half, signature in [
        (
            "BLEU",
            31.25,
            0.88,
            "BLEU|nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp",
        ),
        ("chrF2", 56.09, 0.65, f"chrF2|{chrf}|nw:0|space:no"),
        ("chrF++", 54.34, 0.63, f"chrF2++|{chrf}|nw:2|space:no"),
    ]:
        low, high = metrics[name]["ci95"]
        assert ((low + high) / 2, (high - low) / 2) == pytest.approx((mean, half), abs=0.006)
        assert metrics[name]["signature"].startswith(f"{signature}|version:")
        assert metrics[name]["share"] is False


def test_references_score_100_and_nothing_scores_0(tmp_path: Path) -> None:
    made = task(
        f"{write(tmp_path / 'a.tsv', tsv(*COVOST))}", f"{write(tmp_path / 'b.tsv', tsv(*COVOST))}"
    )
    right = summed(made, [*ENGLISH, *ENGLISH])
    assert [round(m["value"], 6) for m in right["metrics"].values()] == [100.0] * 3
    assert len(right["sources"]) == 2 and right["mean_of_sources"]["BLEU"] == pytest.approx(100)
    wrong = summed(made, [""] * 6)
    assert {m["value"] for m in wrong["metrics"].values()} == {0.0}
    assert wrong["metrics"]["BLEU"]["ci95"] == [0.0, 0.0] and wrong["no_answer_found"] == 6


def test_one_source_is_summed_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    original = Translation.metrics
    monkeypatch.setattr(
        Translation, "metrics", lambda s, rows: counted.append(len(rows)) or original(s, rows)
    )
    file = write(tmp_path / "a.tsv", tsv(*COVOST))
    summed(task(file), list(ENGLISH))
    assert counted == [3]
    summed(task(file, write(tmp_path / "b.tsv", tsv(*COVOST))), [*ENGLISH, *ENGLISH])
    assert counted == [3, 3, 3, 6]


def test_what_scoring_needs_is_missed_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.json", row(translation={"de": "Hallo", "ja": "やあ", "zh": "你好"}))
    found = summed(task(file, target_language="zh"), ["你好"])["metrics"]["BLEU"]
    assert "|tok:zh|" in found["signature"]
    monkeypatch.setitem(sys.modules, "MeCab", None)
    said = error(task(file, target_language="ja", bleu_tokenizer="ja-mecab"), "test")
    assert "ja-mecab cannot be used" in said and "pip install sacrebleu[ja]" in said
    made = task(file, target_language="ja")
    assert len(made.examples("train")) == 1 and made.notes == []
    assert "|tok:char|" in summed(made, ["やあ"])["metrics"]["BLEU"]["signature"]
    assert "sacreBLEU's ja-mecab is not installed (pip install 'sacrebleu[ja]')" in made.notes[0]
    made = task(file, target_language="ja", bleu_tokenizer="char")
    assert len(made.examples("test")) == 1 and made.notes == []
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert "pip install 'scalepeft[eval]'" in error(task(file, target_language="zh"), "test")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "data.source_language is not set, e.g. data.source_language=de"),
        ({"source_language": "de"}, "data.target_language is not set"),
        ({"source_language": "de", "target_language": "de"}, "is the target language as well"),
        ({"source_language": "xx", "target_language": "en"}, "xx: no English name known"),
        (
            {"source_language": "de", "target_language": "en", "bleu_tokenizer": "x"},
            "bleu_tokenizer",
        ),
        (
            {"source_language": "de", "target_language": "en", "protocol": "wmt"},
            "alma, covost-hoft",
        ),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], said: str) -> None:
    values = {
        "run_dir": "x",
        "train": {"max_steps": 1},
        "data": {"name": "translation", **settings},
    }
    with pytest.raises(UserError, match=said):
        config.from_dict(values)


def test_the_paper_s_settings() -> None:
    made, _ = config_files.load(str(ROOT / "configs/runs/translation_hoft.yaml"), [])
    assert config.to_dict(made)["data"]["train_rows"] == 10_000
    assert made.train.global_batch == 16 * 4
    assert (made.train.lr, made.train.warmup_steps, made.train.epochs) == (8e-4, 100, 2)
    assert made.adapter.target_modules == ["q_proj", "k_proj", "v_proj"]
    assert (made.evaluate.num_beams, made.evaluate.max_new_tokens) == (5, 256)
    assert not config.deviations(made)
    other = config_files.overlay(
        config.to_dict(made), ["data.target_language=fr", "evaluate.num_beams=1"]
    )
    assert set(config.deviations(other)) == {"data.target_language", "evaluate.num_beams"}


def test_languages() -> None:
    for code, name, tokenizer in [
        ("de", "German", "13a"), ("deu_Latn", "German", "13a"), ("slv_Latn", "Slovenian", "13a"),
        ("lvs_Latn", "Latvian", "13a"), ("zh-CN", "Chinese", "zh"), ("zho_Hant", "Chinese", "zh"),
        ("ja", "Japanese", "ja-mecab"), ("kor_Hang", "Korean", "ko-mecab"),
        ("sv-SE", "Swedish", "13a"), ("th", "Thai", "char"), ("lao_Laoo", "Lao", "char"),
        ("km", "Khmer", "char"), ("mya_Mymr", "Burmese", "char"),
    ]:  # fmt: skip
        assert (languages.name_of(code, "x"), languages.tokenizer_of(code)) == (name, tokenizer)
    scripts = ("yue_Hant", "bod_Tibt", "shn_Mymr", "hin_Deva")
    assert [languages.tokenizer_of(code) for code in scripts] == ["zh", "char", "char", "13a"]
    assert len(languages.NAMES) == 89 and "Norwegian Bokmål" in languages.NAMES.values()


@pytest.mark.parametrize(
    ("source", "target", "rows", "files"),
    [
        (
            "deu_Latn",
            "eng_Latn",
            1012,
            "F/devtest/deu_Latn.devtest.gz::F/devtest/eng_Latn.devtest.gz",
        ),
        ("sl", "en", 997, "F/dev/slv_Latn.dev.gz::F/dev/eng_Latn.dev.gz"),
        ("de", "en", 14211, "A/deen/train.de-en.de.gz::A/deen/train.de-en.en.gz"),
        ("cs", "en", 12076, "A/csen/train.cs-en.json.gz"),  # json lines under .json
        ("is", "en", 1000, "A/isen/test.is-en.json.gz"),
        ("en", "zh", 2037, "A/zhen/test.en-zh.json.gz"),
        ("de", "en", 5, "A/Filtered-5-shot/shots.de-en.json"),
    ],
)
def test_real_files(shared_data: Path, source: str, target: str, rows: int, files: str) -> None:
    for short, folder in (("F/", "flores200"), ("A/", "alma_wmt/human_written_data")):
        files = files.replace(short, f"{shared_data}/{folder}/")
    made = task(files, source_language=source, target_language=target)
    assert len(pairs(made, "test")) == rows and not made.skipped


# What comet-score 2.2.7 takes and writes (its comet/cli/score.py), without a model.
COMET = """#!{python}
import argparse, json, os, sys
p = argparse.ArgumentParser()
for short, long in (("-s", "--sources"), ("-r", "--references")):
    p.add_argument(short, long)
p.add_argument("-t", "--translations", nargs="+")
p.add_argument("--gpus", type=int, default=1)
p.add_argument("--quiet", action="store_true")
p.add_argument("--only_system", action="store_true")
p.add_argument("--to_json", default="")
p.add_argument("--model", default="Unbabel/wmt22-comet-da")
a = p.parse_args()
ours = ("SLURM_", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
assert not [k for k in os.environ if k.startswith(ours)]
assert "HOME" in os.environ
read = lambda f: [line.strip() for line in open(f, encoding="utf-8").readlines()]
texts = map(read, (a.sources, a.translations[0], a.references))
data = [dict(zip(("src", "mt", "ref"), row)) for row in zip(*texts)]
for row in data:
    row["COMET"] = 0.9 if row["mt"] == row["ref"] else 0.5
    if not a.only_system:
        print("segment")
with open("calls", "a") as f:
    f.write(f"{{a.model}} {{a.gpus}} {{a.quiet}}\\n")
{fault}
print("{{}}\\tscore: {{:.4f}}".format(a.translations[0], sum(r["COMET"] for r in data) / len(data)))
with open(a.to_json, "w", encoding="utf-8") as f:
    json.dump({{a.translations[0]: data}}, f, ensure_ascii=False, indent=4)
print("Predictions saved in: {{}}.".format(a.to_json))
"""


def stand_in(folder: Path, fault: str = "") -> Path:
    """An environment with comet-score."""
    folder.mkdir(exist_ok=True)
    (folder / "comet-score").write_text(COMET.format(python=sys.executable, fault=fault))
    (folder / "comet-score").chmod(0o755)
    return folder / "comet-score"


def scored(outputs: list[str], sources: str = "aab") -> list[Scored]:
    return [
        Scored(
            Example(f"{s}#{i}", "p", en, {"source": s, "question": de, "reference": en}),
            text,
            Score(text or None, None),
        )
        for i, ((de, en), text, s) in enumerate(zip(PAIRS, outputs, sources, strict=True))
    ]


def test_comet_in_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH", "HOME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(comet.VARIABLE, raising=False)
    run = tmp_path / "run"
    rows = scored([ENGLISH[0], "Costs\r\n5\u2028", ""])
    comet.write(run, rows)
    assert comet.compute(run) is None and "SCALEPEFT_COMET=ENV/bin/comet-score" in comet.line(
        comet.read(run)
    )
    assert "not computed" in comet.line(comet.read(run))
    lines = {name: (run / "comet" / name).read_bytes().decode() for name in comet.TEXTS}
    assert (
        lines["mt.txt"] == f"{ENGLISH[0]}\nCosts 5\u2028\n\n" and lines["src.txt"].count("\n") == 3
    )

    program = stand_in(tmp_path / "env with space")
    monkeypatch.setenv(comet.VARIABLE, f"'{program}' --gpus 0")
    found = comet.compute(run)
    assert found == comet.read(run)
    assert found["score"] == pytest.approx(100 * (0.9 + 0.5 + 0.5) / 3) and found["rows"] == 3
    assert found["sources"] == pytest.approx({"a": 70.0, "b": 50.0})
    assert found["model"] == "Unbabel/wmt22-comet-da"
    assert "COMET: 63.33" in comet.line(
        comet.read(run)
    ) and "wmt22-comet-da, 3 rows)" in comet.line(comet.read(run))
    calls = run / "comet" / "calls"
    assert comet.compute(run) == found and calls.read_text() == "Unbabel/wmt22-comet-da 0 True\n"

    monkeypatch.setenv(comet.VARIABLE, f"'{program}' --model=/x/y.ckpt")
    assert comet.compute(run)["model"] == "/x/y.ckpt"  # type: ignore[index]
    monkeypatch.delenv(comet.VARIABLE)
    assert comet.compute(run)["model"] == "/x/y.ckpt", "kept: the same texts"  # type: ignore[index]
    comet.write(run, scored(list(ENGLISH)))
    assert comet.compute(run) is None and "not computed" in comet.line(comet.read(run)), (
        "of other texts"
    )
    assert len(calls.read_text().splitlines()) == 2


def test_an_option_of_comet_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(comet.VARIABLE, "comet-score --model")
    with pytest.raises(UserError, match=r"SCALEPEFT_COMET=comet-score --model: .*one argument"):
        comet._program()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "print('CUDA out of memory', file=sys.stderr); sys.exit(3)",
            "ended with 3: CUDA out of memory",
        ),
        ("sys.exit(1)", "ended with 1: printed nothing"),
        ("os.kill(os.getpid(), 9)", "ended with -9: printed nothing"),
        ("sys.exit(0)", "segments.json: is not what comet-score --to_json writes"),
        ("open(a.to_json, 'w').write('<html>'); sys.exit(0)", "is not what comet-score"),
        ("data = [{'mt': 'x'}]; a.to_json = ''", "ended with 1: KeyError: 'COMET'"),
        ("json.dump({'mt.txt': [{'mt': 1}]}, open(a.to_json, 'w')); sys.exit(0)", "is not what"),
        ("json.dump([1], open(a.to_json, 'w')); sys.exit(0)", "is not what comet-score"),
        ("data = data[1:]", "2 scores, not 3 finite ones"),
        ("data[0]['COMET'] = float('nan')", "3 scores, not 3 finite ones"),
    ],
)
def test_comet_that_fails_is_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    monkeypatch.setenv(comet.VARIABLE, str(stand_in(tmp_path / "env", fault)))
    comet.write(tmp_path, scored(list(ENGLISH)))
    with pytest.raises(UserError) as caught:
        comet.compute(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert comet.read(tmp_path) is None and "not computed" in comet.line(comet.read(tmp_path))


def test_comet_that_is_not_there_or_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comet.write(tmp_path, scored(list(ENGLISH)))
    for value, said in {
        f"{tmp_path}/none": "none: no such program",
        "'a": "No closing quotation",
    }.items():
        monkeypatch.setenv(comet.VARIABLE, value)
        with pytest.raises(UserError, match=said):
            comet.compute(tmp_path)
    broken = tmp_path / "broken"
    broken.write_text("no program")
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv(comet.VARIABLE, str(broken))
    with pytest.raises(UserError, match="cannot be run: Exec format error"):
        comet.compute(tmp_path)
    program = stand_in(tmp_path / "env", "import time; time.sleep(60)")
    monkeypatch.setenv(comet.VARIABLE, str(program))
    flag: Any = SimpleNamespace(signal=15)
    with pytest.raises(Stopping):
        comet.compute(tmp_path, flag)
    assert isinstance(StopFlag().signal, type(None)), "the flag that compute takes"
