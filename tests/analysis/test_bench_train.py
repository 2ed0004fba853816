"""``scalepeft bench train`` on the tiny base: same rows, same losses; no time is asserted."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import call, zygote

from scalepeft.analysis.bench import train
from scalepeft.core.errors import UserError

TINY = [
    "model=tiny", "data=toy", "data.train_size=60", "adapter=lora", "adapter.rank=4",
    "adapter.alpha=8", "engine=single", "engine.device=cpu", "train.precision=fp32",
    "train.global_batch=6", "train.micro_batch=4", "train.max_steps=4", "train.seed=3",
]  # fmt: skip


@pytest.mark.full
def test_contenders_take_the_same_rows_to_the_same_losses(tmp_path: Path) -> None:
    """And one that is not installed is left out, in a line; TRL's where it is."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SCALEPEFT_CACHE": str(tmp_path)}
    words = ["bench", "train", *TINY, "--repeats", "1", "--out", str(tmp_path / "out")]
    done = zygote().run(("-m", "scalepeft"), words, env, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/train.json").read_text())
    text = (tmp_path / "out/train.md").read_text()
    assert text.strip() in done.stdout and set(found["summary"]) == {"scalepeft", "trainer", "trl"}
    runs = found["runs"]
    ours = runs["scalepeft"][0]["steps"]
    assert len(ours) == 4 and sum(s["learned"] for s in ours) == runs["trainer"][0]["learned"]
    for its in (runs["trainer"][0]["steps"], *(run["steps"] for run in runs["scalepeft"])):
        for one, other in zip(ours, its, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert (one["tokens"], one["learned"]) == (other["tokens"], other["learned"])
    for name, row in found["summary"].items():
        if "skipped" in row:
            assert name == "trl" and "trl" in row["skipped"] and row["skipped"] in text
            continue
        assert row["rounds"] == len(runs[name]) == 1 and row["peak MiB"] > 100
        assert row["learned"] == sum(s["learned"] for s in ours)
        assert all(run["tokens/CPU s"] > 0 and run["start-up s"] > 0 for run in runs[name])
    assert found["summary"]["scalepeft"]["tokens/CPU s, x ours"] == 1


def test_a_contender_that_fails_or_does_other_work_is_a_fault(tmp_path: Path) -> None:
    failed = train._measure("trainer", str(tmp_path))  # there is no work.json
    assert "FileNotFoundError" in failed["fault"]
    ours: dict[str, Any] = {"learned": 40, "loss": 2.0, "tokens/CPU s": 9.0, "tokens/s": 8.0}
    ours |= {"start-up s": 1.0, "start-up CPU s": 1.0, "peak MiB": 1.0, "load": 0.1}
    half = ours | {"tokens/CPU s": 4.5, "loss": 2.0001}
    row = train._summary([ours, ours], [half, half], 1e-4)
    assert row["tokens/CPU s, x ours"] == 0.5 and row["tokens/s, x ours"] == 1
    for other in ({"learned": 41}, {"loss": 2.001}, {"loss": math.nan}):
        assert "other work" in train._summary([ours], [ours | other], 1e-4)["fault"]
    assert train._summary([ours], [failed], 1e-4) == failed


def test_too_few_steps_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"loss": 1.0, "tokens": 3, "learned": 2, "at": float(i), "cpu": i} for i in range(2)]
    (tmp_path / "found.json").write_text(json.dumps({"steps": steps}))
    monkeypatch.setattr(train.subprocess, "run", lambda words, **_: subprocess_done(words))
    assert "raise train.max_steps" in train._measure("trl", str(tmp_path))["fault"]


def subprocess_done(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(words, 0, "", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("model.quant=nf4", "model.quant=none"),
        ("engine=ddp", "engine=single"),
        ("adapter=hoft", "adapter=hoft: HF PEFT has no such method"),
        ("train.lrr=1", "lrr"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.run([*(word for word in TINY if "adapter." not in word), changes], None, 1)
    with pytest.raises(UserError, match="--repeats 0"):
        train.run(TINY, None, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "demo", "--shape", "mini"], "--shape is not an option of bench train"),
        (["train", "demo", "--tiny"], "--tiny is not an option of bench train"),
        (["model", "data=toy"], "data=toy is not an option of bench model"),
    ],
)
def test_options_of_another_bench_are_refused_in_one_line(words: list[str], message: str) -> None:
    done = call("bench", *words)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
