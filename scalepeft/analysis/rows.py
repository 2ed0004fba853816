"""``scalepeft data``: the rows of a run in numbers, and as the model sees them."""

import sys
from typing import Any

import torch

from scalepeft.build import task_of
from scalepeft.config import files
from scalepeft.config.schema import RunConfig, TrainConfig
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.core.text import table
from scalepeft.data import token_file
from scalepeft.data.loader import Order
from scalepeft.data.packing import micro_batches, padded
from scalepeft.data.tasks.base import SPLITS
from scalepeft.data.tokens import IGNORED, TokenSet
from scalepeft.models.hub import open_base
from scalepeft.parallel.ranks import Ranks

BINS = 32  # of the histogram of lengths, at most
STEPS = 32  # steps that the shares of real tokens are taken of

NAMES = {
    "rows": "rows", "left_out": "broken rows left out", "duplicates": "duplicates",
    "control_tokens": "rows that spell control tokens", "test_questions": "rows of test sets",
    "in_train": "questions that train has too", "in_valid": "questions that valid has too",
    "tokens": "tokens", "learned": "learned tokens", "mean": "tokens a row, mean",
    "median": "median", "p95": "95 % have at most", "longest": "longest", "cutoff": "cutoff",
    "cut": "rows cut", "lost": "of these without a response",
    "dropped": "rows without a token to learn", "padded": "real tokens of padded rows",
    "packed": "of packed lines",
}  # fmt: skip
"""Keys of ``counts_of`` and ``columns`` as people read them."""

LEARNED, PLAIN = "\x1b[32m", "\x1b[0m"


def run(settings: list[str], show: int) -> None:
    """Print counts of the rows, as a training reads them, and ``show`` of them as text."""
    if show < 0:
        raise UserError(f"--show {show}: expected a number of rows")
    config = files.load_partly(settings)
    base = open_base(config.model, Ranks())
    task, found = task_of(config, base.tokenizer), dict[str, TokenSet]()
    for split, file in token_file.files(task, base.tokenizer, base.vocab_size, base.ends).items():
        found[split], remarks = token_file.read(file)
        for line in [*remarks, *token_file.cut_rows(found[split], config.data, split)]:
            say(line)
    counts = {name: counts_of(tokens, config) for name, tokens in found.items()}
    print("\n".join(table(cells(counts))))
    for i in range(min(show, len(found["train"]))):
        print(f"\nrow {i + 1}, {len(found['train'].row(i))} tokens:")
        print(shown(found["train"], i, base.tokenizer))


def shown(tokens: TokenSet, i: int, tokenizer: Any) -> str:
    """A row's text, control tokens and all, with what is learned set off."""
    begin, end = (LEARNED, PLAIN) if sys.stdout.isatty() else ("«", "»")
    ids, learned = tokens.row(i).tolist(), (tokens.labels(i) != IGNORED).tolist()
    text, place, inside = "", 0, False
    for here, label in enumerate([*learned, None], 0):
        if label == inside:
            continue
        piece = tokenizer.decode(ids[:here], clean_up_tokenization_spaces=False)
        text += piece[place:] + (end if inside else begin if label else "")
        place, inside = len(piece), bool(label)
    return text


def counts_of(tokens: TokenSet, config: RunConfig) -> dict[str, Any]:
    """Counts of a token set. ``padded`` and ``packed`` are shares of real tokens in one rank's
    first steps; bin i of ``histogram`` counts the rows of ``edges[i]`` < tokens <= ``edges[i +
    1]``.
    """
    lengths = tokens.lengths()
    ordered = lengths.sort().values
    learned = sum(int((part >= 0).sum()) for part in tokens.tokens.split(1 << 22))
    longest = int(ordered[-1])
    width = -(-longest // BINS)  # whole: bins of unlike widths would make a comb of smooth counts
    edges = torch.arange(0, longest + width, width)
    counts = torch.bucketize(lengths, edges[1:-1]).bincount(minlength=len(edges) - 1)
    return {
        "rows": len(tokens),
        "tokens": int(lengths.sum()),
        "learned": learned - int(tokens.label_start.sum()),
        "mean": round(lengths.float().mean().item(), 1),
        "median": int(ordered[(len(ordered) - 1) // 2]),
        "p95": int(ordered[-1 - len(ordered) // 20]),
        "longest": longest,
        "cutoff": config.data.cutoff,
        **{name: getattr(tokens, name) for name in ("cut", "lost", "dropped")},
        **_shares(lengths, config.train, config.data.cutoff),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _shares(lengths: torch.Tensor, train: TrainConfig, cutoff: int) -> dict[str, float]:
    order, real, taken = Order(len(lengths), train.seed), 0, {"padded": 0, "packed": 0}
    budget = train.micro_tokens or train.micro_batch * cutoff
    for step in range(min(STEPS, -(-len(lengths) // train.global_batch))):
        begin = step * train.global_batch
        rows = [int(lengths[order[i]]) for i in range(begin, begin + train.global_batch)]
        real += sum(rows)
        for i in range(0, len(rows), train.micro_batch):
            part = rows[i : i + train.micro_batch]
            taken["padded"] += len(part) * padded(max(part))
        for lines in micro_batches(rows, 1, budget, float("inf"))[0]:
            taken["packed"] += sum(padded(sum(rows[i] for i in line)) for line in lines)
    return {name: round(real / count, 3) for name, count in taken.items()}


def columns(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The counts in a pipeline's data/summary.json, by split, as ``cells`` takes them."""
    found = dict[str, dict[str, Any]]()
    for s in SPLITS:
        if held := {**summary.get(s, {}), **summary["tokens"].get(s, {})}:
            found[s] = held | {f"in_{o}": summary.get(f"{s}_questions_in_{o}") for o in found}
    return found


def cells(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The counts of splits (name -> as ``counts_of`` has them) as rows of a table."""
    rows = [["", *found]]
    for key, name in NAMES.items():
        form = "{:.1%}" if key in ("padded", "packed") else "{:,}"
        held = [split.get(key) for split in found.values()]
        if any(value is not None for value in held):
            rows.append([name, *("" if value is None else form.format(value) for value in held)])
    return rows
