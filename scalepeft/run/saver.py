"""How all ranks save together: gathered on rank 0 while the state is small, each rank its own part
where it is large, and then beside the training.

A checkpoint is written in three steps: rank 0 makes a folder, ranks write and hash their files, and
rank 0 commits. Only the middle one takes long; with ``train.save_mode=async`` a thread does it from
a copy, and the commit follows at the first step boundary at which all ranks have written. No thread
ever communicates, so nothing can race with the training's collectives.
"""

import errno
import math
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalepeft.config.schema import RunConfig
from scalepeft.core.log import say
from scalepeft.parallel.base import Part
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import Fenced, check_fence
from scalepeft.run.records import Records
from scalepeft.run.tensors import write_tensors

FINAL_PAUSES = (2.0, 5.0)  # seconds before a last save is tried once more
GATHERED_BYTES = 64 << 20  # state up to this size is written by rank 0 alone


class Saver:
    """Saves one run's state from all its ranks; every method is a collective.

    ``saved`` is the step of the newest checkpoint.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, records: Records | None, saved: int
    ) -> None:
        self.ranks, self.records, self.saved = ranks, records, saved
        self.mode, self.run_dir = config.train.save_mode, Path(config.run_dir)
        self.generation: int = ranks.main_only(lambda: records.folder.generation if records else 0)
        self._pending: _Pending | None = None

    def save(self, step: int, parts: dict[str, Part], state: dict[str, Any], final: bool) -> None:
        """Saves what the ranks hold after ``step``.

        Args:
            step: steps that are done.
            parts: this rank's, from ``Engine.state_parts``.
            state: position in the data, and what the checkpoint may be continued with.
            final: the process ends after it: it must be on the disk when this returns.

        Raises:
            OSError: the disk refused a ``final`` save; a periodic one is only said.
        """
        self.settle()
        for pause in FINAL_PAUSES if final else ():
            if (complaint := self._save(step, parts, state, final)) is None:
                return
            time.sleep(pause)  # a shared file system's hiccup must not cost the last save
        if complaint := self._save(step, parts, state, final):
            self._complain(step, complaint, final)

    def _save(
        self, step: int, parts: dict[str, Part], state: dict[str, Any], final: bool
    ) -> str | None:
        """One attempt; returns the complaint, or None where it is written or under way."""
        begin = time.monotonic()
        large = 4 * sum(math.prod(part.shape) for part in parts.values()) > GATHERED_BYTES
        mode = ("async" if large else "gathered") if self.mode == "auto" else self.mode
        beside = mode == "async" and not final
        if mode == "gathered":
            whole = gather(self.ranks, parts)
            files = {} if whole is None else _by_kind(whole, "")
            shapes: dict[str, tuple[int, ...]] = {}
        else:
            files, shapes = self._own(parts, copied=beside)
        folder, complaint = self.ranks.main_only(lambda: self._begin(step))
        if folder is None:
            return complaint
        self._pending = _Pending(step, folder, state | {"tensors": len(parts)}, begin)
        work = threading.Thread(
            target=self._write, args=(self._pending, files, shapes), daemon=True
        )
        if beside:
            work.start()
            self._pending.thread = work
            self._pending.stall = time.monotonic() - begin
            return None
        work.run()
        return self._commit()

    def _begin(self, step: int) -> tuple[Path | None, str]:
        assert self.records is not None
        try:
            return self.records.begin_save(step), ""
        except OSError as error:
            return None, error.strerror or str(error)

    def poll(self) -> None:
        """Commits the save that goes on beside the training, once all ranks have written it."""
        if self._pending is not None:
            thread = self._pending.thread
            if not self.ranks.any(thread is not None and thread.is_alive()):
                self._committed()

    def settle(self) -> None:
        """Waits for the save that goes on beside the training."""
        if self._pending is not None:
            if self._pending.thread is not None:
                self._pending.thread.join()
            self._committed()

    def stop(self, step: int) -> None:
        """Gives up the save that goes on unless it is of ``step``: a grace period may be short."""
        if self._pending is not None and self._pending.step != step:
            self._pending.given_up = True
        self.settle()

    def _own(self, parts: dict[str, Part], copied: bool) -> tuple[dict[str, Any], dict[str, Any]]:
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
        self, pending: "_Pending", files: dict[str, dict[str, Tensor]], shapes: dict[str, Any]
    ) -> None:
        """Runs on a thread where the training goes on beside it: no collective in here."""
        try:
            for name, tensors in files.items():
                check_fence(self.run_dir, self.generation)
                own = {key.partition("[")[0] for key in tensors}
                pending.files[name] = write_tensors(
                    pending.folder / name,
                    tensors,
                    {key: shape for key, shape in shapes.items() if key in own},
                    pending.check,
                )
        except Exception as error:  # told to all ranks in the commit, whatever it is
            fenced = isinstance(error, Fenced)
            told = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            pending.error = (fenced, str(error) if fenced else told)

    def _committed(self) -> None:
        pending = self._pending
        assert pending is not None
        if (complaint := self._commit()) and not pending.given_up:
            self._complain(pending.step, complaint, final=False)

    def _commit(self) -> str | None:
        pending, self._pending = self._pending, None
        assert pending is not None
        begin = time.monotonic()
        everyone = self.ranks.gather((pending.files, pending.error))
        errors = [(rank, *error) for rank, (_, error) in enumerate(everyone) if error is not None]
        for _, fenced, text in errors:
            if fenced:
                raise Fenced(text)
        files = {name: info for found, _ in everyone for name, info in found.items()}
        complaint = f"rank {errors[0][0]}: {errors[0][2]}" if errors else None

        def commit() -> str | None:
            assert self.records is not None
            if complaint:
                self.records.folder.abandon(pending.folder)
                return complaint
            pending.stall += time.monotonic() - begin if pending.thread else 0.0
            return self.records.commit_save(
                pending.step, pending.folder, files, pending.state, pending.begin, pending.stall
            )

        refused = self.ranks.main_only(lambda: commit() if self.records else None)
        if refused is None:
            self.saved = pending.step
        return refused

    def _complain(self, step: int, complaint: str, final: bool) -> None:
        if final:
            raise OSError(
                f"step {step} could not be saved to {self.run_dir}: {complaint}; older checkpoints"
                " are whole"
            )
        if self.ranks.is_main:
            say(
                f"step {step} could not be saved: {complaint}; training goes on, the next save"
                " tries again"
            )


class _Pending:
    """A save between its begin and its commit."""

    def __init__(self, step: int, folder: Path, state: dict[str, Any], begin: float) -> None:
        self.step, self.folder, self.state, self.begin = step, folder, state, begin
        self.files: dict[str, Any] = {}
        self.error: tuple[bool, str] | None = None
        """Whether it was the fence, and what went wrong."""
        self.thread: threading.Thread | None = None
        self.stall = 0.0
        """Seconds that the training stood still for a save beside it."""
        self.given_up = False

    def check(self) -> None:
        """Raises OSError where the save was given up."""
        if self.given_up:
            raise OSError(errno.ECANCELED, "given up for the save of the last step")


def gather(ranks: Ranks, parts: dict[str, Part]) -> dict[str, Tensor] | None:
    """Puts the ranks' parts together on rank 0: name -> whole CPU tensor there, None elsewhere."""
    mine = {
        name: (part.start, part.data.cpu())
        for name, part in parts.items()
        if part.mine and part.data.numel()
    }
    everyone = ranks.gather_on_main(mine)
    if everyone is None:
        return None
    whole = {}
    for name, part in parts.items():
        flat = torch.empty(math.prod(part.shape), dtype=part.data.dtype)
        found = [held[name] for held in everyone if name in held]
        assert sum(values.numel() for _, values in found) == flat.numel(), name
        for start, values in found:
            flat[start : start + values.numel()] = values
        whole[name] = flat.view(part.shape)
    return whole


def _by_kind(tensors: dict[str, Tensor], ranks: str) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors: what is trained, and the optimiser's."""
    files: dict[str, dict[str, Tensor]] = {f"trained{ranks}.safetensors": {}}
    for name, tensor in tensors.items():
        kind = "optimizer" if "/" in name else "trained"
        files.setdefault(f"{kind}{ranks}.safetensors", {})[name] = tensor
    return files
