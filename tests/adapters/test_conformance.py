"""One test over the folder of methods: every variant x storage x shape x way of running.

The reference is the dense fp64 form of ``references.py``; the closed formulas of the parameter
counts stand in the table.
"""

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import references
import torch
from processes import Job
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import scalepeft
from scalepeft.adapters import inject
from scalepeft.adapters import inject as injection
from scalepeft.config import schema as cfg
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.models import quant


@dataclass(frozen=True)
class Variant:
    """Settings of a method, its parameter count as a formula of (out, in), and where it fits."""

    settings: dict[str, Any]
    count: Callable[[int, int], int]
    fits: Callable[[int, int], bool] = field(default=lambda out, inp: True)
    refusal: str = ""
    affine: bool = True


def halves(n: int) -> tuple[int, int]:
    """(large, small) factors of n, as near to each other as can be."""
    small = max(i for i in range(1, math.isqrt(n) + 1) if n % i == 0)
    return n // small, small


def kronecker_count(o: int, i: int) -> int:
    (o1, o2), (i1, i2) = halves(o), halves(i)
    return o1 * i2 + o2 * i1


def surm(count: Callable[[int, int], int], **settings: Any) -> Variant:
    # Larger than the default, so that products with the zero factor move in a few steps.
    return Variant({"init_std": 0.2, **settings}, count)


FORMS = ("cayley", "mean_difference", "pairs")
SERIES = {"rank": 4, "inverse": "neumann2", "form": "pairs"}
PISSA = {"rank": 4, "dropout": 0.0, "start": "pissa"}


VARIANTS: dict[str, list[Variant]] = {
    "boft": [
        Variant({"block_size": 4, "factors": 1}, lambda o, i: i * 3 // 2 + o),
        Variant({"block_size": 2, "factors": 2}, lambda o, i: 2 * i // 2 + o),
        Variant(
            {"block_size": 4, "factors": 3},
            lambda o, i: 3 * i * 3 // 2 + o,
            lambda o, i: i % 16 == 0,
            r"factors=3 .*block_size=4.*16 to divide.*172 inputs; take fewer factors",
        ),
    ],
    "dora": [
        Variant({"rank": 4, "alpha": 6, "dropout": 0.0}, lambda o, i: 4 * (o + i) + o),
        Variant({**PISSA, "alpha": 6}, lambda o, i: 4 * (o + i) + o),
    ],
    "goft": [
        Variant({}, lambda o, i: i - 1),
        Variant({"scale": True}, lambda o, i: 2 * i - 1),
    ],
    "hadamard": [
        Variant({"train_norm": False}, lambda o, i: 2 * o),
        Variant({"train_norm": False, "position": "before"}, lambda o, i: 2 * i),
    ],
    "hira": [Variant({"rank": 3}, lambda o, i: 3 * (o + i))],
    "hoft": [
        *(Variant({"rank": 6, "form": form}, lambda o, i: 6 * (o + i)) for form in FORMS),
        Variant(SERIES, lambda o, i: 4 * (o + i)),
    ],
    "hra": [
        *(Variant({"rank": 6, "form": form}, lambda o, i: 6 * i) for form in FORMS[1:]),
        *(Variant({"rank": 6, "form": f, "penalty": 0.1}, lambda o, i: 6 * i) for f in FORMS[1:]),
    ],
    "hut": [
        Variant({}, lambda o, i: o + i),
        Variant({"shift": True}, lambda o, i: 2 * o + i),
        Variant(
            {"rank": 4, "shift": True},
            lambda o, i: 4 * (o + i) + o,
        ),
        Variant(
            {"rank": 8},
            lambda o, i: 8 * (o + i),
            lambda o, i: (o % 8, i % 8) == (0, 0),
            r"rank=8: .*does not divide a layer of \d+ x \d+; take a rank .*1, 2 or 4",
        ),
    ],
    "ia3": [
        Variant({}, lambda o, i: o),
        Variant({"target_modules": ["down_proj"]}, lambda o, i: i),
    ],
    "lora": [
        Variant({"rank": 4, "alpha": 6, "dropout": 0.0}, lambda o, i: 4 * (o + i)),
        Variant({"rank": 4, "alpha": 6, "dropout": 0.0, "rslora": True}, lambda o, i: 4 * (o + i)),
        Variant({**PISSA, "alpha": 6}, lambda o, i: 4 * (o + i)),
        Variant({**PISSA, "alpha": 6, "rslora": True}, lambda o, i: 4 * (o + i)),
    ],
    "oft": [
        Variant({"block_size": 4}, lambda o, i: i * 3 // 2),
        Variant(
            {"block_size": 32},
            lambda o, i: i * 31 // 2,
            lambda o, i: i % 32 == 0,
            r"block_size=32 does not divide the layer's 172 inputs; take one of 2, 4, 43.*leave",
        ),
    ],
    "oftv2": [Variant({"block_size": 4}, lambda o, i: i * 3 // 2)],
    "qgoft": [Variant({"penalty": 0.1}, lambda o, i: 4 * (i - 1))],
    "shoft": [
        *(Variant({"rank": 6, "form": form}, lambda o, i: 6 * (o + i) + o) for form in FORMS),
        Variant(SERIES, lambda o, i: 4 * (o + i) + o),
    ],
    "surm": [
        surm(lambda o, i: 2 * o * i // math.gcd(o, i), structure="circulant", scaling=0.5),
        surm(
            lambda o, i: 2 * i if o == i else o + i - 1,
            structure="toeplitz",
            scaling=0.5,
        ),
        surm(kronecker_count, structure="kronecker", scaling=0.5),
        surm(lambda o, i: 2 * i if o == i else kronecker_count(o, i)),
        Variant(
            {"structure": "ldr", "ldr_rank": 3, "init_std": 0.2},
            lambda o, i: 2 * 3 * i,
            lambda o, i: o == i,
            r"structure=ldr: a layer of \d+ x \d+ is not square.*take structure: kronecker",
        ),
        *(
            Variant(
                {"structure": structure, "placement": "adapter", "init_std": 0.2},
                count,
                affine=False,
            )
            for structure, count in (
                ("circulant", lambda o, i: 3 * o),
                ("toeplitz", lambda o, i: 3 * o),
                ("kronecker", lambda o, i: kronecker_count(o, o) + o),
                ("ldr", lambda o, i: 9 * o),
            )
        ),
    ],
}


EXACT_START = set(VARIANTS) - {"hoft", "shoft", "hra"}  # those draw paired columns


SHAPES = {
    "square": (64, 64),
    "wide": (64, 192),
    "tall": (192, 64),
    "gqa": (16, 64),
    "wide172": (64, 172),
    "tall172": (172, 64),
}


KINDS = ("plain", "bf16", "nf4", "int8", "nf4-bf16")  # the last: what training runs in


def every(
    shapes: tuple[str, ...] = tuple(SHAPES), kinds: tuple[str, ...] = KINDS, first: bool = False
) -> Any:
    """Parametrize over (name, variant, shape, kind); a variant is left out where it refuses.

    Pairwise in every run: each variant meets each storage (on squares) and each shape (with
    storages in turn); the product is ``--full``'s.

    ``first``: one variant a method, and of SURM and BOFT all that are affine.
    """
    cases = []
    named = [
        (name, i, variant)
        for name in registry.available("adapters.methods")
        for i, variant in enumerate(VARIANTS.get(name, []))
    ]
    for turn, (name, i, variant) in enumerate(named):
        if first and i and not (name in ("surm", "boft") and variant.affine):
            continue
        label = "-".join(f"{v}" for v in variant.settings.values())
        for column, shape in enumerate(shapes):
            possible = [
                kind for kind in kinds if variant.fits(*SHAPES[shape]) and holds(kind, shape)
            ]
            for n, kind in enumerate(possible):
                pair = shape == "square" or n == (turn + column) % len(possible)
                case = (name, variant, SHAPES[shape], kind)
                marks = [] if pair else [pytest.mark.full]
                cases.append(pytest.param(*case, id=f"{name}-{label}-{shape}-{kind}", marks=marks))
    return pytest.mark.parametrize(("name", "variant", "shape", "kind"), cases)


def holds(kind: str, shape: str) -> bool:
    """NF4 blocks of 64 lie inside a row, so a width of 172 is int8's or plain."""
    if kind == "nf4-bf16":
        return shape in ("square", "gqa")
    return not (kind == "nf4" and shape == "wide172")


def base_layer(kind: str, shape: tuple[int, int], bias: bool) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(shape[1], shape[0], bias=bias)
    storage = kind.removesuffix("bf16").removesuffix("-")
    if kind.endswith("bf16"):
        layer = layer.bfloat16()
    if storage not in ("", "plain"):
        quant.quantize(layer, quant.get_format(storage))
    return layer.requires_grad_(False)


def adapted(name: str, variant: Variant, layer: nn.Linear) -> nn.Sequential:
    """A net of one layer; its name decides what IA3 scales."""
    settings = {"name": name, "target_modules": ["proj"], **variant.settings}
    net = nn.Sequential(OrderedDict({settings["target_modules"][0]: layer}))
    return scalepeft.inject(net, settings, seed=3)


def scatter(net: nn.Module, size: float = 0.3) -> None:
    """Moves the adapters away from their start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in injection.trainable(net).values():
            p.add_(torch.randn(p.shape, generator=generator) * size)


def stored(layer: nn.Linear) -> Tensor:
    """The weight a layer really computes with, in fp64."""
    if isinstance(layer, quant.QuantLinear):
        return layer.fmt.decode(layer.weight, layer.weight_scale, layer.in_features, torch.float64)
    return layer.weight.detach().double()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(net: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradient of x and of every parameter, for one forward and backward."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    y = net(x)
    y.backward(dy)
    grads = {k: p.grad.clone() for k, p in injection.trainable(net).items()}
    return {"y": y.detach(), "x": x.grad, **grads}


def reference_run(name: str, net: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same by autograd through the dense fp64 form."""
    layer = net[0]
    p = {
        key: value.detach().double().requires_grad_()
        for key, value in layer.adapter.named_parameters()
    }
    x = x.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.double()
    y = references.apply(name, p, stored(layer), bias, layer.adapter.config, x)
    y.backward(dy.double())
    prefix = next(iter(injection.trainable(net))).rsplit(".", 1)[0]
    grads = {f"{prefix}.{k}": v.grad for k, v in p.items() if k not in layer.adapter.kept}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], kind: str) -> None:
    """fp32: relative to the largest entry. bf16: of the norm, a few times its step of 2^-8."""
    assert got.keys() == want.keys()
    for key, reference in want.items():
        difference = got[key].double() - reference.double()
        if kind.endswith("bf16"):
            # 2^-8 a rounding, a handful of roundings; a wrong sign or transpose is of order 1.
            assert difference.norm() <= 0.03 * reference.norm(), key
        else:
            limit = 1e-5 if key == "y" else 5e-5
            assert difference.abs().max() <= limit * reference.abs().max(), key


def test_every_method_of_the_folder_has_a_variant_and_a_reference() -> None:
    folder = set(registry.available("adapters.methods"))
    for where, table in (("VARIANTS", VARIANTS), ("references.WEIGHTS", references.WEIGHTS)):
        missing = sorted(folder - set(table))
        assert not missing, f"no test of {missing}: add a line to {where} and the dense form"
        assert not set(table) - folder, f"{where} has methods that are no longer there"


@every()
def test_starts_as_the_base_counts_and_trains_its_own_alone(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    for bias in (True, False):
        layer = base_layer(kind, shape, bias)
        plain = copy.deepcopy(layer)
        net = adapted(name, variant, layer)
        x = random(2, 3, shape[1], dtype=torch.bfloat16 if kind.endswith("bf16") else torch.float32)
        product = quant.Frozen(plain)(x)
        want = product + plain.bias if bias else product
        got = net(x)
        assert got.dtype == x.dtype
        if name in EXACT_START:
            assert torch.equal(got, want)
        else:
            limit = 2e-2 if kind.endswith("bf16") else 1e-6
            assert (got - want).abs().max() <= limit * max(1, want.abs().max())
        found = injection.trainable(net)
        assert all(".adapter." in key for key in found)
        assert all(p.dtype == torch.float32 for p in found.values())
        assert sum(p.numel() for p in found.values()) == variant.count(*shape)


@every()
def test_forward_and_gradients_equal_the_dense_reference(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    x, dy = random(2, 5, shape[1], dtype=dtype), random(2, 5, shape[0], dtype=dtype, seed=5)
    for bias in (True, False):
        net = adapted(name, variant, base_layer(kind, shape, bias))
        scatter(net)
        assert_close(run(net, x, dy), reference_run(name, net, x, dy), kind)
        assert net[0].weight.grad is None
        assert not bias or net[0].bias.grad is None
        net(x).backward(dy)  # an x that needs no gradient


@every(kinds=("plain", "bf16", "nf4", "int8"))
def test_effective_weight_equals_the_dense_reference(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    for bias in (True, False):
        net = adapted(name, variant, base_layer(kind, shape, bias))
        scatter(net)
        layer = net[0]
        if not variant.affine:
            with pytest.raises(UserError, match="not affine in x"):
                scalepeft.effective_weight(layer)
            continue
        p = {k: v.detach().double() for k, v in layer.adapter.named_parameters()}
        want, extra = references.weight(name, p, stored(layer), layer.adapter.config)
        got, got_bias = scalepeft.effective_weight(layer)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        want_bias = layer.bias.double() if bias else None
        if extra is not None:
            want_bias = extra if want_bias is None else want_bias + extra
        assert (got_bias is None) == (want_bias is None)
        if want_bias is not None:
            assert (got_bias - want_bias).abs().max() <= 1e-5 * want_bias.abs().max()


@every(shapes=("square", "wide172", "gqa"), kinds=("plain", "nf4"))
def test_every_entry_gets_a_gradient_and_the_base_never_moves(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    net = adapted(name, variant, base_layer(kind, shape, bias=True))
    frozen = {k: p.clone() for k, p in net.named_parameters() if not p.requires_grad}
    trained = injection.trainable(net)
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    seen = {k: torch.zeros_like(p, dtype=torch.bool) for k, p in trained.items()}
    for step in range(3):
        optimizer.zero_grad()
        target = random(40, shape[0], seed=20 + step)
        (net(random(40, shape[1], seed=10 + step)) - target).square().sum(1).mean().backward()
        for key, p in trained.items():
            seen[key] |= p.grad != 0
        optimizer.step()
    for key, mask in seen.items():
        assert mask.all(), f"{key}: {int((~mask).sum())} of {mask.numel()} entries never learn"
    assert all(torch.equal(p, frozen[k]) for k, p in net.named_parameters() if k in frozen)


SMALL = every(shapes=("square", "gqa"), kinds=("plain", "nf4"))


@SMALL
def test_eval_checkpointing_and_save_load_change_nothing(
    name: str, variant: Variant, shape: tuple[int, int], kind: str, tmp_path: Path
) -> None:
    net = adapted(name, variant, base_layer(kind, shape, bias=True))
    scatter(net)
    x, dy = random(6, shape[1]), random(6, shape[0], seed=5)
    want = run(net, x, dy)
    with torch.no_grad():
        # Not bitwise: torch.matmul picks its kernel by requires_grad.
        assert_close({"y": net.eval()(x)}, {"y": want["y"]}, kind)
    after = run(net.train(), x, dy)
    assert all(torch.equal(after[k], want[k]) for k in want)

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.net, x, use_reentrant=False)
            return y

    again = {k.removeprefix("net."): v for k, v in run(Again(), x, dy).items()}
    assert all(torch.equal(again[k], want[k]) for k in want)

    state = {k: p.detach() for k, p in injection.tensors(net).items()}
    save_file(state, tmp_path / "adapter.safetensors")
    description = {"adapter": cfg.to_dict(net[0].adapter.config)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(description))
    (target,) = (key for key, _ in net.named_children())
    fresh = nn.Sequential(OrderedDict({target: base_layer(kind, shape, bias=True)}))
    assert torch.equal(scalepeft.load_adapter(fresh, tmp_path)(x), want["y"])


def compare_compiled(name: str, variant: Variant, shape: tuple[int, int], kind: str) -> None:
    net = adapted(name, variant, base_layer(kind, shape, bias=True))
    scatter(net)
    x, dy = random(6, shape[1]), random(6, shape[0], seed=5)
    want = run(net, x, dy)
    torch._dynamo.reset()
    # The kernels of inductor are torch's own to test; tracing and functionalising are ours.
    got = run(torch.compile(net, backend="aot_eager"), x, dy)
    assert_close({k.removeprefix("_orig_mod."): v for k, v in got.items()}, want, kind)


QUIET = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@QUIET
@pytest.mark.slow
@every(shapes=("wide",), kinds=("plain",), first=True)
def test_compiled_equals_eager(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    compare_compiled(name, variant, shape, kind)


@QUIET
@pytest.mark.slow
@pytest.mark.full
@every(shapes=("square",), kinds=("nf4",), first=True)
def test_compiled_equals_eager_over_nf4(
    name: str, variant: Variant, shape: tuple[int, int], kind: str
) -> None:
    compare_compiled(name, variant, shape, kind)


@pytest.mark.parametrize(
    ("name", "variant"),
    [pytest.param(n, v, id=f"{n}-{i}") for n in ("goft", "qgoft", "surm")
     for i, v in enumerate(VARIANTS[n]) if v.fits(16, 11008) and v.affine],
)  # fmt: skip
def test_width_of_11008_forward(name: str, variant: Variant) -> None:
    net = adapted(name, variant, base_layer("plain", (16, 11008), bias=False))
    scatter(net, 0.1)
    layer, x = net[0], random(3, 11008)
    p = {k: v.detach().double() for k, v in layer.adapter.named_parameters()}
    if name == "surm":
        want = references.apply(name, p, stored(layer), None, layer.adapter.config, x.double())
    else:
        rotated = references.rotate(x.double(), references.givens_blocks(p["p"]))
        want = (rotated * (1 + p.get("scale", torch.zeros(())))) @ stored(layer).T
    assert sum(v.numel() for v in p.values()) == variant.count(16, 11008)
    assert (net(x) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("norm", [nn.LayerNorm(24), nn.RMSNorm(24)], ids=["layer", "rms"])
def test_trained_norm(norm: nn.Module) -> None:
    """Hadamard's norm: the layer's own at the start, then its weight and bias moved."""
    net = nn.Sequential(OrderedDict(proj=nn.Linear(24, 24), norm=copy.deepcopy(norm)))
    plain = copy.deepcopy(net)
    settings = {"name": "hadamard", "target_modules": ["proj"], "norm": "norm"}
    scalepeft.inject(net, settings)
    x, dy = random(5, 24), random(5, 24, seed=5)
    assert torch.equal(net.norm(x), plain.norm(x))
    scatter(net)
    scale, shift = (
        None if p is None else p.detach().clone().requires_grad_()
        for p in (net.norm.adapter.scale, net.norm.adapter.shift)
    )
    want = plain.norm(x).detach() * (1 + scale) + (0 if shift is None else shift)
    assert (net.norm(x) - want).abs().max() <= 1e-6
    want.backward(dy)
    net.norm(x).backward(dy)
    assert (net.norm.adapter.scale.grad - scale.grad).abs().max() <= 1e-5
    assert (shift is None) == (getattr(norm, "bias", None) is None)
    if shift is not None:
        assert (net.norm.adapter.shift.grad - shift.grad).abs().max() <= 1e-5


REFUSALS = [
    pytest.param(name, variant.settings, SHAPES[shape], variant.refusal, id=f"{name}-{shape}")
    for name, variants in VARIANTS.items()
    for variant in variants
    for shape in SHAPES
    if not variant.fits(*SHAPES[shape])
] + [
    pytest.param(*case, id=f"{case[0]}-{i}")
    for i, case in enumerate(
        [
            *(
                (n, {"rank": 5}, (64, 64), "rank=5: .*must be even; take 4 or 6")
                for n in ("hoft", "shoft", "hra")
            ),
            *(
                (n, {"rank": 130}, (64, 64), "rank=130: a side of 64 .*room for rank 128 at most")
                for n in ("hoft", "shoft", "hra")
            ),
            ("hoft", {"rank": 40}, (16, 64), "rank=40: a side of 16 .*room for rank 32 at most"),
            ("goft", {}, (8, 1), "rotates pairs of input channels"),
            ("boft", {"block_size": 3, "factors": 2}, (8, 12), "block_size=3: needs an even"),
            ("boft", {"block_size": 5, "factors": 1}, (8, 12), "block_size=5 does not divide"),
            ("oftv2", {"block_size": 5}, (8, 12), "block_size=5 .*12 inputs; take one of .*4, 6"),
            ("hut", {"rank": 3}, (6, 8), "rank=3: .*does not divide a layer of 6 x 8; take"),
            (
                "surm",
                {"structure": "circulant"},
                (9, 16),
                "structure=circulant: .*9 x 16 has no common divisor.*take structure: kronecker",
            ),
            (
                "surm",
                {"structure": "kronecker", "factors": [5, 4]},
                (9, 16),
                r"factors=\[5, 4\]: must divide the layer's 9 x 16; take \[3, 4\]",
            ),
        ]
    )
]


@pytest.mark.parametrize(("name", "settings", "shape", "message"), REFUSALS)
def test_a_shape_that_cannot_be_is_refused_in_one_line(
    name: str, settings: dict[str, Any], shape: tuple[int, int], message: str
) -> None:
    assert message, "the variant needs the refusal it is refused with"
    with pytest.raises(UserError, match=message) as caught:
        scalepeft.adapt(nn.Linear(shape[1], shape[0]), name, **settings)
    assert "\n" not in str(caught.value)


def test_nf4_refuses_a_width_that_64_does_not_divide() -> None:
    with pytest.raises(UserError, match="172 is not a multiple of 64"):
        quant.quantize(nn.Linear(172, 64), quant.get_format("nf4"))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_fsdp2_ranks_give_the_gradients_of_one_process() -> None:
    """One launch for all methods; the program is fsdp2_methods.py."""
    program = str(Path(__file__).with_name("fsdp2_methods.py"))
    codes, text = Job(2, [], program=(program,)).wait(timeout=100)
    assert codes == [0, 0], text
    for name, variants in VARIANTS.items():
        for i in range(len(variants)):
            assert text.count(f"ok {name} {i}\n") == 2, f"{name} {i} was not run\n{text}"


@pytest.mark.parametrize("name", ["ia3", "hut", "hadamard", "shoft", "dora", "boft", "goft"])
def test_a_small_scale_acts_in_bf16(name: str) -> None:
    """1 + scale in bf16 would move in steps of 0.8 %; on average the result must be right."""
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    scalepeft.adapt(layer, name, **({"scale": True} if name == "goft" else {}))
    x = random(2000, 64, dtype=torch.bfloat16)
    before = layer(x).float()
    for size in (0.003, 0.006):
        with torch.no_grad():
            for key, p in layer.adapter.named_parameters():
                if key in ("scale", "magnitude", "a"):
                    p.fill_(size)
        change = ((layer(x).float() - before) * before).sum() / before.square().sum()
        assert 0.8 * size < change < 1.2 * size


def test_a_loaded_adapter_follows_its_model_into_evaluation() -> None:
    layer = nn.Linear(16, 16).eval()
    assert not scalepeft.adapt(layer, "lora", rank=2, dropout=0.5).adapter.training


def test_a_norm_or_a_target_outside_the_blocks_is_refused() -> None:
    def net() -> nn.Module:
        block = nn.ModuleDict({"o_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        blocks = nn.ModuleList([block])
        return nn.ModuleDict({"layers": blocks, "last": nn.LayerNorm(8), "head": nn.Linear(8, 8)})

    with pytest.raises(UserError, match=r"adapter.norm: last is in none of the adapted blocks"):
        scalepeft.inject(net(), {"name": "hadamard", "norm": "last"})
    targets = {"target_modules": ["o_proj", "head"], "layers": [0]}
    with pytest.raises(UserError, match=r"head lies in no decoder block"):
        scalepeft.inject(net(), {"name": "lora", "rank": 2, **targets})
    with pytest.raises(UserError, match=r"layers=\[4\]: no block 4; the targets have 0 to 0"):
        scalepeft.inject(net(), {"name": "hadamard", "norm": "norm", "layers": [4]})
    found = injection.trainable(scalepeft.inject(net(), {"name": "hadamard", "norm": "norm"}))
    assert sum(p.numel() for p in found.values()) == 4 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ia3", "feedforward_modules": "typo"}, "'typo' is none of the target_modules"),
        ({"name": "surm", "structure": "ldr", "factors": [3, 5]}, "need structure: kronecker"),
        ({"name": "surm", "ldr_rank": 9}, "ldr_rank=9 needs structure: ldr"),
        (
            {"name": "shoft", "inverse": "neumann2", "form": "mean_difference"},
            "^adapter.form=mean_difference: inverse=neumann2 .*=exact, or adapter.form=pairs",
        ),
        ({"name": "hra", "form": "cayley"}, "^adapter.form='cayley': .*'mean_difference'$"),
        ({"name": "hoft", "layers": "1,x"}, "'1,x': expected 'all', or numbers of decoder blocks"),
    ],
)
def test_settings_that_could_not_take_effect_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        inject.adapter_config(settings)
