"""Storage formats: bytes of a row, error bounds, products, and a self-check that finds mistakes."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from scalepeft.core.errors import UserError
from scalepeft.models import quant

FORMATS = [quant.NF4(), quant.NF4(double=True), quant.Int8()]


by_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def weight(out: int = 24, width: int = 192) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(-3, 1, out)[:, None]  # rows of very different size
    return torch.randn(out, width, generator=generator) * spread


def decoded(w: torch.Tensor, fmt: quant.Format) -> torch.Tensor:
    return fmt.decode(*fmt.encode(w), w.shape[1], torch.float32)


def layer_of(w: torch.Tensor, fmt: quant.Format, bias: bool = False) -> quant.QuantLinear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(w)
    layer.requires_grad_(False)
    quant.quantize(layer, fmt)
    return layer


@by_format
@pytest.mark.parametrize("width", [64, 192, 64 * 300])
def test_rows_are_independent_and_as_wide_as_announced(fmt: quant.Format, width: int) -> None:
    w = weight(8, width)
    packed, scale = fmt.encode(w)
    assert packed.dtype == scale.dtype == torch.uint8
    assert ((8, fmt.row_bytes(width)[0]), (8, fmt.row_bytes(width)[1])) == (
        packed.shape,
        scale.shape,
    )
    for part in (slice(0, 4), slice(4, 8), slice(5, 6)):
        some_packed, some_scale = fmt.encode(w[part])
        assert torch.equal(some_packed, packed[part])
        assert torch.equal(some_scale, scale[part])
        got = fmt.decode(packed[part], scale[part], width, torch.float32)
        assert torch.equal(got, decoded(w, fmt)[part])
        one_by_one = [fmt.encode(w[i : i + 1]) for i in range(8)]
        assert torch.equal(torch.cat([scale for _, scale in one_by_one]), scale)
    shuffled = torch.randperm(8)
    assert torch.equal(fmt.encode(w[shuffled])[0], packed[shuffled])


def by_bucketize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule in words of torch: codes and absmax of blocks, as bytes."""
    values = torch.tensor(quant.NF4_VALUES)
    blocks = rows.float().view(-1, quant.BLOCK)
    absmax = blocks.abs().max(1)[0]
    unit = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    code = torch.bucketize(unit, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    packed, scale = code[:, ::2] * 16 + code[:, 1::2], absmax.view(-1, 1).view(torch.uint8)
    return packed.view(len(rows), -1), scale.reshape(len(rows), -1)


def edges(dtype: torch.dtype) -> torch.Tensor:
    """Rows (n, 128) of NF4's midpoints and their neighbours, of +-0, denormals, inf and NaN."""
    values = torch.tensor(quant.NF4_VALUES, dtype=dtype)
    middle = (torch.tensor(quant.NF4_VALUES[1:]) + torch.tensor(quant.NF4_VALUES[:-1])) / 2
    near = [middle.to(dtype), values]
    for toward in (-2.0, 2.0):
        near += [torch.nextafter(part, torch.full_like(part, toward)) for part in near[:2]]
    info = torch.finfo(dtype)
    tiny = torch.tensor(
        [0.0, -0.0, info.smallest_normal, -info.tiny / 4, info.tiny / 2], dtype=dtype
    )
    unit = torch.cat([*near, tiny])
    unit = torch.cat([torch.ones(1, dtype=dtype), unit, unit[: 127 - len(unit)]])  # absmax 1
    scales = [1.0, -1.0, 0.3, 3e-5, 0.0, info.tiny, info.tiny / 64, info.max]
    rows = [unit * s for s in scales] + [unit.flip(0)]
    for bad in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        rows.append(unit.clone())
        rows[-1][70] = bad
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nf4_bytes_are_those_of_bucketize_and_bitsandbytes(dtype: torch.dtype) -> None:
    some = weight(70, 64 * 90).to(dtype)  # blocks beyond one chunk, and not a multiple
    assert some.numel() // quant.BLOCK > quant.CHUNK
    for rows in (edges(dtype), some, some[:, : 64 * 5], some.T[: 64 * 2, :64]):
        got = quant.NF4().encode(rows)
        want = by_bucketize(rows.contiguous())
        packed, absmax = quant._kernels().quantize_4bit(rows.contiguous(), 64, "nf4", torch.uint8)
        theirs = (packed.view_as(got[0]), absmax.view(len(rows), -1).view(torch.uint8))
        for ours, *others in zip(got, want, theirs, strict=True):
            assert all(torch.equal(ours, other) for other in others)
    codes = quant.NF4().encode(edges(dtype))[0]
    assert {*(codes >> 4).unique().tolist()} == set(range(16))


def test_bits_a_weight() -> None:
    bits = [8 * sum(f.row_bytes(64 * 256)) / (64 * 256) for f in FORMATS]
    assert bits == pytest.approx([4.5, 4.13, 8.002], abs=5e-3)


def test_int8_error_is_half_a_step() -> None:
    w = weight()
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((decoded(w, quant.Int8()) - w).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("double", [False, True])
def test_nf4_error_is_half_the_gap_between_its_values(double: bool) -> None:
    w = weight()
    blocks = w.view(w.shape[0], -1, quant.BLOCK)
    absmax = blocks.abs().amax(2)
    values = torch.tensor(quant.NF4_VALUES)
    bound = absmax[:, :, None] * values.diff().max() / 2
    if double:  # absmax itself is off by half of 1/255 of its range in the row
        bound = bound + ((absmax.amax(1) - absmax.amin(1)) / 255 / 2)[:, None, None] * 1.001
    error = (decoded(w, quant.NF4(double)).view_as(blocks) - blocks).abs()
    assert (error <= bound * 1.0001).all()


def test_double_quantized_scales_are_off_by_half_a_step_at_most() -> None:
    absmax = torch.rand(6, 300, generator=torch.Generator().manual_seed(5)) + 0.1
    w = absmax.repeat_interleave(quant.BLOCK, dim=1)  # every weight is its block's absmax
    step = torch.cat(
        [
            ((g.amax(1, keepdim=True) - g.amin(1, keepdim=True)) / 255).expand_as(g)
            for g in absmax.split(quant.GROUP, dim=1)
        ],
        dim=1,
    )
    error = (decoded(w, quant.NF4(double=True))[:, :: quant.BLOCK] - absmax).abs()
    assert (error <= 0.5001 * step).all()
    assert error.max() > 0


def test_nf4_takes_the_nearest_value() -> None:
    w = weight(16, 64)
    unit = w / w.abs().amax(1, keepdim=True)
    values = torch.tensor(quant.NF4_VALUES)
    nearest = (unit[:, :, None] - values).abs().min(2).values
    got = (decoded(w, quant.NF4()) / w.abs().amax(1, keepdim=True) - unit).abs()
    assert torch.allclose(got, nearest, atol=1e-6)


@by_format
def test_a_row_of_zeros_stays_zero_and_no_rows_stay_none(fmt: quant.Format) -> None:
    w = weight()
    w[3] = 0
    assert torch.equal(decoded(w, fmt)[3], torch.zeros(192))
    assert decoded(w, fmt).isfinite().all()
    packed, scale = fmt.encode(w[:0])
    assert ((0, fmt.row_bytes(192)[0]), (0, fmt.row_bytes(192)[1])) == (packed.shape, scale.shape)
    assert fmt.decode(packed, scale, 192, torch.bfloat16).shape == (0, 192)


@by_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_and_input_gradient_are_those_of_the_decoded_weight(
    fmt: quant.Format, dtype: torch.dtype
) -> None:
    w = weight()
    layer = layer_of(w, fmt, bias=True)
    layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    plain = fmt.decode(layer.weight, layer.weight_scale, 192, dtype)
    results = []
    for compute in (layer, lambda x: x @ plain.T + layer.bias):
        x = torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        y = compute(x)
        assert y.dtype == dtype
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@by_format
def test_nothing_weight_sized_is_saved_for_backward(fmt: quant.Format) -> None:
    layer = layer_of(weight(512, 512), fmt)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved = 0

    def count(t: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        if t.untyped_storage().data_ptr() not in own:
            saved += t.untyped_storage().nbytes()
        return t

    x = torch.randn(2, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = layer(x * 1.0).square().sum()
    assert 0 < saved < 4 * x.nbytes  # of the squares and x; W has 1 MiB in fp32
    y.backward()
    assert x.grad is not None


@by_format
def test_quantized_parameters_are_frozen_bytes_also_on_meta(fmt: quant.Format) -> None:
    real = layer_of(weight(), fmt)
    meta = nn.Linear(192, 24, bias=False, device="meta")
    quant.quantize(meta, fmt)
    for layer in (real, meta):
        assert [n for n, _ in layer.named_parameters()] == ["weight", "weight_scale"]
        assert all(p.dtype == torch.uint8 and not p.requires_grad for p in layer.parameters())
    assert [p.shape for p in real.parameters()] == [p.shape for p in meta.parameters()]


def test_a_width_that_nf4_blocks_do_not_divide_is_refused() -> None:
    for double in (False, True):
        layer = nn.Linear(172, 64)
        with pytest.raises(UserError, match=r"64 x 172 cannot be nf4: its width 172 .* of 64"):
            quant.quantize(layer, quant.NF4(double))
        assert type(layer) is nn.Linear
    assert quant.Int8().refuses(172) is None
    quant.quantize(nn.Linear(172, 64), quant.Int8())


def test_names_of_formats() -> None:
    assert quant.get_format("none") is None
    assert quant.get_format("nf4", True) == quant.NF4(double=True)
    with pytest.raises(UserError, match=r"no quantization .* 'nf3'. Did you mean 'nf4'"):
        quant.get_format("nf3")
    with pytest.raises(UserError, match=r"double_quant=true needs .*nf4, not 'int8'"):
        quant.get_format("int8", True)


@by_format
def test_the_self_check_passes_here(fmt: quant.Format) -> None:
    quant.self_check(torch.device("cpu"), fmt)


@dataclass(frozen=True)
class SwappedNibbles(quant.NF4):
    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scale = super().encode(rows)
        return packed << 4 | packed >> 4, scale


@dataclass(frozen=True)
class WrongScale(quant.NF4):
    def decode(
        self, weight: torch.Tensor, scale: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().decode(weight, scale, in_features, dtype) * 1.001


@dataclass(frozen=True)
class WrongInBf16(quant.Int8):
    def decode(
        self, weight: torch.Tensor, scale: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        rows = super().decode(weight, scale, in_features, dtype)
        return rows.flip(0) if dtype == torch.bfloat16 else rows


@pytest.mark.parametrize(
    ("fmt", "what"),
    [
        (SwappedNibbles(), "wrong bytes"),
        (WrongScale(), "values differ"),
        (WrongInBf16(), r"the torch\.bfloat16 product is wrong"),
    ],
)
def test_the_self_check_finds_a_broken_format(fmt: quant.Format, what: str) -> None:
    with pytest.raises(RuntimeError, match=what):
        quant.self_check(torch.device("cpu"), fmt)
    with pytest.raises(RuntimeError, match=what):
        quant.quantize(nn.Linear(128, 8), fmt)
