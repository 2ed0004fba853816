"""Attention over packed lines that reads each row alone: transformers' sdpa, a row at a time."""

from contextlib import suppress
from copy import deepcopy
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

NAME = "sdpa_rows"
"""The implementation in transformers' registries; what is not packed gets its sdpa."""


class Rows:
    """Takes a mask's place on its way through a model: the rows of all lines, one behind the other.

    Args:
        begins: each row's first token, counted through all lines; then the number of tokens.
        masks: of each row (length, length); None where a token sees its row up to itself.
    """

    def __init__(self, begins: list[int], masks: list[Tensor | None]) -> None:
        self.lengths, self.masks = [end - begin for begin, end in pairwise(begins)], masks


def _neighbors(see: Any, shape: tuple[int, int], device: Any) -> Tensor:
    """Whether each token (2, lines, length) is seen by the one behind it, and by the one before it;
    ``see(line, head, query, key)`` is transformers' mask.
    """
    at = torch.arange(1, shape[1], device=device)
    line = torch.arange(shape[0], device=device)[:, None]
    seen = [m.expand(shape[0], -1) for m in (see(line, 0, at, at - 1), see(line, 0, at - 1, at))]
    return nn.functional.pad(torch.stack(seen), (1, 0)).cpu()  # waits for the device, once a mask


def row_mask(**options: Any) -> Rows | Tensor | None:
    """``Rows`` where the mask is causal over packed lines, else what ``sdpa_mask`` makes."""
    from transformers.masking_utils import sdpa_mask

    packed = options.get("attention_mask") is None and not options["allow_is_causal_skip"]
    if not packed or options.get("use_vmap"):  # padding, or an overlay of the model's own
        return sdpa_mask(**options)
    see, length, device = options["mask_function"], options["q_length"], options["device"]
    size = options["batch_size"] * length
    behind, ahead = _neighbors(see, (options["batch_size"], length), device)
    if ahead.any():
        return sdpa_mask(**options)
    begins = [*(~behind.flatten()).nonzero().flatten().tolist(), size]
    masks, window = [], options.get("local_size") or size
    for begin, end in pairwise(begins):
        at = begin % length + torch.arange(end - begin, device=device)
        masks.append(see(begin // length, 0, at[:, None], at) if len(at) > window else None)
    return Rows(begins, masks)


def row_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' sdpa: (lines, heads, length, d) -> (lines, length, heads, d); of ``Rows``, each
    by itself.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if not isinstance(mask, Rows):
        return sdpa(module, query, key, value, mask, **options)
    flat = [t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value)]
    rows = zip(*(t.split(mask.lengths, 2) for t in flat), mask.masks, strict=True)
    joined = torch.cat([sdpa(module, *row, **options)[0] for row in rows], 1)
    return joined.view(query.shape[0], -1, *joined.shape[2:]), None


class _Reached(Exception):
    """An attention layer has got ``Rows``, and computed with them."""


def read_rows_alone(model: Any) -> bool:
    """Has a base on the meta device, of sdpa, read each row of a packed line alone; returns whether
    it does.

    It does if a trial brings what ``row_mask`` makes to ``row_attention``; else it masks as before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    if model.config.get_text_config()._attn_implementation != "sdpa":
        return False

    def tried(*args: Any, **options: Any) -> None:
        if isinstance(args[4], Rows):
            row_attention(*args, **options)
            raise _Reached

    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    AttentionMaskInterface.register(NAME, row_mask)
    AttentionInterface.register(NAME, tried)
    trial = deepcopy(model.get_decoder())  # a forward leaves things in modules (tables of RoPE)
    trial.config._attn_implementation = NAME
    edges = mock.patch(f"{__name__}._neighbors", return_value=torch.zeros(2, 1, 2).bool())
    packed = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=ids)
    with suppress(Exception), edges, packed:
        try:
            trial(input_ids=ids, position_ids=ids, use_cache=False)
        except _Reached:
            model.config.get_text_config()._attn_implementation = NAME
        finally:
            AttentionInterface.register(NAME, row_attention)
    return bool(model.config.get_text_config()._attn_implementation == NAME)
