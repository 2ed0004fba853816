"""``scalepeft bench gpu --tiny`` on a CPU: every section runs, a failing one is a result."""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import call, zygote

from scalepeft.adapters import householder
from scalepeft.analysis.bench.gpu import command, exactness, training
from scalepeft.analysis.bench.gpu.session import Session
from scalepeft.cluster.plan import gpus
from scalepeft.core.errors import UserError
from scalepeft.core.registry import available
from scalepeft.models import quant


def check_choices(found: dict[str, Any]) -> None:
    """Both ways are the same step; each took the way that it is named for."""
    rows = found["choices"]
    for one, other in (
        ("hoft, factors once", "hoft, factors in each forward"),
        ("goft, factors once", "goft, factors in each forward"),
        ("hoft, packed", "hoft, padded"),
    ):
        for key in ("first loss", "last loss"):
            assert rows[one][key] == pytest.approx(rows[other][key], rel=2e-3), (one, key)
    packed, padded = rows["hoft, packed"], rows["hoft, padded"]
    tokens = [row["tokens/s"] * row["ms"] for row in (packed, padded)]
    assert tokens[0] == pytest.approx(tokens[1]), "tokens of the rows alone"
    assert packed["computed"] < padded["computed"]


def test_each_way_is_the_one_that_it_is_named_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)
        count = staticmethod(lambda *a: calls.update([owner.__name__]) or function(*a))
        monkeypatch.setattr(owner, name, count)

    session = Session(tmp_path, 100, True)
    monkeypatch.setattr(session, "milliseconds", lambda work, *_: [work() or 1.0])
    counted(householder, "core")
    lengths = torch.full((4,), 16)
    for how in (training.ONCE, training.EACH):
        training._choice(session, "hoft", how, lengths)
        calls[how] = calls.pop(householder.__name__)
    # Two sides; four shapes, counted, made and differentiated; ten layers in four micro-batches.
    assert calls == {training.ONCE: 2 * 4 * 3, training.EACH: 2 * (4 + 10 * 4)}


def test_the_model_is_built_as_a_training_builds_it(tmp_path: Path) -> None:
    made = training.trainer(Session(tmp_path, 100, True), "hoft", training.NF4)
    tables = {n: b for n, b in made.built.model.named_buffers() if n.endswith("inv_freq")}
    assert tables and {b.dtype for b in tables.values()} == {torch.float32}, "not rounded to bf16"
    stored = [m for m in made.built.model.modules() if isinstance(m, quant.QuantLinear)]
    assert len(stored) == 14 and {m.fmt for m in stored} == {quant.NF4(True)}


@pytest.mark.slow
@pytest.mark.full
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["bench", "gpu", "--tiny", "--out", str(tmp_path / "new/out")]
    done = zygote().run(("-m", "scalepeft"), words, env, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "new/out/gpu.json").read_text())
    assert list(found) == list(command.SECTIONS)
    assert not command.has_fault(found)
    assert "skipped" not in json.dumps(found)
    for row in found["quant"].values():
        assert row["decoded alike"]
        assert row["weight bytes that differ"] == row["scale bytes that differ"] == 0
    assert set(available("adapters.methods")) <= set(found["exactness"])
    for row in found["exactness"].values():
        assert row["fp32"] < 1e-5 and row["bf16"] < 3e-2
    rows = [found["training"][f"{a} {s}"] for a, s in training.CASES]
    for row in [*rows, *found["choices"].values()]:
        assert math.isfinite(row["first loss"]) and math.isfinite(row["last loss"])
        assert row["ms"] > 0 and row["tokens/s"] > 0
        assert {row[key] for key in training.ON_DEVICE} == {None}
    (planned,) = found["plan"].values()
    assert planned["planned GiB"] > 0 and planned["measured GiB"] is None
    with pytest.raises(UserError, match=r"expected gpu\.json of a full"):
        gpus.measured(tmp_path / "new/out/gpu.json")
    text = (tmp_path / "new/out/gpu.json").read_text().replace("null", "0.5")
    (tmp_path / "gpu.json").write_text(text)  # as a GPU would have filled it
    kept = gpus.measured(tmp_path / "gpu.json")
    assert kept["device"].endswith(" --tiny") and kept["holes"] == kept["CUDA GiB"] == 0.5
    assert kept["TFLOP/s of plan"] == planned["TFLOP/s of plan"] > 0
    check_choices(found)
    (resumed,) = found["running"].values()
    assert resumed["bitwise"] and resumed["killed after"] >= 12
    assert set(found["collectives"]) == {"links", "4-bit bytes"}
    assert all(row["tokens/s"] > 0 for row in found["generation"].values())
    text = (tmp_path / "new/out/gpu.md").read_text()
    assert text.strip() in done.stdout and all(f"\n## {name}\n" in text for name in found)
    assert not (tmp_path / "new/out/runs").exists()


def broken(session: Session) -> dict[str, Any]:
    raise ZeroDivisionError("of this test")


def test_a_section_that_fails_is_a_fault_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(session: Session) -> dict[str, Any]:
        kept = json.loads((tmp_path / "gpu.json").read_text())
        assert kept["quant"]["fault"] == "ZeroDivisionError: of this test"
        return {"looked": True}

    monkeypatch.setitem(command.SECTIONS, "quant", broken)
    monkeypatch.setitem(command.SECTIONS, "exactness", look)
    assert command.run(str(tmp_path), None, "exactness,env,quant", True) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["env", "quant", "exactness"]
    assert found["exactness"] == {"looked": True}
    assert "ZeroDivisionError: of this test" in (tmp_path / "gpu.md").read_text()


def test_a_section_without_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.SECTIONS, "quant", broken)
    assert command.run(str(tmp_path), 1.0, "quant", True) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found == {"quant": {"skipped": "no time left"}}
    assert "no time left" in (tmp_path / "gpu.md").read_text()


def test_options_that_cannot_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no section .* 'quants'\. .*quant"):
        command.run(str(tmp_path), None, "env,quants", True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*name a folder"):
        command.run(str(tmp_path / "file"), None, None, True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device here; add --tiny"):
        command.run(str(tmp_path), None, None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu", "--tiny", "--rank", "4"], "--rank is not an option of bench gpu"),
        (["gpu", "--device", "cpu"], "--device is not an option of bench gpu"),
        (["layer"], "invalid choice: 'layer'"),
        (["model", "--only", "env"], "--only is not an option of bench model"),
    ],
)
def test_a_flag_of_another_bench_is_refused_in_one_line(words: list[str], message: str) -> None:
    done = call("bench", *words)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf"])
def test_seconds_that_are_no_budget(seconds: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--seconds"):
        command.run(str(out), float(seconds), "env", True)
    assert not out.exists()


def test_a_wrong_number_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tmp_path, 100, True)
    right = exactness._errors(session, "lora", {})
    assert not command.has_fault(right) and 0 < right["fp32"] < 1e-5
    run, calls = exactness._run, []

    def wrong(*args: Any) -> Any:
        calls.append(args)
        found = run(*args)
        return found if len(calls) == 1 else [t * float("nan") for t in found]

    monkeypatch.setattr(exactness, "_run", wrong)
    assert command.has_fault(exactness._errors(session, "lora", {}))
    assert not command.has_fault(exactness._bytes(session, quant.NF4(False), torch.float32))
    encode = quant.NF4.encode
    turns = iter([False, True])

    def other(self: Any, rows: Any) -> Any:
        weight, scale = encode(self, rows)
        return (weight ^ 1 if next(turns) else weight), scale

    monkeypatch.setattr(quant, "self_check", lambda *_: None)
    monkeypatch.setattr(quant.NF4, "encode", other)
    assert command.has_fault(exactness._bytes(session, quant.NF4(False), torch.float32))
    session.keep("lora", {"fp32": float("nan")})
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"lora": {"fp32": "NaN"}}
