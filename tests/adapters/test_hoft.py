"""HOFT and SHOFT against an independent fp64 reference built from products of dense reflections."""

import math

import pytest
import references
import torch
from torch import nn

import scalepeft
from scalepeft.adapters.base import Dropout
from scalepeft.adapters.householder import FUSED_FROM, core, start_columns
from scalepeft.adapters.inject import penalty, trainable
from scalepeft.core.errors import UserError
from scalepeft.models import quant

FORMS = ["pairs", "mean_difference", "cayley"]
EACH = [(name, form) for name in ("hoft", "shoft", "hra") for form in FORMS[: 3 - (name == "hra")]]
SHAPES = [(64, 64), (192, 64), (64, 192), (16, 64)]


def reflect_rows(y: torch.Tensor, u: torch.Tensor, inverse: str = "exact") -> torch.Tensor:
    """Rows ``y -> y Q^T``, ``Q = H(u1) H(u2) ... H(ur)``."""
    return y + (y @ u) @ core(u, "pairs", inverse) @ u.mT


def rotation(stored: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(U, M) of rows ``y -> y - (y U) M``."""
    return stored, -core(stored, form) @ stored.mT


def dense_q(u: torch.Tensor) -> torch.Tensor:
    """H(u1) H(u2) ... H(ur), one dense reflection after the other."""
    q = torch.eye(u.shape[0], dtype=torch.float64)
    for column in u.double().T:
        q = q @ (
            torch.eye(u.shape[0], dtype=torch.float64)
            - 2 * torch.outer(column, column) / (column @ column)
        )
    return q


def stored(layer: nn.Linear) -> torch.Tensor:
    """The weight a layer really computes with, in fp64."""
    if isinstance(layer, quant.QuantLinear):
        return layer.fmt.decode(layer.weight, layer.weight_scale, layer.in_features, torch.float64)
    return layer.weight.detach().double()


def make(
    kind: str, name: str, out: int, inp: int, rank: int = 6, bias: bool = True, form="pairs", **more
) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(inp, out, bias=bias)
    if kind == "fp64":
        layer = layer.double()
    elif kind != "plain":
        quant.quantize(layer, quant.get_format(kind.removesuffix("-dq"), kind.endswith("-dq")))
    return scalepeft.adapt(layer, name, rank=rank, form=form, **more)


def scatter(layer: nn.Linear) -> None:
    """Moves the adapter away from its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in layer.adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)


@pytest.mark.parametrize("name", ["hoft", "shoft"])
@pytest.mark.parametrize(("out", "inp"), SHAPES)
@pytest.mark.parametrize("kind", ["plain", "nf4", "nf4-dq", "int8"])
def test_starts_as_the_base(kind: str, name: str, out: int, inp: int) -> None:
    layer = make(kind, name, out, inp)
    x = torch.randn(5, 3, inp)
    want = x.double() @ stored(layer).T + layer.bias.double()
    assert (layer(x) - want).abs().max() <= 1e-6 * want.abs().max() + 1e-6


@pytest.mark.parametrize("name", ["hoft", "shoft"])
@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_activation_form_is_the_weight_form_in_fp64(name: str, out: int, inp: int) -> None:
    layer = make("fp64", name, out, inp)
    layer.adapter.double()
    scatter(layer)
    a = layer.adapter
    m = 1 + a.scale if name == "shoft" else torch.ones(out, dtype=torch.float64)
    want = dense_q(a.U.detach()) @ (m.detach()[:, None] * layer.weight) @ dense_q(a.V.detach())
    x = torch.randn(7, inp, dtype=torch.float64)
    assert (layer(x) - (x @ want.T + layer.bias)).abs().max() < 1e-12
    weight, bias = scalepeft.effective_weight(layer)
    assert (weight - want).abs().max() < 1e-12
    assert torch.equal(bias, layer.bias.detach())


@pytest.mark.parametrize("name", ["hoft", "shoft"])
@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_forward_and_gradients_equal_the_dense_reference(kind: str, name: str) -> None:
    layer = make(kind, name, 128, 64)
    scatter(layer)
    x = torch.randn(9, 64, requires_grad=True)
    layer(x).square().sum().backward()

    u, v = (p.detach().double().requires_grad_() for p in (layer.adapter.U, layer.adapter.V))
    leaves = [u, v]
    m = torch.ones(128, dtype=torch.float64)
    if name == "shoft":
        leaves.append(layer.adapter.scale.detach().double().requires_grad_())
        m = 1 + leaves[2]
    x64 = x.detach().double().requires_grad_()
    weight = dense_q(u) @ (m[:, None] * stored(layer)) @ dense_q(v)
    (x64 @ weight.T + layer.bias.double()).square().sum().backward()
    got = [
        layer.adapter.U.grad,
        layer.adapter.V.grad,
        *([layer.adapter.scale.grad] if name == "shoft" else []),
        x.grad,
    ]
    for mine, reference in zip(got, [*(p.grad for p in leaves), x64.grad], strict=True):
        assert (mine - reference).abs().max() <= 3e-5 * reference.abs().max()


def test_only_the_adapter_trains_and_counts_follow_the_formula() -> None:
    for name, extra in (("hoft", 0), ("shoft", 192)):
        layer = make("nf4", name, 192, 64, rank=8)
        found = trainable(layer)
        assert all(n.startswith("adapter.") for n in found)
        assert sum(p.numel() for p in found.values()) == 8 * (192 + 64) + extra


@pytest.mark.parametrize(
    "d", [256, *(pytest.param(d, marks=pytest.mark.full) for d in (1024, 4096))]
)
@pytest.mark.parametrize("form", FORMS)
def test_rotation_stays_orthogonal_over_1000_optimiser_steps(form: str, d: int) -> None:
    torch.manual_seed(0)
    out = d if d <= 1024 else 64  # a wide layer keeps the large case short
    layer = scalepeft.adapt(nn.Linear(d, out, bias=False), "hoft", rank=8, form=form)
    optimizer = torch.optim.AdamW(layer.adapter.parameters(), lr=1e-2, weight_decay=0)
    x, target = torch.randn(4, d), torch.randn(4, out)
    for _ in range(1000):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    for stored in (layer.adapter.U, layer.adapter.V):
        u, m = rotation(stored.detach(), form)
        eye = torch.eye(len(u))
        q = eye - u @ m
        assert (q - eye).norm() / math.sqrt(len(u)) > 1e-2, "nothing was learnt"
        rows = torch.randperm(len(u))[:1024]
        assert (q[rows].double() @ q.double().T - eye[rows]).abs().max() <= 1e-6
    weight, _ = scalepeft.effective_weight(layer)
    before, after = (torch.linalg.svdvals(w.detach().double()) for w in (layer.weight, weight))
    assert (after - before).abs().max() <= 1e-5 * before.max()


def test_neumann2_is_the_identity_at_the_start_and_inexact_later() -> None:
    exact, series = (make("fp64", "hoft", 64, 64, rank=8, inverse=i) for i in ("exact", "neumann2"))
    x = torch.randn(4, 64, dtype=torch.float64)
    assert (exact(x) - series(x)).abs().max() < 1e-6
    for layer in (exact, series):
        scatter(layer)
    eye = torch.eye(64, dtype=torch.float64)
    q = reflect_rows(eye, series.adapter.U.detach().double(), "neumann2")
    u = series.adapter.U.detach().double()
    gram = u.T @ u
    d_inv = torch.diag(2 / torch.diagonal(gram))
    series_of_paper = eye - u @ (d_inv - d_inv @ torch.triu(gram, 1) @ d_inv) @ u.T
    assert (q - series_of_paper.T).abs().max() < 1e-12
    assert (q @ q.T - eye).abs().max() > 1e-2


@pytest.mark.parametrize("rank", [3, 7])
def test_odd_rank_is_refused_with_the_neighbours(rank: int) -> None:
    with pytest.raises(UserError, match=rf"rank={rank}.*even.*{rank - 1} or {rank + 1}"):
        scalepeft.adapt(nn.Linear(64, 64), "hoft", rank=rank)


def test_a_rank_too_large_for_the_layer_is_refused() -> None:
    with pytest.raises(UserError, match="room for rank 32 at most"):
        scalepeft.adapt(nn.Linear(64, 16), "shoft", rank=34)


def test_start_length_of_a_column_changes_its_gradient_not_the_map() -> None:
    short, long = (make("plain", "hoft", 64, 64, init_norm=n) for n in (1.0, 4.0))
    x = torch.randn(5, 64)
    grads = []
    for layer in (short, long):
        layer(x).square().sum().backward()
        grads.append(layer.adapter.V.grad.norm())
    assert torch.allclose(short(x), long(x), atol=1e-5)
    assert grads[0] / grads[1] == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("name", ["hoft", "shoft", "lora"])
def test_bf16_layer_keeps_fp32_parameters_and_bf16_activations(name: str) -> None:
    layer = scalepeft.adapt(nn.Linear(64, 128).bfloat16(), name, rank=4)
    y = layer(torch.randn(3, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in layer.adapter.parameters())


@pytest.mark.parametrize("tokens", [1, FUSED_FROM])
@pytest.mark.parametrize("inverse", ["exact", "neumann2"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["hoft", "shoft", "hra"])
def test_both_ways_equal_the_plain_composition(
    name: str, bias: bool, inverse: str, tokens: int
) -> None:
    """One reflection of the rows after the other around F.linear, gradients by autograd."""
    settings = {} if name == "hra" else {"inverse": inverse}
    layer = make("fp64", name, 48, 80, bias=bias, **settings)
    a = layer.adapter.double()
    if name == "hra":
        a.inverse = inverse
    scatter(layer)

    def composition(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(reflect_rows(x, a.V, inverse), layer.weight)
        y = y if a.scale is None else y * (1 + a.scale)
        y = y if a.U is None else reflect_rows(y, a.U, inverse)
        return y if layer.bias is None else y + layer.bias

    x = torch.randn(
        2, 3 * tokens, 80, dtype=torch.float64
    )  # 6 tokens for one of rank 6, or as many
    results = []
    for forward in (layer, composition):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = forward(leaf)
        y.sin().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in a.parameters())])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-11, rtol=0)
    layer(x).sum().backward()  # an x that needs no gradient


def config_of(form: str) -> object:
    return scalepeft.adapt(nn.Linear(8, 8), "hoft", rank=2, form=form).adapter.config


@pytest.mark.parametrize("rank", [2, 6, 16])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_its_definition_orthogonal_and_the_identity_at_the_start(
    form: str, rank: int
) -> None:
    torch.manual_seed(0)
    eye = torch.eye(37, dtype=torch.float64)
    stored = start_columns(37, rank, 2.0, form).double()
    assert stored.shape == (37, rank)
    u, m = rotation(stored, form)
    assert (u @ m).abs().max() <= 1e-15
    for size in (1e-3, 0.3, 30):
        u, m = rotation(stored + size * torch.randn_like(stored), form)
        assert (u @ m).abs().max() > 1e-4
        assert ((eye - u @ m) @ (eye - u @ m).T - eye).abs().max() < 1e-12
    moved = stored + 0.3 * torch.randn_like(stored)
    u, m = rotation(moved, form)
    # Rows map as y -> y Q^T.
    assert (eye - u @ m - references.rotation(moved, config_of(form)).T).abs().max() < 1e-13


@pytest.mark.parametrize(("name", "form"), EACH)
def test_gradients_of_each_form_are_finite_differences(form: str, name: str) -> None:
    layer = make("fp64", name, 5, 7, rank=4, form=form)
    layer.adapter.double()
    scatter(layer)
    names = [key for key, _ in layer.adapter.named_parameters()]

    def apply(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer.adapter, state, (x, quant.Frozen(layer)))

    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    leaves = [p.detach().clone().requires_grad_() for p in layer.adapter.parameters()]
    assert torch.autograd.gradcheck(apply, (x, *leaves))


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_small_difference_acts_in_bf16(form: str) -> None:
    """Of 1e-4 beside means of length 1: U in bf16 must still know it."""
    torch.manual_seed(0)
    stored = start_columns(256, 8, 1.0, form)
    stored[:, :4] = 1e-4 / 16 * torch.randn(256, 4)
    u, m = (factor.bfloat16().double() for factor in rotation(stored, form))
    want = references.rotation(stored.double(), config_of(form)).T
    eye = torch.eye(256, dtype=torch.float64)
    assert (eye - u @ m - want).norm() < 1e-2 * (want - eye).norm()


@pytest.mark.parametrize(("name", "form"), [pair for pair in EACH if pair[0] != "shoft"])
def test_each_form_is_a_lora(form: str, name: str) -> None:
    layer = make("fp64", name, 48, 80, form=form)
    layer.adapter.double()
    scatter(layer)
    a, b = layer.adapter.to_lora(quant.Frozen(layer))
    assert len(a) == (12 if name == "hoft" else 6)
    weight, _ = scalepeft.effective_weight(layer)
    assert (weight - layer.weight - b @ a).abs().max() < 1e-13


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_mean_learns_at_four_times_the_rate(form: str) -> None:
    layer = make("plain", "hoft", 64, 64, form=form)
    scatter(layer)
    v = layer.adapter.V
    before = v.detach().clone()
    layer(torch.randn(5, 64)).sin().sum().backward()
    torch.optim.Adam([v], lr=1e-3).step()  # a first step of Adam is lr, whatever the gradient
    p, r = (v.detach() - before).abs().chunk(2, dim=1)
    assert p.mean().item() == pytest.approx(1e-3, rel=1e-2)
    assert 4 * r.mean().item() == pytest.approx(4e-3, rel=1e-2)
    assert start_columns(64, 4, 1.0, form)[:, 2:].norm(dim=0).tolist() == pytest.approx([0.25] * 2)


@pytest.mark.parametrize(("name", "form"), EACH)
@pytest.mark.parametrize("tokens", [12, 700])
def test_dropout_is_on_the_input_of_the_thin_product(name: str, form: str, tokens: int) -> None:
    """``Q_U m W (x + (d(x) Z) K Z^T)``, d(x) of the sample alone; in evaluation there is none."""
    layer = make("plain", name, 32, 48, form=form, dropout=0.3)
    scatter(layer)
    adapter = layer.adapter
    x = torch.randn(2, tokens // 2, 48)
    adapter.dropout.keys = torch.tensor([7, 8])
    alone = Dropout(0.3, "").train()
    alone.keys = torch.tensor([7, 8])
    seen = alone(x).double()
    p = {k: v.detach().double().requires_grad_() for k, v in adapter.named_parameters()}
    leaf = x.double().requires_grad_()
    mask = (seen != 0) / 0.7
    q_v = references.rotation(p["V"], adapter.config)
    y = leaf + (leaf * mask) @ (q_v.T - torch.eye(48))
    y = (y @ stored(layer).T) * (1 + p.get("scale", torch.zeros(())))
    want = (y @ references.rotation(p["U"], adapter.config).T if "U" in p else y) + layer.bias
    dy = torch.randn(want.shape)
    want.backward(dy.double())
    mine = x.clone().requires_grad_()
    got = layer(mine)
    got.backward(dy)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (mine.grad - leaf.grad).abs().max() <= 5e-5 * leaf.grad.abs().max()
    for key, value in adapter.named_parameters():
        assert (value.grad - p[key].grad).abs().max() <= 5e-5 * p[key].grad.abs().max(), key
    whole = references.apply(name, p, stored(layer), layer.bias.double(), adapter.config, leaf)
    assert (layer.eval()(x) - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert (got - whole).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("form", FORMS[:2])
def test_hra_is_pulled_towards_orthogonal_columns(form: str) -> None:
    net = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 24))
    scalepeft.inject(net, {"name": "hra", "rank": 4, "form": form, "penalty": 0.3,
                           "target_modules": ["0", "1"]})  # fmt: skip
    for layer in net:
        scatter(layer)
    found = {k: p.detach().double().requires_grad_() for k, p in trainable(net).items()}
    want = torch.zeros(())
    for stored_columns in found.values():
        p, r = stored_columns[:, :2], 4 * stored_columns[:, 2:]
        pairs = [r[:, 0] + p[:, 0], r[:, 0] - p[:, 0], r[:, 1] + p[:, 1], r[:, 1] - p[:, 1]]
        u = list(stored_columns.T) if form == "pairs" else pairs
        square = sum(
            (a @ b / (a.norm() * b.norm()) - float(i == j)) ** 2
            for i, a in enumerate(u)
            for j, b in enumerate(u)
        )
        want = want + 0.3 * square**0.5
    got = penalty(net)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    want.backward()
    for key, p in trainable(net).items():
        assert (p.grad - found[key].grad).abs().max() <= 1e-4 * found[key].grad.abs().max()
    assert scalepeft.adapt(nn.Linear(8, 8), "hra", rank=2).adapter.penalty() is None
