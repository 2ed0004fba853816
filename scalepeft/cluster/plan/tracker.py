"""Follows a simulated step: bytes alive by kind, collectives, FLOP."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = (
    "base", "adapter", "optimizer", "gradients", "gathered", "dequantized", "activations", "loss",
)  # fmt: skip
EXCHANGES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast_": "broadcast",
}
Bytes = dict[str, float]
Exchange = tuple[str, int, int]
"""A collective's name, the number of ranks in it and of nodes they are on."""


@dataclass
class Figures:
    """What one simulated step found; every number is linear in the number of layers.

    Attributes:
        moments: moment of the step -> kind -> bytes alive at that moment's own peak.
        exchanges: part of the step -> collective -> (count, bytes of the full tensors).
        flops: part of the step -> FLOP.
    """

    moments: dict[str, Bytes] = field(default_factory=dict)
    exchanges: dict[str, dict[Exchange, tuple[float, float]]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)


class Tracker(TorchDispatchMode):
    """Follows every storage from the operator that makes it until it is freed, by kind.

    Scratch space inside one operator is not seen. Values that a step reads on the host are made up:
    a number is 1, and of a mask every place is true (so every token counts as a label).
    """

    def __init__(self, per_node: int) -> None:
        super().__init__()
        self._per_node = per_node
        self.kind: str | None = "activations"
        """None: what is made now has no memory in a real run."""
        self.moment, self.part = "start", "control"
        self.now: Counter[str] = Counter()
        self.figures = Figures()
        self._held: dict[int, tuple[str, int]] = {}
        self._most: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again with the local tensors
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default:
            rows = torch.arange(args[0].numel(), device=args[0].device)
            return rows[:, None].expand(-1, args[0].dim())
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._exchanged(func, args, out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.follow(t.untyped_storage())
        self._computed(func, args, kwargs or {}, out)
        return out

    def follow(self, storage: torch.UntypedStorage, kind: str | None = None) -> None:
        """Begins to follow a storage, or gives it another kind."""
        key, made_for = storage._cdata, kind or self.kind
        if made_for is None:
            return
        if key not in self._held:
            self._held[key] = (made_for, 0)
            weakref.finalize(storage, self._freed, key)
            self.resized(storage, storage.nbytes())
        elif kind is not None:
            old, size = self._held[key]
            self._held[key] = (kind, size)
            self.now[old] -= size
            self.now[kind] += size

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Notes the size of a storage that is followed."""
        if storage._cdata not in self._held:
            return
        kind, old = self._held[storage._cdata]
        self._held[storage._cdata] = (kind, size)
        self.now[kind] += size - old
        total = sum(self.now.values())
        if total > self._most.get(self.moment, -1):
            self._most[self.moment] = total
            self.figures.moments[self.moment] = dict(self.now)

    def _freed(self, key: int) -> None:
        kind, size = self._held.pop(key)
        self.now[kind] -= size

    def begin(self) -> None:
        """Forgets what came before; what is alive stays."""
        self.figures, self._most = Figures(), {}
        self.at("start")

    def at(self, moment: str) -> None:
        """From here on the step is at this moment."""
        self.moment = moment
        total = sum(self.now.values())
        if total > self._most.get(moment, -1):
            self._most[moment] = total
            self.figures.moments[moment] = dict(self.now)

    @contextmanager
    def doing(self, kind: str | None) -> Iterator[None]:
        """What is allocated within is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def wrapped(self, work: Callable[..., Any], kind: str | None) -> Callable[..., Any]:
        """``work``, whose allocations are of this kind."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.doing(kind):
                return work(*args, **kwargs)

        return run

    def _exchanged(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        name = EXCHANGES.get(func._opname)
        if name is None:
            return  # waits and barriers
        group = _ranks_of(args)
        key = name, len(group), len({rank // self._per_node for rank in group})
        held = self.figures.exchanges.setdefault(self.part, {})
        count, total = held.get(key, (0.0, 0.0))
        sizes = (
            sum(t.nbytes for t in tree_leaves(part) if isinstance(t, Tensor))
            for part in (*args, out)
        )
        held[key] = (count + 1, total + max(sizes))

    def _computed(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        flops = 0
        if "attention" in func._opname:
            at = 1 if "backward" in func._opname else 0
            (*_, length, width), keys = args[at].shape, args[at + 1].shape[-2]
            flops = (10 if at else 4) * args[at].shape[:-2].numel() * length * keys * width
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if flops:
            self.figures.flops[self.part] = self.figures.flops.get(self.part, 0) + flops


def _ranks_of(args: tuple[Any, ...]) -> list[int]:
    """Ranks of a collective's group: an object among the arguments, or a name as the last one."""
    if isinstance(args[-1], str):
        return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(args[-1]))  # type: ignore[arg-type]
    # The group comes before the kind of reduction, another such object.
    found = next(value for value in args if isinstance(value, torch.ScriptObject))
    return dist.get_process_group_ranks(dist.ProcessGroup.unbox(found))


def stretch(short: tuple[Figures, Figures], lengths: tuple[int, int], layers: int) -> Figures:
    """The figures of a model with ``layers`` blocks from those of two shorter ones."""
    (a, b), (la, lb) = short, lengths

    def line(x: float, y: float) -> float:
        return x + (y - x) * (layers - la) / (lb - la)

    found = Figures()
    places = [("0", "0", 0), ("1", "1", 1)]
    places += [(str(la - k), str(lb - k), layers - k) for k in (2, 1)]
    pairs = [("start", "start", "start"), ("loss", "loss", "loss"), ("step", "step", "step")]
    pairs += [
        (f"{way} {i}", f"{way} {j}", f"{way} {at}")
        for way in ("forward", "backward")
        for i, j, at in places
    ]
    for i, j, name in pairs:
        at_a, at_b = a.moments.get(i, {}), b.moments.get(j, {})
        found.moments[name] = {k: max(0.0, line(at_a.get(k, 0), at_b.get(k, 0))) for k in KINDS}
    for part in a.exchanges.keys() | b.exchanges.keys():
        xa, xb = a.exchanges.get(part, {}), b.exchanges.get(part, {})
        found.exchanges[part] = {
            key: tuple(map(line, xa.get(key, (0, 0)), xb.get(key, (0, 0))))  # type: ignore[misc]
            for key in xa.keys() | xb.keys()
        }
    for part in a.flops:
        found.flops[part] = line(a.flops[part], b.flops[part])
    return found
