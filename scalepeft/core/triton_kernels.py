"""Triton kernels, each to the bit what the plain form of its caller gives; see ``core.kernels``."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _fp32(at, inside):
    bits = tl.load(at, inside, 0).to(tl.int32)  # four bytes, which may begin anywhere
    for i in tl.static_range(1, 4):
        bits |= tl.load(at + i, inside, 0).to(tl.int32) << (8 * i)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _decode(weight, scale, values, rows, blocks, width, DOUBLE: tl.constexpr, TILE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = block < blocks
    if DOUBLE:  # a row of groups: low, step, up to 256 codes
        at = block % width
        group = scale + block // width * (width + 8 * ((width + 255) // 256)) + at // 256 * 264
        code = tl.load(group + 8 + at % 256, inside, 0).to(tl.float32)
        absmax = _fp32(group, inside) + code * _fp32(group + 4, inside)
    else:
        absmax = _fp32(scale + 4 * block, inside)
    byte = tl.load(weight + block[:, None] * 32 + tl.arange(0, 32), inside[:, None], 0).to(tl.int32)
    value = tl.interleave(tl.load(values + (byte >> 4)), tl.load(values + (byte & 15)))
    out = rows + block[:, None] * 64 + tl.arange(0, 64)
    tl.store(out, (value * absmax[:, None]).to(rows.dtype.element_ty), inside[:, None])


@cache
def _on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, device=device)


def decode(
    weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype, double: bool,
    values: tuple[float, ...],
) -> Tensor:  # fmt: skip
    """``NF4.decode`` in one launch: bytes of rows -> (n, in) in ``dtype``."""
    rows = torch.empty(len(weight), in_features, dtype=dtype, device=weight.device)
    blocks, tile = rows.numel() // 64, 32
    with torch.cuda.device_of(weight):
        _decode[(triton.cdiv(blocks, tile),)](
            weight.contiguous(), scale.contiguous(), _on(weight.device, values), rows, blocks,
            in_features // 64, DOUBLE=double, TILE=tile, enable_fp_fusion=False,
        )  # fmt: skip
    return rows


@triton.jit
def _mix(n):
    n = n * -0x61C8864680B583EB
    n = (n ^ ((n >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    n = (n ^ ((n >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return n ^ ((n >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["tokens", "length", "salt"])
def _drop(
    x, y, keys, positions, tokens, length, features, salt, least, factor,
    KEYED: tl.constexpr, PLACED: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = token < tokens
    key = tl.load(keys + (token if KEYED else token // length), inside, 0)
    position = tl.load(positions + token, inside, 0) if PLACED else token % length
    row = _mix(_mix(key + salt) + position).to(tl.int32)
    bits = row[:, None] ^ _mix(feature.to(tl.int64) - salt).to(tl.int32)[None, :]
    bits *= 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * -0x7B935975
    bits ^= (bits >> 16) & 0xFFFF
    at = token[:, None].to(tl.int64) * features + feature[None, :]
    there = inside[:, None] & (feature < features)[None, :]
    kept = tl.load(x + at, there, 0).to(tl.float32) * factor
    tl.store(y + at, tl.where(bits < least, 0.0, kept).to(y.dtype.element_ty), there)


def drop(x: Tensor, keys: Tensor, positions: Tensor | None, salt: Tensor, p: float) -> Tensor:
    """``adapters.base.drop`` in one launch, of x in at most fp32."""
    features, lines = x.shape[-1], len(keys)
    tokens = x.numel() // features
    length = tokens // lines
    x = x.contiguous()
    y = torch.empty_like(x)
    placed = keys if positions is None else positions.expand(lines, length).contiguous()
    with torch.cuda.device_of(x):
        _drop[(triton.cdiv(tokens, 32), triton.cdiv(features, 256))](
            x, y, keys.contiguous(), placed, tokens, length, features, int(salt),
            round(p * 2**32) - 2**31, 1 / (1 - p),
            KEYED=keys.dim() == 2, PLACED=positions is not None, TOKENS=32, FEATURES=256,
        )  # fmt: skip
    return y
