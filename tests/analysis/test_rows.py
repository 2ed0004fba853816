"""``scalepeft data``: its numbers against a count by hand, and what it marks as learned."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from scalepeft.cli import main
from scalepeft.models import tiny

LONGER = (0, 3, 9, 1, 60, 0)
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\nIs {} even?{}\n\n### Response:\n"
)
EXAMPLES = [
    (PROMPT.format(i, " word" * words), f"the correct answer is {('true', 'false')[i % 2]}")
    for i, words in enumerate(LONGER)
]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    rows = [
        {"instruction": f"Is {i} even?{' word' * words}", "input": "",
         "output": EXAMPLES[i][1], "answer": ("true", "false")[i % 2]}
        for i, words in enumerate(LONGER)
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return ["data", "model=tiny", "data=commonsense", f"data.train={tmp_path}/rows.json"]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.make(0))


def test_the_numbers_are_those_of_a_count_by_hand(
    settings: list[str], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cutoff = 100
    settings += [f"data.cutoff={cutoff}", "train.global_batch=5", "train.micro_batch=5"]
    assert main([*settings, "--show", "0"]) == 0
    said = capsys.readouterr().out
    found = {
        name.strip(): value for name, value in re.findall(r"^  (\S.*?) {2,}(\S+)$", said, re.M)
    }
    prompts, completions = (
        [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        for texts in zip(*EXAMPLES, strict=True)
    )
    counted = [(p + c + 1, c + 1) for p, c in zip(prompts, completions, strict=True) if p < cutoff]
    kept, learned = zip(*counted, strict=True)  # the end-of-text is one of each
    assert len(kept) == 5 and max(kept) < cutoff, "the row of 60 words lost its response"
    longest, together = (-(-tokens // 8) * 8 for tokens in (max(kept), sum(kept)))
    assert found == {
        "rows": "5", "tokens": f"{sum(kept)}", "learned tokens": f"{sum(learned)}",
        "tokens a row, mean": f"{sum(kept) / 5}", "median": f"{sorted(kept)[2]}",
        "95 % have at most": f"{max(kept)}", "longest": f"{max(kept)}", "cutoff": f"{cutoff}",
        "rows cut": "1", "of these without a response": "1", "rows without a token to learn": "1",
        "real tokens of padded rows": f"{sum(kept) / (5 * longest):.1%}",
        "of packed lines": f"{sum(kept) / together:.1%}",
    }  # fmt: skip


@pytest.mark.parametrize("learned", ["response", "all"])
def test_what_is_learned_and_nothing_else_is_marked(
    settings: list[str], tokenizer: Any, capsys: pytest.CaptureFixture[str], learned: str
) -> None:
    assert main([*settings, f"data.train_on={learned}", "--show", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("«") == said.count("»") == 2, "two rows, each learned in one piece"
    for i, (prompt, completion) in enumerate(EXAMPLES[:2]):
        if learned == "all":  # but for the first token, which nothing predicts
            first = tokenizer.decode(tokenizer(prompt)["input_ids"][:1])
            text = f"{first}«{prompt.removeprefix(first)}{completion}</s>»"
        else:
            text = f"{prompt}«{completion}</s>»"
        assert re.search(rf"\nrow {i + 1}, \d+ tokens:\n{re.escape(text)}\n", said), said


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--show", "-1"], "--show -1: expected a number of rows"),
        (["data.train=none.json"], "data.train: none.json: no such file"),
        (["data.cutof=3"], "Did you mean 'cutoff'?"),
        (["data.cutoff=20"], "no row has a token to learn within data.cutoff=20"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_a_mistake_is_one_line(
    settings: list[str], capsys: pytest.CaptureFixture[str], more: list[str], wanted: str
) -> None:
    assert main([*settings, *more]) == 2
    out, err = capsys.readouterr()
    assert not out and wanted in err.splitlines()[-1], err
    assert err.count("error:") == 1 and "Traceback" not in err


def test_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("data: [")
    rows = ["model=tiny", "data=commonsense"]
    for start, wanted in (("none.yaml",) * 2, ("bad.yaml",) * 2, ("train.lr=1", "data.train is")):
        word = start if "=" in start else str(tmp_path / start)
        assert main(["data", word, *rows]) == 2
        assert wanted in capsys.readouterr().err.splitlines()[-1]
