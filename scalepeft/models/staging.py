"""What is large of a base, or its quantized copy, on each node's own disk: copied once, checked."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError
from scalepeft.core.files import damage, fsync, kept_digest, share, write_atomically
from scalepeft.core.log import say
from scalepeft.core.safetensors import SafetensorsFile
from scalepeft.core.text import duration, size
from scalepeft.models.hub import Base, shard_digests
from scalepeft.models.quantized_copy import QuantizedCopy, begin
from scalepeft.parallel.ranks import Ranks


def stage(base: Base, copy: QuantizedCopy, ranks: Ranks, poll: Callable[[], None]) -> None:
    """Lets ranks read the copy's files, or else the base's, under ``model.stage``, to which local
    rank 0 brings them; what cannot be had there, where it is. A collective; ``poll`` may raise.
    """
    setting = base.config.stage
    place = os.environ.get("SCALEPEFT_STAGE", "") if setting == "auto" else str(setting or "off")
    root = Path(place) if place not in ("", "off") else None
    if root and not root.is_absolute():  # on the disk that all nodes share, most likely
        raise UserError(f"model.stage={setting}: {place} is no whole path; begin it with /")
    if not ranks.any(root is not None):
        return
    files = copy.reader.files if copy.reader else base.weights.files
    sums = shard_digests([f.path for f in files], ranks) if copy.reader else base.digests(ranks)
    facts = {f.path.name: {"bytes": f.size, "sha256": sums[f.path.name]} for f in files}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    turns = _bring(root / name, files, facts) if root and ranks.local_rank == 0 else iter(())
    found = None if ranks.local_rank else ""
    while ranks.any((turn := ranks.all_or_raise(lambda: next(turns, None))) is not None):
        found = turn or found
        poll()
    for file in files if (folder := ranks.of_node(found)) else ():
        try:
            file.move(Path(folder) / file.path.name)
        except OSError as error:  # the task has a disk of its own, or an epilog was faster
            say(f"{error.filename}: {error.strerror}; read at {file.place}")


def _bring(folder: Path, files: list[SafetensorsFile], facts: dict[str, Any]) -> Iterator[str]:
    """Yields "" now and then, and once the folder is whole its name; else says why it is not."""
    host, began, total = socket.gethostname(), time.monotonic(), sum(file.size for file in files)
    what = f"{folder}: {size(total)} of the base"
    if not damage(folder, facts, kept_digest):
        say(f"{what} read there on {host}, from an earlier start")
        yield str(folder)
        return
    temporary = folder.with_name(f"{folder.name}.tmp-{host}-{os.getpid()}")

    def copy(file: SafetensorsFile) -> None:
        made = temporary / file.path.name
        shutil.copyfile(file.path, made)
        fsync(made)
        if kept_digest(made) != facts[made.name]["sha256"]:
            raise OSError(f"{file.path}: other bytes arrived than its sha256 says")

    try:
        begin(temporary, total)
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(copy, files):
                yield ""
        write_atomically(temporary / "manifest.json", json.dumps({"files": facts}, indent=1))
        share(temporary)
        if damage(folder, facts, kept_digest):  # else another job on this node was faster
            if folder.exists():
                folder.rename(temporary / "damaged")  # who reads it has it open
            temporary.rename(folder)
            shutil.rmtree(folder / "damaged", ignore_errors=True)
        say(f"{what} staged on {host} in {duration(time.monotonic() - began)}")
        yield str(folder)
    except OSError as error:
        say(f"{what} not staged on {host}, read where it is: {error.strerror or error}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
