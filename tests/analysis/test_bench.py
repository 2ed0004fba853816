"""The benchmark's bookkeeping on a tiny shape: no timing is asserted."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scalepeft.adapters import inject as injection
from scalepeft.analysis.bench import command as bench
from scalepeft.analysis.bench.entries import (
    Case,
    Entry,
    layers_of,
    make_case,
    measure,
    output,
    shared_copy,
)
from scalepeft.analysis.bench.methods import choose
from scalepeft.core.errors import UserError
from scalepeft.core.registry import available
from scalepeft.models.quant import bnb_linear

OPTIONS = bench.Options(
    "model",
    shape="mini",
    rank=4,
    tokens=8,
    repeats=2,
    device="cpu",
    methods="hoft,goft,peft-hra,peft-oft",
)


# Layers of `mini`: (in, out) and how often they occur in its two blocks.
LAYER = "model.layers.0.mlp.up_proj"
LAYERS = {(256, 256): 4, (256, 128): 4, (256, 704): 4, (704, 256): 2}


def run(**changes: Any) -> dict[str, Any]:
    return bench.run(dataclasses.replace(OPTIONS, **changes))


def entries_of(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["label"]: entry for entry in case["entries"]}


def check_ratios(found: dict[str, dict[str, Any]]) -> None:
    """Medians of the ratios of each round, from the times in the file."""
    for entry in found.values():
        if entry["reason"]:
            assert not entry["times_ms"] and entry["median_ms"] is None
            continue
        assert entry["median_ms"] == pytest.approx(statistics.median(entry["times_ms"]))
        others = {"peft-lora": entry["x_peft_lora"], "base": entry["x_base"]}
        for label, value in others.items():
            if value is None:
                assert found[label]["reason"]
                continue
            rounds = zip(entry["times_ms"], found[label]["times_ms"], strict=False)
            assert value == pytest.approx(statistics.median(t / r for t, r in rounds))


@pytest.mark.slow
def test_a_model_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(out=str(tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == result
    assert result["versions"]["torch"] == torch.__version__
    assert result["options"]["tokens"] == 8 and result["threads"] >= 1 and result["device"]

    (case,) = result["cases"]
    found = entries_of(case)
    assert list(found) == ["base", "goft", "hoft", "peft-hra", "peft-lora", "peft-oft"]
    assert not any(entry["reason"] for entry in found.values())
    assert all(len(entry["times_ms"]) == 2 for entry in found.values())
    check_ratios(found)
    assert case["noise"] >= 0

    lora = sum(4 * (i + o) * n for (i, o), n in LAYERS.items())
    widths = sum(i * n for (i, _), n in LAYERS.items())
    assert found["base"]["parameters"] == 0
    assert found["peft-lora"]["parameters"] == found["hoft"]["parameters"] == lora
    assert found["goft"]["parameters"] == widths - sum(LAYERS.values())
    assert found["peft-hra"]["parameters"] == 2 * 4 * widths
    b = found["peft-oft"]["settings"]["oft_block_size"]
    assert found["peft-oft"]["parameters"] == widths * (b - 1) / 2
    assert abs(widths * (b - 1) / 2 - lora) <= abs(widths * (2 * b - 1) / 2 - lora)

    printed = capsys.readouterr().out
    assert all(label in printed for label in found) and "noise" in printed


def test_nf4() -> None:
    pytest.importorskip("bitsandbytes")
    methods = "hoft,lora,ldr,hut-r4,peft-hra"
    found = entries_of(run(quant="nf4", methods=methods, precision="bf16")["cases"][0])
    check_ratios(found)
    assert not found["peft-lora"]["reason"] and not found["hoft"]["reason"]
    assert not found["peft-lora-bf16"]["reason"]
    # PEFT's HRA cannot stand on 4-bit weights, nor LDR on layers that are not square.
    assert found["peft-hra"]["reason"] and found["peft-hra"]["x_base"] is None
    assert "not square" in found["ldr"]["reason"]
    assert found["hut-r4"]["parameters"] == found["lora"]["parameters"]


def test_bitsandbytes_own_layer_is_the_same_nf4() -> None:
    pytest.importorskip("bitsandbytes")
    case = make_case("mini", 8, torch.float32, torch.device("cpu"), "nf4")
    assert not case.peft_base.get_submodule(LAYER).support_avx512bf16_for_cpu
    assert torch.allclose(output(case.base, case.x), output(case.peft_base, case.x), atol=1e-4)
    biased = nn.Linear(64, 32)
    assert torch.equal(bnb_linear(biased).bias, biased.bias)


def test_int8_runs_peft_on_our_storage() -> None:
    found = entries_of(run(quant="int8", methods="lora")["cases"][0])
    assert not found["peft-lora"]["reason"]
    assert found["lora"]["parameters"] == found["peft-lora"]["parameters"]


def lora_entry() -> tuple[Case, Entry]:
    case = make_case("mini", 4, torch.float32, torch.device("cpu"), "none")
    settings = {"name": "lora", "rank": 2, "dropout": 0.0, "target_modules": ["up_proj"]}
    return case, Entry("lora", "scalepeft", settings)


def test_entries_share_the_weights_and_leave_the_base_alone() -> None:
    case, entry = lora_entry()
    before = case.base.get_submodule(LAYER).weight.clone()
    entry.build(case)
    assert entry.parameters == 2 * 2 * (256 + 704)
    assert entry.module.get_submodule(LAYER).weight is case.base.get_submodule(LAYER).weight
    assert torch.equal(before, case.base.get_submodule(LAYER).weight)
    assert not any(True for _ in injection.adapters(case.base))
    assert shared_copy(case.base).get_submodule(LAYER) is not case.base.get_submodule(LAYER)


def test_an_entry_that_differs_from_the_base_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, entry = lora_entry()
    monkeypatch.setattr(Entry, "_output", lambda self, x: output(self.module, x) + 1)
    with pytest.raises(RuntimeError, match="lora: differs from the base at the start"):
        entry.build(case)
    fields = {"peft_type": "LORA", "target_modules": ["up_proj"]}
    theirs = Entry("peft-x", "peft", fields)
    theirs.build(case)
    assert "differs from the base" in theirs.reason and not theirs.times


def test_a_slow_entry_stops_after_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    case, slow = lora_entry()
    lora, base = Entry("peft-lora", "base"), Entry("base", "base")
    seconds = {"lora": 6.0, "peft-lora": 1.0, "base": 0.5}
    monkeypatch.setattr(Entry, "seconds", lambda entry, case: seconds[entry.label])
    measure(case, [base, slow, lora], 5)
    found = entries_of(bench.summary("t", [base, slow, lora]))
    assert [len(found[label]["times_ms"]) for label in seconds] == [3, 5, 5]
    assert found["lora"]["x_peft_lora"] == 6 and found["lora"]["x_base"] == 12
    assert found["base"]["iqr_ms"] == 0


def test_every_method_has_an_entry_of_equal_size() -> None:
    layers = layers_of("llama-8b-block")
    entries = {e.label: e for e in choose("all", layers, 16, False)}
    ours = {e.label: e.settings for e in entries.values() if e.family == "scalepeft"}
    theirs = {e.label: e.settings for e in entries.values() if e.family == "peft"}
    expected = set(available("adapters.methods")) - {"surm", "hut"}
    assert set(ours) == expected | {
        "circulant", "toeplitz", "kronecker", "ldr", "hut-r1", "hut-r16"
    }  # fmt: skip
    for name in ("hoft", "shoft", "hra"):
        assert injection.adapter_config(ours[name]).form != "pairs"
    assert ours["lora"]["dropout"] == ours["dora"]["dropout"] == 0
    assert "peft-lora-bf16" not in theirs
    low = next(e for e in choose("hoft", layers, 16, True) if e.label == "peft-lora-bf16")
    assert not low.autocast and low.settings == theirs["peft-lora"]
    lora = sum(16 * (width + out) for _, width, out in layers)
    for name, b, count in (
        ("oft", ours["oft"]["block_size"], lambda b, i, o: i * (b - 1) / 2),
        ("boft", ours["boft"]["block_size"], lambda b, i, o: i * (b - 1) + o),
        ("peft-boft", theirs["peft-boft"]["boft_block_size"], lambda b, i, o: i * b + o),
    ):
        assert 0.6 < sum(count(b, i, o) for _, i, o in layers) / lora < 1.5, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "hotf"}, "no method .* Did you mean 'hoft'"),
        ({"shape": "llama-9b"}, "no shape or model folder 'llama-9b'"),
        ({"tokens": 0}, "--tokens 0: must be 1 or more"),
        ({"tokens": 700}, "rows of 512; take 512"),
        ({"methods": ""}, "no method .* ''"),
        ({"repeats": 0}, "--repeats 0"),
        ({"rank": 0}, "--rank 0"),
        ({"rank": 5}, "--rank 5: HOFT .* even; take 6"),
    ],
)
def test_nonsense_is_refused_before_anything_is_built(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "make_case", lambda *a: pytest.fail("built"))
    with pytest.raises(UserError, match=message):
        run(**changes)


def test_cuda_that_is_not_there_and_a_file_as_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA"):
        run(device="cuda")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        run(out=str(tmp_path / "file"))


def test_an_absent_peft_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'scalepeft\[dev\]'"):
        run()
