"""Our methods as PEFT tuners: against the same methods injected, and against dense references."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import scalepeft
import scalepeft.integrations.peft as ours
from scalepeft.adapters import inject as injection
from scalepeft.adapters.layout import TAKEN, method_of, peft_name
from scalepeft.adapters.merged_weight import affine
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.models import quant

METHODS = registry.available("adapters.methods")
SEVEN = ["hoft", "shoft", "goft", "qgoft", "surm", "hut", "hadamard"]


def config(method: str, **settings: Any) -> Any:
    made = next(c for c in vars(ours).values() if getattr(c, "method", None) == method
                and issubclass(c, ours.Config))  # fmt: skip
    return made(**settings)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=128, num_hidden_layers=2, num_key_value_heads=2, **sizes)
    ).eval()


IDS = (torch.arange(3 * 11).view(3, 11) * 7) % 128


def shake(model: nn.Module, seed: int = 1) -> None:
    """Moves what trains away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)


def test_names_of_peft_are_known() -> None:
    builtin = {name.lower() for name in peft.PeftType.__members__}
    builtin -= {peft_name(method) for method in METHODS}
    assert {method for method in METHODS if method in builtin} == TAKEN & set(METHODS)
    assert [method_of(peft_name(m).upper()) for m in METHODS] == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_layer_is_the_injected_one(method: str) -> None:
    """The same tensors in both: the same logits and gradients to the bit."""
    one, other = llama(), llama()
    names = ["q_proj", "v_proj", "up_proj"]
    scalepeft.inject(one, {"name": method, "target_modules": names})
    shake(one)
    tuned = peft.get_peft_model(other, config(method, target_modules=names)).eval()
    box = f"{peft_name(method)}_adapter.default"
    state = {
        f"base_model.model.{name}.{box}.{key}": p
        for name, adapter in injection.adapters(one)
        for key, p in adapter.named_parameters()
    }
    missing, extra = tuned.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert not extra
    assert trained == set(state)
    assert not trained & set(missing)
    for model in (one, tuned):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    penalty = injection.penalty(one)
    assert torch.equal(one(IDS).logits, tuned(IDS).logits)
    own = dict(tuned.named_parameters())
    assert all(torch.equal(p.grad, own[name].grad) for name, p in state.items())
    if penalty is not None:  # in training it is a part of the loss
        plain = tuned(IDS, labels=IDS).loss
        assert (tuned.train()(IDS, labels=IDS).loss - plain - penalty).abs() < 1e-6


@pytest.mark.parametrize("storage", ["plain", "bitsandbytes 4", "bitsandbytes 8", "nf4", "int8"])
@pytest.mark.parametrize("method", SEVEN)
def test_storages(method: str, storage: str, tmp_path: Path) -> None:
    """Over every storage: trains, is saved and loaded to the bit; merged and unmerged."""

    def base() -> Any:
        model = llama()
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, stored(child))
        return model

    def stored(layer: nn.Linear) -> nn.Module:
        if storage == "bitsandbytes 4":
            return quant.bnb_linear(layer)
        if storage == "bitsandbytes 8":
            bnb = pytest.importorskip("bitsandbytes")
            made = bnb.nn.Linear8bitLt(
                layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
            )
            made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
            return made.to("cpu")
        if storage != "plain":
            quant.quantize(layer, quant.get_format(storage))
        return layer

    model = peft.get_peft_model(base(), config(method, target_modules="all-linear"))
    start = model.eval()(IDS).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = model.eval()(IDS).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(base(), tmp_path)
        assert torch.equal(again(IDS).logits, want)
        with again.disable_adapter():
            assert (again(IDS).logits - start).abs().max() < 1e-4
        if method == "hadamard":  # Llama's layers have no bias for the shift
            with pytest.raises(UserError, match="adds a bias and the layer has none"):
                again.merge_adapter()
            return
        stacks = {
            m: affine(m.stack(m.active(), exact=True), torch.empty(0, m.in_features), [])[0]
            for m in again.modules()
            if isinstance(m, ours.Layer)
        }
        again.merge_adapter()
        step = {"plain": 0, "nf4": 0.153, "bitsandbytes 4": 0.153}.get(storage, 0.5 / 127)
        for layer, weight in stacks.items():  # rounded once (8 bits: by way of fp16)
            off = (layer.get_base_weight() - weight).abs().max()
            assert off <= step * weight.abs().max() * 1.25 + 1e-6
        again.unmerge_adapter()
        assert torch.equal(again(IDS).logits, want)


def toy(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Linear(16, 32, bias=bias), nn.Tanh(), nn.Linear(32, 8, bias=bias)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("method", SEVEN)
def test_two_active_adapters_in_training(method: str) -> None:
    """Both learn: each gradient is that of the stack, by differences in fp64."""
    settings = {"r": 2} if method in ("hut",) else {}
    model = peft.get_peft_model(toy(), config(method, target_modules=["0", "2"], **settings), "a")
    model.add_adapter("b", config(method, target_modules=["0", "2"], **settings))
    model.base_model.set_adapter(["a", "b"])
    model.double()
    shake(model)
    x = torch.randn(500, 16, dtype=torch.float64)  # enough tokens for HOFT's fused form
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        at = p.grad.abs().argmax()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.view(-1)[at] += step
                values.append(model(x).square().mean())
                p.view(-1)[at] -= step
        measured = (values[0] - values[1]) / 2e-5
        assert torch.isclose(measured, p.grad.view(-1)[at], rtol=1e-4), name


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
@pytest.mark.parametrize("method", ["hadamard", "hut", "shoft"])
def test_merges_of_two(method: str, order: list[str]) -> None:
    """At once, or one after another: what the forward computed, shifts under scales included."""
    settings = {"shift": True} if method == "hut" else {}
    model = peft.get_peft_model(toy(), config(method, target_modules=["0", "2"], **settings), "a")
    model.add_adapter("b", config(method, target_modules=["0", "2"], **settings))
    model.base_model.set_adapter(order)
    shake(model)
    x = torch.randn(5, 16)
    with torch.no_grad():
        want = model(x)
        model.merge_adapter(order)
        assert (model(x) - want).abs().max() < 1e-5
        model.unmerge_adapter()
        assert torch.equal(model(x), want)
        model.merge_adapter(order[:1])
        model.merge_adapter(order[1:])
        assert (model(x) - want).abs().max() < 1e-5
        bare = model.merge_and_unload()
        assert (bare(x) - want).abs().max() < 1e-5
        assert not any(isinstance(m, ours.Layer) for m in bare.modules())


def test_a_shift_needs_a_bias() -> None:
    model = peft.get_peft_model(toy(bias=False), config("hadamard", target_modules=["0"]))
    shake(model)
    with pytest.raises(UserError, match="adds a bias and the layer has none"):
        model.merge_adapter()


def test_a_process_without_the_plug_in_is_told_what_to_do(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), config("hoft", r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last == "KeyError: 'HOFT: pip install scalepeft, then import scalepeft.integrations.peft'"
    )
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "peft_type": "HOFT"}))  # by hand, or by another tool
    assert peft.PeftConfig.from_pretrained(tmp_path).r == 4


def test_a_part_of_a_tensor_is_not_saved(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), config("hoft", r=4, target_modules=["q_proj"]))
    state = {k: v[:0] if "hoft" in k else v for k, v in model.state_dict().items()}  # as ZeRO-3's
    with pytest.raises(UserError, match=r"U has shape \[0, 4\], the whole tensor \[64, 4\]"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_rank_pattern_and_layers(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}
    model = peft.get_peft_model(
        llama(), config("hoft", r=4, rank_pattern={"up_proj": 2}, **settings)
    )
    trained = {name: p.shape[1] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split("_proj")[0][-1]: r for name, r in trained.items()} == {"q": 4, "p": 2}
    assert all(".layers.1." in name for name in trained)
    with pytest.raises(UserError, match="the rank must be even"):
        peft.get_peft_model(llama(), config("hoft", r=3, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has no rank"):
        config("goft", rank_pattern={"up_proj": 2})


def test_penalty_once_a_step_under_accumulation() -> None:
    """Trainer divides a sum over micro-batches by the step's tokens; the penalty comes to one."""
    model = peft.get_peft_model(llama(), config("qgoft", target_modules=["q_proj"]))
    shake(model)
    terms = [m.adapters["default"].penalty() for m in model.modules() if isinstance(m, ours.Layer)]
    labels = IDS.clone()
    labels[0, 5:] = -100
    items = (labels[:, 1:] != -100).sum()
    total = plain = 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        args = {"labels": labels[rows], "num_items_in_batch": items}
        total += model.train()(IDS[rows], **args).loss.item()
        plain += model.eval()(IDS[rows], **args).loss.item()
    assert abs(total - plain - sum(terms).item()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, dtype: torch.dtype) -> None:
    sizes = {"block_size": 2} if method in ("oft", "oftv2", "boft") else {}
    model = peft.get_peft_model(toy(), config(method, target_modules=["0", "2"], **sizes)).eval()
    shake(model)
    x = torch.randn(6, 16)
    with torch.autocast("cpu", dtype):
        y = model(x)
        assert y.dtype == dtype
        y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (y - model(x)).abs().max() < 0.05


@pytest.mark.full
@pytest.mark.parametrize("method", SEVEN)
def test_compiled(method: str) -> None:
    model = peft.get_peft_model(llama(), config(method, target_modules="all-linear"))
    shake(model)
    want = model(IDS).logits
    assert (torch.compile(model, backend="aot_eager")(IDS).logits - want).abs().max() < 1e-4


def test_a_mixed_batch_has_each_rows_own_modules_to_save() -> None:
    """And a second adapter over all-linear takes the layers that the first one wrapped."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(net, config("goft", target_modules=["0"], modules_to_save=["1"]))
    model.add_adapter("b", config("goft", target_modules=["0"], modules_to_save=["1"]))
    model.set_requires_grad(["default", "b"])
    shake(model)
    model.eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        mixed = model(x, adapter_names=["default", "b", "b", "default"])
        for name, rows in (("default", [0, 3]), ("b", [1, 2])):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[rows], model(x)[rows])
    two = peft.get_peft_model(toy(), config("goft", target_modules="all-linear"))
    two.add_adapter("b", config("goft", target_modules="all-linear"))
    layers = [m for m in two.modules() if isinstance(m, ours.Layer)]
    assert layers and all(set(m.adapters) == {"default", "b"} for m in layers)


def test_excluded_and_missing_targets_are_told_apart() -> None:
    names = ["0", "1", "2"]
    with pytest.raises(ValueError, match="All modules were excluded"):
        peft.get_peft_model(toy(), config("goft", target_modules=names, exclude_modules=names))
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(toy(), config("goft", target_modules=["absent"]))


@pytest.mark.parametrize("way", ["offloaded", "own forward", "hook"])
def test_a_layer_that_is_more_than_its_weight_is_called(way: str) -> None:
    base = llama()
    layer = base.model.layers[0].self_attn.q_proj
    layer.bias = nn.Parameter(torch.ones(64))
    if way == "own forward":
        forward = layer.forward
        layer.forward = lambda x: 3 * forward(x)
    elif way == "hook":
        layer.register_forward_hook(lambda m, args, y: 3 * y)
    want = base(IDS).logits
    model = peft.get_peft_model(base, config("hoft", target_modules=["q_proj"])).eval()
    if way == "offloaded":
        shake(model)
        want = model(IDS).logits
        accelerate.cpu_offload(model, torch.device("cpu"))
        with pytest.raises(UserError, match="adapt the model first, then offload"):
            model.add_adapter("late", config("hoft", target_modules=["v_proj"]))
    assert (model(IDS).logits - want).abs().max() < 1e-5
    with pytest.raises(UserError, match="load the whole plain model to merge"):
        model.merge_adapter()


def test_an_adapter_of_another_kind_is_not_passed_over() -> None:
    settings = {"target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings)).base_model.model
    for base in (scalepeft.inject(llama(), {"name": "hoft", **settings}), theirs):
        with pytest.raises(UserError, match="has an adapter of another kind"):
            peft.get_peft_model(base, config("hoft", **settings))


def test_a_second_tuner_adds_the_penalty_once() -> None:
    one = config("qgoft", target_modules=["q_proj"])
    plain = peft.get_peft_model(llama(), one).merge_and_unload()
    model = peft.get_peft_model(plain, one)
    shake(model)
    terms = [m.adapters["default"].penalty() for m in model.modules() if isinstance(m, ours.Layer)]
    off = model.train()(IDS, labels=IDS).loss - model.eval()(IDS, labels=IDS).loss - sum(terms)
    assert off.abs() < 1e-5
    model.merge_adapter()
    assert torch.equal(model.train()(IDS, labels=IDS).loss, model.eval()(IDS, labels=IDS).loss)


def test_penalty_where_labels_are_not_shifted() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    base = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=128, num_hidden_layers=1, pad_token_id=0, **sizes)
    )
    model = peft.get_peft_model(base, config("qgoft", target_modules=["q_proj"]))
    shake(model)
    labels, items = torch.tensor([0, 1, 0]), torch.tensor(3)
    (term,) = (
        m.adapters["default"].penalty() for m in model.modules() if isinstance(m, ours.Layer)
    )
    args = {"labels": labels, "num_items_in_batch": items}
    assert (model.train()(IDS, **args).loss - model.eval()(IDS, **args).loss - term).abs() < 1e-5


def test_a_refused_merge_changes_nothing() -> None:
    model = peft.get_peft_model(toy(bias=False), config("hut", target_modules=["0"]), "x")
    model.add_adapter("y", config("hut", shift=True, target_modules=["0"]))
    model.base_model.set_adapter(["x", "y"])
    shake(model)
    model.merge_adapter(["x"])
    x = torch.randn(5, 16)
    want = model(x)
    with pytest.raises(UserError, match="adds a bias"):
        model.merge_adapter(["y"])
    assert torch.equal(model(x), want)
    model.bfloat16()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["x"])


def test_a_norm_of_nan_is_not_merged() -> None:
    model = peft.get_peft_model(llama(), config("hadamard", target_modules=["o_proj"]))
    norm = next(m for m in model.modules() if isinstance(m, ours.Layer) and m.is_norm)
    norm.adapters["default"].scale.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        norm.merge()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("storage", ["plain", "nf4"])
def test_pissa_keeps_its_start_beside_what_trains(
    method: str, storage: str, tmp_path: Path
) -> None:
    names = ["q_proj", "up_proj"]

    def base() -> Any:
        model = llama()
        for layer in model.model.layers if storage == "nf4" else ():
            quant.quantize(layer.self_attn.q_proj, quant.get_format("nf4"))
        return model

    settings = {"r": 4, "alpha": 8.0, "dropout": 0.0, "start": "pissa", "target_modules": names}
    tuned = peft.get_peft_model(base(), config(method, **settings))
    assert torch.equal(tuned.eval()(IDS).logits, base()(IDS).logits)
    one = scalepeft.inject(
        base(), {"name": method, "rank": 4, **{k: v for k, v in settings.items() if k != "r"}}
    )
    own = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if "_adapter" in n}
    theirs = [own[name] for name in sorted(own) if name.endswith("0")]
    ours_ = [p for name, p in sorted(injection.tensors(one).items()) if name.endswith("0")]
    assert len(theirs) == 2 * 4 and all(map(torch.equal, theirs, ours_))
    tuned.add_adapter("second", config(method, **settings))
    tuned.set_adapter("second")
    tuned.set_adapter("default")
    trained = {n.rsplit(".", 1)[1] for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"} | ({"magnitude"} if method == "dora" else set())
    shake(tuned)
    want = tuned.eval()(IDS).logits
    tuned.save_pretrained(tmp_path)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(again(IDS).logits, want)
    assert torch.equal(scalepeft.load_adapter(base(), tmp_path).eval()(IDS).logits, want)
    merged = again.merge_and_unload() if storage == "plain" else None
    assert merged is None or (merged(IDS).logits - want).abs().max() < 1e-5
