"""Damaged checkpoints, records and adapters: read as they were, or refused in one line."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from processes import TINY, call
from tally import Tally
from test_checkpoint import claimed, damage_at_random, expected, save_in_parts

from scalepeft import cli
from scalepeft.adapters.inject import read_adapter
from scalepeft.core.errors import UserError
from scalepeft.models.tensors import Reader
from scalepeft.run.checkpoint import RunFolder

Damage = Callable[[Path, Random], str]
"""Does something to the files of a folder; returns what."""
CHECKPOINT: list[Damage] = [damage_at_random]
WRONG = ["[]", "{}", "null", "[" * 5000, "9" * 5000, '{"a": [', "\x1b[31mred", "NaN", '""']


def damage_a_record(folder: Path, rng: Random) -> str:
    """What disks and people do to a file of text."""
    file = rng.choice(sorted(f for f in folder.iterdir() if f.is_file() and f.stat().st_size))
    data, kind = bytearray(file.read_bytes()), rng.choice(["flip", "cut", "zeros", "line", "all"])
    at = rng.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at:] = bytes(len(data) - at)
    elif kind == "line":
        lines = data.splitlines(keepends=True)
        lines[rng.randrange(len(lines))] = bytearray(rng.choice(WRONG).encode() + b"\n")
        data = bytearray(b"".join(lines))
    else:
        data = bytearray(rng.choice(WRONG).encode())
    file.write_bytes(data)
    return f"{kind} {file.name}"


RECORD: list[Damage] = [damage_a_record]


def _checkpoint(saved: Path, run: Path, tally: Tally) -> None:
    shutil.copytree(saved, run)
    damaged = [30] if tally.rng.random() < 0.7 else [30, 20]
    folders = [run / f"checkpoints/step-{n:06d}" for n in damaged]
    what = str([tally.rng.choice(CHECKPOINT)(folder, tally.rng) for folder in folders])
    try:
        found, passed_over = RunFolder(run).newest()
    except Exception as error:
        tally.count(isinstance(error, UserError), f"{what}: {type(error).__name__}: {error}")
        return
    said = all(len(reason) <= 400 and reason.isprintable() for reason in passed_over)
    tally.count(found is not None and said, f"{what}: {found}, {passed_over}")
    if found is not None:
        reader = Reader(found.folder)
        same = (torch.equal(reader.whole(n), t) for n, t in expected(found.step).items())
        tally.compare(all(same), what)


def _printed(*words: str) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        code = cli.main([*words])
    return code, text.getvalue()


def _records(finished: Path, run: Path, tally: Tally) -> None:
    shutil.copytree(finished, run)
    what = tally.rng.choice(RECORD)(run, tally.rng)
    code, text = _printed("status", str(run))
    tally.count(code in (0, 2), f"status after {what}: exit code {code}", text)
    if tally.rng.random() < 0.1:  # a process of its own; two more steps than it has
        os.environ["OMP_NUM_THREADS"] = "1"
        done = call("train", *TINY, *SHORT, "train.max_steps=8", f"run_dir={run}")
        ok = done.returncode in (0, 2)
        tally.count(ok, f"train after {what}: {done.returncode}", done.stderr)


def _adapter(finished: Path, run: Path, tally: Tally) -> None:
    shutil.copytree(finished / "adapter", run)
    what = tally.rng.choice(RECORD)(run, tally.rng)
    files = ("adapter_model.safetensors", "adapter_config.json", "scalepeft.json")
    same = [(finished / "adapter" / name).read_bytes() for name in files]
    now = [(run / name).read_bytes() for name in files]
    try:
        read = read_adapter(run)
    except Exception as error:
        tally.count(isinstance(error, UserError), f"{what}: {type(error).__name__}: {error}")
        return
    tally.count(True, what)
    want = read_adapter(finished / "adapter")
    tally.compare(now == same or all(torch.equal(read[1][n], t) for n, t in want[1].items()), what)


SHORT = ["train.save_every=3"]


def campaign(work: Path, tally: Tally) -> None:
    """One damage after the other, each to a fresh copy; mostly to checkpoints."""
    saved = [work / f"saved-{writers}" for writers in (1, 3)]
    for folder, writers in zip(saved, (1, 3), strict=True):
        for step in (10, 20, 30):
            save_in_parts(claimed(folder), step, writers)
    finished = work / "finished"
    done = call("train", *TINY, *SHORT, "train.max_steps=6", f"run_dir={finished}")
    assert done.returncode == 0, done.stderr
    while tally.goes_on():
        run, which = work / "run", tally.rng.random()
        if which < 0.7:
            _checkpoint(tally.rng.choice(saved), run, tally)
        elif which < 0.9:
            _records(finished, run, tally)
        else:
            _adapter(finished, run, tally)
        shutil.rmtree(run)
