"""Splits of a run -> token sets in files that all ranks of a node map into memory."""

import contextlib
import hashlib
import json
import os
import socket
import time
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from scalepeft.core import safetensors
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides, deciding
from scalepeft.core.files import cache_folder, share, shared_folder
from scalepeft.data import rows as readers
from scalepeft.data.tasks.base import Split, Task, TaskConfig
from scalepeft.data.tokens import Rows, TokenSet, ids_of

DAY = 86400  # seconds
HEADER = 1 << 16  # bytes that are kept for what is known last
COUNTS = ("dropped", "cut", "lost")
PARTS = ("tokens", "lengths", "label_start")


def split_file(task: Task, split: Split, tokenizer: Any, ends: list[int]) -> Path:
    """The file with a split's tokens, made in a stream unless it is there and whole. Raises
    UserError: rows cannot be read, or the cache's folder cannot be written.
    """
    folder = Path(task.config.cache or cache_folder()) / "tokens"
    file = folder / f"{_key(task, split, tokenizer, ends)}.safetensors"
    if whole(file):
        return file
    temporary = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        shared_folder(folder)
        for left in folder.glob("*.tmp"):  # of processes that were killed; not all are ours
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > DAY:
                    left.unlink()
        _write(temporary, task, split, Rows(task.stream(split), tokenizer, task.config, ends))
        share(temporary)
        temporary.replace(file)
    except OSError as error:
        fix = "set data.cache=FOLDER"
        raise UserError(f"data.cache: {folder} cannot be written: {error}; {fix}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return file


def _write(file: Path, task: Task, split: Split, rows: Rows) -> None:
    """A safetensors file: the tensors behind a header of fixed size, which is written last."""
    lengths, starts, digest = array("i"), array("i"), hashlib.sha256()
    with file.open("wb") as f:
        f.write(bytes(HEADER))
        for values, start in rows:
            f.write(content := values.tobytes())
            digest.update(content)
            lengths.append(len(values))
            starts.append(start)
        f.write(lengths.tobytes() + starts.tobytes())
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        digest.update(offsets.astype(np.int64).tobytes() + starts.tobytes())
        meta = {name: str(getattr(rows, name)) for name in COUNTS}
        meta |= {"sha256": digest.hexdigest(), "remarks": json.dumps(task.remarks(split))}
        counts = zip(PARTS, (sum(lengths), len(lengths), len(starts)), strict=True)
        head, _ = safetensors.header(((name, "I32", [n], 4 * n) for name, n in counts), meta)
        assert len(head) <= HEADER, "remarks are a few lines"
        f.seek(0)
        f.write((HEADER - 8).to_bytes(8, "little") + head[8:].ljust(HEADER - 8))


def read(file: Path) -> tuple[TokenSet, list[str]]:
    """The tokens of a split, mapped into memory, and what is to be said of its rows."""
    with safe_open(file, "pt") as f:
        meta = f.metadata()
        tokens, lengths, starts = (f.get_tensor(name) for name in PARTS)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    dropped, cut, lost = (int(meta[name]) for name in COUNTS)
    return TokenSet(tokens, offsets, starts, dropped, cut, lost), json.loads(meta["remarks"])


def whole(file: Path) -> bool:
    """Whether the tokens are those that were written."""
    try:
        with safe_open(file, "pt") as f:
            recorded = f.metadata()["sha256"]
        return bool(read(file)[0].fingerprint() == recorded)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        return False


@cache
def _code() -> str:
    """sha256 of the code and lists that make tokens of rows: no other version's are taken."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".json", ".yaml"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _key(task: Task, split: Split, tokenizer: Any, ends: list[int]) -> str:
    config = task.config
    decide = deciding(type(config), Decides.ROWS, Decides.TOKENS, Decides.LENGTH)
    decides = [
        _code(), split, *((name, getattr(config, name)) for name in decide), ends,
        tokenizer_hash(tokenizer), task.renderer.chat_template,
        tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None),
        *([readers.content(f) for f in readers.expand(getattr(config, s), f"data.{s}")]
          for s in task.reads(split)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the tokenizer's full definition."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def files(task: Task, tokenizer: Any, vocab_size: int, ends: list[int]) -> dict[Split, Path]:
    """The files of training and validation rows. Raises UserError: bad, none left, foreign ids."""
    config, found = task.config, dict[Split, Path]()
    splits: tuple[Split, ...] = ("train",)
    if config.valid or (config.OWN_VALID and not config.valid_size):
        splits = ("train", "valid")
    for split in splits:
        found[split] = split_file(task, split, tokenizer, ends)
        tokens, _ = read(found[split])
        if not len(tokens):
            what = f"no row has a token to learn within data.cutoff={config.cutoff}; raise it"
            raise UserError(f"data.{split}: {what}")
        largest = max(int(ids_of(part).max()) for part in tokens.tokens.split(1 << 22))
        if largest >= vocab_size:
            raise UserError(
                f"model.tokenizer: makes token id {largest}, the model has {vocab_size} ids"
                f" (0..{vocab_size - 1}): tokenizer and model do not belong together; set"
                " model.tokenizer to the model's own"
            )
    return found


def prepared(
    found: dict[Split, Path], config: TaskConfig, seed: int
) -> tuple[TokenSet, TokenSet | None, list[str]]:
    """Training rows, validation rows, remarks; UserError: ``data.valid_size`` leaves nothing."""
    sets, report = dict[str, TokenSet](), list[str]()
    for split, file in found.items():
        sets[split], remarks = read(file)
        report += [*remarks, *cut_rows(sets[split], config, split)]
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
    said = f"data.{split}: {tokens.cut} rows longer than data.cutoff={config.cutoff} were cut;"
    said += f" {tokens.lost} of them lost their whole response"
    if tokens.dropped:
        said += f"; {tokens.dropped} rows had no token left to learn and were dropped"
    elif tokens.lost:
        said += " and teach their prompt alone (data.train_on=all)"
    return [said]
