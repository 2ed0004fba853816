"""Run folder and checkpoints: two-phase commit, checksums, newest verified, retention, fence.

A checkpoint holds what was trained and where training stood, never the base and never a pickle:
``trained.safetensors``, ``optimizer.safetensors``, ``state.json``, and ``manifest.json``, which is
written last.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalepeft.lookup import UserError

SCHEMA = 1
NAME = re.compile(r"step-(\d{6,})")


class Fenced(Exception):
    """A newer start of the same run owns the folder; this process must not write."""


class NewerCheckpoint(Exception):
    """A checkpoint that a later version of scalepeft wrote."""


class DamagedCheckpoint(Exception):
    """A folder that does not verify; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    step: int
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file as a whole: readers and crashes see the old or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def try_to_write(folder: Path) -> None:
    """Puts a few bytes on the folder's disk and takes them away again: a full disk makes empty
    files.

    Raises:
        OSError: it cannot.
    """
    with tempfile.TemporaryFile(dir=folder) as f:
        f.write(bytes(4096))
        f.flush()
        os.fsync(f.fileno())


class RunFolder:
    """One run's folder on the rank that writes. ``generation`` counts the starts and is the fence.

    Nothing of a run that is there changes before ``claim``.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.generation = 0
        """0 until the folder is claimed."""
        self._verified: set[str] = set()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            try_to_write(path)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"run_dir={self.path}: cannot be written on {socket.gethostname()}: {error.strerror};"
            " make room or choose another folder"
        )

    def claim(self) -> None:
        """Takes the next generation: an older process of this run stops at its next write."""
        try:
            self.generation = self._stored_generation() + 1
            write_atomically(self.path / "generation", f"{self.generation}\n")
        except OSError as error:
            raise self._unwritable(error) from None
        for leftover in self.checkpoints.glob("*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _stored_generation(self) -> int:
        file = self.path / "generation"
        text = file.read_bytes().decode(errors="replace").strip() if file.is_file() else ""
        return int(text) if text.isdecimal() else 0

    def check_fence(self) -> None:
        """Raises Fenced if the run was started again since this process took the folder."""
        if (stored := self._stored_generation()) != self.generation:
            raise Fenced(
                f"run_dir={self.path}: start {stored} of this run owns the folder, this is start"
                f" {self.generation}; it stops without writing"
            )

    def save(
        self,
        step: int,
        trained: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        keep: int,
    ) -> Path:
        """Writes and commits ``step-NNNNNN``, then drops what retention no longer needs.

        Raises:
            OSError: the disk refused; nothing of this checkpoint is left, the older ones are
                untouched.
            Fenced: another start owns the folder.
        """
        final = self.checkpoints / f"step-{step:06d}"
        temporary = final.with_name(f"{final.name}.tmp-{self.generation}")
        self.check_fence()
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write(temporary, "trained.safetensors", lambda p: save_file(trained, p))
            self._write(temporary, "optimizer.safetensors", lambda p: save_file(optimizer, p))
            self._write(
                temporary, "state.json", lambda p: p.write_text(json.dumps(state, indent=1))
            )
            manifest = {
                "schema": SCHEMA,
                "step": step,
                "generation": self.generation,
                "files": _inventory(temporary),
            }
            self._write(
                temporary, "manifest.json", lambda p: p.write_text(json.dumps(manifest, indent=1))
            )
            fsync(temporary)
            self.check_fence()
            if final.exists():  # passed over as damaged, or the same step saved before
                self._set_aside(final)
            temporary.rename(final)
            fsync(self.checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        self._verified.add(final.name)
        self._retain(keep)
        return final

    @staticmethod
    def _write(folder: Path, name: str, write: Callable[[Path], object]) -> None:
        write(folder / name)
        fsync(folder / name)

    def _set_aside(self, folder: Path) -> None:
        target = folder.with_name(f"{folder.name}.damaged-{self.generation}")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, newest first; whether they verify is another
        question.
        """
        return self.steps_in(self.checkpoints)

    @staticmethod
    def steps_in(checkpoints: Path) -> list[int]:
        """The same for any ``checkpoints`` folder, without opening the run."""
        found = (NAME.fullmatch(p.name) for p in checkpoints.glob("step-*"))
        return sorted((int(m[1]) for m in found if m), reverse=True)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Returns the newest checkpoint that verifies, and for each one passed over why.

        Raises:
            UserError: there are checkpoints and none can be used: nobody starts over by accident.
        """
        passed_over: list[str] = []
        for step in self.steps():
            folder = self.checkpoints / f"step-{step:06d}"
            try:
                checkpoint = read(folder)
            except DamagedCheckpoint as error:
                passed_over.append(f"{folder.name}: {error}")
                continue
            except NewerCheckpoint as error:
                raise UserError(f"{error}; update scalepeft to resume") from None
            self._verified.add(folder.name)
            return checkpoint, passed_over
        if passed_over:
            raise UserError(
                f"run_dir={self.path}: no checkpoint verifies ({'; '.join(passed_over)}); restore"
                f" one, or remove {self.checkpoints} to start over"
            )
        return None, []

    def _retain(self, keep: int) -> None:
        kept = 0
        for step in self.steps():
            folder = self.checkpoints / f"step-{step:06d}"
            if kept >= keep:
                shutil.rmtree(folder, ignore_errors=True)
            elif self._verifies(folder):
                kept += 1

    def _verifies(self, folder: Path) -> bool:
        if folder.name not in self._verified:
            try:
                verify(folder)
            except DamagedCheckpoint:
                return False
            self._verified.add(folder.name)
        return True


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != "manifest.json"
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """Checks a checkpoint folder against its manifest and returns the manifest.

    Raises:
        DamagedCheckpoint: the manifest is missing or broken, or a file is missing, cut or changed.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        schema, files, step = manifest["schema"], dict(manifest["files"]), manifest["step"]
        names = {"trained.safetensors", "optimizer.safetensors", "state.json"}
        if isinstance(schema, int) and schema > SCHEMA:
            raise NewerCheckpoint(f"{folder} has schema {schema}, this version reads {SCHEMA}")
        if folder.name != f"step-{step:06d}" or not names <= files.keys():
            raise DamagedCheckpoint(
                f"manifest.json is that of step {step} with {', '.join(sorted(files))}"
            )
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                raise DamagedCheckpoint(f"{name} is missing")
            if (size := file.stat().st_size) != expected["bytes"]:
                raise DamagedCheckpoint(
                    f"{name} has {size} bytes, the manifest says {expected['bytes']}"
                )
            if _sha256(file) != expected["sha256"]:
                raise DamagedCheckpoint(f"{name} has changed: sha256 differs from the manifest")
    except FileNotFoundError:
        raise DamagedCheckpoint("no manifest.json: never committed, or deleted") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"unreadable: {type(error).__name__}: {error}") from None
    return dict(manifest)


def read(folder: Path) -> Checkpoint:
    """Verifies and loads a checkpoint. Raises DamagedCheckpoint."""
    manifest = verify(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        trained, optimizer = (
            load_file(folder / f"{n}.safetensors") for n in ("trained", "optimizer")
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(f"unreadable: {type(error).__name__}: {error}") from None
    return Checkpoint(manifest["step"], trained, optimizer, state)
