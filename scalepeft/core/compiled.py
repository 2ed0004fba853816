"""``torch.compile`` of a decoder block, for training alone."""

from collections.abc import Callable
from typing import Any

import torch

from scalepeft.core.errors import UserError

GRAPHS = 64
"""Of one function at most; torch's 8 are soon used: of the first shape, of all others, of one line
or several, of few tokens or many (HOFT), each for the first block and for the others."""


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward, compiled for training alone: a generation would bring ever new shapes."""
    fast = torch.compile(forward)
    return lambda *args, **kwargs: (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)


def prepare(device: torch.device) -> None:
    """Raises UserError where nothing can be compiled for the device."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second, which few runs need
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    torch._dynamo.config.recompile_limit = GRAPHS
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        missing = "a C++ compiler (g++, or what CXX names)"
    else:
        if device.type == "cpu" or has_triton():
            return
        missing = "triton"
    raise UserError(f"engine.compile=blocks needs {missing}; install it, or set engine.compile=off")
