"""How ranks save together: small state gathered on rank 0, large by each rank, in the background.

Rank 0 makes a folder, ranks write and hash their files, rank 0 commits. With ``async`` a thread
writes, from a copy; no thread communicates, so nothing can race with the training's collectives.
"""

import math
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.models.tensors import write_tensors
from scalepeft.parallel.base import Part
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.lease import Superseded, check_fence
from scalepeft.run.records import RunRecorder, Save

FINAL_PAUSES = (2.0, 5.0)  # seconds before a last save is tried once more
FAILED_SAVES, PATIENCE_SECONDS = 2, 60.0
"""So many periodic saves in a row that fail, over so long at least, end the run."""
GATHERED_BYTES = 64 << 20  # state up to this size is written by rank 0 alone


class NotSaved(Exception):
    """The disk refuses, and the run stops at an older checkpoint, which is whole."""


class Saver:
    """Saves one run's state from all its ranks; every method is a collective."""

    def __init__(self, records: RunRecorder, saved: int) -> None:
        self.ranks, self.records, self.saved = records.ranks, records, saved
        self.mode = records.config.train.save_mode
        self._pending: tuple[Save, threading.Thread] | None = None  # in the background
        self._failures: list[tuple[float, str]] = []  # periodic saves in a row: when and why

    def save(self, step: int, parts: dict[str, Part], state: dict[str, Any], final: bool) -> None:
        """Saves what the ranks hold after ``step``; a ``final`` save is on the disk on return.
        Raises NotSaved: the disk refused that, or periodic saves again and again; UserError: with
        none older.
        """
        self.wait()
        for pause in FINAL_PAUSES if final else ():
            if (reason := self._save(step, parts, state, final)) is None:
                return
            time.sleep(pause)  # a shared file system's hiccup must not cost the last save
        if reason := self._save(step, parts, state, final):
            self._report(step, reason)
            if final:
                self._end()
            self._end_if_none_comes_through()

    def _save(
        self, step: int, parts: dict[str, Part], state: dict[str, Any], final: bool
    ) -> str | None:
        """One attempt; returns why it failed, or None where it is written or under way."""
        begin = time.monotonic()
        large = 4 * sum(math.prod(part.shape) for part in parts.values()) > GATHERED_BYTES
        mode = ("async" if large else "gathered") if self.mode == "auto" else self.mode
        in_background = mode == "async" and not final
        if mode == "gathered":
            whole = gather(self.ranks, parts)
            files = {} if whole is None else _by_kind(whole, "")
            shapes: dict[str, tuple[int, ...]] = {}
        else:
            files, shapes = self._local_files(parts, copied=in_background)
        folder, reason = self.records.begin_save(step)
        if reason:
            return reason
        pending = Save(step, Path(folder), state | {"tensors": len(parts)}, begin)
        if not in_background:
            self._write(pending, files, shapes)
            return self._commit(pending)
        work = pending, files, shapes
        self._pending = pending, threading.Thread(target=self._write, args=work, daemon=True)
        self._pending[1].start()
        pending.stall = time.monotonic() - begin
        return None

    def poll(self) -> None:
        """Commits the save in the background, once all ranks have written it."""
        if self._pending is not None and not self.ranks.any(self._pending[1].is_alive()):
            self.wait()
            self._end_if_none_comes_through()

    def wait(self) -> None:
        """Waits for the save in the background and commits it."""
        if self._pending is not None:
            pending, thread = self._pending
            thread.join()
            if (reason := self._commit(pending)) and not pending.cancelled:
                self._report(pending.step, reason)

    def cancel(self, step: int) -> None:
        """Cancels a save in the background that is not of ``step``: a grace may be short."""
        if self._pending is not None and self._pending[0].step != step:
            self._pending[0].cancelled = True
        self.wait()

    def _local_files(
        self, parts: dict[str, Part], copied: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """File name -> tensors that this rank writes, and whole shapes of those in part."""
        tensors: dict[str, Tensor] = {}
        shapes = {}
        for name, part in parts.items():
            numel = math.prod(part.shape)
            # An empty tensor is somebody's too.
            if not part.mine or (numel and not part.data.numel()):
                continue
            data = part.data.clone() if copied and not part.data.is_cuda else part.data.cpu()
            if part.data.numel() == numel:
                tensors[name] = data.view(part.shape)
            else:
                tensors[f"{name}[{part.start}:{part.stop}]"] = data
                shapes[name] = part.shape
        ranks = f"-{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}"
        return _by_kind(tensors, ranks), shapes

    def _write(
        self, pending: Save, files: dict[str, dict[str, Tensor]], shapes: dict[str, Any]
    ) -> None:
        """Runs on a thread where the training continues meanwhile: no collective in here."""

        def write(name: str) -> dict[str, Any]:
            check_fence(self.records.path, self.records.generation)
            names = (key.partition("[")[0] for key in files[name])
            local = {key: shapes[key] for key in names if key in shapes}
            return write_tensors(pending.folder / name, files[name], local, pending.check)

        try:
            with ThreadPoolExecutor() as pool:
                pending.files = dict(zip(files, pool.map(write, files), strict=True))
        except Exception as error:  # told to all ranks in the commit, whatever it is
            superseded = isinstance(error, Superseded)
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            pending.error = [superseded, str(error) if superseded else reason]

    def _commit(self, pending: Save) -> str | None:
        self._pending = None
        begin = time.monotonic()
        mine: list[Any] = [pending.files, pending.error]
        everyone = self.ranks.gather(mine)
        errors = [(rank, *error) for rank, (_, error) in enumerate(everyone) if error is not None]
        for _, superseded, text in errors:
            if superseded:
                raise Superseded(text)
        if errors:
            if self.ranks.is_main:
                shutil.rmtree(pending.folder, ignore_errors=True)
            return f"rank {errors[0][0]}: {errors[0][2]}"
        files = {name: info for written, _ in everyone for name, info in written.items()}
        pending.stall += time.monotonic() - begin if pending.stall else 0.0
        if (reason := self.records.commit_save(pending, files)) is None:
            self.saved, self._failures = pending.step, []
        return reason

    def _report(self, step: int, reason: str) -> None:
        self._failures.append((time.monotonic(), f"step {step} could not be saved: {reason}"))
        self.records.keep_room()
        if self.ranks.is_main:
            say(self._failures[-1][1])

    def _end_if_none_comes_through(self) -> None:
        if len(self._failures) >= FAILED_SAVES:
            waits = time.monotonic() - self._failures[0][0] < PATIENCE_SECONDS
            if not self.ranks.any(waits):
                self._end()

    def _end(self) -> NoReturn:
        if self.saved:
            raise NotSaved("a disk that refuses to save")
        reason = self._failures[-1][1]
        raise UserError(f"run_dir={self.records.path}: {reason}; there is no older: make room")


def gather(ranks: Ranks, parts: dict[str, Part]) -> dict[str, Tensor] | None:
    """Puts the ranks' parts together on rank 0: name -> whole CPU tensor there, None elsewhere."""
    if ranks.world_size == 1:
        return {n: part.data.to("cpu", copy=True).view(part.shape) for n, part in parts.items()}
    mine = {n: part for n, part in parts.items() if part.mine and part.data.numel()}
    data = [part.data.cpu().contiguous().view(-1).view(torch.uint8) for part in mine.values()]
    here: list[list[Any]] = [[n, part.start, part.data.nbytes] for n, part in mine.items()]
    held = ranks.gather(here)
    received = ranks.gather_bytes(torch.cat([*data, torch.empty(0, dtype=torch.uint8)]), False)
    if received is None:
        return None
    whole = {n: torch.empty(math.prod(p.shape), dtype=p.data.dtype) for n, p in parts.items()}
    missing = sum(flat.nbytes for flat in whole.values())
    for theirs, values in zip(held, received, strict=True):
        at = 0
        for name, start, size in theirs:
            flat = whole[name].view(torch.uint8)
            first = start * parts[name].data.itemsize
            flat[first : first + size] = values[at : at + size]
            at += size
        missing -= at
    assert not missing, f"{missing} bytes of {len(parts)} tensors came from no rank, or twice"
    return {name: flat.view(parts[name].shape) for name, flat in whole.items()}


def _by_kind(tensors: dict[str, Tensor], ranks: str) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors: what is trained, and the optimizer's."""
    files: dict[str, dict[str, Tensor]] = {f"trained{ranks}.safetensors": {}}
    for name, tensor in tensors.items():
        kind = "optimizer" if "/" in name else "trained"
        files.setdefault(f"{kind}{ranks}.safetensors", {})[name] = tensor
    return files
