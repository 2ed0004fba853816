"""Whether a base's files are what they were: the sha256 of each, computed once."""

import json
import re
import time
from pathlib import Path

from scalepeft.core.errors import UserError
from scalepeft.core.files import kept_digest
from scalepeft.core.log import say
from scalepeft.core.text import duration, size
from scalepeft.parallel.ranks import Ranks

SAY_AFTER = 10.0  # seconds


def shard_digests(paths: list[Path], ranks: Ranks) -> dict[str, str]:
    """sha256 of each file by name. Ranks that see the same file share the reading, whichever nodes
    they are on; a file that has not changed since is not read again. A collective. Raises
    UserError: a file is not the one that the hub names, or differs between nodes.
    """
    began = time.monotonic()
    stats = ranks.all_or_raise(lambda: [path.stat() for path in paths])
    # They change with the bytes: ctime too, as mtime can be set back.
    keys = [[s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats]
    everyone = ranks.gather(dict(zip((path.name for path in paths), keys, strict=True)))

    def work() -> dict[str, str]:
        made = {}
        for i, (path, key) in enumerate(zip(paths, keys, strict=True)):
            same = [r for r, theirs in enumerate(everyone) if theirs.get(path.name) == key]
            if same[i % len(same)] == ranks.rank:
                made[json.dumps([path.name, *key])] = _digest(path)
        return made

    known = {k: v for made in ranks.gather(ranks.all_or_raise(work)) for k, v in made.items()}
    for name in everyone[0]:
        theirs = [known.get(json.dumps([name, *rank[name]])) if name in rank else None
                  for rank in everyone]  # fmt: skip
        if others := [rank for rank, value in enumerate(theirs) if value != theirs[0]]:
            raise UserError(f"{paths[0].parent / name}: differs between rank 0 and ranks {others};"
                            " give every node the same copy")  # fmt: skip
    seconds = time.monotonic() - began
    if ranks.is_main and seconds > SAY_AFTER:
        total = size(sum(stat.st_size for stat in stats))
        say(f"sha256 of the base's {len(paths)} files ({total}) in {duration(seconds)}; kept")
    return {p.name: known[json.dumps([p.name, *k])] for p, k in zip(paths, keys, strict=True)}


def _digest(path: Path) -> str:
    real, found = path.resolve(), kept_digest(path)
    # In the hub's cache the name of a large file is the sha256 that the hub has of it.
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name) and (
        real.name != found
    ):  # fmt: skip
        raise UserError(f"{path}: damaged: its sha256 is not the hub's ({real.name[:12]}...);"
                        f" remove {real} and download it again")  # fmt: skip
    return found
