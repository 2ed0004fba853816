"""Whether a Triton kernel stands in for a plain form: on CUDA, once it gave the same bits."""

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.core.text import one_line

_enabled = True


def allow(enabled: bool) -> None:
    """Sets ``engine.kernels`` for this process."""
    global _enabled
    _enabled = enabled


def find(name: str, x: Tensor, compare: Callable[..., Any], *key: Any) -> Any:
    """Returns the function ``name`` of ``triton_kernels``, or None: the plain form.

    ``compare(function, device, *key)`` returns what it and the plain form make of one small input;
    called once for each device and ``key`` (dtypes, formats), which compile to another kernel.
    """
    if not _enabled or type(x) not in (Tensor, nn.Parameter):
        return None
    interpreted = x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"
    return _compared(name, x.device, compare, *key) if x.is_cuda or interpreted else None


@cache
def _compared(name: str, device: torch.device, compare: Callable[..., Any], *key: Any) -> Any:
    try:
        function = getattr(importlib.import_module("scalepeft.core.triton_kernels"), name)
        with torch.no_grad():
            got, want = (made.view(torch.uint8) for made in compare(function, device, *key))
        if torch.equal(got, want):
            return function
        fault = "its values are not those of the plain form"
    except Exception as error:  # of a compiler that is not ours
        fault = one_line(f"{type(error).__name__}: {error}", 200)
    if rank() == 0:
        what = " ".join(map(str, (name, *key)))
        say(f"the Triton kernel {what} is not used on {device}, a slower form is: {fault}")
    return None
