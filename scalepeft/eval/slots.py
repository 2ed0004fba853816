"""Greedy search in slots: a row whose answer has ended leaves, and a waiting one takes its place,
prefilled in a cache of its own, which is then put below the left-padded one of all.
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
PLAIN = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # keys and values, or nothing
STATES = {"LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"}  # of each row


@dataclass
class Row:
    """A prompt and its answer so far, of at most ``limit`` tokens; ``cut``: the prompt is."""

    index: int
    prompt: list[int]
    limit: int
    cut: bool = False
    new: list[int] = field(default_factory=list)
    done: bool = False


def obstacle(model: Any, longest: int) -> str:
    """Why rows of at most ``longest`` tokens cannot come and go in a cache of ``model``, or ""."""
    text = model.config.get_text_config(decoder=True)
    takes = inspect.signature(model.forward).parameters
    found = {type(layer).__name__ for layer in _cache(text).layers}
    shared = "past_key_values" in takes and model._supports_default_dynamic_cache()
    if not shared or (model._is_stateful and not found & STATES):
        return "the base keeps a cache of its own"
    if unknown := found - PLAIN - STATES:
        return f"the base's cache holds {', '.join(sorted(unknown))}"
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            short = rope.get("original_max_position_embeddings") or text.max_position_embeddings
            if short < longest:
                what = "the base's RoPE depends on the longest row where that is over"
                return f"{what} {short} tokens long; evaluate.max_tokens={short} rules that out"
    return ""


@dataclass
class Slots:
    """``size`` rows at once, each answered as if it were alone, until a token of ``ends`` or, as
    ``stopped`` tells, a stop text. ``synced``: ranks make as many forwards (sharded parameters).
    """

    model: Any
    device: torch.device
    size: int
    ends: list[int]
    stopped: Callable[[list[list[int]]], list[bool]]
    synced: bool
    rows: list[Row] = field(default_factory=list)
    last: Tensor = field(init=False)  # (rows,) the tokens that go in next
    mask: Tensor = field(init=False)  # (rows, tokens) 1 where there is one
    cache: Any = None

    @torch.no_grad()
    def run(self, waiting: Iterator[Row]) -> Iterator[list[Row]]:
        """Answers the rows that are ``waiting``; yields those done, some seconds' at once."""
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
            if not fresh and not self.rows:  # other ranks have some
                fresh = [Row(-1, [0], 1, done=True)]
            done += self._step(fresh)

    def _admitted(self, waiting: Iterator[Row]) -> list[Row]:
        """The rows that enter now; those that are done leave, if enough of them are."""
        kept = [i for i, row in enumerate(self.rows) if not row.done]
        # Prefilling row by row would cost more forwards than some idle slots do.
        least, free = max(1, self.size // 8), self.size - len(kept)
        fresh = list(islice(waiting, free)) if free >= least or not kept else []
        gone = len(self.rows) - len(kept)
        if gone and (fresh or not kept or gone >= least):
            self.rows = [self.rows[i] for i in kept]
            # A token of an answer goes in one forward after it was made.
            longest = max((len(row.prompt) + len(row.new) - 1 for row in self.rows), default=1)
            index = torch.tensor(kept, dtype=torch.long, device=self.device)
            self.last, self.mask = self.last[index], self.mask[index, -longest:]
            for held, name, tokens in _tensors(self.cache):
                held[name] = (held[name][..., -longest:, :] if tokens else held[name])[index]
        return fresh

    def _step(self, fresh: list[Row]) -> list[Row]:
        """One forward, of prompts that enter or else of all slots; the rows that it has ended."""
        if fresh:
            made = self._prefill(fresh)
        else:
            # Of a row that is done no position grows: a table of positions would end.
            live = [[int(not row.done)] for row in self.rows]
            self.mask = torch.cat([self.mask, torch.tensor(live, device=self.device)], 1)
            at = self.mask.sum(1, keepdim=True) - 1
            self.last = made = self._forward(self.last[:, None], self.mask, at, self.cache)
        pairs = zip(fresh or self.rows, made.tolist(), strict=True)
        rows = [(row, token) for row, token in pairs if not row.done]
        for row, token in rows:
            row.new.append(token)
        for (row, token), stop in zip(rows, self.stopped([r.new for r, _ in rows]), strict=True):
            row.done = stop or token in self.ends or len(row.new) >= row.limit
        return [row for row, _ in rows if row.done]

    def _prefill(self, fresh: list[Row]) -> Tensor:
        ids, mask = left_padded([row.prompt for row in fresh], self.device)
        cache = _cache(self.model.config.get_text_config(decoder=True))
        made = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        if not self.rows:
            self.rows, self.last, self.mask, self.cache = fresh, made, mask, cache
            return made
        width = max(self.mask.shape[1], mask.shape[1])
        self.rows, self.last = self.rows + fresh, torch.cat([self.last, made])
        self.mask = torch.cat([pad(m, (width - m.shape[1], 0)) for m in (self.mask, mask)])
        pairs = zip(_tensors(self.cache), _tensors(cache), strict=True)
        for (held, name, tokens), (new, _, _) in pairs:
            both = [held[name], new[name]]
            if tokens:
                both = [pad(part, (0, 0, width - part.shape[-2], 0)) for part in both]
            held[name] = torch.cat(both)
        return made

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The likeliest token (rows,) after ``ids`` (rows, new); ``mask`` (rows, all)."""
        takes = inspect.signature(self.model.forward).parameters
        known = {"position_ids": positions, "logits_to_keep": 1}
        some = {key: value for key, value in known.items() if key in takes}
        some |= {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        return self.model(input_ids=ids, **some).logits[:, -1].argmax(-1)


def left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as (rows, tokens), and 1 where there is a token."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=-1).to(device)
    return ids.clamp(min=0), (ids >= 0).long()


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
    """A cache's tensors (rows, ...): holder, name, whether it is (rows, heads, tokens, size)."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            yield from ((vars(layer), name, True) for name in ("keys", "values"))
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            yield from ((states, i, False) for i, state in states.items() if state is not None)
