"""Factors that are made once a step: the gradients of a plain loop, in a fraction of its launches.

Across engines and world sizes: tests/parallel.
"""

import copy
from typing import Any

import pytest
import torch
from test_conformance import VARIANTS, Variant
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import scalepeft
from scalepeft.adapters.base import Adapter
from scalepeft.adapters.factors import Factors
from scalepeft.adapters.inject import adapted_layers, adapters, trainable
from scalepeft.adapters.merged_weight import merged
from scalepeft.models import quant
from scalepeft.parallel.base import EngineConfig
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single


def adapted(name: str, settings: dict[str, Any], dtype: torch.dtype, kind: str = "") -> nn.Module:
    """Four layers in a row, two of one shape, away from the start."""
    torch.manual_seed(0)
    shapes = ((128, 128), (128, 128), (128, 64), (64, 64))
    net = nn.Sequential(*(nn.Linear(*shape) for shape in shapes)).to(dtype)
    if kind:
        for layer in net:
            quant.quantize(layer, quant.get_format(kind))
    scalepeft.inject(net, {"name": name, "target_modules": ["0", "1", "2", "3"], **settings})
    with torch.no_grad():
        for p in trainable(net).values():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def factors(net: nn.Module) -> Factors:
    return Factors(net, Single(EngineConfig(name="single"), Ranks()))


def backward(net: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Two micro-batches."""
    for i in range(2):
        x = torch.linspace(-1 - i, 1, 6 * 128).view(6, 128).to(dtype)
        net(x).float().sin().sum().backward()
    return [p.grad for p in trainable(net).values()]


CASES = [
    pytest.param(name, variant, id=f"{name}-{i}")
    for name, variants in VARIANTS.items()
    for i, variant in enumerate(variants)
    if name != "hadamard" and variant.settings.get("structure") != "ldr" and variant.fits(64, 128)
]


@pytest.mark.parametrize("kind", ["", "nf4"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_gradients_and_outputs_are_those_of_factors_made_in_each_forward(
    name: str, variant: Variant, kind: str
) -> None:
    settings = {k: v for k, v in variant.settings.items() if k != "target_modules"}
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-5)):
        plain = adapted(name, settings, dtype, kind)
        once = copy.deepcopy(plain)
        want = backward(plain, dtype)
        kept = factors(once)
        with kept.of_step():
            backward(once, dtype)
        for p, g in zip(trainable(once).values(), want, strict=True):
            assert (p.grad - g).abs().max() <= tolerance * g.abs().max()
        x = torch.randn(3, 128).to(dtype)
        with torch.no_grad(), kept.made():
            assert (once(x) - plain(x)).abs().max() <= tolerance * plain(x).abs().max()
        assert all(adapter.made is None for _, adapter in adapters(once))


@pytest.mark.parametrize("kind", ["", "nf4"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_what_a_merge_takes_is_the_effective_weight(name: str, variant: Variant, kind: str) -> None:
    settings = {k: v for k, v in variant.settings.items() if k != "target_modules"}
    if not variant.affine:
        return
    for _, layer in adapted_layers(adapted(name, settings, torch.float32, kind)):
        want, _ = scalepeft.effective_weight(layer)
        assert (merged(layer) - want).abs().max() <= 2e-6 * want.abs().max()


class Launches(TorchDispatchMode):
    """Counts operations that a device would run: what is no view and makes no empty memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        makes = any(r.alias_info is None for r in func._schema.returns)
        writes = func._schema.is_mutable
        reshapes = func in (torch.ops.aten._unsafe_view.default,)
        if (makes or writes) and not reshapes and "empty" not in str(func):
            self.count += 1
        return out


@pytest.mark.parametrize(
    ("name", "settings", "limit"),
    [
        ("lora", {"dropout": 0.0}, 20),
        ("hoft", {}, 40),
        ("hoft", {"form": "pairs"}, 40),
        ("shoft", {}, 48),
        ("hra", {}, 25),
        ("goft", {}, 32),
        ("qgoft", {}, 32),
        ("oft", {}, 15),
    ],
)
def test_launches_of_an_adapted_layer(name: str, settings: dict[str, Any], limit: int) -> None:
    """Forward and backward in bf16, frozen products and the sums over micro-batches included."""
    net = adapted(name, settings, torch.bfloat16)
    with factors(net).of_step():
        backward(net, torch.bfloat16)
        with Launches() as seen:
            backward(net, torch.bfloat16)
    outside = 2 * 8  # of the two losses
    assert (seen.count - outside) / 8 <= limit


@pytest.mark.parametrize("name", ["hoft", "hra", "goft", "qgoft", "oft", "boft"])
def test_factors_of_many_layers_take_the_launches_of_one(name: str) -> None:
    counts = []
    for layers in (1, 5):
        net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(layers)])
        scalepeft.inject(net, {"name": name, "target_modules": list(map(str, range(layers)))})
        with Launches() as seen, factors(net).made():
            pass
        counts.append(seen.count)
    assert counts[0] == counts[1] > 0


def test_a_method_without_factors_is_untouched() -> None:
    net = adapted("lora", {}, torch.float32)
    assert not factors(net).groups
    assert type(next(a for _, a in adapters(net))).factors is Adapter.factors
