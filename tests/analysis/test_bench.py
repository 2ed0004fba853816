"""The benchmark's bookkeeping on two tiny shapes: no timing is asserted."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from scalepeft.adapters import inject as injection
from scalepeft.analysis.bench import command as bench
from scalepeft.analysis.bench.cases import Case, layer_sets, make_case, output, shared_copy
from scalepeft.analysis.bench.entries import Entry, measure
from scalepeft.analysis.bench.memory import peak_bytes, saved_bytes
from scalepeft.analysis.bench.methods import choose
from scalepeft.core.errors import UserError
from scalepeft.core.registry import available
from scalepeft.models.quant import bnb_linear

OPTIONS = bench.Options(
    "model", shape="mini", rank=4, tokens=8, repeats=2, device="cpu", methods="hoft,goft"
)


# Layers of `mini`: (in, out) and how often they occur in its two blocks.
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
        for label, value in {**others, **entry["x_neighbours"]}.items():
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
    assert (tmp_path / "new" / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert result["versions"]["torch"] == torch.__version__
    assert result["options"]["tokens"] == 8 and result["threads"] >= 1 and result["device"]

    (case,) = result["cases"]
    found = entries_of(case)
    assert list(found) == [
        "base", "goft", "hoft", "peft-boft", "peft-hra", "peft-lora", "peft-oft"
    ]  # fmt: skip
    assert set(found["goft"]["x_neighbours"]) == {"peft-boft", "peft-oft"}
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

    for entry in found.values():
        assert 0 < entry["saved_bytes"] <= entry["peak_bytes"] * 1.05
    printed = capsys.readouterr().out
    assert all(label in printed for label in found) and "noise" in printed


def test_layers_are_measured_in_turn() -> None:
    result = run(what="layer", methods="ldr,hut-r4,hadamard,ia3", tokens=6)
    assert len(result["cases"]) == len(LAYERS)
    for case, (width, out) in zip(result["cases"], LAYERS, strict=True):
        assert f"{out} x {width}" in case["title"]
        found = entries_of(case)
        check_ratios(found)
        assert (
            found["hut-r4"]["parameters"] == found["peft-hira"]["parameters"] == 4 * (width + out)
        )
        assert found["hadamard"]["parameters"] == 2 * out
        assert found["ia3"]["parameters"] == found["peft-ia3"]["parameters"]
        # LDR exists on square layers alone: left out with its reason, not silently.
        assert ("not square" in found["ldr"]["reason"]) == (width != out)


@pytest.mark.parametrize("what", ["layer", "model"])
def test_nf4(what: str) -> None:
    pytest.importorskip("bitsandbytes")
    for case in run(what=what, quant="nf4", methods="hoft,lora", precision="bf16")["cases"]:
        found = entries_of(case)
        check_ratios(found)
        assert not found["peft-lora"]["reason"] and not found["hoft"]["reason"]
        assert not found["peft-lora-bf16"]["reason"]
        # PEFT's HRA cannot stand on 4-bit weights.
        assert found["peft-hra"]["reason"] and found["hoft"]["x_neighbours"] == {"peft-hra": None}


def test_bitsandbytes_own_layer_is_the_same_nf4() -> None:
    pytest.importorskip("bitsandbytes")
    case = make_case(("q_proj", 128, 64), 8, torch.float32, torch.device("cpu"), "nf4")
    assert not case.peft_base.get_submodule("q_proj").support_avx512bf16_for_cpu
    assert torch.allclose(output(case.base, case.x), output(case.peft_base, case.x), atol=1e-6)
    biased = nn.Linear(64, 32)
    assert torch.equal(bnb_linear(biased).bias, biased.bias)


def test_int8_runs_peft_on_our_storage() -> None:
    found = entries_of(run(quant="int8", methods="lora")["cases"][0])
    assert not found["peft-lora"]["reason"]
    assert found["lora"]["parameters"] == found["peft-lora"]["parameters"]


def lora_entry(tokens: int, out: int, width: int, rank: int) -> tuple[Case, Entry]:
    case = make_case(("up_proj", width, out), tokens, torch.float32, torch.device("cpu"), "none")
    settings = {"name": "lora", "rank": rank, "target_modules": ["up_proj"]}
    return case, Entry("lora", "scalepeft", settings)


def test_saved_bytes_of_lora_are_counted_exactly() -> None:
    tokens, out, width, rank = 24, 48, 32, 4
    case, entry = lora_entry(tokens, out, width, rank)
    entry.build(case)
    # x, x A^T, and B times its scaling; W and A are parameters and count as nothing saved.
    assert entry.saved_bytes == 4 * (tokens * width + tokens * rank + out * rank)
    assert entry.parameters == rank * (width + out)


def test_peak_bytes_follow_what_is_alive() -> None:
    x = torch.zeros(1000)

    def step() -> None:
        a = x + 1
        del a
        b = x * 2
        c = b.view(10, 100)[2:]  # a view is no memory
        b += 1
        c.add_(x[:800].view(8, 100))

    assert peak_bytes(step, x.device) == 4000

    def two() -> None:
        kept = x + 1
        kept.exp()
        x.mul_(2)  # was there before

    assert peak_bytes(two, x.device) == 8000


def test_counting_frees_what_was_saved() -> None:
    x = torch.randn(100, requires_grad=True)

    def step(hooks: saved_tensors_hooks) -> None:
        with hooks:
            y = x.exp()  # saves its own output
        y.sum().backward()
        assert torch.equal(x.grad, y)  # type: ignore[arg-type]

    assert saved_bytes(step, []) == 400


def test_entries_share_the_weights_and_leave_the_base_alone() -> None:
    case, entry = lora_entry(4, 16, 8, 2)
    before = case.base.get_submodule("up_proj").weight.clone()
    entry.build(case)
    assert entry.module.get_submodule("up_proj").weight is case.base.get_submodule("up_proj").weight
    assert torch.equal(before, case.base.get_submodule("up_proj").weight)
    assert not any(True for _ in injection.adapters(case.base))
    assert shared_copy(case.base).get_submodule("up_proj") is not case.base.get_submodule("up_proj")


def test_an_entry_that_differs_from_the_base_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, entry = lora_entry(4, 16, 8, 2)
    monkeypatch.setattr(Entry, "_output", lambda self, x: output(self.module, x) + 1)
    with pytest.raises(RuntimeError, match="lora: differs from the base at the start"):
        entry.build(case)
    fields = {"peft_type": "LORA", "target_modules": ["up_proj"]}
    theirs = Entry("peft-x", "peft", fields)
    theirs.build(case)
    assert "differs from the base" in theirs.reason and not theirs.saved_bytes


def test_a_slow_entry_stops_after_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    case, slow = lora_entry(4, 16, 8, 2)
    lora, base = Entry("peft-lora", "base"), Entry("base", "base")
    seconds = {"lora": 6.0, "peft-lora": 1.0, "base": 0.5}
    monkeypatch.setattr(Entry, "seconds", lambda entry, case: seconds[entry.label])
    measure(case, [base, slow, lora], 5)
    found = entries_of(bench.summary("t", [base, slow, lora]))
    assert [len(found[label]["times_ms"]) for label in seconds] == [3, 5, 5]
    assert found["lora"]["x_peft_lora"] == 6 and found["lora"]["x_base"] == 12
    assert found["base"]["iqr_ms"] == 0


def test_every_method_has_an_entry_of_equal_size() -> None:
    (layers,) = layer_sets("model", "llama-8b-block")
    entries = {e.label: e for e in choose("all", layers, 16, False)}
    ours = {e.label: e.settings for e in entries.values() if e.family == "scalepeft"}
    theirs = {e.label: e.settings for e in entries.values() if e.family == "peft"}
    expected = set(available("adapters.methods")) - {"surm", "hut"}
    assert set(ours) == expected | {
        "circulant", "toeplitz", "kronecker", "ldr", "hut-r1", "hut-r16"
    }  # fmt: skip
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
    assert theirs["peft-c3a"]["block_size"] == 2048  # of down_proj too
    assert theirs["peft-c3a"]["block_size_pattern"] == {
        "q_proj": 4096, "o_proj": 4096, "k_proj": 1024, "v_proj": 1024
    }  # fmt: skip
    assert entries["hut-r16"].neighbours == ["peft-hira"] and not entries["kronecker"].neighbours


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
        ({"what": "layer", "rank": 5}, "--rank 5"),
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
