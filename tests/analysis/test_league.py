"""launch/league.sh: rows, methods and comparisons of a list; and all of it on a small one."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT, rows

from scalepeft import arguments
from scalepeft.analysis.compare import design
from scalepeft.models import shapes

TEXTS = [f"Question {i}?\nanswer {i % 3}" for i in range(60)]


@pytest.fixture
def league() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("league", ROOT / "launch/league.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data(folder: Path) -> Path:
    """Rows as GSM8K and LLM-Adapters have them, three of them twice, and lines of text."""
    questions = [text.split("\n") for text in [*TEXTS, *TEXTS[:3]]]
    asked = [{"question": q, "answer": a + "<<1+1=2>>"} for q, a in questions]
    told = [{"instruction": q, "output": a, "answer": "x"} for q, a in questions]
    files = {
        "a/train.jsonl.gz": "\n".join(map(json.dumps, asked)),
        "b/train.json.gz": json.dumps(told),
        "c/train.en.gz": "\n".join(f"The {i} of the {i % 7} are here." for i in range(300)),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(text.encode()))
    return folder


def test_no_row_is_held_out_and_trained_on(league: Any, tmp_path: Path) -> None:
    found = []
    for name in ("a/train.jsonl.gz", "*/train.json*.gz"):
        league.make_rows(data(tmp_path), tmp_path / "out", [name], 8, longest=len(TEXTS[-1]))
        split = {
            part: [row["text"] for row in rows(tmp_path / "out", f"{part}.jsonl")]
            for part in ("train", "valid")
        }
        assert len(split["valid"]) == 8
        assert sorted(split["train"] + split["valid"]) == sorted(TEXTS), "each once"
        found.append(split)
    assert found[0] == found[1], "drawn by the texts alone"
    league.make_rows(data(tmp_path), tmp_path / "out", ["a/*"], 8, longest=len(TEXTS[0]))
    assert len(rows(tmp_path / "out", "train.jsonl")) == 2, "of ten short ones eight are held out"
    with pytest.raises(SystemExit, match="no such file"):
        league.read(tmp_path, ["none/*"])


def test_every_method_of_the_list_fits_its_bases(league: Any, tmp_path: Path) -> None:
    spec = yaml.safe_load((ROOT / "launch/league.yaml").read_text())
    stories = {
        "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "vocab_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    bases, sizes = {}, {"stories260K": stories, "news1M": spec["bases"]["news1M"]["spec"]}
    for name, values in sizes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
        bases[name] = str(tmp_path / name)
    commands = league.commands_of(spec, bases, tmp_path)
    assert len(commands) == len({words[-1] for words in commands.values()}) == 12
    counts: dict[str, list[int]] = {}
    cases = {}
    for command in commands.values():
        given = arguments.parse(command[4:], None)
        folder = next(s.partition("=")[2] for s in given.settings if s.startswith("model.path="))
        cases[folder, given.methods] = given
    for (folder, _), given in cases.items():
        base, target = shapes.meta_model(folder), None
        if given.budget == "parameters":
            target = design.target_parameters(base, design.read_method(given.reference), given.rank)
        for file in given.methods.split(","):
            method = design.fit_method(base, design.read_method(file), target, given.lrs)
            assert not method.refused and len(method.rates) == given.lrs.count("x"), method
            if target is None:
                counts.setdefault(method.adapter["name"], []).append(method.parameters)
    assert len(counts) == 9 and all(n == sorted(set(n)) for n in counts.values()), counts


@pytest.mark.slow
@pytest.mark.full
def test_a_small_league_from_one_command(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    recipe = {"seed": 0, "steps": 3, "batch": 2, "length": 16, "lr": 1e-3}
    place = {"bases": ["own"], "rows": ["a"], "steps": [10], "quant": ["none"]}
    spec = {
        "bases": {"own": {"spec": sizes, "recipe": recipe, "text": ["c/*.gz"]}},
        "rows": {"a": {"files": ["a/*.gz"], "held_out": 8}},
        "settings": ["data=sft", "train.precision=fp32", "train.global_batch=4"],
        "methods": {"lora": {"lr": 0.01, "rank": 2, "dropout": 0}, "hoft": {"lr": 0.01}},
        "comparisons": [
            place | {"options": ["--rank=2", "--lrs=x1", "--seeds=2"]},
            place | {"name": "sizes-", "options": ["--budget=steps", "--lrs=x1", "--seeds=1"]},
        ],
    }
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(spec))
    words = [ROOT / "launch/league.sh", data(tmp_path / "data"), tmp_path / "out"]
    words += ["--list", tmp_path / "list.yaml", "--docs", tmp_path / "docs"]
    env = {**os.environ, "PYTHON": sys.executable}
    first = subprocess.Popen(list(map(str, words)), env=env)
    while not list(tmp_path.glob("out/comparisons/*/cells/*/*/holder-1.json")):
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 75 and not (tmp_path / "docs").exists()
    assert subprocess.run(list(map(str, words)), env=env, check=False).returncode == 0
    page = (tmp_path / "docs/league.md").read_text()
    for name in ("own-a-010-none", "sizes-own-a-010-none"):
        found = json.loads((tmp_path / f"out/comparisons/{name}/compare.json").read_text())
        for cell in found["cells"]:
            assert f"{cell['loss']:.4f} `{cell['digest'][:8]}`" in page
    assert {p.name for p in (tmp_path / "docs").iterdir()} == {
        "league.md", "league.png", "league-sizes.png",
    }  # fmt: skip
