"""Bytes that a training step keeps for backward, and the most it has at one time."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(forward: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd saves in ``forward``, each once, without ``held``."""
    known = {t.untyped_storage().data_ptr() for t in held}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = forward()  # alive until the count is done: no address is used twice
    total = sum(kept.values())
    del graph
    return total


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator returns until it is freed.

    Scratch space inside one operator is not seen.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in held}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                self._follow(t.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(step: Callable[[], None], held: list[Tensor]) -> int:
    """Most bytes alive at one time in ``step``, on top of ``held`` (what is there between steps).

    On CUDA it is the allocator's own count, elsewhere that of tensors made by operators.
    """
    device = held[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes(held) as live:
        step()
    return live.peak
