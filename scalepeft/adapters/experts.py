"""An adapter for each expert of a mixture: any method, its parameters stacked."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from scalepeft.adapters.base import Adapter, Dropout
from scalepeft.core.errors import UserError
from scalepeft.models.experts import mix_in


def stack(adapter: Adapter, experts: int) -> None:
    """Makes every parameter (...) of it (experts, ...), in place. Raises UserError: dropout."""
    if any(isinstance(module, Dropout) for module in adapter.modules()):
        raise UserError(
            "an expert sees tokens of all rows of a batch, and dropout is drawn by row; set"
            " adapter.dropout=0, or leave the experts out of adapter.target_modules"
        )
    mix_in(adapter, Stacked)
    for key in list(adapter._modules):  # an Identity: ZeRO-3 counts calls, which ranks differ in
        vars(adapter)[key] = adapter._modules.pop(key)
    for key, parameter in adapter._parameters.items():
        if parameter is not None:
            adapter._parameters[key] = nn.Parameter(parameter.new_empty(experts, *parameter.shape))
    adapter.freeze()


class Stacked(Adapter):
    """Mixin: a method once for each expert, on the tokens that are routed there."""

    def each(self, stacks: Mapping[str, Any] | None = None) -> list[Adapter]:
        """The experts' adapters, over the memory of the stacked parameters."""
        method: Any = type(self).__mro__[2]
        stacks = self._parameters if stacks is None else stacks
        # One node of the graph: its gradient is whole, zero for experts without a token.
        parts = {key: p.unbind(0) for key, p in stacks.items() if p is not None}
        absent = {key: None for key, p in stacks.items() if p is None}
        found: list[Adapter] = []
        for own in zip(*parts.values(), strict=True):
            found.append(method.__new__(method))
            parameters = absent | dict(zip(parts, own, strict=True))
            found[-1].__dict__ = {**self.__dict__, "_parameters": parameters}
        return found

    def reset_parameters(self) -> None:
        """Draws the start values of one after another."""
        with torch.no_grad():
            for one in self.each():
                one.reset_parameters()

    def start(self, base: Any) -> dict[str, Tensor]:
        """Of each expert; base: the ``ExpertLinear``."""
        found = [one.start(base.expert(e)) for e, one in enumerate(self.each())]
        return {key: torch.stack([values[key] for values in found]) for key in found[0]}

    def forward(self, x: Tensor, base: Any, bounds: Sequence[int] = ()) -> Tensor:
        """X (rows, in), of expert e ``bounds[e] .. bounds[e + 1]``; base: the ``ExpertLinear``."""
        rows = x.split([last - first for first, last in pairwise(bounds)])
        # Of no rows a gradient all the same: ranks exchange them together.
        used = [e for e, part in enumerate(rows) if len(part)] or [0]
        each = self.each()
        # Not called as modules: what engines hook is the stack.
        return torch.cat([each[e].forward(rows[e], base.expert(e)) for e in used])

    def penalty(self) -> Tensor | None:
        """Sum over the experts, each where its parameters lie."""
        held: dict[str, Any] = dict(self._parameters)
        local = {k: p.to_local() if isinstance(p, DTensor) else p for k, p in held.items()}
        zero = {k: None if p is None else p.new_zeros(1, *p.shape[1:]) for k, p in local.items()}
        # One more, of zeros: a rank may have none.
        values = [one.penalty() for stacks in (zero, local) for one in self.each(stacks)]
        found = [value for value in values if value is not None]
        if not found:
            return None
        total = sum(found[1:], 0 * found[0])
        for p in held.values():
            if isinstance(p, DTensor):
                places = [Partial() if place.is_shard() else place for place in p.placements]
                return DTensor.from_local(total, p.device_mesh, places)
        return total

    def flops(self) -> int:
        """Of a token in one expert."""
        return self.each()[0].flops()

    to_peft, to_lora = Adapter.to_peft, Adapter.to_lora  # none: the formats have no such layer
