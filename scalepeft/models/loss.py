"""Cross-entropy summed over label tokens, by the model's own head, a chunk of them at a time."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.core.errors import UserError
from scalepeft.data.tokens import IGNORED, label_places

Head = Callable[[Tensor], Tensor]


class _ChunkedLoss(torch.autograd.Function):
    """Takes each chunk's gradient in forward: neither logits nor their gradient outlive it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: Head, chunk: int, *trained: Tensor
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


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    chunk: int,
    trained: Sequence[Tensor] = (),
    places: Tensor | None = None,
) -> Tensor:
    """``sum_t -log softmax(head(hidden_t))[label_{t+1}]`` where the next label is not -100.

    Of hidden (batch, length, d) and labels (batch, length); the logits of ``chunk`` tokens exist at
    one time. ``trained``: what ``head``, (rows, d) -> logits, trains; ``places``: of
    ``label_places``.
    """
    places = label_places(labels) if places is None else places
    rows = hidden.reshape(-1, hidden.shape[-1])[places - 1]
    trained = trained if torch.is_grad_enabled() else ()  # the function sees no difference
    return _ChunkedLoss.apply(rows, labels.flatten()[places], head, chunk, *trained)


class _Decoded(tuple[Tensor]):
    """A decoder's output: ``(last_hidden_state,)``, and None for all else that is asked of it."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class _StandIn(nn.Module):
    """In the decoder's place, without its parameters: returns the states that ``run`` is given."""

    output: _Decoded

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["_decoder"] = decoder  # no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)  # a multiplier, an embedding

    def forward(self, *_: Any, **__: Any) -> _Decoded:
        return self.output

    def run(self, forward: Callable[..., Any], states: Tensor, **options: Any) -> Any:
        """What the model's ``forward`` makes of last hidden states (batch, length, d)."""
        self.output = _Decoded((states,))
        self.output.__dict__["router_logits"] = options.pop("router_logits", None)
        return forward(inputs_embeds=states.detach(), use_cache=False, **options)


@contextmanager
def _without_decoder(model: nn.Module, path: str) -> Iterator[_StandIn]:
    """Puts a stand-in at ``path``: the model's parameters are those outside of its decoder."""
    parent, _, name = path.rpartition(".")
    modules = model.get_submodule(parent)._modules
    decoder = modules[name]
    assert decoder is not None
    modules[name] = stand_in = _StandIn(decoder)
    try:
        yield stand_in
    finally:
        modules[name] = decoder


def _router_loss(
    run: Callable[..., Any],
    hidden: Tensor,
    routers: tuple[Tensor, ...],
    labels: Tensor,
    positions: Tensor | None,
) -> Tensor:
    """Sum over rows of (label tokens) x (the auxiliary loss that the model adds for the row alone):
    the same whatever the micro-batch. ``routers``: the logits of each, (lines * length, experts).
    """
    learned, length = labels != IGNORED, labels.shape[1]
    if positions is None:
        positions = torch.arange(length, device=labels.device).expand_as(labels)
    begins = (positions.flatten() == 0).nonzero().flatten().tolist()
    total = torch.zeros((), device=labels.device)
    for begin, end in zip(begins, [*begins[1:], labels.numel()], strict=True):
        # To the last label is text; a row without labels, padding too, counts nothing.
        labelled = learned.flatten()[begin + 1 : end].nonzero().flatten()
        if not len(labelled):
            continue
        end = begin + 2 + int(labelled[-1])
        of_row = tuple(r.reshape(labels.numel(), -1)[begin:end] for r in routers)
        # Cross-entropy over no label, so that ``loss`` is the auxiliary one times its weight.
        nothing = {"labels": torch.full_like(labels[:1, :1], IGNORED), "num_items_in_batch": 1}
        state = hidden.flatten(0, 1)[begin : begin + 1][None].detach()
        out = run(state, router_logits=of_row, **nothing)
        if out.aux_loss is not None:  # its graph, unlike that of ``loss``, is without the head
            total = total + len(labelled) * (out.loss / out.aux_loss).detach() * out.aux_loss
    return total


@cache
def _class_with_loss(base: type[nn.Module], path: str) -> type[nn.Module]:
    def forward(
        self: Any,
        *args: Any,
        token_labels: Tensor | None = None,
        label_places: Tensor | None = None,
        loss_chunk: int = 0,
        **kwargs: Any,
    ) -> Any:
        if token_labels is None:
            return base.forward(self, *args, **kwargs)
        out = self.get_submodule(path)(*args, use_cache=False, **kwargs)
        hidden = out.last_hidden_state
        with _without_decoder(self, path) as stand_in:
            run = partial(stand_in.run, partial(base.forward, self))
            trained = [p for p in self.parameters() if p.requires_grad]
            loss = chunked_cross_entropy(
                hidden, token_labels, lambda rows: run(rows[None]).logits[0], loss_chunk, trained,
                label_places,
            )  # fmt: skip
            if routers := getattr(out, "router_logits", None):
                positions = kwargs.get("position_ids")
                loss = loss + _router_loss(run, hidden, routers, token_labels, positions)
        return loss

    # generate() asks the signature what the model can do: without logits_to_keep there it has the
    # head compute the logits of every prompt token.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def _decoder_of(model: Any) -> str:
    """Name of the submodule whose states alone make the logits; UserError if none is shown to."""
    why, head, p = "it has no decoder", model.get_output_embeddings(), next(model.parameters())
    text = model.config.get_text_config()
    size, width = (text.vocab_size, text.hidden_size) if head is None else head.weight.shape
    states = torch.zeros(1, 3, width, dtype=p.dtype, device=p.device, requires_grad=True)
    for path in [name for name, m in model.named_modules() if name and hasattr(m, "base_model")]:
        try:
            with _without_decoder(model, path) as stand_in, torch.enable_grad():
                logits = stand_in.run(model.forward, states).logits
            (used,) = torch.autograd.grad(logits.sum(), states, allow_unused=True)
            if used is not None and logits.shape == (1, 3, size):
                return path
            why = f"it does not make them of what its {path} returns, token by token"
        except Exception as error:  # whatever a class does with such a decoder
            why = " ".join(f"{type(error).__name__}: {error}".split())
    what = f"its logits cannot be computed a chunk of tokens at a time ({why})"
    raise UserError(f"{type(model).__name__} is not supported: {what}")


def add_token_loss(model: nn.Module) -> None:
    """Swaps in a class with ``forward(input_ids, token_labels=, label_places=, loss_chunk=)`` ->
    summed loss, inside the model's own forward, where a sharded head is gathered. Raises UserError:
    logits are not shown to be a function of the decoder's states.
    """
    model.__class__ = _class_with_loss(type(model), _decoder_of(model))  # type: ignore[arg-type]  # mypy: no Hashable
