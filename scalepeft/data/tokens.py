"""Examples -> tokens (once, cached by content) -> micro-batches in the order of the global sample
index.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides, deciding
from scalepeft.core.files import cache_folder
from scalepeft.data.tasks.base import Example, Split, Task, TaskConfig

IGNORED = -100

CACHE_VERSION = 2
COUNTS = ("dropped", "cut", "lost")


@dataclass(frozen=True)
class TokenSet:
    """Tokenized examples: ``tokens`` of all in one row, cut at ``offsets``; labels begin at
    ``label_start``.
    """

    tokens: Tensor  # (total,) int32
    offsets: Tensor  # (n + 1,) int64
    label_start: Tensor  # (n,) int32, at least 1: the first token has nothing to predict it from
    dropped: int  # examples without a label token left after the cut
    cut: int  # examples that lost their end
    lost: int  # of these, examples that lost their whole response

    def __len__(self) -> int:
        return len(self.label_start)

    def row(self, i: int) -> Tensor:
        """Tokens of an example."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def count(self, rows: list[int]) -> tuple[int, int]:
        """Number of label tokens, and of all tokens without padding, in these rows."""
        lengths = sum(len(self.row(i)) for i in rows)
        return lengths - int(self.label_start[rows].sum()), lengths

    def fingerprint(self) -> str:
        """sha256 of tokens, cuts and labels: a resumed run must see the same data."""
        digest = hashlib.sha256()
        for tensor in (self.tokens, self.offsets, self.label_start):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def take(self, rows: Tensor) -> "TokenSet":
        """The subset of these rows, in this order."""
        counts = (self.dropped, self.cut, self.lost)
        return _joined(list(map(self.row, rows.tolist())), self.label_start[rows], *counts)


def _joined(rows: list[Tensor], starts: Tensor, *counts: int) -> TokenSet:
    tokens = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32)
    return TokenSet(tokens, torch.tensor([0, *map(len, rows)]).cumsum(0), starts, *counts)


def tokenize(examples: list[Example], tokenizer: Any, config: TaskConfig) -> TokenSet:
    """Tokenizes a sequence of prompt (with the tokenizer's BOS), completion and end-of-text, cut at
    ``config.cutoff``.

    With ``config.tokenize`` ``apart`` training sees the very prompt tokens generation starts from.
    ``together`` the first label is the first token that reaches into the completion, wherever the
    tokenizer puts the border.
    """
    pairs = (_apart if config.tokenize == "apart" else _together)(examples, tokenizer)
    rows, starts, dropped, cut, lost = [], [], 0, 0, 0
    for text, border in pairs:
        ids = [*text, tokenizer.eos_token_id]
        start = max(1, border if config.train_on == "response" else 0)
        cut += len(ids) > config.cutoff
        lost += border >= config.cutoff
        ids = ids[: config.cutoff]
        if len(ids) <= start:
            dropped += 1
            continue
        rows.append(torch.tensor(ids, dtype=torch.int32))
        starts.append(start)
    return _joined(rows, torch.tensor(starts, dtype=torch.int32), dropped, cut, lost)


def _apart(examples: list[Example], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """Tokens of each example, and how many of them are the prompt's."""
    prompts = tokenizer([e.prompt for e in examples], verbose=False)["input_ids"]
    completions = tokenizer(
        [e.completion for e in examples], add_special_tokens=False, verbose=False
    )["input_ids"]
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt = strip_eos(prompt, tokenizer)
        yield [*prompt, *completion], len(prompt)


def _together(examples: list[Example], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    texts = [e.prompt + e.completion for e in examples]
    made = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    every = zip(examples, made["input_ids"], made["offset_mapping"], strict=True)
    for example, ids, spans in every:
        ids = strip_eos(ids, tokenizer)
        # A special token has the empty span (0, 0), so BOS is on the prompt's side.
        inside = (i for i, (_, end) in enumerate(spans) if end > len(example.prompt))
        yield ids, next(inside, len(ids))


def strip_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """Removes an end-of-text token that some tokenizers put after every text: a prompt must stay
    open.
    """
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def cached_tokens(examples: list[Example], tokenizer: Any, config: TaskConfig) -> TokenSet:
    """``tokenize`` through a cache keyed by everything that decides the result.

    Raises:
        UserError: the cache's folder cannot be written.
    """
    file = (
        Path(config.cache or cache_folder())
        / "tokens"
        / f"{_key(examples, tokenizer, config)}.safetensors"
    )
    if (cached := _read(file)) is not None:
        return cached
    made = tokenize(examples, tokenizer, config)
    tensors = {"tokens": made.tokens, "offsets": made.offsets, "label_start": made.label_start}
    meta = {"sha256": made.fingerprint(), **{name: str(getattr(made, name)) for name in COUNTS}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary, meta)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"data.cache: {file.parent} cannot be written: {error}; set data.cache=FOLDER"
        ) from None
    return made


def _read(file: Path) -> TokenSet | None:
    """What is cached; None if nothing, or a damaged file."""
    try:
        with safe_open(file, "pt") as f:
            tensors = (f.get_tensor(name) for name in ("tokens", "offsets", "label_start"))
            found = TokenSet(*tensors, *(int(f.metadata()[name]) for name in COUNTS))
            return found if found.fingerprint() == f.metadata()["sha256"] else None
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        return None


def _key(examples: list[Example], tokenizer: Any, config: TaskConfig) -> str:
    header = [
        CACHE_VERSION, *(getattr(config, k) for k in deciding(TaskConfig, Decides.TOKENS)),
        tokenizer.eos_token_id,
        tokenizer_hash(tokenizer),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(header).encode())
    for example in examples:
        # The lengths tell where the prompt ends.
        lengths = f"{len(example.prompt)} {len(example.completion)} "
        key.update(f"{lengths}{example.prompt}{example.completion}".encode())
    return key.hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the tokenizer's full definition."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def prepare(
    task: Task, tokenizer: Any, vocab_size: int, seed: int
) -> tuple[TokenSet, TokenSet | None, list[str]]:
    """Reads and tokenizes the training and validation rows; returns them with a line for what was
    left out.

    Raises:
        UserError: bad files or rows, nothing left to train on, or token ids beyond the model's
            vocabulary.
    """
    config, report, sets = task.config, list[str](), dict[str, TokenSet]()
    splits: tuple[Split, ...] = ("train",)
    if config.valid or (config.OWN_VALID and not config.valid_size):
        splits = ("train", "valid")
    for split in splits:
        sets[split] = tokens = cached_tokens(task.examples(split), tokenizer, config)
        report += [*task.remarks(split), *cut_rows(tokens, config, split)]
        if not len(tokens):
            raise UserError(
                f"data.{split}: no row has a token to learn within data.cutoff={config.cutoff};"
                " raise it"
            )
        if (largest := int(tokens.tokens.max())) >= vocab_size:
            raise UserError(
                f"model.tokenizer: makes token id {largest}, the model has {vocab_size} ids"
                f" (0..{vocab_size - 1}): tokenizer and model do not belong together; set"
                " model.tokenizer to the model's own"
            )
    train, valid = sets["train"], sets.get("valid")
    if size := config.valid_size:
        if size >= (rows := len(train)):
            raise UserError(f"data.valid_size={size} leaves nothing of the {rows} training rows")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        valid = train.take(order[:size].sort().values)
        train = train.take(order[size:].sort().values)
    held_out = "" if valid is None else f", {len(valid)} held out"
    report.append(f"data: {len(train)} training rows{held_out}")
    return train, valid, report


def cut_rows(tokens: TokenSet, config: TaskConfig, split: str) -> list[str]:
    """What the cutoff did to a split, in a line; none if nothing."""
    if not tokens.cut and not tokens.dropped:
        return []
    said = (
        f"data.{split}: {tokens.cut} rows longer than data.cutoff={config.cutoff} were cut;"
        f" {tokens.lost} of them lost their whole response"
    )
    if tokens.dropped:
        said += f"; {tokens.dropped} rows had no token left to learn and were dropped"
    elif tokens.lost:
        said += " and teach their prompt alone (data.train_on=all)"
    return [said]
