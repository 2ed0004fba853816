"""scalepeft merge: what stock transformers loads is the adapted model; refusals leave nothing."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finished import (
    METHODS,
    adapted,
    distance,
    logits,
    make_run,
    sealed_again,
    stock,
    write_adapter,
)
from processes import ROOT, Job, call, flip
from safetensors.torch import load_file, save_file
from torch import nn

from scalepeft import cli
from scalepeft.adapters import inject as injection
from scalepeft.adapters import layout
from scalepeft.adapters import merged_weight as effective
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.safetensors import SafetensorsFile
from scalepeft.export import merge
from scalepeft.models import hub, quant
from scalepeft.models.quantized_copy import QuantizedCopy
from scalepeft.parallel.base import EngineConfig
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single

TINY = "builtin:tiny"


def run(
    run_dir: Path, out: Path, *settings: str, base: str = "original", dtype: str = "base"
) -> Path:
    merge.run(str(run_dir), str(out), list(settings), base, dtype)
    return out


def refused(*args: Any, **kwargs: Any) -> str:
    """The message of a merge that must not write anything."""
    out = args[1]
    before = out.exists()
    with pytest.raises(UserError) as caught:
        run(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert out.exists() == before
    assert not list(out.parent.glob("*partial*"))
    return str(caught.value)


def random_llama(
    folder: Path, architecture: str = "Llama", shard: str = "10GB", **settings: Any
) -> Path:
    import transformers

    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases off their start
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K" / "hf"


@torch.no_grad()
def story(model: Any, prompt: torch.Tensor) -> list[int]:
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64,
        min_new_tokens=64,
    )  # fmt: skip
    found: list[int] = out[0, prompt.shape[1] :].tolist()
    return found


QUICK = ("lora", "hoft", "goft", "hadamard")


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_the_merged_model_is_the_adapted_one(
    method: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    run_dir = make_run(tmp_path / "run", stories, method)
    out = run(run_dir, tmp_path / "out")
    printed = capsys.readouterr().err
    ours, theirs, base = adapted(run_dir), stock(out), stock(stories)
    wanted = logits(ours)
    assert distance(wanted, logits(base)) > 0.1, "the adapter must show"
    assert distance(wanted, logits(theirs)) < 2e-4
    prompt = AutoTokenizer.from_pretrained(out)("Once upon a time", return_tensors="pt").input_ids
    told = story(theirs, prompt)
    assert told == story(ours, prompt)
    assert told != story(base, prompt)
    line = re.search(r"by at most (\S+) \(relative (\S+)\) over 64 tokens; .* 64 of 64", printed)
    assert line, printed
    assert float(line[1]) < 2e-4
    assert float(line[2]) < 2e-5
    assert not list(tmp_path.glob("*partial*"))


def test_what_is_not_adapted_is_the_same_bytes(stories: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", stories, "hadamard-after", adapter={"layers": [1]})
    out = run(run_dir, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (stories, out))
    block = "model.layers.1"
    changed = {f"{block}.self_attn.o_proj.weight", f"{block}.post_attention_layernorm.weight"}
    assert {k for k in before if not torch.equal(before[k], after[k])} == changed
    # the switch gives q, k, v and o of every block a bias: zero but for the adapted one
    new = {f"model.layers.{i}.self_attn.{m}_proj.bias" for i in range(5) for m in "qkvo"}
    assert after.keys() - before.keys() == new
    assert {k for k in new if after[k].any()} == {f"{block}.self_attn.o_proj.bias"}
    config = json.loads((out / "config.json").read_text())
    original = json.loads((stories / "config.json").read_text())
    assert config == {**original, "attention_bias": True}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (stories / name).read_bytes()


def test_biases_take_the_switches_they_need(stories: Path, tmp_path: Path) -> None:
    for targets, switches in (
        (["gate_proj"], (False, True)),
        (["q_proj", "down_proj"], (True, True)),
    ):
        name = "-".join(targets)
        settings = {"target_modules": targets}
        run_dir = make_run(tmp_path / name, stories, "hut-rank1-shift", adapter=settings)
        out = run(run_dir, tmp_path / f"{name}-out")
        config = json.loads((out / "config.json").read_text())
        assert (config["attention_bias"], config["mlp_bias"]) == switches
        assert distance(logits(adapted(run_dir)), logits(stock(out))) < 1e-4


def test_a_shift_of_zero_needs_no_bias(stories: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", stories, "hut-rank1-shift")
    _, state, description = injection.read_adapter(run_dir / "adapter")
    state = {k: torch.zeros_like(v) if k.endswith("shift") else v for k, v in state.items()}
    description["adapter"] = cfg.to_dict(injection.read_adapter(run_dir / "adapter")[0])
    write_adapter(run_dir, state, description)
    out = run(run_dir, tmp_path / "out")
    assert not json.loads((out / "config.json").read_text())["attention_bias"]
    assert distance(logits(adapted(run_dir)), logits(stock(out))) < 1e-4


@pytest.mark.parametrize(
    ("architecture", "settings", "method"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}, "hut-rank1-shift"),
        ("Llama", {"attention_bias": True}, "hadamard-after"),
        ("Llama", {"tie_word_embeddings": True}, "hoft"),
        ("Mistral", {}, "hoft"),
        ("Qwen2", {}, "hut-rank1-shift-qkv"),
        ("Qwen3", {"head_dim": 16}, "hadamard-after"),
    ],
)
def test_other_architectures(
    architecture: str, settings: dict[str, Any], method: str, tmp_path: Path
) -> None:
    base = random_llama(tmp_path / "base", architecture, **settings)
    qkv = {"target_modules": ["q_proj", "k_proj", "v_proj"]} if method.endswith("qkv") else {}
    layers = {} if method.startswith("hadamard") else {"layers": [0]}
    adapter = {**qkv, **layers}
    run_dir = make_run(tmp_path / "run", base, method.removesuffix("-qkv"), adapter=adapter)
    out = run(run_dir, tmp_path / "out")
    wanted = logits(adapted(run_dir))
    assert distance(wanted, logits(stock(base))) > 1e-2
    assert distance(wanted, logits(stock(out))) < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("method", ["hoft", "hira", "hadamard-after"])
@pytest.mark.parametrize(
    "storage", [{"quant": "nf4"}, {"quant": "nf4", "double_quant": True}, {"quant": "int8"}]
)
def test_a_dequantized_base_is_what_training_saw(
    method: str,
    storage: dict[str, Any],
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = make_run(tmp_path / "run", stories, method, **storage)
    wanted = logits(adapted(run_dir))
    printed = {}
    for base in ("dequantized", "original"):
        out = run(run_dir, tmp_path / base, base=base)
        error = distance(wanted, logits(stock(out)))
        line = re.search(r"by at most (\S+) ", capsys.readouterr().err)
        assert line
        printed[base] = float(line[1])
        if base == "dequantized":
            assert error < 1e-4
            assert printed[base] < 1e-4
        else:
            plain = distance(logits(adapted(run_dir, quantized=False)), logits(stock(out)))
            assert plain < 1e-4, "the original base: the adapter on unquantized weights"
    assert printed["original"] > 100 * printed["dequantized"]


def test_shards_keep_their_files_and_index(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base", shard="100KB")
    index = json.loads((base / merge.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    run_dir = make_run(tmp_path / "run", base, "hut-rank1-shift")
    out = run(run_dir, tmp_path / "out")
    written = json.loads((out / merge.INDEX).read_text())
    bias = "model.layers.1.mlp.up_proj.bias"
    assert bias in written["weight_map"]
    for name, file in written["weight_map"].items():
        held = index["weight_map"][name.replace("bias", "weight")]
        assert file == held
    files = {file: load_file(out / file) for file in set(written["weight_map"].values())}
    assert {k: f for f, tensors in files.items() for k in tensors} == written["weight_map"]
    total = sum(t.nbytes for tensors in files.values() for t in tensors.values())
    assert written["metadata"]["total_size"] == total
    wanted = logits(adapted(run_dir))
    assert distance(wanted, logits(stock(out))) < 1e-5 * wanted.abs().max()


def test_files_without_an_index_are_no_model_for_transformers_either(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base", shard="100KB")
    run_dir = make_run(tmp_path / "run", base, "hoft")
    (base / merge.INDEX).unlink()
    assert "neither model.safetensors nor" in refused(run_dir, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["base", "bf16", "fp32"])
def test_each_weight_is_rounded_once(dtype: str, stories: Path, tmp_path: Path) -> None:
    base = shutil.copytree(stories, tmp_path / "base")
    kept = torch.bfloat16 if dtype != "bf16" else torch.float32
    held = {k: v.to(kept) for k, v in load_file(base / "model.safetensors").items()}
    held["counter"] = torch.arange(3)  # of a dtype that is nobody's business
    save_file(held, base / "model.safetensors", {"format": "pt"})
    run_dir = make_run(tmp_path / "run", base, "hoft", unexpected="ignore")
    out = run(run_dir, tmp_path / "out", dtype=dtype)
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    written = load_file(out / "model.safetensors")
    assert torch.equal(written.pop("counter"), torch.arange(3))
    assert {t.dtype for t in written.values()} == {wanted}
    model = adapted(run_dir)
    exact = {f"{n}.weight": scalepeft_weight(layer) for n, layer in injection.adapted_layers(model)}
    for name, tensor in written.items():
        value = exact.get(name, held[name])
        assert distance(value.to(wanted).float(), tensor.float()) <= (
            0 if name not in exact else value.abs().max().item() * 2**-8 * (dtype != "fp32") + 1e-6
        ), name
    same = [(exact[n].to(wanted) == written[n]).float().mean() for n in exact]
    assert min(same) > (0.5 if dtype == "fp32" else 0.99), "one rounding, up to the last fp32 bit"
    said = json.loads((out / "config.json").read_text())["dtype"]
    assert said == ("float32" if dtype in ("base", "fp32") else "bfloat16")


def scalepeft_weight(layer: nn.Module) -> torch.Tensor:
    return effective.merged(layer)


def test_values_too_large_for_the_dtype(stories: Path, tmp_path: Path) -> None:
    base = shutil.copytree(stories, tmp_path / "base")
    held = {k: v.half() for k, v in load_file(base / "model.safetensors").items()}
    save_file(held, base / "model.safetensors", {"format": "pt"})
    run_dir = make_run(tmp_path / "run", base, "hut-rank1-shift", scatter=400.0)
    message = refused(run_dir, tmp_path / "out")
    assert "do not fit into F16" in message
    assert "--dtype" in message


def test_a_tokenizer_of_its_own_goes_along(stories: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stories / name, bare)
    run_dir = make_run(tmp_path / "run", bare, "hoft", tokenizer=str(stories))
    out = run(run_dir, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()


def test_an_adapter_placed_behind_the_layer_cannot_merge(tmp_path: Path) -> None:
    settings = {"placement": "adapter", "target_modules": ["o_proj"]}
    run_dir = make_run(tmp_path / "run", TINY, "surm", adapter=settings)
    message = refused(run_dir, tmp_path / "out")
    assert "SURM cannot merge" in message
    assert "not affine" in message
    assert "keep the adapter" in message
    assert (run_dir / "adapter" / layout.WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("architecture", "method"), [("Mistral", "hut-rank1-shift"), ("Qwen2", "hadamard-after")]
)
def test_a_bias_without_a_place(architecture: str, method: str, tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base", architecture)
    adapter = {} if method.startswith("hadamard") else {"layers": [0]}
    run_dir = make_run(tmp_path / "run", base, method, adapter=adapter)
    message = refused(run_dir, tmp_path / "out")
    assert f"adapter.name={METHODS[method]['name']} adds a bias" in message
    assert architecture.lower() in message
    assert "keep the adapter" in message


def test_a_tied_head_takes_no_adapter_and_another_merges(stories: Path, tmp_path: Path) -> None:
    head = {"target_modules": ["lm_head"]}
    with pytest.raises(UserError, match=r"lm_head shares its weight with model.embed_tokens"):
        make_run(tmp_path / "run", stories, "lora", adapter=head)
    run_dir = make_run(tmp_path / "untied", TINY, "lora", adapter={"target_modules": ["lm_head"]})
    out = run(run_dir, tmp_path / "out")
    assert distance(logits(adapted(run_dir)), logits(stock(out))) < 1e-4


class ShiftedNorm(nn.LayerNorm):
    """Multiplies by 1 + weight, as Gemma's norms do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalized = nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps)
        return normalized * (1 + self.weight) + self.bias


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, ShiftedNorm])
def test_a_norm_with_a_trained_scale(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.o_proj, model.norm, x = nn.Linear(8, 8), kind(8), torch.randn(5, 8)
    injection.inject(model, {"name": "hadamard", "norm": "norm"})
    norm: Any = model.norm
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn_like(p))
    without = super(injection.AdaptedNorm, norm).forward
    if kind is ShiftedNorm:
        with pytest.raises(UserError, match="ShiftedNorm does not multiply by its weight"):
            effective.merged_norm("model.norm", norm, [norm.adapter], without)
        return
    wanted, plain = norm(x), kind(8)
    merged = effective.merged_norm("model.norm", norm, [norm.adapter], without)
    for key, p in plain.named_parameters():
        p.data = merged[key]
    assert distance(plain(x), wanted) < 1e-5
    assert distance(norm(x), wanted) == 0, "measuring leaves the norm as it was"


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    assert f"OUT={out}: is there already" in refused(run_dir, out)
    assert [f.read_text() for f in out.iterdir()] == ["precious"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is there already"):
        run(run_dir, tmp_path / "link")


def test_dequantizing_what_was_never_quantized(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    message = refused(run_dir, tmp_path / "out", base="dequantized")
    assert "--base-weights dequantized" in message
    assert "model.quant=none" in message


def test_settings_that_would_make_it_another_model(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    message = refused(run_dir, tmp_path / "out", "adapter.rank=2")
    assert "adapter.rank: cannot be changed for a merge; allowed: model.path" in message
    assert "is not a run directory" in refused(tmp_path / "none", tmp_path / "out")


def test_another_base(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", random_llama(tmp_path / "base"), "hoft")
    other = random_llama(tmp_path / "other", num_hidden_layers=1)
    message = refused(run_dir, tmp_path / "out", f"model.path={other}")
    assert "was trained on another base" in message
    assert str(other) in message
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    out = run(run_dir, tmp_path / "out", f"model.path={moved}")
    assert (out / "model.safetensors").is_file()


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _no_tensors(folder: Path) -> None:
    (folder / layout.WEIGHTS).unlink()


def _garbage(folder: Path) -> None:
    (folder / layout.WEIGHTS).write_bytes(b"\x08" * 100)


def _tensors(folder: Path, change: Any) -> None:
    state = load_file(folder / layout.WEIGHTS)
    change(state, sorted(state)[0])
    save_file(state, folder / layout.WEIGHTS)
    sealed_again(folder)


def _description(folder: Path, **changes: Any) -> None:
    held = json.loads((folder / layout.ABOUT).read_text())["adapter"]
    sealed_again(folder, adapter=held | changes)


def _flipped(name: str) -> Any:
    return lambda folder: flip(folder / name, (folder / name).stat().st_size * 2 // 3)


DAMAGES: dict[str, tuple[Any, list[str]]] = {
    "no-config": (_no_config, ["adapter_config.json: no such file", "name the adapter/"]),
    "no-tensors": (_no_tensors, ["adapter_model.safetensors", "No such file"]),
    "no-description": (
        lambda f: (f / layout.ABOUT).unlink(), ["scalepeft.json: no such file", "again, which"],
    ),
    "flipped": (_flipped(layout.WEIGHTS), ["adapter_model.safetensors: has changed", "copy it"]),
    "flipped-config": (_flipped(layout.CONFIG), ["adapter_config.json: "]),
    "flipped-description": (_flipped(layout.ABOUT), ["scalepeft.json: "]),
    "garbage": (_garbage, ["adapter_model.safetensors", "no readable adapter folder"]),
    "missing": (lambda f: _tensors(f, lambda s, k: s.pop(k)), ["lacks 1 of 40 tensors"]),
    "extra": (
        lambda f: _tensors(f, lambda s, k: s.update(more=torch.ones(1))),
        ["more is no tensor of hoft"],
    ),
    "another-layer": (
        lambda f: _tensors(f, lambda s, k: s.update({k.replace("layers.0", "layers.9"): s[k] + 1})),
        ["has 1 tensors this model does not", "layers.9"],
    ),
    "shape": (
        lambda f: _tensors(f, lambda s, k: s.update({k: s[k][:, :2].clone()})),
        ["has shape [", "needs ["],
    ),
    "nan": (
        lambda f: _tensors(f, lambda s, k: s[k].view(-1)[0].fill_(float("nan"))),
        ["holds NaN or infinity", "older checkpoint"],
    ),
    "inf": (
        lambda f: _tensors(f, lambda s, k: s[k].view(-1)[3].fill_(float("inf"))),
        ["holds NaN or infinity"],
    ),
    "method": (
        lambda f: _description(f, name="shoft"),
        ["adapter_model.safetensors: ", "is no tensor of shoft"],
    ),
    "no-base": (
        lambda f: sealed_again(f, base_model="meta-llama/x"),
        ["or of no base", "name the adapter/"],
    ),
    "rank": (lambda f: _description(f, rank=8), ["rank is 8 there and 4 in"]),
    "unknown": (lambda f: _description(f, rnak=8), ["adapter.rnak=8", "Did you mean 'rank'?"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter(damage: str, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    break_it, expected = DAMAGES[damage]
    break_it(run_dir / "adapter")
    message = refused(run_dir, tmp_path / "out")
    for part in expected:
        assert part in message, message


def test_another_storage_than_that_of_training(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft", quant="int8")
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    values["model"]["quant"] = "nf4"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    assert "quant is int8 there and nf4 in" in refused(run_dir, tmp_path / "out")


def test_an_incomplete_base(stories: Path, tmp_path: Path) -> None:
    base = shutil.copytree(stories, tmp_path / "base")
    held = load_file(base / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, base / "model.safetensors", {"format": "pt"})
    run_dir = make_run(tmp_path / "run", base, "hoft")
    message = refused(run_dir, tmp_path / "out")
    assert "no tensor 'model.norm.weight'" in message


def test_a_full_disk(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, old[1]))
    try:
        message = refused(run_dir, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert f"OUT={tmp_path / 'out'}: not written: File too large" in message


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="not written: Not a directory"):
        run(run_dir, tmp_path / "file" / "out")


def test_a_run_that_went_on_or_has_not_finished_is_refused(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    step = json.loads((run_dir / "adapter" / layout.ABOUT).read_text())["step"]
    (run_dir / f"checkpoints/step-{step + 5:06d}").mkdir(parents=True)
    assert f"adapter is that of step {step}, the newest" in refused(run_dir, tmp_path / "out")
    shutil.rmtree(run_dir / "adapter")
    assert f"has not finished: it is at step {step + 5}" in refused(run_dir, tmp_path / "out")


def test_settings_do_not_take_the_place_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["merge", "run", "model.path=elsewhere"])
    assert exit_.value.code == 2
    assert "OUT=model.path=elsewhere: RUN_DIR and OUT come first" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        (partial,) = tmp_path.glob("out.partial-*")
        assert (partial / "model.safetensors").is_file()
        raise KeyboardInterrupt

    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    monkeypatch.setattr(merge, "_write_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(run_dir, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


class Counted:
    """What a merge reads of the base's files, and how many numbers it quantizes."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.encoded = 0
        read, encode = SafetensorsFile.read, quant.NF4.encode

        def counted(file: Any, start: int, size: int) -> bytearray:
            if file.path.parent == base and size:
                self.ranges.append((file.path.name, start, start + size))
            return read(file, start, size)

        def encoded(fmt: Any, rows: torch.Tensor) -> Any:
            self.encoded += rows.numel() if len(rows) > 8 else 0  # not the self-check's
            return encode(fmt, rows)

        monkeypatch.setattr(SafetensorsFile, "read", counted)
        monkeypatch.setattr(quant.NF4, "encode", encoded)


@pytest.mark.parametrize("architecture", ["Llama", "Mixtral"])
@pytest.mark.parametrize(
    ("storage", "base"), [("none", "original"), ("nf4", "original"), ("nf4", "dequantized")]
)
def test_each_tensor_is_read_once_and_quantized_once(
    storage: str, base: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_llama(tmp_path / "base", architecture, shard="150KB")
    settings = {"target_modules": ["q_proj", "v_proj"]}
    run_dir = make_run(tmp_path / "run", folder, "lora", quant=storage, adapter=settings)
    counted = Counted(folder, monkeypatch)
    out = run(run_dir, tmp_path / "out", base=base)
    monkeypatch.undo()
    files = {path.name: SafetensorsFile(path) for path in folder.glob("*.safetensors")}
    assert len(files) > 2
    ends = {name: [t.start for t in f.tensors.values()][:1] for name, f in files.items()}
    for name, start, stop in sorted(counted.ranges):
        assert ends[name][-1] == start, "read twice, or not at all"
        ends[name].append(stop)
    assert {name: end[-1] for name, end in ends.items()} == {n: f.size for n, f in files.items()}
    model = adapted(run_dir)
    layers = [m for m in model.modules() if isinstance(m, quant.QuantLinear)]
    assert counted.encoded == sum(2 * m.weight.numel() for m in layers)
    if base == "dequantized" or storage == "none":
        wanted = logits(model)
        assert distance(wanted, logits(stock(out))) < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_the_quantized_copy_of_the_run_is_taken(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_llama(tmp_path / "base")
    run_dir = make_run(tmp_path / "run", folder, "hoft", quant="nf4")
    setting = f"model.quantized_cache={tmp_path / 'copies'}"
    plain = run(run_dir, tmp_path / "plain", base=base)
    said = re.findall("logits.*", capsys.readouterr().err)
    config = hub.ModelConfig(
        path=str(folder), quant="nf4", quantized_cache=str(tmp_path / "copies")
    )
    opened, engine = hub.open_base(config, Ranks()), Single(EngineConfig(name="single"), Ranks())
    QuantizedCopy(opened, adapted(run_dir), engine).keep()
    counted = Counted(folder, monkeypatch)
    out = run(run_dir, tmp_path / "out", setting, base=base)
    printed = capsys.readouterr().err
    assert "quantized copy of the base read in its place" in printed
    assert re.findall("logits.*", printed) == said, "the check too sees what training saw"
    assert counted.encoded == 0
    file = "model.safetensors"
    assert (out / file).read_bytes() == (plain / file).read_bytes()
    if base == "dequantized":
        read = sum(stop - start for _, start, stop in counted.ranges)
        assert read < (folder / file).stat().st_size / 2


def python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT,
        timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


KILLED = """
import os, signal, sys
from scalepeft import cli
from scalepeft.export import merge
merge._write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cli.main(["merge", sys.argv[1], sys.argv[2]])
"""


@pytest.mark.slow
def test_a_killed_merge_is_made_again(tmp_path: Path) -> None:
    run_dir, out = make_run(tmp_path / "run", TINY, "hoft"), tmp_path / "out"
    codes, text = Job(1, [str(run_dir), str(out)], program=("-c", KILLED)).wait()
    assert codes == [-signal.SIGKILL], text
    assert not out.exists()
    assert len(list(tmp_path.glob("out.partial-*"))) == 1
    of_another = tmp_path / f"out.partial-{socket.gethostname()}-{os.getppid()}"
    of_another.mkdir()  # a process that lives and writes to the same place
    run(run_dir, out)
    assert distance(logits(adapted(run_dir)), logits(stock(out))) < 1e-4
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out", of_another.name}


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    run_dir, out = make_run(tmp_path / "run", TINY, "hoft"), tmp_path / "out"
    codes, last = [], []
    for _ in range(2):
        done = call("merge", str(run_dir), str(out), "--dtype", "bf16")
        codes.append(done.returncode)
        last.append(done.stderr.strip().splitlines()[-1])
    assert codes == [0, 2]
    assert last[0].startswith("scalepeft: merged: logits differ")
    assert last[1].startswith(f"scalepeft: error: OUT={out}: is there already")


# Not ru_maxrss: a process inherits that from the one that started it.
PEAK = """
import sys
from pathlib import Path
from scalepeft.export import merge

def memory(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

merge.run(sys.argv[1], sys.argv[1] + "-out", [], *sys.argv[3:])  # imports, first calls
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
merge.run(sys.argv[2], sys.argv[2] + "-out", [], *sys.argv[3:])
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quant", "kind"),
    [("none", "original"), pytest.param("nf4", "dequantized", marks=pytest.mark.full)],
)
def test_memory_is_that_of_the_largest_tensor(quant: str, kind: str, tmp_path: Path) -> None:
    largest, size = 4096 * 1024 * 4, 4 * (4 * 1024 * 1024 + 3 * 4096 * 1024) * 4
    base = random_llama(
        tmp_path / "base", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=1024, shard="30MB",
    )  # fmt: skip
    assert len(list(base.glob("*.safetensors"))) >= 8
    adapter = {"layers": [3], "target_modules": ["q_proj", "up_proj"]}
    small = make_run(tmp_path / "small", TINY, "hoft", quant=quant)
    large = make_run(tmp_path / "large", base, "hoft", adapter=adapter, quant=quant)
    # As for the tensors of real models: what is freed goes back, the heap does not keep it.
    done = python(PEAK, str(small), str(large), kind, "base", MALLOC_MMAP_THRESHOLD_="1000000")
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout)
    print(f"{quant}: {growth / largest:.1f} of the largest tensor; model {size / largest:.0f}")
    assert largest < growth < 5.5 * largest
