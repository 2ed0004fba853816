"""Triton's kernels run by its interpreter on a CPU, beside the plain forms.

TRITON_INTERPRET=1 python tests/core/interpreted_kernels.py    {case: what is wrong}, as JSON
"""

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from triton import language as tl
from triton.runtime import interpreter

from scalepeft.adapters import base
from scalepeft.core import kernels, triton_kernels
from scalepeft.models import quant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = quant.NF4(), quant.NF4(double=True)
cut_off = interpreter._convert_float
calls = dict.fromkeys(("decode", "drop"), 0)


def to_nearest(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """As a GPU converts; the interpreter makes bf16 of fp32 by cutting bits off."""
    if (source, target) == (tl.float32, tl.bfloat16):
        near = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        return near.view(torch.int16).numpy().view(np.uint16)
    return cut_off(values, source, target, mode)


def counted(name: str) -> Callable[..., Tensor]:
    function = getattr(triton_kernels, name)

    def call(*args: object) -> Tensor:
        calls[name] += 1
        return function(*args)

    return call


def same(*pairs: tuple[Tensor, Tensor]) -> bool:
    return all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs) and all(
        torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in pair)) for pair in pairs
    )


def both(name: str, work: Callable[[], tuple[Tensor, ...]]) -> str:
    """What is wrong with ``work`` by the kernel, beside the plain form."""
    kernels.allow(False)
    before = calls[name]
    want = work()
    assert calls[name] == before
    kernels.allow(True)
    got = work()
    if calls[name] == before:
        return "the kernel was not called"
    return "" if same(*zip(got, want, strict=True)) else "other bits"


def decoded(found: dict[str, str], fmt: quant.NF4, dtype: torch.dtype) -> None:
    for rows, width in ((1, 64), (5, 192), (2, 64 * 259), (0, 128)):
        w = torch.randn(rows, width) * torch.logspace(-3, 1, rows)[:, None]
        w[rows // 2 :, :64] = 0
        stored = fmt.encode(w)
        cases = {"whole": stored, "from a byte on": tuple(t[1:] for t in stored)}
        cases["apart"] = tuple(torch.cat([t, t], 1)[:, : t.shape[1]] for t in stored)
        for label, (weight, scale) in cases.items():
            found[f"decode {fmt} {dtype} {rows} x {width} {label}"] = both(
                "decode", lambda a=weight, b=scale, n=width: (fmt.decode(a, b, n, dtype),)
            )


def multiplied(found: dict[str, str], fmt: quant.NF4) -> None:
    layer = torch.nn.Linear(192, 24)
    quant.quantize(layer, fmt)
    x = torch.randn(2, 7, 192, requires_grad=True)

    def through(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        y = call(x)
        return y, *torch.autograd.grad(y.sin().sum(), x)

    found[f"layer {fmt}"] = both("decode", lambda: through(layer))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found[f"layer {fmt} compiled"] = both("decode", lambda: through(compiled))


def dropped(found: dict[str, str], dtype: torch.dtype) -> None:
    for (lines, length, features), packed in product(((2, 5, 7), (3, 33, 300)), (False, True)):
        dropout = base.Dropout(0.3, f"layer {features}").train()
        dropout.keys = base.dropout_keys(torch.arange(lines), 7)
        if packed:
            dropout.keys = dropout.keys[:, None] + torch.arange(length) // 3
            dropout.positions = torch.arange(length).repeat(lines, 1) % 3
        x = torch.randn(lines, length, features).to(dtype)
        strided = x.transpose(0, 2).contiguous().transpose(0, 2)
        for label, at in {"": x, "flat": x.flatten(0, 1), "strided": strided}.items():
            at.requires_grad_()

            def work(how: Callable[..., Tensor], at: Tensor = at) -> tuple[Tensor, ...]:
                y = how(at)
                return y, *torch.autograd.grad(y, at, at.detach().cos())

            case = f"drop {dtype} {lines} x {length} x {features} {label} packed={packed}"
            found[case] = both("drop", partial(work, dropout))
        again = partial(checkpoint, dropout, use_reentrant=False)
        found[f"{case} checkpointed"] = both("drop", partial(work, again))


def left_alone() -> str:
    """Fake tensors, graphs and fp64 take the plain form."""
    dropout = base.Dropout(0.3, "a").train()
    dropout.keys = torch.tensor([8, 9])
    x, fmt = torch.randn(2, 5, 64), FORMATS[1]
    stored, want, before = fmt.encode(torch.ones(4, 128)), dropout(x), dict(calls)
    if not same((torch.compile(dropout, backend="aot_eager", fullgraph=True)(x), want)):
        return "compiled: other bits"
    dropout(x.double())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        weight, scale, dropout.keys, x = map(fake.from_tensor, (*stored, dropout.keys, x))
        assert fmt.decode(weight, scale, 128, torch.float32).shape == (4, 128)
        assert dropout(x).shape == x.shape
    return "" if calls == before else f"a kernel was called: {before} {calls}"


def main() -> None:
    torch.manual_seed(0)
    found: dict[str, str] = {}
    replaced = mock.patch.multiple(triton_kernels, decode=counted("decode"), drop=counted("drop"))
    with mock.patch.object(interpreter, "_convert_float", to_nearest), replaced:
        for dtype in DTYPES:
            dropped(found, dtype)
            for fmt in FORMATS:
                decoded(found, fmt, dtype)
        for fmt in FORMATS:
            decoded(found, fmt, torch.float64)
            multiplied(found, fmt)
        found["left alone"] = left_alone()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
