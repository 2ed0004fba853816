"""An adapter for each expert equals that method on a layer of its own, for every method."""

import copy
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_conformance import VARIANTS, Variant, random, scatter
from torch import Tensor, nn

import scalepeft
from scalepeft.adapters import inject as injection
from scalepeft.adapters import sizing
from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.models.experts import ExpertLinear

EXPERTS, BOUNDS = 3, [0, 4, 4, 9]
"""The second expert gets no token."""


def cases() -> Any:
    found = []
    for name, variants in VARIANTS.items():
        for i, variant in enumerate(variants):
            shape = (64, 64) if variant.settings.get("structure") == "ldr" else (192, 64)
            if variant.fits(*shape):
                kind = ("plain", "nf4", "int8")[i % 3]
                found.append(pytest.param(name, variant, shape, kind, id=f"{name}-{i}-{kind}"))
    return pytest.mark.parametrize(("name", "variant", "shape", "kind"), found)


class Mixture(nn.Module):
    def __init__(self, shape: tuple[int, int], kind: str, last: str, transposed: bool) -> None:
        super().__init__()
        fused = random(EXPERTS, *shape, seed=8) / 8
        layer = ExpertLinear(fused.mT if transposed else fused, transposed)
        if kind != "plain":
            quant.quantize(layer, quant.get_format(kind))
        self.experts = nn.ModuleDict(OrderedDict({last: layer}))

    @property
    def layer(self) -> Any:
        return next(iter(self.experts.values()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, BOUNDS)
        return y


def mixture(name: str, variant: Variant, shape: tuple[int, int], kind: str) -> Mixture:
    last = variant.settings.get("target_modules", ["proj"])[0]
    net = Mixture(shape, kind, last, transposed=kind == "nf4")
    where = [f"experts.{last}"]
    more = {"feedforward_modules": where} if "target_modules" in variant.settings else {}
    return scalepeft.inject(
        net, {"name": name, **variant.settings, **more, "target_modules": where}, seed=3
    )


def one_of(net: Mixture, name: str, variant: Variant, number: int) -> nn.Linear:
    """The expert as a layer with the method of its own, on the same values."""
    layer = net.layer
    w = layer.expert(number).weight(torch.float32).clone()
    plain = nn.Linear(w.shape[1], w.shape[0], bias=False)
    plain.weight.data.copy_(w)
    last = variant.settings.get("target_modules", ["proj"])[0]
    holder = nn.Sequential(OrderedDict({last: plain}))
    scalepeft.inject(holder, {"name": name, "target_modules": [last], **variant.settings})
    with torch.no_grad():
        for key, p in plain.adapter.named_parameters():
            p.copy_(getattr(layer.adapter, key)[number])
    return plain


@cases()
def test_equals_a_layer_for_each_expert(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    net = mixture(name, variant, shape, kind)
    scatter(net, 0.2)
    x = random(9, shape[1]).requires_grad_()
    dy = random(9, shape[0], seed=5)
    y = net(x)
    y.backward(dy)
    adapter = net.layer.adapter
    for number, (first, last) in enumerate(pairwise(BOUNDS)):
        one = one_of(net, name, variant, number)
        part = x.detach()[first:last].clone().requires_grad_()
        if last > first:
            want = one(part)
            want.backward(dy[first:last])
            assert (y[first:last] - want).abs().max() <= 1e-5 * want.abs().max()
            assert (x.grad[first:last] - part.grad).abs().max() <= 2e-5 * part.grad.abs().max()
        for key, p in one.adapter.named_parameters():
            if key in adapter.kept:
                assert getattr(adapter, key).grad is None
                continue
            got = getattr(adapter, key).grad[number]
            if last == first:
                assert not got.any(), "no token, and a gradient of zero rather than none"
            else:
                assert (got - p.grad).abs().max() <= 5e-5 * p.grad.abs().max() + 1e-6, key
        assert one.adapter.flops() == adapter.flops()
    assert all(name.startswith("experts.") for name in injection.trainable(net))


@cases()
def test_merges_and_has_the_penalty_of_each(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    net = mixture(name, variant, shape, kind)
    scatter(net, 0.2)
    ones = [one_of(net, name, variant, number) for number in range(EXPERTS)]
    penalty = injection.penalty(net)
    assert (penalty is None) == ("penalty" not in variant.settings)
    if penalty is not None:
        want = sum(one.adapter.penalty() for one in ones)
        assert torch.allclose(penalty, want, rtol=1e-5)
        (got,) = torch.autograd.grad(penalty, list(net.layer.adapter.parameters()))
        of_each = [(one.adapter.penalty(), list(one.adapter.parameters())) for one in ones]
        grads = [torch.autograd.grad(*each)[0] for each in of_each]
        assert torch.allclose(got, torch.stack(grads), rtol=1e-5, atol=1e-7)
    if not variant.affine:
        with pytest.raises(UserError, match="not affine in x"):
            scalepeft.effective_weight(net.layer)
        return
    got, got_bias = scalepeft.effective_weight(net.layer)
    parts = [scalepeft.effective_weight(one) for one in ones]
    want = torch.cat([w for w, _ in parts])
    assert got.shape == (EXPERTS * shape[0], shape[1])
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (got_bias is None) == (parts[0][1] is None)
    if got_bias is not None:
        assert torch.allclose(got_bias, torch.cat([b for _, b in parts]), rtol=1e-5, atol=1e-6)


@cases()
def test_starts_differ_by_expert_and_each_is_the_base(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    net = mixture(name, variant, shape, kind)
    x = random(9, shape[1])
    plain = Mixture(shape, kind, "proj", transposed=kind == "nf4")
    assert (net(x) - plain(x)).abs().max() <= 1e-5 * plain(x).abs().max()
    again = mixture(name, variant, shape, kind)
    for key, p in net.layer.adapter.named_parameters():
        assert torch.equal(p, getattr(again.layer.adapter, key))
        assert not p.any() or not torch.equal(p[0], p[1]), key
        assert p.shape[0] == EXPERTS and p.requires_grad == (key not in net.layer.adapter.kept)
    count = sum(p.numel() for p in injection.trainable(net).values())
    assert count == EXPERTS * variant.count(*shape)
    state = {k: p.detach() + 1 for k, p in injection.tensors(net).items()}
    injection.load_state(again, state, "here")
    assert all(torch.equal(p, state[k]) for k, p in injection.tensors(again).items())


def test_no_expert_hit_gives_zero_gradients() -> None:
    net = mixture("hoft", VARIANTS["hoft"][0], (192, 64), "nf4")
    y = net.layer(torch.zeros(0, 64), [0] * (EXPERTS + 1))
    assert y.shape == (0, 192)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.layer.adapter.parameters())


def test_experts_are_adapted_only_where_they_are_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(64, 64)
            self.shared_experts = nn.ModuleDict({"down_proj": nn.Linear(64, 64)})
            self.experts = nn.ModuleDict({"down_proj": ExpertLinear(random(3, 64, 64), False)})

    def adapted(*targets: str) -> list[str]:
        net = scalepeft.inject(copy.deepcopy(block), {"name": "goft", "target_modules": targets})
        return [name for name, _ in injection.adapted_layers(net)]

    block = Block()
    dense, shared, experts = "down_proj", "shared_experts.down_proj", "experts.down_proj"
    assert adapted("down_proj") == [dense, shared]
    assert adapted("*down_proj") == [dense, shared]
    assert adapted("experts.down_proj") == [experts]
    assert adapted("*experts*") == [shared, experts]
    assert adapted("down_proj", "experts.*") == [dense, shared, experts]
    with pytest.raises(UserError, match=r"'up_proj' matches no linear.*experts\.down_proj"):
        adapted("up_proj")
    with pytest.raises(UserError, match="dropout=0, or leave the experts out"):
        scalepeft.inject(
            block, {"name": "lora", "dropout": 0.1, "target_modules": ["experts.down_proj"]}
        )
    where = {
        "name": "lora",
        "rank": 2,
        "dropout": 0.0,
        "target_modules": ["experts.down_proj", "down_proj"],
    }
    block = Block()
    assert sizing.adapted_shapes(block, where) == {(64, 64): 5}
    assert sizing.count_parameters(block, where) == 5 * 2 * 128
