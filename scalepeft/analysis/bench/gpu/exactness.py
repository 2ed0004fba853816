"""Right numbers: stored bytes of the device against the CPU's, every method against fp64."""

import copy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.analysis.bench.gpu.session import Session
from scalepeft.analysis.bench.methods import STRUCTURES
from scalepeft.core import registry
from scalepeft.models import quant
from scalepeft.models.hub import PRECISIONS

BOUNDS = {"fp32": 1e-4, "bf16": 3e-2}
"""Relative errors that only a wrong product exceeds: a CPU is below 1e-6 and 6e-3."""
SETTINGS: dict[str, dict[str, list[Any]]] = {  # tried beside the defaults
    "surm": {"structure": list(STRUCTURES)}, "hut": {"rank": [4]}, "goft": {"scale": [True]},
    "hoft": {"form": ["pairs"]}, "shoft": {"form": ["pairs"]}, "hra": {"form": ["pairs"]},
}  # fmt: skip


def storage(session: Session) -> dict[str, Any]:
    """NF4 and int8: known bytes; random rows stored here and on the CPU, and read back."""
    cases = [(f, d) for f in (quant.NF4(False), quant.NF4(True), quant.Int8()) for d in PRECISIONS]
    return {
        f"{fmt} {dtype}": session.attempt(_bytes, fmt, PRECISIONS[dtype]) for fmt, dtype in cases
    }


def _bytes(session: Session, fmt: quant.Format, dtype: torch.dtype) -> dict[str, Any]:
    quant.self_check(session.device, fmt)
    rows = torch.randn(256, 4096, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows[7] = 0
    want, got = fmt.encode(rows), fmt.encode(rows.to(session.device))
    differ = [int((a.cpu() != b).sum()) for a, b in zip(got, want, strict=True)]
    here, there = (
        fmt.decode(want[0].to(device), want[1].to(device), 4096, torch.float32).cpu()
        for device in (session.device, "cpu")
    )
    found: dict[str, Any] = {
        "weight bytes that differ": differ[0], "scale bytes that differ": differ[1],
        "of": sum(t.numel() for t in want), "decoded alike": torch.equal(here, there),
    }  # fmt: skip
    if isinstance(fmt, quant.NF4):
        args: Any = *(t.repeat(16, 1) for t in got), 4096, dtype
        for label, form in {"decode ms": fmt.decode, "plain decode ms": fmt.plain}.items():
            found[label] = median(session.milliseconds(partial(form, *args), 10, 3))
    right = found["decoded alike"] and not any(differ)
    return found if right else {**found, "fault": "not the CPU's bytes"}


def methods(session: Session) -> dict[str, Any]:
    """Output and all gradients of a layer on the device against fp64: largest relative error."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in registry.available("adapters.methods"):
        cases[name] = name, {}
        for key, values in SETTINGS.get(name, {}).items():
            cases |= {f"{name} {key}={value}": (name, {key: value}) for value in values}
    return {label: session.attempt(_errors, *case) for label, case in cases.items()}


def _errors(session: Session, name: str, more: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    layer: Any = injection.adapt(nn.Linear(256, 256).eval(), name, **more)
    for p in layer.adapter.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, dy = torch.randn(2, 64, 256), torch.randn(2, 64, 256)
    want = _run(layer, x, dy, torch.float64, torch.device("cpu"))
    found: dict[str, Any] = {}
    for label, dtype in PRECISIONS.items():
        pairs = zip(_run(layer, x, dy, dtype, session.device), want, strict=True)
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        found[label] = max(errors)
        if not all(error <= BOUNDS[label] for error in errors):  # NaN is not
            found["fault"] = f"{label}: further from fp64 than {BOUNDS[label]:g}"
    return found


def _run(
    layer: Any, x: Tensor, dy: Tensor, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Output, gradient of x and of the adapter, as fp64; the adapter stays in fp32 under bf16."""
    layer = copy.deepcopy(layer).to(device, dtype)
    if dtype == torch.bfloat16:
        layer.adapter.float()
    x = x.to(device, dtype, copy=True).requires_grad_()
    y = layer(x)
    y.backward(dy.to(device, dtype))
    grads = [p.grad for p in layer.parameters() if p.requires_grad]
    return [t.detach().double().cpu() for t in (y, x.grad, *grads) if t is not None]
