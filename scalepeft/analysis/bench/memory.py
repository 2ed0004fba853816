"""Bytes that a training step keeps for backward, and the most it has at one time."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(step: Callable[[saved_tensors_hooks], None], weights: Iterable[Tensor]) -> int:
    """Return the bytes that the forward of ``step``, in the hooks, saves beside the weights."""
    known = {t.untyped_storage().data_ptr() for t in weights}
    kept: dict[int, int] = {}  # what is saved lives until backward: no address is two storages

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()  # with its history an output would keep its own graph alive for good

    step(saved_tensors_hooks(pack, lambda t: t))
    return sum(size for address, size in kept.items() if address not in known)


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes until it is freed; not scratch inside one."""

    now = peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        old, new = _storages((args, kwargs)), _storages(out)
        for key in new.keys() - old.keys():  # neither a view nor written in place
            self._count(new[key].nbytes())
            weakref.finalize(new[key], self._count, -new[key].nbytes())
        return out

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    storages = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return {storage._cdata: storage for storage in storages}


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes alive at one time in ``step``, on top of what is there before it.

    On CUDA it is the allocator's own count, elsewhere that of tensors made by operators.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        step()
    return live.peak
