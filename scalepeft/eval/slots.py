"""Greedy search in slots: a row whose answer has ended leaves, and a waiting one takes its place.

The rows in the slots share a cache, left-padded to the longest of them. Rows that enter are
prefilled in a cache of their own, which is then put below it.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

LOT_SECONDS = 5.0  # of answers are lost at most where a process is killed


@dataclass
class Row:
    """A prompt and its answer so far, of at most ``limit`` tokens.

    Attributes:
        cut: the prompt has lost its beginning.
    """

    index: int
    prompt: list[int]
    limit: int
    cut: bool = False
    new: list[int] = field(default_factory=list)
    done: bool = False


PLAIN = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
}
"""Layers of a cache that hold each token's keys and values, states of each row, or nothing."""


def obstacle(model: Any, longest: int) -> str:
    """Why rows of at most ``longest`` tokens cannot come and go in a cache of ``model``; empty if
    they can.
    """
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" not in takes or not model._supports_default_dynamic_cache():
        return "its forward takes a cache of its own"
    text = model.config.get_text_config(decoder=True)
    found = {type(layer).__name__ for layer in _cache(text).layers}
    if model.config.is_encoder_decoder or found - PLAIN:
        return f"its cache holds {', '.join(sorted(found - PLAIN)) or 'what an encoder made'}"
    if model._is_stateful and not any("Linear" in name for name in found):
        return "it keeps states outside of its cache"
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") not in ("dynamic", "longrope"):
            continue
        short = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        if short < longest:
            return (
                f"its positions depend on the longest row where that has over {short} tokens;"
                f" evaluate.max_tokens={short} rules that out"
            )
    return ""


class Slots:
    """``size`` rows at once, each answered as if it were alone. ``ends`` are the tokens that end an
    answer; ``stopped`` tells of answers so far which have come to a stop text. ``synced``: ranks go
    through the same number of forwards (sharded parameters).
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        size: int,
        ends: list[int],
        stopped: Callable[[list[list[int]]], list[bool]],
        synced: bool,
    ) -> None:
        self.model, self.device, self.size, self.synced = model, device, size, synced
        self.ends, self.stopped = {*ends}, stopped
        # Prefilling row by row would cost more forwards than some idle slots do.
        self.least = max(1, size // 8)
        self.takes = inspect.signature(model.forward).parameters
        self.text = model.config.get_text_config(decoder=True)
        self.rows: list[Row] = []
        self.last = self.mask = torch.empty(0)  # (rows,) token to go in; (rows, tokens) 0 or 1
        self.cache: Any = None

    @torch.no_grad()
    def run(self, waiting: Iterator[Row]) -> Iterator[list[Row]]:
        """Answers all rows that are ``waiting``; yields those that are done, in lots of some
        seconds. ``synced``: ranks yield after the same forwards, if need be a lot without a row.
        """
        done: list[Row] = []
        begin = time.monotonic()
        while True:
            fresh = self._admitted(waiting)
            busy, due = bool(fresh or self.rows), time.monotonic() - begin > LOT_SECONDS
            if self.synced:
                flags = torch.tensor([busy, due], dtype=torch.int, device=self.device)
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
                busy, due = map(bool, flags.tolist())
            if due or not busy:
                yield done
                done, begin = [], time.monotonic()
            if not busy:
                return
            done += self._step(fresh)

    def _admitted(self, waiting: Iterator[Row]) -> list[Row]:
        """The rows that enter now; those that are done leave, if enough of them are."""
        kept = [i for i, row in enumerate(self.rows) if not row.done]
        free = self.size - len(kept)
        fresh = list(islice(waiting, free)) if free >= self.least or not kept else []
        if fresh or not kept or len(self.rows) - len(kept) >= self.least:
            self._keep(kept)
        return fresh

    def _keep(self, kept: list[int]) -> None:
        """Rows of these numbers alone, without the padding that all of them have."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.cache = None
            return
        index = torch.tensor(kept, device=self.device)
        longest = max(len(row.prompt) + len(row.new) - 1 for row in self.rows)
        self.last, self.mask = self.last[index], self.mask[index, -longest:]
        for held, name, tokens in _tensors(self.cache):
            held[name] = (held[name][..., -longest:, :] if tokens else held[name])[index]

    def _step(self, fresh: list[Row]) -> list[Row]:
        """One forward, of prompts that enter, of all slots, or (nothing to do while other ranks
        have) of one token; the rows that it has ended.
        """
        if fresh:
            rows = fresh
            tokens = self._prefill(fresh)
        elif rows := self.rows:
            # Of a row that is done no position grows: a table of positions would end.
            live = [[int(not row.done)] for row in rows]
            self.mask = torch.cat([self.mask, torch.tensor(live, device=self.device)], 1)
            at = self.mask.sum(1, keepdim=True) - 1
            self.last = tokens = self._forward(self.last[:, None], self.mask, at, self.cache)
        else:
            one = torch.ones(1, 1, dtype=torch.long, device=self.device)
            tokens = self._forward(one, one, one - 1, _cache(self.text))
        live_rows = []
        for row, token in zip(rows, tokens.tolist(), strict=False):
            if not row.done:
                row.new.append(token)
                live_rows.append(row)
        for row, stop in zip(live_rows, self.stopped([r.new for r in live_rows]), strict=True):
            row.done = stop or row.new[-1] in self.ends or len(row.new) >= row.limit
        return [row for row in live_rows if row.done]

    def _prefill(self, fresh: list[Row]) -> Tensor:
        prompts = [torch.tensor(row.prompt) for row in fresh]
        padded = pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=-1)
        padded = padded.to(self.device)
        mask, cache = (padded >= 0).long(), _cache(self.text)
        tokens = self._forward(padded.clamp(min=0), mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        if not self.rows:
            self.rows, self.last, self.mask, self.cache = fresh, tokens, mask, cache
            return tokens
        width = max(self.mask.shape[1], mask.shape[1])
        self.rows = self.rows + fresh
        self.last = torch.cat([self.last, tokens])
        self.mask = torch.cat([pad(m, (width - m.shape[1], 0)) for m in (self.mask, mask)])
        _join(self.cache, cache, width)
        return tokens

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The likeliest token (rows,) after ``ids`` (rows, new); ``mask`` (rows, all)."""
        some = {"position_ids": positions, "logits_to_keep": 1}
        some = {key: value for key, value in some.items() if key in self.takes}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **some
        )
        found: Tensor = out.logits[:, -1].argmax(-1)
        return found


def _cache(text: Any) -> Any:
    """An empty cache for the config ``text``. A window is a matter of the mask: layers that would
    forget what is outside keep it, so that all rows have as many tokens in all layers.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=text)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = DynamicLayer()
    return cache


def _tensors(cache: Any) -> Iterator[tuple[dict[Any, Tensor], Any, bool]]:
    """Every tensor (rows, ...) of a cache: what holds it, under which name, and whether it has
    tokens: (rows, heads, tokens, size).
    """
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            yield from ((vars(layer), name, True) for name in ("keys", "values"))
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            yield from ((states, i, False) for i, state in states.items() if state is not None)


def _join(cache: Any, other: Any, width: int) -> None:
    """Puts the rows of ``other`` below those of ``cache``, left-padded to ``width`` tokens."""
    pairs = zip(_tensors(cache), _tensors(other), strict=True)
    for (held, name, tokens), (new, _, _) in pairs:
        both = [held[name], new[name]]
        if tokens:
            both = [pad(part, (0, 0, width - part.shape[-2], 0)) for part in both]
        held[name] = torch.cat(both)
