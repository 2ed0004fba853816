"""Pre-quantized bases: packed tensors with their scales, by rows, as floats of the plain weight."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.models.sources import Source

Sources = dict[str, Source]
Bytes = tuple[Tensor, Tensor]
Made = Iterator[tuple[str, Source]]
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


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of a config.json, or empty. Raise UserError if it names no method."""
    text = config.get("text_config") or {}
    found = config.get("quantization_config") or text.get("quantization_config") or {}
    if isinstance(found, dict) and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        # Older files do not name it.
        found = found | {"quant_method": found.get("quant_method") or "bitsandbytes"}
    if not isinstance(found, dict) or (found and not isinstance(found.get("quant_method"), str)):
        what = f"quantization_config={found!r} names no quant_method"
        raise UserError(f"config.json: {what}; restore config.json")
    return found


def keeps(settings: dict[str, Any]) -> Callable[[str], bool]:
    """Says whether a module stays plain over this base: what bitsandbytes was told to skip."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = settings.get("llm_int8_skip_modules") or []
    return lambda name: not should_convert_module(name, skipped)


def read(settings: dict[str, Any], entries: Sources) -> Sources:
    """Folds what is of a quantized weight into it. Raises UserError: packed in a way not read."""
    method, left = settings.get("quant_method"), dict(entries)
    if settings and method not in METHODS:
        known = f"read are {', '.join(METHODS)}"
        _refuse("config.json", f"quant_method={method} of the base is not read here ({known})")
    try:
        made = dict(METHODS[method](settings, left)) if settings else {}
    except UserError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        why = f"the tensors are not packed as it says ({type(error).__name__}: {error})"
        _refuse("config.json", f"quant_method={method}: {why}")
    for name, source in left.items():
        scaled = {name.removesuffix(s) for s in ("_scale", "_scale_inv") if name.endswith(s)}
        integers = name.endswith("weight") and not source.dtype.is_floating_point
        packed = integers or source.dtype in FLOAT8
        if packed or name.endswith(PARTS) or scaled & (left.keys() | made.keys()):
            who = f"quant_method={method}" if settings else "config.json, without a quant_method,"
            what = f"'{name}' ({str(source.dtype).removeprefix('torch.')} {list(source.shape)})"
            _refuse(source.where, f"{what} is of a quantized weight, and {who} does not say how")
    return left | made


def _refuse(where: str, what: str) -> NoReturn:
    remedy = "name the folder of the unquantized checkpoint, or of a copy that transformers has"
    raise UserError(f"{where}: {what}; {remedy} dequantized")


def _take(left: Sources, name: str, *shape: int) -> Source:
    found = left.pop(name, None)
    if found is None:
        what = f"no tensor '{name}', which a quantized weight needs"
        raise UserError(f"the base has {what}; the files are incomplete: copy them again")
    if shape and tuple(found.shape) != shape:
        what = f"'{name}' has shape {list(found.shape)}, its weight needs {list(shape)}"
        raise UserError(f"{found.where}: {what}; copy the base again")
    return found


class _Bnb4(Source):
    """bitsandbytes' 4 bits: table[code] * absmax of its block; blocks run on over rows."""

    def __init__(self, left: Sources, name: str, state: dict[str, Any]) -> None:
        self.name, self.size, self.nf4 = name, int(state["blocksize"]), state["quant_type"] == "nf4"
        self.shape = tuple(int(n) for n in state["shape"])
        self.dtype = getattr(torch, state["dtype"])
        self.packed, count = left[name], math.prod(self.shape)
        self.where = self.packed.where
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
            what = f"'{self.name}': its scales are not finite: the base is damaged"
            raise UserError(f"{self.absmax.where}: {what}; copy it again")
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


class _Scaled(Source):
    """FP8 (and int8) with one scale a tensor, a row, or a block: code * scale."""

    dtype = torch.float32

    def __init__(self, name: str, codes: Source, scale: Source, wanted: Any = None) -> None:
        """``wanted``: block of the config, if that says one."""
        shape = self.shape = tuple(codes.shape)
        self.where, self.codes, self.scale = codes.where, codes, scale
        if not isinstance(wanted, list) or [type(n) for n in wanted] != [int, int]:
            wanted = (1, 1)
        self.grid = (*scale.shape, *[1] * (len(shape) - len(scale.shape)))
        last = list(zip(shape[-2:], self.grid[-2:], wanted, strict=False))
        # The config's block first: its last one may be cut (576 rows of 128 are 5 blocks).
        self.block = [b for n, g, b in last if b > 0 and -(-n // b) == g]
        if len(self.block) < 2:
            self.block = [n // g for n, g, _ in last if n % g == 0]
        if len(self.block) < 2 or shape[:-2] != self.grid[:-2]:
            sizes = f"{list(scale.shape)}, does not fit its {list(shape)}"
            _refuse(scale.where, f"the scale of '{name}', {sizes}")

    def _factors(self) -> Tensor:
        factors = self.scale.whole()
        if factors.dtype == torch.uint8:  # E8M0: exponents alone
            return (factors.float() - 127).exp2()
        return factors.float()

    def rows(self, first: int, last: int) -> Tensor:
        factors, (height, width) = self._factors().view(self.grid), self.block
        if len(self.grid) == 2:
            factors = factors[torch.arange(first, last) // height]
        else:
            factors = factors[first:last].repeat_interleave(height, -2)[..., : self.shape[-2], :]
        factors = factors.repeat_interleave(width, -1)[..., : self.shape[-1]]
        return self.codes.rows(first, last).float() * factors


class _BnbInt8(_Scaled):
    """LLM.int8: w = code * SCB / 127, one SCB a row."""

    def _factors(self) -> Tensor:
        return super()._factors() / 127

    def encoded(self, fmt: quant.Format, first: int, last: int) -> Bytes | None:
        if not isinstance(fmt, quant.Int8):
            return None
        parts = self.codes.rows(first, last), self._factors().view(-1, 1)[first:last]
        return parts[0].view(torch.uint8), parts[1].view(torch.uint8)


def _bitsandbytes(settings: dict[str, Any], left: Sources) -> Made:
    for key in [name for name in left if ".quant_state.bitsandbytes__" in name]:
        state, name = left.pop(key).whole(), key.partition(".quant_state.")[0]
        yield name, _Bnb4(left, name, json.loads(bytes(state.tolist())))
    for key in [name for name in left if name.endswith(".SCB")]:
        name, stats = key.removesuffix("SCB") + "weight", left.pop(key)
        left.pop(f"{name}_format", None)
        yield name, _BnbInt8(name, _take(left, name), stats)


def _scaled(settings: dict[str, Any], left: Sources) -> Made:
    kinds = (*FLOAT8, torch.int8) if settings["quant_method"] == "compressed-tensors" else FLOAT8
    for name in [name for name, source in left.items() if source.dtype in kinds]:
        names = [form.format(name, name.removesuffix(".weight")) for form in SCALED]
        scale = next((left.pop(n) for n in names if n in left), None)
        if scale is not None:
            yield name, _Scaled(name, left.pop(name), scale, settings.get("weight_block_size"))
    for name in [name for name in left if name.endswith(ACTIVATIONS)]:
        del left[name]


def _columns(packed: Tensor, shifts: Tensor, first: int, last: int) -> Tensor:
    """Columns ``first .. last`` of numbers of which each int32 has a row's next, at these bits."""
    each = len(shifts)
    a, b = first // each, -(-last // each)
    numbers = (packed[:, a:b, None] >> shifts) & (2 ** (32 // each) - 1)
    return numbers.flatten(1)[:, first - a * each : last - a * each]


class _Grouped(Source):
    """GPTQ and AWQ: w[o, i] = scale[g, o] * (code[i, o] - zero[g, o]), g the group of input i."""

    dtype = torch.float32
    by_rows = False  # a row of ours lies across the rows of the file

    def __init__(self, left: Sources, key: str, form: str) -> None:
        module, self.codes, self.awq = key.removesuffix("qweight"), left.pop(key), form == "gemm"
        self.zeros, self.scales = (_take(left, module + part) for part in ("qzeros", "scales"))
        self.order, out = left.pop(f"{module}g_idx", None), self.scales.shape[1]
        bits = 32 * self.zeros.shape[1] // out
        if bits not in ((4,) if self.awq else (2, 4, 8)):
            _refuse(self.codes.where, f"'{key}': {bits} bits in the form {form} are not read here")
        self.shifts = AWQ_SHIFTS if self.awq else torch.arange(0, 32, bits)
        self.less = int(form == "gptq")  # zeros are stored less one
        self.shape = out, self.codes.shape[0] * (1 if self.awq else len(self.shifts))
        self.where = self.codes.where

    def rows(self, first: int, last: int) -> Tensor:
        shifts, codes = self.shifts, self.codes.whole()
        if self.awq:
            codes = _columns(codes, shifts, first, last)
        else:  # along inputs
            codes = _columns(codes[:, first:last].T, shifts, 0, self.shape[1]).T
        zero = _columns(self.zeros.whole(), shifts, first, last) + self.less
        zero = zero & (2 ** (32 // len(shifts)) - 1)
        scale, width = self.scales.whole()[:, first:last].float(), len(codes)
        group = torch.arange(width) * len(scale) // width
        if self.order is not None:
            group = self.order.whole().long()
        return ((codes - zero[group]) * scale[group]).T.contiguous()


def _grouped(settings: dict[str, Any], left: Sources) -> Made:
    key, forms = "checkpoint_format", ["gptq", "gptq_v2"]
    if settings["quant_method"] == "awq":
        key, forms = "version", ["gemm"]
    form = str(settings.get(key) or forms[0]).lower()
    if form not in forms:
        what = f"quant_method={settings['quant_method']} in the form {form} is not read here"
        _refuse("config.json", f"{what} ({', '.join(forms)} are)")
    for name in [name for name in left if name.endswith(".qweight")]:
        yield name.removesuffix("qweight") + "weight", _Grouped(left, name, form)


class _Mxfp4(Source):
    """gpt-oss: 32 E2M1 share an exponent, a row is an expert; transformers' own arithmetic."""

    dtype = torch.bfloat16

    def __init__(self, blocks: Source, left: Sources, name: str) -> None:
        experts, out, groups, half = blocks.shape
        self.shape = experts, groups * half * 2, out
        self.where, self.blocks = blocks.where, blocks
        self.scales = _take(left, f"{name}_scales", experts, out, groups)

    def rows(self, first: int, last: int) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        packed = self.blocks.rows(first, last), self.scales.rows(first, last)
        return convert_moe_packed_tensors(*packed)


def _mxfp4(settings: dict[str, Any], left: Sources) -> Made:
    for key in [name for name in left if name.endswith("_blocks")]:
        name = key.removesuffix("_blocks")
        yield name, _Mxfp4(left.pop(key), left, name)


METHODS: dict[Any, Callable[[dict[str, Any], Sources], Made]] = {
    "bitsandbytes": _bitsandbytes,
    **dict.fromkeys(("fp8", "fbgemm_fp8", "mxfp8", "compressed-tensors"), _scaled),
    **dict.fromkeys(("gptq", "awq"), _grouped),
    "mxfp4": _mxfp4,
}
