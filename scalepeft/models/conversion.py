"""Which tensors of a folder make up which of the model's, by transformers' own mapping, by rows."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.core.errors import UserError
from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.models.sources import Source

PIECE_ROWS = 1024  # compared at one time
# Operations that leave the rows of a stacked tensor where they are, if not told dimension 0.
ROW_WISE = {"Chunk", "Concatenate", "Transpose", "Interleave"}
Take = Callable[[str, Source], Tensor]


@dataclass(eq=False)
class Group:
    """Tensors of files that become tensors of the model together."""

    first_target: str  # name of the model's tensor, the first of them for a split
    converter: Any  # transformers' ``WeightConverter``; None where a tensor is only renamed
    model: Any  # on the meta device, as its class makes it
    sources: dict[str, list[tuple[str, Source]]] = field(default_factory=lambda: defaultdict(list))
    """Pattern of the converter -> (name, tensor) in transformers' order."""

    @cached_property
    def names(self) -> list[str]:
        """Of the files' tensors."""
        return [name for listed in self.sources.values() for name, _ in listed]

    @cached_property
    def by_rows(self) -> bool:
        """Row i of the target is made of the i-th tensor of each list and of no other."""
        if self.converter is None:
            return True
        first, *later = self.converter.operations
        dims = {getattr(op, key, 1) for op in later for key in ("dim", "dim0", "dim1")}
        return (
            type(first).__name__ == "MergeModulelist"
            and first.dim == 0
            and {type(op).__name__ for op in later} <= ROW_WISE
            and not dims & {0, -3}
            and len({*map(len, self.sources.values())}) == 1
        )

    def convert(self, take: Take, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The model's tensors (of one made by rows, these) out of what ``take`` gives for each."""
        if self.converter is None:
            ((name, source),) = next(iter(self.sources.values()))
            return {self.first_target: take(name, source)}
        converter = copy.deepcopy(self.converter)
        rows = rows if self.by_rows else slice(None)
        converter.collected_tensors = {
            pattern: [take(name, source) for name, source in listed[rows]]
            for pattern, listed in self.sources.items()
        }
        try:
            made = converter.convert(self.first_target, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise UserError(
                f"{self.names[0]} and {len(self.names) - 1} more do not make {self.first_target} as"
                f" transformers' mapping says ({error}); the files are of another model"
            ) from None
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def shapes(self) -> dict[str, Tensor]:
        """Returns the model's tensors on the meta device."""
        return self.convert(lambda _, s: torch.empty(s.shape, dtype=s.dtype, device="meta"))

    def restore(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Returns a tensor of the files out of values of the model's: the inverse of ``convert``,
        whose operations only move numbers. The numbers of its places, sent through them with -1 for
        those of other tensors, tell where its values are now. Raises UserError: one does more.
        """
        listed = next(of for of in self.sources.values() if name in dict(of))
        row, shape = [key for key, _ in listed].index(name), dict(listed)[name].shape
        rows = slice(row, row + 1) if self.by_rows else slice(None)
        numbers = torch.arange(math.prod(shape))

        def places(key: str, source: Source) -> Tensor:
            return numbers.view(shape) if key == name else torch.full(source.shape, -1)

        made = self.convert(places, rows)
        flat = torch.cat([values[key][rows].reshape(-1) for key in made])
        place = torch.cat([made[key].reshape(-1) for key in made])
        at = (place >= 0).nonzero().squeeze(1)
        at = at[place[at].argsort()]
        if len(flat) != len(place) or not torch.equal(place[at], numbers):
            raise UserError(
                f"{self.first_target} is not {name} and others in another order, so that merged"
                " values cannot be written back; keep the adapter"
            )
        return flat[at.to(flat.device)].view(shape)


class _Converted(Source):
    """A tensor of the model that a group makes."""

    def __init__(self, group: Group, name: str, like: Tensor) -> None:
        self.group, self.name = group, name
        self.shape, self.dtype = tuple(like.shape), like.dtype
        self.where = next(iter(group.sources.values()))[0][1].where
        self.by_rows = group.by_rows

    def rows(self, first: int, last: int) -> Tensor:
        """Reads the tensors of these rows where each row has its own, else all of them."""
        made = self.group.convert(lambda _, source: source.whole(), slice(first, last))[self.name]
        return made if self.by_rows else made[first:last]


class Layout:
    """A folder's tensors, bound to a model. Raises UserError: lacking, unused, not convertible."""

    def __init__(
        self, model: Any, entries: dict[str, Source], where: str, stray: list[str], unexpected: str
    ) -> None:
        self.sources: dict[str, Source] = {}  # every tensor of the model's ``state_dict``
        self.groups: dict[str, Group] = {}  # of each used tensor of the files, what it is a part of
        self.untied: list[str] = []  # tensors of the model that its config ties, and no file does
        left = self._assign(model, entries)
        self._tie(model)
        info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(left))
        model._adjust_missing_and_unexpected_keys(info)
        unknown = sorted(left[key] for key in info.unexpected_keys)
        extra = f"{len(unknown)} tensors that {type(model).__name__} does not use"
        for first in unknown[:1]:
            extra += f", first '{first}' ({entries[first].where})"
        if missing := sorted(set(model.state_dict()) - self.sources.keys()):
            raise UserError(
                f"{where}: no tensor '{missing[0]}' in {len(entries)} found, and {len(missing) - 1}"
                f" more that {type(model).__name__} needs; the files are incomplete or of another"
                f" architecture than config.json (they have {extra})"
            )
        if unknown and unexpected == "error":
            raise UserError(
                f"{where}: {extra}; the files are of another model than config.json, or set"
                " model.unexpected=ignore to leave them out as transformers does"
            )
        if unknown and rank() == 0:
            say(f"{where}: {extra}: left out (model.unexpected=ignore)")
        if stray and rank() == 0:
            say(f"{where}: {', '.join(stray)} not read: transformers takes other files there")

    def _assign(self, model: Any, entries: dict[str, Source]) -> dict[str, str]:
        """Fills ``groups`` and ``sources``; returns renamed -> name of what fits nowhere."""
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        # Operations ask it for shapes, and ours are about to change (quantized layers).
        model = copy.deepcopy(model) if converters else model
        found: dict[str, Group] = {}
        left: dict[str, str] = {}
        renamed = loading.rename_source_key
        for name in sorted(entries, key=loading.dot_natural_key):
            target, pattern = renamed(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = renamed(name, [], [], prefix, state)
            if target not in state:
                left[target] = name
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            group = found.setdefault(target, Group(target, converter, model))
            if group.converter is None and group.sources:
                raise UserError(
                    f"{entries[name].where}: '{name}' and '{group.names[0]}' are both {target} of"
                    f" {type(model).__name__}; keep one of them"
                )
            group.sources[pattern or name].append((name, entries[name]))
        for group in found.values():
            self.groups |= dict.fromkeys(group.names, group)
            if group.converter is None:
                self.sources[group.first_target] = entries[group.names[0]]
            else:
                for name, like in group.shapes().items():
                    self.sources[name] = _Converted(group, name, like)
        return left

    def _tie(self, model: Any) -> None:
        """Ties as transformers does: to what is there; not at all if both are there and differ."""
        for target, source in list(model.all_tied_weights_keys.items()):
            here = [name for name in (source, target) if name in self.sources]
            if len(here) == 2 and not _equal(*(self.sources[name] for name in here)):
                self.untied.append(target)
            elif here:
                self.sources |= dict.fromkeys((source, target), self.sources[here[0]])
        self.untie(model)

    def untie(self, model: Any) -> None:
        """Unties in a model what the files hold with different values."""
        for name in self.untied:
            parent, _, key = name.rpartition(".")
            module = model.get_submodule(parent)
            module._parameters[key] = nn.Parameter(torch.empty_like(module._parameters[key]))
            del model.all_tied_weights_keys[name]
            model.config.tie_word_embeddings = False
            if rank() == 0:
                say(f"{name} has values of its own in the files: not tied, as in transformers")


def _equal(one: Source, other: Source) -> bool:
    pieces = zip(one.pieces(PIECE_ROWS), other.pieces(PIECE_ROWS), strict=False)
    return one.shape == other.shape and all(torch.equal(a, b) for a, b in pieces)
