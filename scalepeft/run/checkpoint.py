"""Run folder and checkpoints: two-phase commit, checksums, newest verified, retention, fence."""

import errno
import hashlib
import json
import re
import shutil
import socket
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import (
    damage,
    fsync,
    parse_json,
    read_sealed,
    read_text,
    sealed,
    try_to_write,
    write_atomically,
    writing,
)
from scalepeft.core.log import say
from scalepeft.core.text import one_line
from scalepeft.run.lease import check_fence, claim

SCHEMA = 2  # 1 had no files in parts
NAME = re.compile(r"step-(\d{6,})")
NO_FOLDER_RENAME = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM}
STATE = {"base": dict, "data": str, "nonfinite_in_a_row": int}  # what a resume takes of state.json


class DamagedCheckpoint(Exception):
    """A folder that does not verify; the message says why, in one printable line."""

    def __init__(self, reason: object) -> None:
        super().__init__(one_line(reason))


class NewerCheckpoint(DamagedCheckpoint):
    """A checkpoint that a later version of scalepeft wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; ``Reader`` gives its tensors."""

    step: int
    folder: Path
    state: dict[str, Any]

    def plain(self) -> list[Any]:
        """As it goes to the other ranks."""
        return [self.step, str(self.folder), self.state]

    @classmethod
    def of(cls, plain: list[Any] | None) -> "Checkpoint | None":
        """What ``plain`` gave, if anything."""
        return cls(plain[0], Path(plain[1]), plain[2]) if plain else None


class RunFolder:
    """A run's folder on the rank that writes. Raises UserError: it cannot be made or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.generation = 0  # counts the starts: the fence; 0 before ``claim``
        # Name of what verified -> its signature then, and its state: not hashed twice.
        self._verified: dict[str, Any] = {}
        self._told_of_rename = False
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        with writing_in(path):
            path.mkdir(parents=True, exist_ok=True)
            try_to_write(path)

    def claim(self) -> None:
        """Takes the next generation. Raises UserError: it is in use, or the disk refuses."""
        with writing_in(self.path):
            # Only an owner makes it: another start that goes takes what is empty with it.
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.generation = claim(self.path)
        for leftover in self.checkpoints.glob("*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def withdraw(self) -> None:
        """Removes the folders that this object made and has not claimed, if they are empty."""
        with suppress(OSError):  # something of another start is there
            for folder in self._made if not self.generation else ():
                folder.rmdir()

    def begin(self, step: int) -> Path:
        """Makes the folder that ranks write a checkpoint's tensors into; raises as ``commit``."""
        check_fence(self.path, self.generation)
        temporary = self.checkpoints / f"step-{step:06d}.tmp-{self.generation}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary

    def commit(
        self, temporary: Path, files: dict[str, Any], state: dict[str, Any], keep: int
    ) -> Path:
        """Makes ``step-NNNNNN`` of ``files`` in ``temporary`` and ``state``; drops all but the
        newest ``keep`` that verify. Raises OSError: the disk refused, nothing of it is left;
        Superseded: another start owns the folder.
        """
        from scalepeft.models.tensors import Reader

        step = int(temporary.name[len("step-") :].partition(".")[0])
        final = self._folder(step)
        text = json.dumps(state, indent=1).encode()
        try:
            write_atomically(temporary / "state.json", text)
            sha256 = hashlib.sha256(text).hexdigest()
            files = files | {"state.json": {"bytes": len(text), "sha256": sha256}}
            head = {"schema": SCHEMA, "step": step, "generation": self.generation}
            body = {"tensors": state.get("tensors"), "files": dict(sorted(files.items()))}
            text = json.dumps(sealed(head | body), indent=1).encode()
            write_atomically(temporary / "manifest.json", text)
            Reader(temporary)  # is it whole?
            check_fence(self.path, self.generation)
            if final.exists():  # passed over as damaged, or the same step saved before
                target = final.with_name(f"{final.name}.damaged-{self.generation}")
                shutil.rmtree(target, ignore_errors=True)
                final.rename(target)
            self._rename(temporary, final)
            fsync(self.checkpoints)
        except (OSError, ValueError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        self._verified[final.name] = _signature(final), state
        self._retain(keep)
        return final

    def _rename(self, temporary: Path, final: Path) -> None:
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in NO_FOLDER_RENAME:
                raise
            if not self._told_of_rename:
                say(
                    f"run_dir={self.path}: this file system cannot rename a folder"
                    f" ({error.strerror}): checkpoints are moved file by file, the manifest last;"
                    " a crash meanwhile loses the one that is being saved, never an older one"
                )
                self._told_of_rename = True
            final.mkdir()
            for file in sorted(temporary.iterdir(), key=lambda f: f.name == "manifest.json"):
                file.replace(final / file.name)
            fsync(final)
            temporary.rmdir()

    def _folder(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that verifies, and for each one passed over why. Raises UserError: there are
        some and none can be used: nobody starts over by accident.
        """
        passed_over, newer = list[str](), False
        for step in steps_of(self.path):
            folder = self._folder(step)
            try:
                return Checkpoint(step, folder, self._verify(folder)), passed_over
            except DamagedCheckpoint as error:
                passed_over.append(f"{folder.name}: {error}")
                newer = newer or isinstance(error, NewerCheckpoint)
        if newer:
            raise UserError(f"{'; '.join(passed_over)}; update scalepeft to resume")
        if passed_over:
            raise UserError(
                f"run_dir={self.path}: no checkpoint verifies ({'; '.join(passed_over)}); restore"
                f" one, or remove {self.checkpoints} to start over"
            )
        return None, []

    def _retain(self, keep: int) -> None:
        kept = 0
        for folder in map(self._folder, steps_of(self.path)):
            if kept >= keep:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            with suppress(DamagedCheckpoint):
                self._verify(folder)
                kept += 1

    def _verify(self, folder: Path) -> dict[str, Any]:
        """The state of a checkpoint that verifies. Raises DamagedCheckpoint."""
        signature = _signature(folder)
        if self._verified.get(folder.name, (None,))[0] != signature:
            self._verified[folder.name] = signature, verify(folder)["state"]
        return self._verified[folder.name][1]


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the committed checkpoints, verified or not, newest first."""
    found = (NAME.fullmatch(p.name) for p in run_dir.glob("checkpoints/step-*"))
    return sorted((int(m[1]) for m in found if m), reverse=True)


def writing_in(run_dir: Path) -> AbstractContextManager[None]:
    """Raise UserError for an ``OSError`` inside: this node cannot write the run folder."""
    remedy = "make room or choose another folder"
    return writing(f"run_dir={run_dir}", remedy, f" on {socket.gethostname()}")


def _signature(folder: Path) -> list[tuple[str, int, int, int]]:
    """What of a folder changes when a file in it does."""
    try:
        stats = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
        return [(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats]
    except OSError:
        return []


def verify(folder: Path) -> dict[str, Any]:
    """A folder's manifest, with its ``state``. Raises DamagedCheckpoint: it is not as it says."""
    from scalepeft.models.tensors import Reader  # torch, which status does without

    try:
        manifest = read_sealed(folder / "manifest.json")
        schema, files, step = manifest["schema"], dict(manifest["files"]), manifest["step"]
        kinds = {re.split(r"[-.]", name)[0] for name in files}
        if type(schema) is not int or schema < 1:
            raise DamagedCheckpoint(f"manifest.json has schema {schema}")
        if schema > SCHEMA:
            raise NewerCheckpoint(f"has schema {schema}, this version reads {SCHEMA}")
        if folder.name != f"step-{step:06d}" or not {"trained", "state"} <= kinds:
            raise DamagedCheckpoint(f"manifest.json is that of step {step}: {', '.join(files)}")
        if lacking := [name for name, known in files.items() if not known["sha256"]]:
            raise DamagedCheckpoint(f"manifest.json has no sha256 of {lacking[0]}")
        if reason := damage(folder, files):
            raise DamagedCheckpoint(reason)
        Reader(folder)  # is each tensor whole?
        state = parse_json(read_text(folder / "state.json"))
        if wrong := [key for key, kind in STATE.items() if type(state.get(key)) is not kind]:
            raise DamagedCheckpoint(f"state.json has no usable {wrong[0]}")
    except FileNotFoundError:
        raise DamagedCheckpoint("no manifest.json: never committed, or deleted") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedCheckpoint(f"unreadable: {type(error).__name__}: {error}") from None
    return manifest | {"state": state}
