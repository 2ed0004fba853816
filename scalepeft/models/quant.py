"""How a frozen weight is stored: plain, NF4 or int8. The only file that imports bitsandbytes.

A quantized layer keeps two frozen uint8 parameters, ``weight`` and ``weight_scale``. Each row of
both belongs to the same row of W (out, in) and to no other, so a rank reads, quantizes and holds
just its own rows.
"""

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.core import kernels
from scalepeft.core.errors import UserError, unknown

BLOCK = 64  # weights that share one NF4 scale, as in QLoRA
CHUNK = 4096  # NF4 blocks at a time on a CPU: what 15 comparisons read lies in the cache
GROUP = 256  # NF4 scales that share one range under double quantization
# The 16 quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def _kernels() -> Any:
    """bitsandbytes' operators, without its notice, nor the inductor that it would load."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, torch_compile = log.level, torch.compile
    log.setLevel(logging.ERROR)
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"model.quant=nf4 needs bitsandbytes ({error}); pip install 'scalepeft[quant]', or take"
            " model.quant=int8"
        ) from error
    finally:
        log.setLevel(level)
        torch.compile = torch_compile
    return torch.ops.bitsandbytes


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _floats(x: Tensor) -> Tensor:
    """Bytes (n, 4 m) -> fp32 (n, m); a slice may begin at any byte, and one row have any stride."""
    flat = x.reshape(-1)
    if flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(torch.float32).view(x.shape[0], x.shape[1] // 4)


def _nf4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (n, 64) -> codes (n, 32), two a byte, and absmax (n,); a tie takes the lower code."""
    blocks = blocks.float()
    absmax = blocks.abs().amax(1)
    unit = (blocks * (1 / absmax.clamp_min(1e-38))[:, None]).clamp_(-1, 1)
    values = torch.tensor(NF4_VALUES)
    code = torch.full_like(unit, 15, dtype=torch.uint8)
    for middle in ((values[1:] + values[:-1]) / 2).tolist():
        code -= (unit <= middle).view(torch.uint8)  # NaN is at most nothing: 15, as bucketize says
    return code[:, ::2] << 4 | code[:, 1::2], absmax


@dataclass(frozen=True)
class NF4:
    """4-bit normal float (arXiv 2305.14314): ``w ~ absmax * NF4_VALUES[code]``, absmax of 64.

    ``weight``: two codes a byte, the first in the high half. ``weight_scale``: absmax in fp32 (4.5
    bit a weight), or with ``double`` one byte each as ``low + byte * step`` with low and step in
    fp32 for at most 256 scales of the same row (4.13 bit). bitsandbytes' own double quantization
    takes one mean over the whole tensor, which no rank that holds a part of it could reproduce.
    """

    name: ClassVar[str] = "nf4"
    double: bool = False

    def refuses(self, in_features: int) -> str | None:
        """Says why a layer of this width cannot be stored so, or None: blocks lie inside rows."""
        if in_features % BLOCK:
            return f"its width {in_features} is not a multiple of {BLOCK}"
        return None

    def row_bytes(self, in_features: int) -> tuple[int, int]:
        """Bytes of one row in ``weight``, half a byte a number, and in ``weight_scale``."""
        blocks = in_features // BLOCK
        scales = blocks + 8 * -(-blocks // GROUP) if self.double else 4 * blocks
        return in_features // 2, scales

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes as bitsandbytes' kernel, to the bit; on a CPU that one is ``bucketize``."""
        n, in_features = rows.shape
        if rows.device.type == "cpu" or n == 0:
            parts = [_nf4(part) for part in rows.reshape(-1, BLOCK).split(CHUNK)]
            packed, absmax = (torch.cat(part) for part in zip(*parts, strict=True))
        else:
            packed, absmax = _kernels().quantize_4bit(rows.contiguous(), BLOCK, "nf4", torch.uint8)
        scales = self.pack_scales(absmax.view(n, in_features // BLOCK))
        return packed.view(n, in_features // 2), scales

    def pack_scales(self, absmax: Tensor) -> Tensor:
        """Scales (n, blocks) in fp32 -> their bytes (n, ...)."""
        if not self.double:
            return _bytes(absmax)
        parts = []
        for group in absmax.split(GROUP, dim=1):
            low = group.amin(1, keepdim=True)
            step = ((group.amax(1, keepdim=True) - low) / 255).clamp_min(1e-30)
            code = ((group - low) / step).round().to(torch.uint8)
            parts += [_bytes(low), _bytes(step), code]
        return torch.cat(parts, dim=1)

    def decode(self, weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """Dequantizes, in one launch where that can be."""
        if decode := kernels.find("decode", weight, _compare, self, dtype):
            return decode(weight, scale, in_features, dtype, self.double, NF4_VALUES)
        return self.plain(weight, scale, in_features, dtype)

    def plain(self, weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``decode`` with bitsandbytes' kernel (fp64 by way of fp32)."""
        n = weight.shape[0]
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        rows = _kernels().dequantize_4bit(
            weight.reshape(-1, 1), self._absmax(scale, in_features).reshape(-1), BLOCK, "nf4",
            [n, in_features], kernel_dtype,
        )  # fmt: skip
        return rows.to(dtype)

    def _absmax(self, scale: Tensor, in_features: int) -> Tensor:
        if not self.double:
            return _floats(scale)
        blocks, parts = in_features // BLOCK, []
        sizes = [min(GROUP, blocks - i) for i in range(0, blocks, GROUP)]
        for group, size in zip(scale.split([8 + s for s in sizes], dim=1), sizes, strict=True):
            low, step, code = group.split([4, 4, size], dim=1)
            parts.append(_floats(low) + code.float() * _floats(step))
        return torch.cat(parts, dim=1)


def _compare(decode: Any, device: torch.device, fmt: NF4, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the kernel and the plain form make of every code, in rows of more than one group."""
    blocks = GROUP + 3
    absmax = torch.arange(3 * blocks, device=device).view(3, blocks).float().cos().abs()
    weight = (torch.arange(3 * blocks * 32, device=device) * 7).to(torch.uint8).view(3, -1)
    args = weight, fmt.pack_scales(absmax), blocks * BLOCK, dtype
    return decode(*args, fmt.double, NF4_VALUES), fmt.plain(*args)


@dataclass(frozen=True)
class Int8:
    """``w ~ scale * code``, code in -127..127, one fp32 scale a row; products in the dtype of x."""

    name: ClassVar[str] = "int8"

    def refuses(self, in_features: int) -> None:
        """None: a row of any width can be stored so."""

    def row_bytes(self, in_features: int) -> tuple[int, int]:
        """One byte a weight, one fp32 a row."""
        return in_features, 4

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds to the nearest code."""
        scale = (rows.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        code = (rows.float() / scale).round().to(torch.int8)
        return _bytes(code), _bytes(scale)

    def decode(self, weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """Multiplies in fp32, rounds once to ``dtype``."""
        return (weight.view(torch.int8).float() * _floats(scale)).to(dtype)


Format = NF4 | Int8
"""A storage format: rows of W (n, in) <-> bytes ``weight`` and ``weight_scale``, (n, ...)."""


def get_format(name: str, double: bool = False) -> Format | None:
    """The format of ``model.quant``; None for ``none``. Raises UserError: unknown, or no double."""
    if double and name != "nf4":
        raise UserError(f"model.double_quant=true needs model.quant=nf4, not {name!r}")
    formats = {"none": None, "nf4": NF4(double), "int8": Int8()}
    if name not in formats:
        raise unknown("quantization (model.quant)", name, formats)
    return formats[name]


@torch.library.custom_op("scalepeft::decode", mutates_args=())
def _opaque(
    weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype, name: str, double: bool
) -> Tensor:
    fmt = get_format(name, double)
    assert fmt is not None
    return fmt.decode(weight, scale, in_features, dtype)


@_opaque.register_fake
def _(weight: Tensor, _: Tensor, in_features: int, dtype: torch.dtype, *__: Any) -> Tensor:
    return weight.new_empty(len(weight), in_features, dtype=dtype)


def _decode(
    fmt: Format, weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """``fmt.decode``, which torch.compile leaves as it is: it cannot view bytes as floats."""
    if torch.compiler.is_compiling():
        double = isinstance(fmt, NF4) and fmt.double
        return _opaque(weight, scale, in_features, dtype, fmt.name, double)
    return fmt.decode(weight, scale, in_features, dtype)


class _QuantMatMul(torch.autograd.Function):
    """``x W^T``, W dequantized in forward and again in backward: no tensor of its size is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, fmt: Format) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.fmt, ctx.in_features = fmt, x.shape[-1]
        return F.linear(x, _decode(fmt, weight, scale, x.shape[-1], x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        w = _decode(ctx.fmt, weight, scale, ctx.in_features, grad.dtype)
        return grad @ w, None, None, None


class QuantLinear(nn.Linear):
    """A frozen ``nn.Linear`` whose W (out, in) is stored as bytes; only ``quantize`` makes one."""

    fmt: Format
    weight_scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """``W x + b`` with W dequantized for the call."""
        y = matmul(self, x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Adds the format to the printed layer."""
        return f"{super().extra_repr()}, {self.fmt}"


def quantize(layer: nn.Linear, fmt: Format) -> None:
    """Swaps a plain layer to ``QuantLinear`` in place; on the meta device only shapes change."""
    if reason := fmt.refuses(layer.in_features):
        shape = f"{layer.out_features} x {layer.in_features}"
        raise UserError(f"a layer of {shape} cannot be {fmt.name}: {reason}")
    if layer.weight.is_meta:
        weight, scale = (
            torch.empty(len(layer.weight), width, dtype=torch.uint8, device="meta")
            for width in fmt.row_bytes(layer.in_features)
        )
    else:
        self_check(layer.weight.device, fmt)
        weight, scale = fmt.encode(layer.weight.detach())
    layer.__class__ = getattr(layer, "Quantized", QuantLinear)  # experts have their own
    assert isinstance(layer, QuantLinear)
    layer.fmt = fmt
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)


def bnb_linear(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' own NF4 layer of a plain one, for comparisons: in eval mode its forward would
    repack the weight for good on CPUs with avx512_bf16, which is switched off.
    """
    _kernels()
    bnb = importlib.import_module("bitsandbytes")
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta",
        compute_dtype=layer.weight.dtype, compress_statistics=False, quant_type="nf4",
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(
        layer.weight.detach().clone(), compress_statistics=False, quant_type="nf4", module=made
    )
    made.bias = layer.bias
    made.support_avx512bf16_for_cpu = False
    return made.to(layer.weight.device)


def matmul(layer: nn.Linear, x: Tensor) -> Tensor:
    """``W x`` (..., out) in the dtype of x without the bias, however W is stored."""
    if isinstance(layer, QuantLinear):
        return _QuantMatMul.apply(x, layer.weight, layer.weight_scale, layer.fmt)
    return F.linear(x, layer.weight.to(x.dtype))


class Frozen:
    """The black box of an adapter: a frozen layer, or rows of one, without its bias."""

    trained = False

    def __init__(self, layer: nn.Linear, rows: slice = slice(None)) -> None:
        self._layer, self._rows = layer, rows

    def __call__(self, x: Tensor) -> Tensor:
        """``W x`` (..., out) in the dtype of x."""
        return matmul(self._layer, x)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), for the backward of a fused method alone: made now, not to be kept."""
        layer, rows = self._layer, self._rows
        if isinstance(layer, QuantLinear):
            weight, scale = layer.weight[rows], layer.weight_scale[rows]
            return _decode(layer.fmt, weight, scale, layer.in_features, dtype)
        return layer.weight.detach()[rows].to(dtype)


@cache
def self_check(device: torch.device, fmt: Format) -> None:
    """Compares the device's kernels, once a process, with known bytes and an fp32 product: code
    values times powers of two, which decode exactly. Raises RuntimeError: a broken kernel or build.
    """
    n, in_features = 8, 2 * BLOCK
    index = torch.arange(n * in_features).view(n, in_features) * 7
    row_scale = 2.0 ** -(torch.arange(n).float()[:, None] % 4)
    if isinstance(fmt, NF4):
        code = index % 16
        w = torch.tensor(NF4_VALUES)[code] * row_scale
        expected = (code[:, ::2] * 16 + code[:, 1::2]).to(torch.uint8)
    else:
        code = index % 255 - 127
        code[:, 0] = 127
        w = code.float() * row_scale
        expected = code.to(torch.int8).view(torch.uint8)
    weight, scale = fmt.encode(w.to(device))
    where = f"quantization self-check of {fmt} on {device} (torch {torch.__version__}) failed"
    if not torch.equal(weight.cpu(), expected):
        raise RuntimeError(f"{where}: wrong bytes. Update bitsandbytes, or change model.quant")
    decoded = fmt.decode(weight, scale, in_features, torch.float32)
    if not torch.allclose(decoded.cpu(), w, rtol=1e-6, atol=0):
        raise RuntimeError(f"{where}: dequantized values differ. Update bitsandbytes")
    x = torch.sin(torch.arange(4 * in_features).float()).view(4, in_features).to(device)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        y = _QuantMatMul.apply(x.to(dtype), weight, scale, fmt)
        want = x @ w.to(device).T
        if (y.float() - want).abs().max() > tolerance * want.abs().max():
            raise RuntimeError(f"{where}: the {dtype} product is wrong. Update torch")
