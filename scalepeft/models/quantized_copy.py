"""A quantized copy of a base, read in its place: byte ranges by name, the manifest last."""

import hashlib
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.core.files import cache_folder, fsync, share, shared_folder, write_atomically
from scalepeft.core.log import say
from scalepeft.core.text import size
from scalepeft.models.hub import Base, shard_digests
from scalepeft.models.tensors import Reader, write_tensors
from scalepeft.parallel.base import Engine, full_shape, local_part

VERSION = 1  # of the conversion: another one's copies are not read
AUTO_BYTES = 1 << 30  # below this ``auto`` keeps nothing
LEFTOVER_SECONDS = 86400.0
PASSED = "quantized copy passed over ({}); the base is read in its place"


class QuantizedCopy:
    """The copy for one model as this start shards it; making one, and ``keep``, are collectives."""

    def __init__(self, base: Base, model: nn.Module, engine: Engine) -> None:
        self.ranks, self._engine = engine.ranks, engine
        quantized = [(name, p) for name, p in model.named_parameters() if p.dtype == torch.uint8]
        self._parameters = {name: p for name, p in quantized if ".adapter." not in name}
        self._shapes = {name: tuple(full_shape(p)) for name, p in self._parameters.items()}
        self.size = sum(map(math.prod, self._shapes.values()))
        self.reader: Reader | None = None
        self.folder: Path | None = None  # where it is or will be; None where none is wanted
        setting = base.config.quantized_cache
        own_bytes = base.weights.storage.get("quant_method") == "bitsandbytes"  # read as they are
        root = None if setting == "auto" and own_bytes else folder_of(setting, self.size)
        if root is not None:
            fingerprint = self.ranks.all_or_raise(lambda: base.fingerprint)
            storage = base.config.quant, base.config.double_quant
            what = [VERSION, fingerprint, base.digests(self.ranks), *storage]
            text = json.dumps([*what, sorted(self._shapes.items())], sort_keys=True)
            self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
            if self.ranks.any(self.folder.is_dir()):
                self._find(self.folder)

    def _find(self, folder: Path) -> None:
        """Opens the copy that is there, unless a rank finds that it is none."""
        try:
            self.reader = self._opened(folder)
            what = f"{size(self.size)}, quantized copy of the base read in its place"
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            what = PASSED.format(str(error) or type(error).__name__)  # on all ranks
        if self.ranks.is_main:
            say(f"{folder}: {what}")

    def _opened(self, folder: Path) -> Reader:
        """Raises what a copy is not read for, on all ranks."""

        def read() -> Reader:
            found = Reader(folder)
            if found.shapes != self._shapes:
                raise ValueError("other tensors than the model has")
            return found

        reader = self.ranks.all_or_raise(read)
        files = json.loads((folder / "manifest.json").read_text())["files"]
        found = shard_digests([folder / name for name in files], self.ranks)
        if damaged := [name for name in files if found[name] != files[name]["sha256"]]:
            raise ValueError(f"{damaged[0]}: damaged: another sha256 than when it was written")
        return reader

    def fill(self, name: str, *parameters: Tensor) -> bool:
        """Reads this rank's part of a quantized weight and its scale; False: take the base."""
        if self.reader is None:
            return False
        try:
            for key, parameter in zip((name, f"{name}_scale"), parameters, strict=True):
                self.reader.fill(key, local_part(parameter))
        except (OSError, ValueError, LookupError) as error:
            say(f"{self.folder}: {PASSED.format(error)}")
            self.reader = None
            return False
        return True

    def keep(self) -> None:
        """Writes the copy, unless this start read it; a disk that refuses costs a line."""
        if self.folder is None or not self.ranks.any(self.reader is None):
            return
        mine = f"{self.folder.name}.tmp-{socket.gethostname()}-{os.getpid()}"
        temporary = self.folder.with_name(self.ranks.gather(mine)[0])
        file = temporary / f"rank-{self.ranks.rank:05d}.safetensors"
        try:
            self.ranks.run_on_main(lambda: begin(temporary, self.size))
            written = self.ranks.all_or_raise(lambda: {file.name: self._write(file)})
            files = {k: v for made in self.ranks.gather(written) for k, v in made.items()}
            self.ranks.run_on_main(lambda: self._commit(temporary, files))
            self._opened(self.folder)  # does every node see it, and the disk return it?
            if self.ranks.is_main:
                kept = f"quantized copy of the base kept, {size(self.size)}"
                say(f"{self.folder}: {kept}: what the next start reads")
        except (OSError, ValueError, RuntimeError) as error:  # on all ranks, whichever it befell
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                reason = getattr(error, "strerror", None) or error
                remedy = "the next start quantizes again (model.quantized_cache=FOLDER or off)"
                say(f"{self.folder}: no quantized copy is kept: {reason}; {remedy}")

    def _write(self, file: Path) -> dict[str, Any]:
        """Writes the bytes that are this rank's to write; copies share them."""
        mine = {}
        for name, parameter in self._parameters.items():
            part, whole = local_part(parameter), hasattr(parameter, "ds_tensor")
            copy, count = (0, 1) if whole else self._engine.copies(parameter)
            a, b = (part.data.numel() * i // count for i in (copy, copy + 1))
            if a < b:
                mine[f"{name}[{part.start + a}:{part.start + b}]"] = part.data[a:b]
        return write_tensors(file, mine, self._shapes)

    def _commit(self, temporary: Path, files: dict[str, Any]) -> None:
        assert self.folder is not None
        manifest = {"version": VERSION, "tensors": len(self._shapes), "files": files}
        write_atomically(temporary / "manifest.json", json.dumps(manifest))
        Reader(temporary)  # is it whole: has this node all files?
        share(temporary)
        shutil.rmtree(self.folder, ignore_errors=True)
        temporary.rename(self.folder)
        fsync(self.folder.parent)


def begin(temporary: Path, wanted: int) -> None:
    """Makes NAME.tmp-HOST-PID for so many bytes, without those of killed starts. Raises OSError."""
    root = shared_folder(temporary.parent)
    for old in root.glob("*.tmp-*"):
        host, _, pid = old.name.partition(".tmp-")[2].rpartition("-")
        gone = host == socket.gethostname() and not Path("/proc", pid).exists()
        if gone or time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    if (free := shutil.disk_usage(root).free) < wanted + wanted // 8:
        raise OSError(f"{size(wanted)} are needed and {size(free)} free")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def folder_of(setting: str | bool, quantized_bytes: int) -> Path | None:
    """Where copies lie under ``model.quantized_cache``, or None: a home may have no room."""
    if setting == "auto":
        wanted = quantized_bytes >= AUTO_BYTES and os.environ.get("SCALEPEFT_CACHE")
        return cache_folder() / "quantized" if wanted else None
    return Path(str(setting)) if setting not in (False, "off", "") and quantized_bytes else None
