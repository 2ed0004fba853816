"""Cross-entropy summed over label tokens, a chunk of tokens at a time: no (tokens, vocabulary)
tensor.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.data.tokens import IGNORED


class _ChunkedLoss(torch.autograd.Function):
    """Takes each chunk's gradient in forward: neither logits nor their gradient outlive it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        *trained: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:])
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grads = [torch.zeros_like(p) for p in trained] if wanted else []
        for rows, targets, first in zip(
            hidden.split(chunk), labels.split(chunk), range(0, len(hidden), chunk), strict=False
        ):
            with torch.set_grad_enabled(wanted):
                rows = rows.detach().requires_grad_(wanted)
                loss = F.cross_entropy(head(rows).float(), targets, reduction="sum")
            total += loss.detach()
            if grad_hidden is not None:
                grad_rows, *grad_trained = torch.autograd.grad(loss, [rows, *trained])
                grad_hidden[first : first + len(rows)] = grad_rows
                for sum_, grad in zip(grads, grad_trained, strict=True):
                    sum_ += grad
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outer
        grad_hidden, *grads = ctx.saved_tensors
        return grad_hidden * scale, None, None, None, *(g * scale for g in grads)


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module, chunk: int) -> Tensor:
    """Returns ``sum_t -log softmax(head(hidden_t))[label_{t+1}]`` over positions whose next label
    is not -100.

    Args:
        hidden: last hidden states (batch, length, d).
        labels: (batch, length), -100 where there is nothing to learn.
        head: d -> vocabulary; may hold trained parameters (an adapter on it).
        chunk: tokens whose logits exist at one time.
    """
    targets = labels[:, 1:].reshape(-1)
    kept = (targets != IGNORED).nonzero().squeeze(1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept]
    trained = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = _ChunkedLoss.apply(rows, targets[kept], head, chunk, *trained)
    return loss


@cache
def _class_with_loss(base: type[nn.Module]) -> type[nn.Module]:
    def forward(
        self: Any,
        *args: Any,
        token_labels: Tensor | None = None,
        loss_chunk: int = 0,
        **kwargs: Any,
    ) -> Any:
        if token_labels is None:
            return base.forward(self, *args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return chunked_cross_entropy(hidden, token_labels, self.get_output_embeddings(), loss_chunk)

    # generate() asks the signature what the model can do: without logits_to_keep there it has the
    # head compute the logits of every prompt token.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def add_token_loss(model: nn.Module) -> None:
    """Swaps in a class with ``forward(input_ids, token_labels=, loss_chunk=)`` -> summed loss.

    The loss is computed inside the model's own forward, where a sharded head is gathered.
    """
    model.__class__ = _class_with_loss(type(model))  # type: ignore[arg-type]  # mypy: no Hashable
