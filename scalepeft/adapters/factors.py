"""What depends on an adapter's parameters alone, made once a step for all n layers of a shape."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scalepeft.adapters.base import Adapter
from scalepeft.adapters.inject import Adapted, AdaptedExperts
from scalepeft.parallel.base import Engine, full_shape


class Group:
    """Adapters of one shape."""

    def __init__(self, adapters: list[Adapter]) -> None:
        self.adapters = adapters
        named = [dict(a.named_parameters(recurse=False)) for a in adapters]
        self.parameters = {key: [own[key] for own in named] for key in named[0]}
        shapes = {key: full_shape(p) for key, p in named[0].items()}
        on_meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        factors = sum(factor.numel() for factor in adapters[0].factors(on_meta))
        # A layer's factors are fewer numbers than its parameters, which must be used elsewhere too.
        self.fewer = factors < sum(map(torch.Size.numel, shapes.values()))


class Factors:
    """Of all adapters, but experts', of a model that ``engine`` has sharded; outside a forward."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.engine = engine
        adapted = [m for m in model.modules() if isinstance(m, Adapted)]
        self.adapters = [m.adapter for m in adapted if not isinstance(m, AdaptedExperts)]
        alike: dict[object, list[Adapter]] = {}
        for a in self.adapters:
            if type(a).factors is not Adapter.factors:
                key = type(a), id(a.config), a.in_features, a.out_features
                alike.setdefault(key, []).append(a)
        self.groups = [*map(Group, alike.values())]

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Around micro-batches, whose gradients reach the parameters at the end; a collective."""
        groups = [group for group in self.groups if group.fewer or self.engine.takes_idle]
        with self.made(groups):
            for factor in (f for g in groups for adapter in g.adapters for f in adapter.made or ()):
                factor.requires_grad_()
            yield
            self._backward(groups)

    @contextmanager
    def made(self, groups: list[Group] | None = None) -> Iterator[None]:
        """The factors are there within, where no parameter may change; a collective."""
        try:
            yield self.make(groups)
        finally:
            for adapter in self.adapters:
                adapter.made = None

    @torch.no_grad()
    def make(self, groups: list[Group] | None = None) -> None:
        """Makes the factors for good: for parameters that never change again; a collective."""
        for adapter in self.adapters:
            if type(adapter).factors is Adapter.factors:
                adapter.made = ()
        for group in self.groups if groups is None else groups:
            stacked = group.adapters[0].factors(self._stacked(group))
            each = zip(*(t.unbind() for t in stacked), strict=True)
            for adapter, own in zip(group.adapters, each, strict=True):
                adapter.made = tuple(t.detach() for t in own)

    def _stacked(self, group: Group) -> dict[str, Tensor]:
        """The parameters of a group by name, (n, ...) each."""
        return {key: self.engine.whole(each) for key, each in group.parameters.items()}

    def _backward(self, groups: list[Group]) -> None:
        """Sums over the ranks the factors' gradients where ``fewer``, else the parameters'."""
        grads = []
        for group in groups:
            made = zip(*(adapter.made or () for adapter in group.adapters), strict=True)
            held = [[torch.zeros_like(f) if f.grad is None else f.grad for f in fs] for fs in made]
            grads.append([torch.stack(fs) for fs in held])
        sent = [f for group, each in zip(groups, grads, strict=True) if group.fewer for f in each]
        self.engine.sum_gradients(sent)
        late: list[tuple[list[nn.Parameter], Tensor]] = []
        for group, grad in zip(groups, grads, strict=True):
            stacked = {key: p.requires_grad_() for key, p in self._stacked(group).items()}
            made = zip(group.adapters[0].factors(stacked), grad, strict=True)
            out, d_out = zip(*((f, d) for f, d in made if f.requires_grad), strict=True)
            each = torch.autograd.grad(out, list(stacked.values()), d_out, allow_unused=True)
            for parameters, d in zip(group.parameters.values(), each, strict=True):
                if d is None:  # of a scale, say, which makes no factor
                    continue
                if group.fewer:
                    self.engine.add_gradients(parameters, list(d.unbind()))
                else:
                    late.append((parameters, d))
        self.engine.sum_gradients([d for _, d in late])
        for parameters, d in late:
            self.engine.add_gradients(parameters, list(d.unbind()))
