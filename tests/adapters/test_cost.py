"""Cost by counting: bytes that a layer keeps for backward, and tensors as large as the weight."""

from typing import Any

import pytest
import torch
from test_conformance import VARIANTS, Variant
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scalepeft
from scalepeft.models import quant


def layer_of(kind: str, name: str, out: int, inp: int, **settings: Any) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(inp, out)
    if kind != "plain":
        quant.quantize(layer, quant.get_format(kind))
    return scalepeft.adapt(layer, name, **settings)


def saved(layer: nn.Linear, x: Tensor) -> list[int]:
    """Bytes of each storage that a forward keeps for backward, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return list(found.values())


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_rotations_save_for_backward_what_lora_saves(kind: str) -> None:
    x = torch.randn(2048, 1024, requires_grad=True)
    lora = sum(saved(layer_of(kind, "lora", 1024, 1024, rank=8), x))
    assert lora >= x.nbytes
    for name, settings in (
        ("hoft", {"rank": 8}),
        ("hra", {"rank": 8}),
        ("goft", {}),
        ("qgoft", {}),
    ):
        mine = sum(saved(layer_of(kind, name, 1024, 1024, **settings), x))
        assert x.nbytes <= mine <= 1.05 * lora, name


def test_hoft_of_few_tokens_keeps_one_activation_more() -> None:
    x = torch.randn(256, 1024, requires_grad=True)
    lora, few = (sum(saved(layer_of("nf4", n, 512, 1024, rank=8), x)) for n in ("lora", "hoft"))
    assert few <= 1.05 * lora + 256 * 512 * 4


SMALL_SAVERS: list[tuple[str, dict[str, Any]]] = [
    ("surm", {"structure": "circulant"}),
    ("surm", {"structure": "toeplitz"}),
    ("surm", {"structure": "kronecker"}),
    ("surm", {"structure": "ldr"}),
    ("hira", {"rank": 4}),
    ("hut", {"rank": 4}),
]


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize(("name", "settings"), SMALL_SAVERS)
def test_saves_x_and_what_is_as_small_as_its_parameters(
    kind: str, name: str, settings: dict[str, Any]
) -> None:
    layer = layer_of(kind, name, 512, 512, **settings)
    x = torch.randn(256, 512, requires_grad=True)
    parameters = sum(p.nbytes for p in layer.adapter.parameters())
    sizes = sorted(saved(layer, x))
    assert sizes[-1] == x.nbytes < 512 * 512 * 4
    assert sum(sizes[:-1]) <= 3 * parameters


class Large(TorchDispatchMode):
    """Notes every operation that makes ``limit`` numbers or more, other than views of ``own``."""

    def __init__(self, own: list[Tensor], limit: int) -> None:
        super().__init__()
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.limit, self.found = limit, []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if not isinstance(t, Tensor) or t.untyped_storage().data_ptr() in self.own:
                continue
            if t.untyped_storage().nbytes() // t.element_size() >= self.limit:
                self.found.append((str(func), tuple(t.shape)))
        return result


@pytest.mark.parametrize("shape", [(256, 256), (192, 256)])
@pytest.mark.parametrize(
    ("name", "variant"),
    [pytest.param(n, v, id=f"{n}-{i}") for n, vs in VARIANTS.items() for i, v in enumerate(vs)],
)
def test_forward_makes_no_tensor_as_large_as_the_weight(
    name: str, variant: Variant, shape: tuple[int, int]
) -> None:
    if not variant.fits(*shape):
        return
    layer = layer_of("plain", name, *shape, **variant.settings)
    x = torch.randn(8, shape[1], requires_grad=True)
    with Large([*layer.parameters(), x], shape[0] * shape[1]) as seen:
        layer(x)
    if name == "hira" or (name == "hut" and variant.settings.get("rank", 1) > 1):
        assert seen.found, "a weight made on the spot should have been seen"
    else:
        assert not seen.found
