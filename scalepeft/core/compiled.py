"""``torch.compile`` of a decoder block, for training alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from scalepeft.core.errors import UserError

GRAPHS = 64
"""Of one function at most; torch's 8 are one for each of: a first block or another, one line or
several, few tokens or many (HOFT)."""


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward (states (lines, length, d), ...), compiled for every length at once.

    Without gradients it is called as it is: each token of a generation would be a new shape.
    """
    fast = torch.compile(forward)

    def call(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(states, *args, **kwargs)
        for t in tree_leaves((states, args, kwargs)):
            for dim, size in enumerate(t.shape) if isinstance(t, Tensor) else ():
                if size in states.shape[:2]:
                    torch._dynamo.maybe_mark_dynamic(t, dim)
        return fast(states, *args, **kwargs)

    return call


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
