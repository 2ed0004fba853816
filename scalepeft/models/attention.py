"""Attention over packed lines that reads each row alone: transformers' sdpa, a row at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

NAME = "sdpa_rows"  # in transformers' registries; what is not packed gets its sdpa
_KNOWN = ContextVar[Tensor | None]("positions on the host", default=None)


@dataclass(frozen=True)
class Rows:
    """In a mask's place on its way through a model: the rows of all lines, one behind the other."""

    lengths: list[int]
    masks: list[Tensor | None]
    """Of each row (length, length); None where a token sees its row up to itself."""


@contextmanager
def rows_known(positions: Tensor | None) -> Iterator[None]:
    """Within, the tokens of all lines have these positions in their rows, (lines, length) on the
    host; None: a line is a row. Masks are made without looking at, and waiting for, the device's.
    """
    from transformers import masking_utils

    packed = positions is not None and bool((positions.diff() != 1).any())

    def rows(ids: Tensor) -> Tensor | None:  # as transformers numbers them
        return (ids.diff(prepend=ids[:, :1] - 1) != 1).cumsum(-1) if packed else None

    token = _KNOWN.set(positions if packed else None)
    try:
        with mock.patch.object(masking_utils, "find_packed_sequence_indices", rows):
            yield
    finally:
        _KNOWN.reset(token)


def row_mask(**options: Any) -> Rows | Tensor | None:
    """``Rows`` where the mask is causal over packed lines, else what ``sdpa_mask`` makes."""
    from transformers.masking_utils import sdpa_mask

    padded, plain = options["attention_mask"] is not None, options["allow_is_causal_skip"]
    if padded or plain or options["use_vmap"]:  # not packed, or an overlay of the model's own
        return sdpa_mask(**options)
    lines, length, device = options["batch_size"], options["q_length"], options["device"]
    see = options["mask_function"]  # (line, head, query, key) -> bool
    if (positions := _KNOWN.get()) is not None:
        first = positions == 0
    else:
        at = torch.arange(1, length, device=device)
        line = torch.arange(lines, device=device)[:, None]
        seen = [see(line, 0, at, at - 1), see(line, 0, at - 1, at)]  # the token before, and after
        before, after = torch.stack([s.expand(lines, -1) for s in seen]).cpu()  # waits
        if before.all() or after.any():  # one row a line; an image, which sees itself
            return sdpa_mask(**options)
        first = nn.functional.pad(~before, (1, 0), value=True)
    begins = [*first.flatten().nonzero().flatten().tolist(), lines * length]
    masks, window = list[Tensor | None](), options.get("local_size") or length
    for begin, end in pairwise(begins):
        at = begin % length + torch.arange(end - begin, device=device)
        masks.append(see(begin // length, 0, at[:, None], at) if len(at) > window else None)
    return Rows([end - begin for begin, end in pairwise(begins)], masks)


@torch.compiler.disable  # the lengths of rows would each be a graph
def row_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Sdpa, of ``Rows`` each: (lines, heads, length, d) -> (lines, length, heads, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if not isinstance(mask, Rows):
        return sdpa(module, query, key, value, mask, **options)
    flat = [t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value)]
    rows = zip(*(t.split(mask.lengths, 2) for t in flat), mask.masks, strict=True)
    joined = torch.cat([sdpa(module, *row, **options)[0] for row in rows], 1)
    return joined.view(query.shape[0], -1, *joined.shape[2:]), None


def read_rows_alone(model: Any) -> None:
    """Has an sdpa base read each row of a packed line alone, if ``Rows`` reach its attention."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    config, ids = model.config.get_text_config(), torch.zeros(1, 2, device="meta").long()
    if config._attn_implementation != "sdpa":
        return

    def attend(*args: Any, **options: Any) -> None:
        assert args[4] is rows
        row_attention(*args, **options)
        config._attn_implementation = NAME
        raise InterruptedError  # seen enough

    rows = Rows([1, 1], [None, None])
    AttentionMaskInterface.register(NAME, lambda **o: None if o["use_vmap"] else rows)
    AttentionInterface.register(NAME, attend)
    packed = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=ids)
    with suppress(Exception), packed:
        trial = deepcopy(model.get_decoder())  # a forward leaves things in modules (RoPE's tables)
        trial.config._attn_implementation = NAME
        trial(input_ids=ids, position_ids=ids, use_cache=False)
    AttentionMaskInterface.register(NAME, row_mask)
    AttentionInterface.register(NAME, row_attention)
