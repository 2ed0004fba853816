"""SURM's products against dense matrices in fp64, and HUT's two paths."""

from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

import scalepeft
from scalepeft.adapters.methods.hut import sandwich, weight_product
from scalepeft.adapters.methods.surm import balanced, smooth_length
from scalepeft.models.quant import Frozen


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def filled(layer: nn.Module, name: str, **settings: Any) -> nn.Module:
    """The layer with an adapter in fp64 whose entries are all random."""
    scalepeft.adapt(layer, name, **settings).adapter.double()
    with torch.no_grad():
        for i, p in enumerate(layer.adapter.parameters()):
            p.copy_(random(*p.shape, seed=i) * 0.3)
    return layer


SHAPES = {
    "circulant": [(7, 7), (64, 64), (9, 9), (12, 8), (8, 12), (15, 35), (7, 21)],
    "toeplitz": [(7, 7), (64, 64), (9, 9), (12, 7), (5, 11), (1, 4)],
    "kronecker": [(7, 7), (64, 64), (12, 8), (9, 35), (13, 6)],
    "ldr": [(7, 7), (64, 64), (9, 9)],
}


@pytest.mark.parametrize(
    ("structure", "out", "inp"), [(s, *shape) for s, shapes in SHAPES.items() for shape in shapes]
)
def test_product_and_gradients_equal_the_dense_matrix(structure: str, out: int, inp: int) -> None:
    layer = filled(nn.Linear(inp, out), "surm", structure=structure, scaling=0.7)
    a = layer.adapter
    leaves = {k: p.detach().clone().requires_grad_() for k, p in a.named_parameters()}
    x, dy = random(2, 3, inp, seed=8), random(2, 3, out, seed=9)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = a.product(ours)
    want = plain @ references.structured(leaves, out, inp, a.config).T
    assert (got - want).abs().max() <= 1e-10
    got.backward(dy)
    want.backward(dy)
    assert (ours.grad - plain.grad).abs().max() <= 1e-10
    for key, leaf in leaves.items():
        assert (dict(a.named_parameters())[key].grad - leaf.grad).abs().max() <= 1e-10, key


@pytest.mark.parametrize("structure", list(SHAPES))
def test_n_of_11008(structure: str) -> None:
    """A few entries of the output by the formula of a row, in place of 11008 x 11008 numbers."""
    n = 11008
    # The frozen layer is on meta: the product alone is in question.
    layer = nn.Linear(n, n, bias=False, device="meta")
    settings = {"name": "surm", "structure": structure, "target_modules": ["0"]}
    if structure == "ldr":
        settings["ldr_rank"] = 1
    a = scalepeft.inject(nn.Sequential(layer), settings)[0].adapter.to_empty(device="cpu")
    a.double()
    with torch.no_grad():
        for i, p in enumerate(a.parameters()):
            p.copy_(random(*p.shape, seed=i) * 0.1)
    p = {k: v.detach() for k, v in a.named_parameters()}
    # A sparse x: a product of two matrices needs just so many columns of the second.
    j = torch.arange(n)
    places = torch.arange(3, n, 211)
    x = torch.zeros(2, n, dtype=torch.float64)
    x[:, places] = random(2, len(places), seed=9)
    got = a.product(x).detach()
    offset = j[:, None] - places
    for i in (0, 1, 4321, n - 1):
        if structure == "circulant":
            want = x @ (p["a"] * p["c0"]).view(-1)[(i - j) % n]
        elif structure == "toeplitz":
            want = x[:, places] @ p["b"][offset.abs()].T @ p["a"][(i - j).abs()]
        elif structure == "ldr":
            skew = p["h"][0][offset % n] * torch.where(offset >= 0, 1, -1)
            want = x[:, places] @ skew.T @ p["g"][0][(i - j) % n]
        else:
            (o1, i1), (o2, i2) = p["A"].shape, p["B"].shape
            assert (o1 * o2, i1 * i2) == (n, n)
            want = x @ (p["A"][i // o2][:, None] * p["B"][i % o2]).reshape(-1)
        assert (got[:, i] - want).abs().max() <= 1e-10


@pytest.mark.parametrize("structure", list(SHAPES))
@pytest.mark.parametrize("n", [7, 64, 172])
def test_bf16_input(structure: str, n: int) -> None:
    layer = filled(nn.Linear(n, n), "surm", structure=structure)
    a = layer.adapter.float()
    x = random(4, n).bfloat16().requires_grad_()
    got = a.product(x)
    assert got.dtype == torch.bfloat16
    leaves = {k: p.detach().double() for k, p in a.named_parameters()}
    m = references.structured(leaves, n, n, a.config)
    want = x.detach().double() @ m.T
    assert (got.double() - want).norm() <= 1e-2 * want.norm()
    got.sum().backward()
    want = m.sum(0).expand(4, n)
    assert (x.grad.double() - want).norm() <= 2e-2 * want.norm()


def test_lengths_and_factors() -> None:
    assert [smooth_length(n) for n in (1, 2, 13, 22, 23, 8191, 22015)] == [
        2, 2, 14, 24, 24, 8192, 22050,
    ]  # fmt: skip
    assert [balanced(n) for n in (1, 7, 64, 768, 4096, 11008)] == [
        (1, 1), (7, 1), (8, 8), (32, 24), (64, 64), (128, 86),
    ]  # fmt: skip


def test_given_kronecker_factors() -> None:
    layer = scalepeft.adapt(nn.Linear(12, 8), "surm", structure="kronecker", factors=[2, 3])
    assert (layer.adapter.A.shape, layer.adapter.B.shape) == ((2, 3), (4, 4))


def test_exactly_one_factor_starts_at_zero() -> None:
    for structure, shapes in SHAPES.items():
        for placement in ("lora", "adapter"):
            layer = nn.Linear(*shapes[0][::-1])
            scalepeft.adapt(layer, "surm", structure=structure, placement=placement)
            values = {k: p for k, p in layer.adapter.named_parameters() if k != "c"}
            assert [bool(p.any()) for p in values.values()] == [False, True]
    layer = scalepeft.adapt(nn.Linear(6, 4), "surm", structure="toeplitz")  # one matrix: zero
    assert not layer.adapter.t.any()


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (10, 10)])
def test_hut_rank_1_is_the_weight_path_at_rank_1(shape: tuple[int, int]) -> None:
    layer = filled(nn.Linear(shape[1], shape[0]).double(), "hut")
    a, base = layer.adapter, Frozen(layer)
    x, dy = random(5, shape[1], seed=8), random(5, shape[0], seed=9)
    found = []
    for path in (lambda x: a(x, base), lambda x: weight_product(x, base, sandwich, a.a, a.b)):
        leaf = x.clone().requires_grad_()
        a.zero_grad()
        y = path(leaf)
        y.backward(dy)
        found.append([y.detach(), leaf.grad, a.a.grad, a.b.grad])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-12


def test_hut_tiles() -> None:
    """Block (p, q) of W has its rows scaled by a_q and its columns by b_p."""
    a, b, w = random(4, 2), random(2, 6, seed=2), random(4, 6, seed=3)
    got = sandwich(w, a, b)
    for i in range(4):
        for j in range(6):
            want = w[i, j] * (1 + a[i, j // 3]) * (1 + b[i // 2, j])
            assert abs(got[i, j] - want) <= 1e-12


@pytest.mark.parametrize(("method", "rank"), [("hut", 1), ("hut", 2), ("hira", 3)])
def test_gradcheck_of_weights_made_on_the_spot(method: str, rank: int) -> None:
    layer = filled(nn.Linear(6, 4).double().requires_grad_(False), method, rank=rank)
    names = [key for key, _ in layer.adapter.named_parameters()]
    parameters = [p.detach().requires_grad_() for p in layer.adapter.parameters()]

    def adapted(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        inputs = x, Frozen(layer)
        return torch.func.functional_call(
            layer.adapter, dict(zip(names, values, strict=True)), inputs
        )

    x = random(2, 3, 6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(adapted, [x, *parameters])
