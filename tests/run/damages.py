"""Seeded damage of a checkpoint folder: what disks, crashes, copies, people and strangers do to it.

``campaign(folder, seed, count)`` damages copies of a run and says what a resume and a save made of
them; tests take some, ``python tests/run/damages.py FOLDER SEED COUNT`` more.
"""

import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalepeft.core.errors import UserError
from scalepeft.core.files import sealed
from scalepeft.models.tensors import Reader, write_tensors
from scalepeft.run.checkpoint import RunFolder

STATE = {"base": {}, "data": "", "nonfinite_in_a_row": 0}
TENSORS = {"a.adapter.U": (6, 50), "b.adapter.U": (40,), "c.adapter.s": ()}


def expected(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}


def claimed(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.claim()
    return folder


def save(folder: RunFolder, step: int) -> Path:
    temporary = folder.begin(step)
    moments = {f"{name}/exp_avg": tensor + 1 for name, tensor in expected(step).items()}
    files = {
        f"{kind}.safetensors": write_tensors(temporary / f"{kind}.safetensors", tensors)
        for kind, tensors in (("trained", expected(step)), ("optimizer", moments))
    }
    state = {"step": step, "tensors": 2 * len(TENSORS), **STATE}
    return folder.commit(temporary, files, state, 3)


def any_json(rng: random.Random) -> str:
    """A JSON text that is not what was there, as hostile as one can be."""
    return rng.choice([
        "[" * 100_000, "9" * 5000, "[]", "null", "{}", '"x"', "", '{"a":' * 3000, "NaN",
        '{"schema": 2, "step": [], "files": {}}', '{"files": {"state.json": null}, "schema": 2,'
        ' "step": 20}', '{"schema": 2, "step": 1e999, "files": {"trained": 1}}', "\ufeff{}", "\0",
    ])  # fmt: skip


def signed(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the manifest and seals it anew, as a stranger does."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(sealed(manifest)))


def resigned_state(folder: Path, text: str) -> None:
    (folder / "state.json").write_text(text)
    known = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    signed(folder, lambda m: m["files"].update({"state.json": known}))


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def replaced(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


def renamed(folder: Path, name: str) -> None:
    """The manifest names a file outside, or one that cannot be."""
    signed(folder, lambda m: m["files"].update({name: m["files"].pop("optimizer.safetensors")}))


def without(key: str) -> Callable[[Path, Path, random.Random], None]:
    def edit(folder: Path, file: Path, rng: random.Random) -> None:
        state = json.loads((folder / "state.json").read_text())
        del state[key]
        resigned_state(folder, json.dumps(state))

    return edit


def number(key: str) -> Callable[[Path, Path, random.Random], None]:
    """One bit of a number in the manifest, its digest as it was."""

    def edit(folder: Path, file: Path, rng: random.Random) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[key] ^= 1 << rng.randrange(8)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


KINDS: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "flip": lambda _, file, rng: flip(file, rng),
    "truncate": lambda _, file, rng: os.truncate(file, rng.randrange(file.stat().st_size)),
    "append": lambda _, file, rng: file.write_bytes(file.read_bytes() + rng.randbytes(5)),
    "zeros": lambda _, file, rng: file.write_bytes(bytes(file.stat().st_size)),
    "garbage": lambda _, file, rng: file.write_bytes(rng.randbytes(rng.randrange(400))),
    "delete": lambda _, file, rng: file.unlink(),
    "folder": lambda _, file, rng: replaced(file, Path.mkdir),
    "fifo": lambda _, file, rng: replaced(file, os.mkfifo),
    "dead link": lambda _, file, rng: replaced(file, lambda f: f.symlink_to("nowhere")),
    "of another": lambda f, file, rng: shutil.copy(f.parent / "step-000010" / file.name, file),
    "swapped": lambda f, file, rng: (
        (f / "trained.safetensors").rename(f / "x"),
        (f / "optimizer.safetensors").rename(f / "trained.safetensors"),
        (f / "x").rename(f / "optimizer.safetensors"),
    ),
    "emptied": lambda f, file, rng: [file.unlink() for file in f.iterdir()],
    "manifest json": lambda f, file, rng: (f / "manifest.json").write_text(any_json(rng)),
    "manifest bit": lambda f, file, rng: flip(f / "manifest.json", rng),
    "manifest fifo": lambda f, file, rng: replaced(f / "manifest.json", os.mkfifo),
    "schema": number("schema"),
    "tensors": number("tensors"),
    "later schema": lambda f, file, rng: signed(f, lambda m: m.update(schema=3)),
    "state json": lambda f, file, rng: resigned_state(f, any_json(rng)),
    "no base": without("base"),
    "no data": without("data"),
    "outside": lambda f, file, rng: renamed(f, rng.choice(["../x", "/etc/passwd", "a/../../x"])),
    "odd name": lambda f, file, rng: renamed(
        f, rng.choice(["\x1b[31m\n" * 9, "x" * 100_000, "\x00", "optimizer\u202e", ""])
    ),
    "odd type": lambda f, file, rng: signed(
        f, lambda m: m.update({rng.choice(["schema", "step", "files"]): rng.choice([[], None, -1])})
    ),
}  # fmt: skip


def campaign(folder: Path, seed: int, count: int) -> Counter[str]:
    """Damages ``count`` copies of a run, kind after kind; each is then resumed and saved twice.

    Raises:
        AssertionError: something was loaded in silence, lost, or said in a line of odd length.
    """
    rng, found = random.Random(seed), Counter[str]()
    saved = folder / "saved"
    writer = claimed(saved)
    for step in (10, 20, 30):
        save(writer, step)
    for case in range(count):
        kind, step = [*KINDS][case % len(KINDS)], rng.choice([30, 30, 20])
        run = folder / "damaged"
        shutil.copytree(saved, run)
        damaged = run / f"checkpoints/step-{step:06d}"
        KINDS[kind](damaged, rng.choice(sorted(damaged.iterdir())), rng)
        again = claimed(run)
        try:
            resumed, passed_over = again.newest()
        except UserError as error:
            raise AssertionError((kind, seed, case)) from error
        assert resumed is not None and all(len(r) <= 320 and r.isprintable() for r in passed_over)
        assert len(passed_over) == (30 - resumed.step) // 10, (kind, passed_over)
        reader = Reader(resumed.folder)
        for name, tensor in expected(resumed.step).items():
            assert torch.equal(reader.whole(name), tensor), (kind, seed, case)
            assert torch.equal(reader.whole(f"{name}/exp_avg"), tensor + 1), (kind, seed, case)
        for later in (40, 50):
            save(again, later)
        newest, _ = again.newest()
        assert newest is not None and newest.step == 50
        found["passed over" if resumed.step < step else "whole"] += 1
        shutil.rmtree(run)
    return found


if __name__ == "__main__":
    print(campaign(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
