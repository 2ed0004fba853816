"""Bytes that a training step keeps for backward, and the most it has at one time."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Within it, counts the storages that a forward saves for backward, each once, not ``held``."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in held}
        self._kept: dict[int, int] = {}
        super().__init__(self._pack, lambda t: t)

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # with its history an output would keep its own graph alive for good

    @property
    def total(self) -> int:
        """Bytes; what is saved lives until backward, so no address is counted for two."""
        return sum(self._kept.values())


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
