"""Examples -> token ids and labels."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scalepeft.core.errors import UserError
from scalepeft.data.chat import SEAM
from scalepeft.data.tasks.base import Example, TaskConfig

IGNORED = -100

CHUNK = 512  # examples tokenized at a time, by all cores
Encoded = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and where each begins and ends in the text (only where that was asked for)."""


def label_places(labels: Tensor) -> Tensor:
    """Indices of the label tokens in ``labels.flatten()``; nothing predicts the first of a line."""
    return F.pad(labels[:, 1:] != IGNORED, (1, 0)).flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class TokenSet:
    """Tokenized examples: ``tokens`` of all in one row, cut at ``offsets``; labels begin at
    ``label_start``. A negative value ``~t`` is token t without a label.
    """

    tokens: Tensor  # (total,) int32
    offsets: Tensor  # (n + 1,) int64
    label_start: Tensor  # (n,) int32, at least 1: the first token has nothing to predict it from
    dropped: int = 0  # examples without a label token left after the cut
    cut: int = 0  # examples that lost their end
    lost: int = 0  # of these, examples that lost their whole response
    chosen: Tensor | None = None  # the rows of this set among those of the file, ascending

    def __len__(self) -> int:
        return len(self.label_start if self.chosen is None else self.chosen)

    def _at(self, i: int) -> int:
        return i if self.chosen is None else int(self.chosen[i])

    def _raw(self, i: int) -> Tensor:
        at = self._at(i)
        return self.tokens[self.offsets[at] : self.offsets[at + 1]]

    def row(self, i: int) -> Tensor:
        """Tokens of an example."""
        return ids_of(self._raw(i))

    def labels(self, i: int) -> Tensor:
        """Labels of an example: its tokens, ``IGNORED`` where not learned."""
        raw = self._raw(i)
        labels = torch.where(raw < 0, IGNORED, raw)
        labels[: int(self.label_start[self._at(i)])] = IGNORED
        return labels

    def lengths(self) -> Tensor:
        """Tokens of each example, (n,)."""
        lengths = self.offsets.diff()
        return lengths if self.chosen is None else lengths[self.chosen]

    def count(self, rows: list[int]) -> tuple[int, int]:
        """Number of label tokens, and of all tokens without padding, in these rows."""
        labels = sum(int((self.labels(i) != IGNORED).sum()) for i in rows)
        return labels, sum(len(self._raw(i)) for i in rows)

    def fingerprint(self) -> str:
        """sha256 of tokens, cuts and labels: a resumed run must see the same data."""
        rows = torch.arange(len(self)) if self.chosen is None else self.chosen
        digest = hashlib.sha256()
        # Tokens of what stays together in the file at a time.
        for run in rows.tensor_split(((rows.diff() != 1).nonzero().flatten() + 1).tolist()):
            if len(run):
                part = self.tokens[self.offsets[run[0]] : self.offsets[run[-1] + 1]]
                digest.update(part.numpy().data)
        digest.update(F.pad(self.lengths().cumsum(0), (1, 0)).numpy().data)
        digest.update(self.label_start[rows].numpy().data)
        return digest.hexdigest()

    def take(self, rows: Tensor) -> "TokenSet":
        """The subset of these rows, ascending; nothing is copied."""
        return replace(self, chosen=rows if self.chosen is None else self.chosen[rows])


def ids_of(raw: Tensor) -> Tensor:
    """Token ids of values of a ``TokenSet``."""
    return raw ^ (raw >> 31)


@dataclass
class Rows:
    """Tokens of examples, row by row: ``(values as in a TokenSet, label_start)``; counts what is
    cut.

    ``together``, and in conversations, the first label is the first token that reaches into the
    completion. A row ends with one end-of-text, or with another of ``ends``.
    """

    examples: Iterable[Example]
    tokenizer: Any
    config: TaskConfig
    ends: list[int] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0
    lost: int = 0

    def __iter__(self) -> Iterator[tuple["np.ndarray[Any, Any]", int]]:
        examples, cutoff = iter(self.examples), self.config.cutoff
        eos = self.tokenizer.eos_token_id
        ends = {eos, *self.ends}
        while chunk := list(islice(examples, CHUNK)):
            for text, border, learned in self._pairs(chunk):
                size = len(text)
                while size > border + 1 and text[size - 1] in ends and text[size - 2] in ends:
                    size -= 1
                ids = text[:size]
                if size == border or ids[-1] not in ends:
                    ids.append(eos)
                first = learned[0][0] if learned else border
                start = max(1, first if learned or self.config.train_on != "all" else 0)
                self.cut += len(ids) > cutoff
                self.lost += first >= cutoff
                values = np.array(ids[:cutoff], dtype=np.int32)
                for (_, end), (begin, _) in pairwise([*learned, (border, 0)]):
                    values[end:begin] = ~values[end:begin]
                if len(values) <= start or not (values[start:] >= 0).any():
                    self.dropped += 1
                    continue
                yield values, start

    def _pairs(self, chunk: list[Example]) -> "Pairs":
        together = self.config.tokenize == "together"
        for joined, examples in groupby(chunk, key=lambda e: e.joined or together):
            yield from (_together if joined else _apart)(list(examples), self.tokenizer)


Pairs = Iterator[tuple[list[int], int, list[list[int]]]]
"""Of each example: tokens, how many of them are the prompt's, its learned parts in tokens."""


def _apart(examples: list[Example], tokenizer: Any) -> Pairs:
    prompts = encode([e.prompt for e in examples], tokenizer)
    completions = encode([e.completion for e in examples], tokenizer, add_special_tokens=False)
    for (prompt, _), (completion, _) in zip(prompts, completions, strict=True):
        yield [*prompt, *completion], len(prompt), []


def _together(examples: list[Example], tokenizer: Any) -> Pairs:
    texts = [e.prompt + e.completion for e in examples]
    for example, (ids, spans) in zip(examples, encode(texts, tokenizer, where=True), strict=True):
        # A special token has the empty span (0, 0), so BOS is on the prompt's side.
        inside = (i for i, (_, end) in enumerate(spans) if end > len(example.prompt))
        learned = []
        for begin, end in example.learned:  # in characters
            first = next(i for i, (_, e) in enumerate(spans) if e > begin)
            after = (i for i, (b, e) in enumerate(spans) if b >= end and e > b)
            learned.append([first, next(after, len(spans))])
        yield ids, next(inside, len(ids)), learned


def encode(
    texts: list[str], tokenizer: Any, *, where: bool = False, **options: Any
) -> list[Encoded]:
    """Token ids of each text behind one BOS, without EOS and seams; ``where``: with places."""
    seamed = [SEAM in text for text in texts]
    if where or any(seamed):
        options["return_offsets_mapping"] = True
    made = tokenizer(texts, verbose=False, **options)
    places = made["offset_mapping"] if "return_offsets_mapping" in options else [[]] * len(texts)
    end, bos = tokenizer.eos_token_id, getattr(tokenizer, "bos_token_id", None)
    found = []
    for text, seam, ids, spans in zip(texts, seamed, made["input_ids"], places, strict=True):
        if seam:
            ids, spans = _without_seams(text, ids, spans)
        if ids[-1:] == [end] and (len(ids) > 1 or end != bos):  # some put one after every text
            ids = ids[:-1]
        more = next((i for i, token in enumerate(ids) if token != bos), len(ids)) - 1
        found.append((ids[max(more, 0) :], spans[max(more, 0) : len(ids)]))
    return found


def _without_seams(text: str, ids: list[int], spans: list[tuple[int, int]]) -> Encoded:
    kept = [(i, (b, e)) for i, (b, e) in zip(ids, spans, strict=True) if text[b:e] != SEAM]
    if any(SEAM in text[b:e] for _, (b, e) in kept):
        what = "the text spells a control token, and this tokenizer cannot read it as plain text"
        raise UserError(f"{what}; take it out of the row")
    return [i for i, _ in kept], [span for _, span in kept]
