"""More columns of the table of ``test_conformance.py``: where others' loops and models lead."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import references
import torch
import yaml
from test_conformance import (
    VARIANTS,
    Variant,
    adapted,
    assert_close,
    base_layer,
    every,
    random,
    scatter,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import scalepeft
from scalepeft.adapters import inject as injection
from scalepeft.adapters.base import apply
from scalepeft.analysis.compare import design
from scalepeft.config import files as config_files
from scalepeft.config.schema import config_class
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.models.experts import ExpertLinear

SQUARE = every(shapes=("square",), kinds=("plain", "nf4"))
PLAIN = every(shapes=("square", "gqa"), kinds=("plain",))
FIRST_ORDER = {"hoft", "shoft", "hra", "hira"}  # and hut of a rank over 1


def made(name: str, variant: Variant, shape: tuple[int, int], kind: str) -> nn.Sequential:
    net = adapted(name, variant, base_layer(kind, shape, bias=True))
    scatter(net)
    return net


def ways(net: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "plain": net,
        "checkpoint": lambda x: checkpoint(net, x, use_reentrant=False),
        "reentrant": lambda x: checkpoint(net, x, use_reentrant=True),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@SQUARE
def test_autocast_is_the_adapter_by_hand_in_its_dtype(
    name: str, variant: Variant, shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    """Many tokens and few: HOFT's two ways. Backward outside of autocast, and within."""
    net = made(name, variant, shape, kind)

    def run(forward: Any, x: Tensor, autocast: bool, within: bool) -> list[Tensor]:
        x = x.clone().requires_grad_()
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = forward(x)
            with torch.autocast("cpu", dtype, enabled=autocast and within):
                y.backward(random(*y.shape, seed=5).to(y.dtype))
        return [y, x.grad.to(dtype), *(p.grad for p in net.parameters() if p.requires_grad)]

    for tokens in (5, 600) if name == "hoft" else (5,):
        x = random(tokens, shape[1])
        want = run(net, x.to(dtype), False, False)
        with torch.autocast("cpu", dtype):
            plain = base_layer("plain", shape, bias=True)(x)
        assert want[0].dtype == plain.dtype == dtype
        for way, forward in ways(net).items():
            for within in (False, True):
                got = run(forward, x, True, within)
                for a, b in zip(got, want, strict=True):
                    assert a.dtype == b.dtype and torch.equal(a, b), (way, within)


def test_autocast_of_norms_experts_and_fp64_is_that_of_the_plain_layer() -> None:
    net = nn.ModuleDict({"proj": nn.Linear(24, 24), "norm": nn.LayerNorm(24)})
    plain = nn.LayerNorm(24)
    scalepeft.inject(net, {"name": "hadamard", "target_modules": ["proj"], "norm": "norm"})
    experts = nn.ModuleDict(
        {"experts": nn.ModuleDict({"up_proj": ExpertLinear(random(2, 8, 24), False)})}
    )
    where = {"target_modules": ["experts.up_proj"]}
    scalepeft.inject(experts, {"name": "hoft", "rank": 2, **where})
    wide = scalepeft.adapt(nn.Linear(24, 24).double(), "hoft", rank=2)
    x = random(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert net["norm"](x.to(dtype)).dtype == plain(x.to(dtype)).dtype
        y = experts["experts"]["up_proj"](x, [0, 2, 5])
        assert y.dtype == torch.bfloat16
        assert wide(x.double()).dtype == torch.float64
    assert torch.equal(y, experts["experts"]["up_proj"](x.bfloat16(), [0, 2, 5]))


@pytest.mark.slow
def test_autocast_compiles() -> None:
    net = made("hoft", VARIANTS["hoft"][0], (64, 64), "plain")
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        want = net(random(5, 64))
        got = torch.compile(net, backend="aot_eager", fullgraph=True)(random(5, 64))
    assert got.dtype == torch.bfloat16
    assert_close({"y": got}, {"y": want}, "bf16")


class Trained:
    """A base with parameters of its own: ``W x + c``."""

    trained = True

    def __init__(self, weight: Tensor, shift: Tensor) -> None:
        self.w, self.c = weight, shift

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w, self.c)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return self.w.detach().to(dtype)


@PLAIN
def test_a_base_that_trains_gets_its_gradient(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    adapter = made(name, variant, shape, kind)[0].adapter
    x, dy = random(700, shape[1]), random(700, shape[0], seed=5)
    w = random(*shape, seed=6).requires_grad_()
    if name == "dora":  # whose norms take none
        assert torch.autograd.grad(apply(adapter, x, Trained(w, w[:, 0])).sum(), w)[0].any()
        return
    y = apply(adapter, x, Trained(w, torch.zeros(shape[0])))
    names = [k for k, v in adapter.named_parameters() if v.requires_grad]
    leaves = [w, *(adapter.get_parameter(k) for k in names)]
    got = torch.autograd.grad(y, leaves, dy)
    wide = w.detach().double().requires_grad_()
    p = {k: v.detach().double().requires_grad_() for k, v in adapter.named_parameters()}
    dense = references.apply(name, p, wide, None, adapter.config, x.double())
    want = torch.autograd.grad(dense, [wide, *(p[k] for k in names)], dy.double())
    for a, b in zip([y, *got], [dense, *want], strict=True):
        assert (a - b).abs().max() <= 5e-5 * b.abs().max()


@pytest.mark.parametrize("outer", ["hoft", "hira"])
def test_both_of_two_adapters_around_a_layer_learn(outer: str) -> None:
    """The inner one adds a shift, which goes through the outer one."""
    inner = made("hadamard", VARIANTS["hadamard"][0], (64, 64), "plain")[0]
    around = made(outer, VARIANTS[outer][0], (64, 64), "plain")[0].adapter

    class Stack:
        trained = True

        def __call__(self, x: Tensor) -> Tensor:
            return inner.adapter(x, quant.Frozen(inner))

    x = random(700, 64)
    around(x, Stack()).sin().sum().backward()
    for p in inner.adapter.parameters():
        at = (..., 3)
        slope = p.grad[at].item()
        sides = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                p[at] += step
                sides.append(around(x, Stack()).double().sin().sum())
                p[at] -= step
        assert ((sides[0] - sides[1]) / 2e-3).item() == pytest.approx(slope, rel=2e-2, abs=0.05)


@PLAIN
def test_a_second_derivative_is_right_or_refused(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    """Of a loss that is linear in y, too, and by x alone: torch's own refusal misses both."""
    net = made(name, variant, shape, kind).double()
    layer: Any = net[0]
    own_ones = dict(layer.adapter.named_parameters())
    p = {k: v.detach().requires_grad_(v.requires_grad) for k, v in own_ones.items()}
    leaves_of = [
        [t for t in values if t.requires_grad] for values in (own_ones.values(), p.values())
    ]
    w, bias = layer.weight.detach(), layer.bias.detach()

    def second(forward: Any, inputs: list[Tensor], power: int) -> list[Tensor]:
        x = random(3, shape[1], dtype=torch.float64).requires_grad_()
        leaves = [x, *inputs]
        loss = forward(x).pow(power).sum()
        firsts = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum(g.pow(2).sum() for g in firsts)
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

    def dense(x: Tensor) -> Tensor:
        return references.apply(name, p, w, bias, layer.adapter.config, x)

    for own in (True, False):
        for power in (1, 3):
            mine, theirs = (leaves * own for leaves in leaves_of)
            if name in FIRST_ORDER or (name == "hut" and variant.settings.get("rank", 1) > 1):
                with pytest.raises(UserError, match=r"create_graph=True: .*no second derivative"):
                    second(net, mine, power)
                continue
            want = second(dense, theirs, power)
            for a, b in zip(second(net, mine, power), want, strict=True):
                assert (a - b).abs().max() <= 1e-9 * b.abs().max()


@SQUARE
def test_no_rows_give_no_rows_and_zero_gradients(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    net = made(name, variant, shape, kind)
    for size in ((0,), (0, 3), (2, 0)):
        x = torch.zeros(*size, shape[1], requires_grad=True)
        net.zero_grad()
        y = net(x)
        assert y.shape == (*size, shape[0])
        y.sum().backward()
        assert x.grad.shape == x.shape
        for key, p in injection.trainable(net).items():
            assert p.grad is not None and not p.grad.any(), key


def test_dropout_of_no_rows() -> None:
    layer = scalepeft.adapt(nn.Linear(8, 8), "lora", rank=2, dropout=0.3)
    layer.adapter.dropout.keys = torch.zeros(0, dtype=torch.int64)
    assert layer(torch.zeros(0, 3, 8)).shape == (0, 3, 8)


@PLAIN
def test_functional_call_works_and_vmap_works_or_is_refused(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    net = made(name, variant, shape, kind)
    x, want = random(4, 3, shape[1]), net(random(4, 3, shape[1]))
    state = {k: p.detach().clone() for k, p in injection.trainable(net).items()}
    with torch.no_grad():
        for p in injection.trainable(net).values():
            p.zero_()
    got = torch.func.functional_call(net, state, (x,))
    assert_close({"y": got}, {"y": want}, kind)  # torch.matmul picks its kernel by requires_grad

    def mapped() -> Tensor:
        return torch.func.vmap(lambda row: torch.func.functional_call(net, state, (row,)))(x)

    said = ""
    try:
        assert_close({"y": mapped()}, {"y": want}, kind)
    except RuntimeError as error:
        said = str(error)
    assert not said or ("autograd.Function with functorch" in said and "vmap" in said)


LOWERED = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "linalg_lu_solve", "linalg_lu_factor_ex"}
LOWERED |= {"linalg_solve_triangular", "_linalg_solve_ex"}


class Lowered(TorchDispatchMode):
    """Notes the dtypes of products that ``torch.set_float32_matmul_precision`` lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        narrow = any(isinstance(a, Tensor) and a.dtype == torch.float32 for a in args)
        if narrow and func._schema.name.split("::")[1] in LOWERED:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@PLAIN
def test_factors_take_no_product_that_a_setting_lowers(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    """TF32 or bf16 in a Gram matrix makes a rotation none; forward and backward."""
    adapter = made(name, variant, shape, kind)[0].adapter
    named = dict(adapter.named_parameters())
    with Lowered() as seen:
        factors = adapter.factors(named)
        for factor in factors:
            assert factor.dtype == torch.float32
            if factor.requires_grad:
                factor.sin().sum().backward(retain_graph=True)
    assert not seen.found


@pytest.mark.parametrize("size", [0.05, 0.1, 0.2])
def test_oftv2_drifts_as_its_docstring_says(size: float) -> None:
    adapter = scalepeft.adapt(nn.Linear(2, 2), "oftv2", block_size=2).adapter.double()
    r = torch.eye(2) + adapter.factors({"K": torch.full((1, 1), size, dtype=torch.float64)})[0][0]
    drift = torch.linalg.matrix_norm(r @ r.T - torch.eye(2), 2).item()
    assert drift == pytest.approx(2 * size**4, rel=0.01)


@pytest.mark.parametrize("name", registry.available("adapters.methods"))
def test_a_methods_defaults_are_those_of_its_file(name: str) -> None:
    file = config_files.config_root() / f"adapters/{name}.yaml"
    settings = yaml.safe_load(file.read_text())["adapter"]
    assert injection.adapter_config({"name": name}) == injection.adapter_config(settings)


@pytest.mark.parametrize("name", ["hoft", "shoft", "hra"])
def test_saved_settings_without_a_form_are_of_pairs(name: str) -> None:
    make = config_class("adapter", name)
    new, old = make(name=name), replace(make(name=name), form="pairs")
    assert injection.adapter_config({"name": name}) == new
    assert injection.adapter_config({"name": name}, saved=True) == old
    held = {"name": name, "form": new.form}
    assert injection.adapter_config(held, saved=True) == new
    values = {"run_dir": "x", "adapter": {"name": name}, "train": {"max_steps": 1}}
    assert config_files.overlay(values, []).adapter == old
    assert config_files.overlay(values, ["adapter.rank=2"]).adapter.form == "pairs"
    assert config_files.overlay({**values, "adapter": held}, []).adapter == new
    method = design.Method(name, {"name": name}, 1e-3, [1e-3])
    compared = design.Design(values, [method], "x1", 0, [1], "steps", None, name, False, {})
    assert compared.config(method, 1e-3, 0).adapter == old
    loaded, _ = config_files.load(None, ["run_dir=x", "train.max_steps=1", f"adapter.name={name}"])
    assert loaded.adapter == new
