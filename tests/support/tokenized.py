"""Token sets of a test's rows: in memory, and by way of the token file on one rank."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from scalepeft.data import token_file
from scalepeft.data.tasks.base import Example, Task, TaskConfig
from scalepeft.data.tokens import Rows, TokenSet


def tokenize(
    examples: Iterable[Example], tokenizer: Any, config: TaskConfig, ends: Iterable[int] = ()
) -> TokenSet:
    rows = Rows(examples, tokenizer, config, list(ends))
    made = list(rows)
    values = np.concatenate([v for v, _ in made]) if made else np.empty(0, dtype=np.int32)
    offsets = torch.tensor([0, *(len(v) for v, _ in made)]).cumsum(0)
    starts = torch.tensor([start for _, start in made], dtype=torch.int32)
    return TokenSet(torch.from_numpy(values), offsets, starts, rows.dropped, rows.cut, rows.lost)


def prepare(
    task: Task, tokenizer: Any, vocab_size: int, seed: int, ends: list[int] | None = None
) -> tuple[TokenSet, TokenSet | None, list[str]]:
    files = token_file.files(task, tokenizer, vocab_size, ends or [])
    return token_file.prepared(files, task.config, seed)
