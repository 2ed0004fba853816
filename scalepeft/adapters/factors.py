"""What depends on an adapter's parameters alone, made once a step for all layers of a shape.

Letters: n layers of one shape. A rotation takes many small operations to make, and every
micro-batch, its recomputation and every generated token need the same one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scalepeft.adapters.base import Adapter
from scalepeft.adapters.inject import Adapted, AdaptedExperts
from scalepeft.parallel.base import Engine

Group = list[tuple[Adapter, dict[str, nn.Parameter]]]
"""Layers of one shape, with their own parameters by name."""


class Factors:
    """The factors of all adapters of a model.

    Args:
        model: sharded, loaded, outside of a forward.
        engine: the one that sharded it.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.engine = engine
        self.adapters = [
            m.adapter
            for m in model.modules()
            if isinstance(m, Adapted) and not isinstance(m, AdaptedExperts)
        ]
        groups: dict[object, Group] = {}
        for adapter in self.adapters:
            if type(adapter).factors is not Adapter.factors:
                own = dict(adapter.named_parameters(recurse=False))
                key = type(adapter), id(adapter.config), adapter.in_features, adapter.out_features
                groups.setdefault(key, []).append((adapter, own))
        self._groups = list(groups.values())

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Around a step's micro-batches: their gradients go on to the parameters at the end, beside
        what the engine has summed over the ranks there. A collective.
        """
        with self.made():
            for factor in (f for adapter in self.adapters for f in adapter.made or ()):
                factor.requires_grad_()
            yield
            self._backward()

    @contextmanager
    def made(self) -> Iterator[None]:
        """The factors are there within, where no parameter may change; a collective."""
        try:
            yield self.make()
        finally:
            for adapter in self.adapters:
                adapter.made = None

    @torch.no_grad()
    def make(self) -> None:
        """Makes the factors for good: for parameters that never change again; a collective."""
        for adapter in self.adapters:
            adapter.made = ()
        for group in self._groups:
            stacked = group[0][0].factors(self._stacked(group))
            for (adapter, _), *each in zip(group, *(t.unbind() for t in stacked), strict=True):
                adapter.made = tuple(t.detach() for t in each)

    def _stacked(self, group: Group) -> dict[str, Tensor]:
        """The parameters of a group by name, (n, ...) each."""
        return {key: self.engine.whole([own[key] for _, own in group]) for key in group[0][1]}

    def _backward(self) -> None:
        """Each group's gradient: where the factors are fewer numbers than the parameters, they are
        what is summed over the ranks, else the parameters' gradients are.
        """
        grads = []
        for group in self._groups:
            made = zip(*(adapter.made or () for adapter, _ in group), strict=True)
            grads.append([torch.stack([_grad(f) for f in each]) for each in made])
        sizes = [sum(p.numel() for p in group[0][1].values()) for group in self._groups]
        early = [sum(f[0].numel() for f in g) < n for g, n in zip(grads, sizes, strict=True)]
        self.engine.sum([f for g, first in zip(grads, early, strict=True) if first for f in g])
        late: list[tuple[list[nn.Parameter], Tensor]] = []
        for group, grad, first in zip(self._groups, grads, early, strict=True):
            stacked = {key: p.requires_grad_() for key, p in self._stacked(group).items()}
            made = zip(group[0][0].factors(stacked), grad, strict=True)
            out, grad = zip(*((f, g) for f, g in made if f.requires_grad), strict=True)
            each = torch.autograd.grad(out, list(stacked.values()), grad, allow_unused=True)
            for key, d in zip(stacked, each, strict=True):
                if d is None:  # of a scale, say, which makes no factor
                    continue
                parameters = [own[key] for _, own in group]
                if first:
                    self.engine.add_gradients(parameters, list(d.unbind()))
                else:
                    late.append((parameters, d))
        self.engine.sum([d for _, d in late])
        for parameters, d in late:
            self.engine.add_gradients(parameters, list(d.unbind()))


def _grad(factor: Tensor) -> Tensor:
    return torch.zeros_like(factor) if factor.grad is None else factor.grad
