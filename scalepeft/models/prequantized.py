"""Pre-quantized bases: a file's packed tensors read as floats, under the plain weight's name.

What a library stores beside a weight (scales, zero points, tables) is folded into it, by rows, in
that library's arithmetic. A method that is not here is refused by its name.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.models.sources import Source

Sources = dict[str, Source]
Bytes = tuple[Tensor, Tensor]
Made = Iterator[tuple[str, "_Folded"]]
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALED = ("{0}_scale_inv", "{0}_scale", "{1}.scale", "{1}.qscale_weight")
"""Names of the scale of a weight {0} of module {1}."""
ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act", ".output_scale")
"""Of activations at inference, which are not rounded here; transformers drops them too."""
PARTS = (
    ".absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed",
    ".weight_shape", ".weight_zero_point", ".weight_global_scale", ".weight_g_idx", "_blocks",
)  # fmt: skip
AWQ_SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])
"""Bits at which 8 neighboring columns lie in an int32 of AWQ's gemm order."""


class _Folded(Source):
    """A quantized weight of the files as floats; ``encoded``: the file's own bytes, where they are
    those of a format of ours.
    """

    def __init__(
        self, where: str, shape: Any, rows: Any, encoded: Any = None,
        dtype: torch.dtype = torch.float32, by_rows: bool = True,
    ) -> None:  # fmt: skip
        self.where, self.shape, self.dtype, self.by_rows = where, tuple(shape), dtype, by_rows
        self._rows, self._encoded = rows, encoded or (lambda fmt, first, last: None)

    def rows(self, first: int, last: int) -> Tensor:
        rows: Tensor = self._rows(first, last)
        return rows

    def encoded(self, fmt: quant.Format, first: int, last: int) -> Bytes | None:
        found: Bytes | None = self._encoded(fmt, first, last)
        return found


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of a config.json or of its text part; empty without one.

    Raises:
        UserError: it names no method.
    """
    text = config.get("text_config") or {}
    found = config.get("quantization_config") or text.get("quantization_config") or {}
    if not isinstance(found, dict) or (found and not isinstance(_method(found), str)):
        raise UserError(f"config.json: quantization_config={found!r} names no quant_method;"
                        " restore config.json")  # fmt: skip
    return found


def _method(settings: dict[str, Any]) -> Any:
    loads = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # of older files
    return settings.get("quant_method") or ("bitsandbytes" if loads else None)


def keeps(settings: dict[str, Any]) -> Callable[[str], bool]:
    """Says of a module's name whether it stays plain over this base, as in stock transformers: what
    bitsandbytes was told to skip.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = settings.get("llm_int8_skip_modules") or []
    return lambda name: not should_convert_module(name, skipped)


def read(settings: dict[str, Any], entries: Sources) -> Sources:
    """Folds the tensors of the files that belong to a quantized weight into that weight.

    Args:
        settings: as ``settings_of`` returns them.
        entries: every tensor of the files, in whatever dtype, by name.

    Raises:
        UserError: a method or packing that is not read here, or a scale that would be ignored.
    """
    method, left = _method(settings), dict(entries)
    if settings and method not in METHODS:
        _refuse("config.json", f"quant_method={method} of the base is not read here (read are"
                f" {', '.join(METHODS)})")  # fmt: skip
    try:
        made = dict(METHODS[method](settings, left)) if settings else {}
    except UserError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        _refuse("config.json", f"quant_method={method}: the tensors are not packed as it says"
                f" ({type(error).__name__}: {error})")  # fmt: skip
    for name, source in left.items():
        scaled = {name.removesuffix(s) for s in ("_scale", "_scale_inv") if name.endswith(s)}
        packed = name.endswith("weight") and not source.dtype.is_floating_point
        if scaled & (left.keys() | made.keys()) or packed or name.endswith(PARTS) or (
            source.dtype in FLOAT8
        ):  # fmt: skip
            who = f"quant_method={method}" if settings else "config.json, without a quant_method,"
            kind = f"{str(source.dtype).removeprefix('torch.')} {list(source.shape)}"
            _refuse(source.where, f"'{name}' ({kind}) is of a quantized weight, and {who} does not"
                    " say how")  # fmt: skip
    return left | made


def _refuse(where: str, what: str) -> NoReturn:
    raise UserError(f"{where}: {what}; name the folder of the unquantized checkpoint, or of a copy"
                    " that transformers has dequantized")  # fmt: skip


def _ending(left: Sources, end: str | tuple[str, ...]) -> list[str]:
    return [name for name in left if name.endswith(end)]


def _take(left: Sources, name: str, *shape: int) -> Source:
    found = left.pop(name, None)
    if found is None:
        raise UserError(f"the base has no tensor '{name}', which a quantized weight needs; the"
                        " files are incomplete: copy them again")  # fmt: skip
    if shape and tuple(found.shape) != shape:
        raise UserError(f"{found.where}: '{name}' has shape {list(found.shape)}, its weight needs"
                        f" {list(shape)}; copy the base again")  # fmt: skip
    return found


class _Bnb4:
    """bitsandbytes' 4 bits: table[code] * absmax of its block; blocks run on over rows."""

    def __init__(self, left: Sources, name: str, state: dict[str, Any]) -> None:
        self.name, self.size, self.nf4 = name, int(state["blocksize"]), state["quant_type"] == "nf4"
        self.shape = tuple(int(n) for n in state["shape"])
        self.dtype = getattr(torch, state["dtype"])
        self.packed, count = left[name], math.prod(self.shape)
        item = self.packed.dtype.itemsize  # bnb_4bit_quant_storage may be wider than a byte
        _take(left, name, -(-count // (2 * item)), 1)
        self.absmax = _take(left, f"{name}.absmax", -(-count // self.size))
        self.table = _take(left, f"{name}.quant_map", 16).whole().float()
        self.nested: Any = None
        if "nested_offset" in state:
            parts = (_take(left, f"{name}.nested_{part}") for part in ("quant_map", "absmax"))
            offset = torch.tensor(float(state["nested_offset"]))
            self.nested = *(part.whole() for part in parts), int(state["nested_blocksize"]), offset

    def _scales(self, first: int, last: int) -> Tensor:
        """Of blocks ``first .. last``, fp32."""
        found = self.absmax.rows(first, last).float()
        if self.nested is not None:
            table, scales, size, offset = self.nested
            found = table[found.int()] * scales[torch.arange(first, last) // size] + offset
        if not torch.isfinite(found).all():
            raise UserError(f"{self.absmax.where}: '{self.name}': its scales are not finite: the"
                            " base is damaged; copy it again")  # fmt: skip
        return found

    def _bytes(self, first: int, last: int) -> Tensor:
        a, b = (i * self.size // 2 // self.packed.dtype.itemsize for i in (first, last))
        return self.packed.rows(a, min(b, self.packed.shape[0])).reshape(-1).view(torch.uint8)

    def rows(self, first: int, last: int) -> Tensor:
        begin, end = (row * math.prod(self.shape[1:]) for row in (first, last))
        a, b = begin // self.size, -(-end // self.size)
        packed = self._bytes(a, b)
        codes = torch.stack([packed >> 4, packed & 15], -1).view(-1).int()
        scales = self._scales(a, b).repeat_interleave(self.size)[: len(codes)]
        values = (self.table[codes] * scales).to(self.dtype)
        return values[begin - a * self.size : end - a * self.size].view(-1, *self.shape[1:])

    def encoded(self, fmt: quant.Format, first: int, last: int) -> Bytes | None:
        same = self.nf4 and self.size == quant.BLOCK and self.shape[-1] % self.size == 0
        if not (same and isinstance(fmt, quant.NF4)):
            return None
        a, b = (row * self.shape[-1] // self.size for row in (first, last))
        scales = self._scales(a, b).view(last - first, -1)
        return self._bytes(a, b).view(last - first, -1), fmt.pack_scales(scales)


def _bitsandbytes(settings: dict[str, Any], left: Sources) -> Made:
    for key in [name for name in left if ".quant_state.bitsandbytes__" in name]:
        source, name = left.pop(key), key.partition(".quant_state.")[0]
        made = _Bnb4(left, name, json.loads(bytes(source.whole().tolist())))
        yield name, _Folded(source.where, made.shape, made.rows, made.encoded, made.dtype)
    for key in _ending(left, ".SCB"):
        name, stats = key.removesuffix("SCB") + "weight", left.pop(key)
        weight = _take(left, name)
        left.pop(key.removesuffix("SCB") + "weight_format", None)
        rows, encoded = partial(_int8_rows, weight, stats), partial(_int8_bytes, weight, stats)
        yield name, _Folded(stats.where, weight.shape, rows, encoded)


def _int8_bytes(weight: Source, stats: Source, fmt: Any, first: int, last: int) -> Bytes | None:
    """LLM.int8: w = code * SCB / 127, one SCB a row."""
    scale = stats.rows(first, last).float().view(-1, 1) / 127
    parts = weight.rows(first, last).view(torch.uint8), scale.view(torch.uint8)
    return parts if isinstance(fmt, quant.Int8) else None


def _int8_rows(weight: Source, stats: Source, first: int, last: int) -> Tensor:
    parts = _int8_bytes(weight, stats, quant.Int8(), first, last)
    assert parts is not None
    return quant.Int8().decode(*parts, weight.shape[1], torch.float32)


def _scaled(settings: dict[str, Any], left: Sources) -> Made:
    """FP8 (and int8) with one scale a tensor, a row, or a block: code * scale."""
    kinds = (*FLOAT8, torch.int8) if _method(settings) == "compressed-tensors" else FLOAT8
    for name in [name for name, source in left.items() if source.dtype in kinds]:
        names = [form.format(name, name.removesuffix(".weight")) for form in SCALED]
        scale = next((left.pop(n) for n in names if n in left), None)
        if scale is not None:
            weight = left.pop(name)
            shape, wanted = tuple(weight.shape), settings.get("weight_block_size")
            if not isinstance(wanted, list) or [type(n) for n in wanted] != [int, int]:
                wanted = (1, 1)
            grid = (*scale.shape, *[1] * (len(shape) - len(scale.shape)))
            last = list(zip(shape[-2:], grid[-2:], wanted, strict=False))
            # The config's block first: its last one may be cut (576 rows of 128 are 5 blocks).
            block = [b for n, g, b in last if b > 0 and -(-n // b) == g]
            if len(block) < 2:
                block = [n // g for n, g, _ in last if n % g == 0]
            if len(block) < 2 or shape[:-2] != grid[:-2]:
                _refuse(scale.where, f"the scale of '{name}', {list(scale.shape)}, does not fit its"
                        f" {list(shape)}")  # fmt: skip
            rows = partial(_by_blocks, weight, scale, grid, block)
            yield name, _Folded(weight.where, shape, rows)
    for name in _ending(left, ACTIVATIONS):
        del left[name]


def _by_blocks(
    weight: Source, scale: Source, grid: tuple[int, ...], block: list[int], first: int, last: int
) -> Tensor:
    factors = scale.whole()
    if factors.dtype == torch.uint8:  # E8M0: exponents alone
        factors = (factors.float() - 127).exp2()
    factors = factors.float().view(grid)
    if len(grid) == 2:
        factors = factors[torch.arange(first, last) // block[0]]
    else:
        factors = factors[first:last].repeat_interleave(block[0], -2)[..., : weight.shape[-2], :]
    factors = factors.repeat_interleave(block[1], -1)[..., : weight.shape[-1]]
    return weight.rows(first, last).float() * factors


def _unpack(packed: Tensor, shifts: Tensor, dim: int) -> Tensor:
    """int32 -> the numbers at these bits of each, in their place along ``dim`` of (0, 1)."""
    mask = 2 ** (32 // len(shifts)) - 1
    shifts = shifts.view(-1, *[1] * (1 - dim))
    return ((packed.unsqueeze(dim + 1) >> shifts) & mask).flatten(dim, dim + 1)


def _columns(packed: Tensor, shifts: Tensor, first: int, last: int) -> Tensor:
    """Columns ``first .. last`` of what is packed along columns."""
    each = len(shifts)
    a, b = first // each, -(-last // each)
    return _unpack(packed[:, a:b], shifts, 1)[:, first - a * each : last - a * each]


def _grouped(settings: dict[str, Any], left: Sources) -> Made:
    """GPTQ and AWQ: w[o, i] = scale[g, o] * (code[i, o] - zero[g, o]), g the group of input i."""
    awq = _method(settings) == "awq"
    found = (
        settings.get("version") or "gemm" if awq else settings.get("checkpoint_format") or "gptq"
    )
    if (form := str(found).lower()) not in (("gemm",) if awq else ("gptq", "gptq_v2")):
        _refuse("config.json", f"quant_method={_method(settings)} in the form {form} is not read"
                " here (gptq, gptq_v2 and AWQ's gemm are)")  # fmt: skip
    for key in _ending(left, ".qweight"):
        module, packed = key.removesuffix("qweight"), left.pop(key)
        zeros, scales = (_take(left, module + part) for part in ("qzeros", "scales"))
        order, out = left.pop(f"{module}g_idx", None), scales.shape[1]
        bits = 32 * zeros.shape[1] // out
        if bits not in ((4,) if awq else (2, 4, 8)):
            _refuse(packed.where, f"'{key}': {bits} bits of {_method(settings)} are not read here")
        shifts = AWQ_SHIFTS if awq else torch.arange(0, 32, bits)
        width = packed.shape[0] * (1 if awq else len(shifts))
        sources = packed, zeros, scales
        rows = partial(_decode_groups, sources, order, shifts, awq, int(form == "gptq"))
        # A row of ours lies across the rows of the file.
        yield f"{module}weight", _Folded(packed.where, (out, width), rows, by_rows=False)


def _decode_groups(
    sources: Any, order: Any, shifts: Tensor, awq: bool, less: int, *at: int
) -> Tensor:  # fmt: skip
    codes, zero, scale = (source.whole() for source in sources)
    first, last = at
    codes = _columns(codes, shifts, *at) if awq else _unpack(codes[:, first:last], shifts, 0)
    zero = (_columns(zero, shifts, first, last) + less) & (2 ** (32 // len(shifts)) - 1)
    width, scale = len(codes), scale[:, first:last].float()
    group = torch.arange(width) * len(scale) // width if order is None else order.whole().long()
    return ((codes - zero[group]) * scale[group]).T.contiguous()


def _mxfp4(settings: dict[str, Any], left: Sources) -> Made:
    """gpt-oss: 32 E2M1 share an exponent, a row is an expert; transformers' own arithmetic."""
    for key in _ending(left, "_blocks"):
        name, blocks = key.removesuffix("_blocks"), left.pop(key)
        experts, out, groups, half = blocks.shape
        scales = _take(left, f"{name}_scales", experts, out, groups)
        rows = partial(_mxfp4_rows, blocks, scales)
        shape = (experts, groups * half * 2, out)
        yield name, _Folded(blocks.where, shape, rows, dtype=torch.bfloat16)


def _mxfp4_rows(blocks: Source, scales: Source, first: int, last: int) -> Any:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks.rows(first, last), scales.rows(first, last))


METHODS: dict[Any, Callable[[dict[str, Any], Sources], Made]] = {
    "bitsandbytes": _bitsandbytes, "fp8": _scaled, "fbgemm_fp8": _scaled, "mxfp8": _scaled,
    "compressed-tensors": _scaled, "gptq": _grouped, "awq": _grouped, "mxfp4": _mxfp4,
}  # fmt: skip
