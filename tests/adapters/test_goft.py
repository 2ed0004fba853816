"""GOFT and qGOFT: exact rotations, the fused form against the rounds, orthogonality in training."""

import math

import pytest
import references
import torch
from torch import Tensor, nn

import scalepeft
from scalepeft.adapters.block_orthogonal import less_identity
from scalepeft.adapters.methods.goft import RUN, _GivensProduct, givens_matrices, rotation_rounds


def angles(d: int, seed: int = 0) -> Tensor:
    return torch.randn(d - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_rounds(x: Tensor, g: Tensor) -> Tensor:
    """``x R``, a round of strided pairs at a time, from the last to the first."""
    d = x.shape[1]
    counts = rotation_rounds(d)
    for k, blocks in reversed(list(enumerate(g.split(counts)))):
        s = 1 << k
        first = torch.arange(len(blocks)) * 2 * s
        pairs = torch.stack([x[:, first], x[:, first + s]], dim=-1)
        pairs = torch.einsum("tpi,pij->tpj", pairs, blocks)
        x = x.clone()
        x[:, first], x[:, first + s] = pairs.unbind(-1)
    return x


def product(x: Tensor, g: Tensor) -> Tensor:
    """``x R`` of the blocks g (d - 1, 2, 2)."""
    return _GivensProduct.apply(x, *map(less_identity, givens_matrices(g, x.shape[1])))


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("d", [5, 7, 64, 768, 4096, 11008])
def test_exactly_orthogonal_and_equal_to_the_rounds(d: int) -> None:
    g = references.givens_blocks(angles(d))
    if d <= 768:
        r = product(torch.eye(d, dtype=torch.float64), g)
        assert (r @ r.T - torch.eye(d)).abs().max() <= 1e-12
        assert (r - references.givens(g, d)).abs().max() <= 1e-12
    # R R^T = I: x R keeps every inner product, and so do rows of R itself.
    x = random(40, d) / math.sqrt(d)
    x[20:] = 0
    x[20:].scatter_(1, torch.linspace(0, d - 1, 20).long()[:, None], 1)
    y = product(x, g)
    assert (y @ y.T - x @ x.T).abs().max() <= 1e-12
    assert (y - by_rounds(x, g)).abs().max() <= 1e-12
    assert (y - references.rotate(x, g)).abs().max() <= 1e-12
    # Where M1 and M2 are all of R, each of their blocks is orthogonal.
    for m in givens_matrices(g, d):
        square = m @ m.mT
        assert (square - torch.eye(m.shape[-1]).expand_as(square)).abs().max() <= 1e-12


@pytest.mark.parametrize("d", [2, 3, 63, 65, 100, 130, 192, 320])
def test_fused_equals_the_rounds_with_free_blocks_and_its_gradients(d: int) -> None:
    """qGOFT's blocks are no rotations: a transposed or swapped one would show."""
    g = torch.eye(2).double() + 0.3 * random(d - 1, 2, 2)
    x, dy = random(6, d, seed=2), random(6, d, seed=3)
    found = []
    for rotate in (product, references.rotate):
        leaves = x.clone().requires_grad_(), g.clone().requires_grad_()
        y = rotate(*leaves)
        y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-12 * max(1, want.abs().max())


def test_exactly_d_minus_1_rotations_for_every_d() -> None:
    for d in range(2, 201):
        pairs = references.givens_pairs(d)
        assert sum(rotation_rounds(d)) == len(pairs) == d - 1
        assert len(rotation_rounds(d)) == math.ceil(math.log2(d))
        strides = [j - i for i, j in pairs]
        assert strides == [1 << k for k, n in enumerate(rotation_rounds(d)) for _ in range(n)]
        for name, entries in (("goft", 1), ("qgoft", 4)):
            layer = scalepeft.adapt(nn.Linear(d, 2), name)
            assert sum(p.numel() for p in layer.adapter.parameters()) == entries * (d - 1)


@pytest.mark.parametrize("name", ["goft", "qgoft"])
@pytest.mark.parametrize("d", [5, 64, 172, 768])
def test_starts_at_the_identity(name: str, d: int) -> None:
    layer = nn.Linear(d, 8, bias=False)
    x = torch.randn(3, d)
    want = layer(x)
    assert torch.equal(scalepeft.adapt(layer, name)(x), want)


@pytest.mark.parametrize(
    "d", [256, *(pytest.param(d, marks=pytest.mark.full) for d in (1024, 4096))]
)
def test_rotation_stays_orthogonal_over_1000_optimiser_steps(d: int) -> None:
    torch.manual_seed(0)
    layer = scalepeft.adapt(nn.Linear(d, 16, bias=False), "goft")
    optimizer = torch.optim.AdamW(layer.adapter.parameters(), lr=1e-2, weight_decay=0)
    x, target = torch.randn(4, d), torch.randn(4, 16)
    for _ in range(1000):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    rows = torch.randperm(d)[:1024]
    eye = torch.eye(d)
    with torch.no_grad():
        r = layer.adapter.transform_input(eye)
    assert r.dtype == torch.float32
    assert (r - eye).norm() / math.sqrt(d) > 1e-2, "nothing was learnt"
    assert (r[rows].double() @ r.double().T - eye[rows]).abs().max() <= 1e-6


def test_small_angles_survive_bf16() -> None:
    """cos of 0.05 is 1 in bf16; in ``x + x (M - I)`` it still shortens x by its 0.125 %."""
    layer = scalepeft.adapt(nn.Linear(2 * RUN, 4).bfloat16(), "goft")
    with torch.no_grad():
        layer.adapter.p.fill_(0.05 / math.pi)
    m1, _ = givens_matrices(layer.adapter.blocks(layer.adapter.p), 2 * RUN)
    diagonal = torch.diagonal(m1, dim1=1, dim2=2)[:, 1]
    assert (diagonal.bfloat16() == 1).all()
    x = torch.ones(1, 2 * RUN, dtype=torch.bfloat16)
    want = layer.adapter.transform_input(x.double())
    got = layer.adapter.transform_input(x).double()
    assert (got - want).norm() <= 3e-3 * want.norm()


def test_penalty_is_the_weighted_sum_over_blocks() -> None:
    net = scalepeft.inject(
        nn.Sequential(nn.Linear(9, 20), nn.Linear(20, 5)),
        {"name": "qgoft", "penalty": 0.3, "target_modules": ["0", "1"]},
    )
    from scalepeft.adapters.inject import penalty, trainable

    assert penalty(net) == 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable(net).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    found = {k: p.detach().double().requires_grad_() for k, p in trainable(net).items()}
    want = 0.3 * sum(references.givens_penalty(p) for p in found.values())
    got = penalty(net)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    want.backward()
    for key, p in trainable(net).items():
        assert (p.grad - found[key].grad).abs().max() <= 1e-5 * found[key].grad.abs().max()
    assert penalty(nn.Linear(3, 3)) is None
    assert scalepeft.adapt(nn.Linear(8, 8), "qgoft", penalty=0).adapter.penalty() is None
    assert scalepeft.adapt(nn.Linear(8, 8), "goft").adapter.penalty() is None
