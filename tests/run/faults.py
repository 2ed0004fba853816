"""``python -m scalepeft`` on a machine in trouble: the environment's FAULT says in which.

``memory``: rank 1 has no room for some of its writes. ``row``, ``save``, ``end``: the file system
does not answer for a moment when the fence is read, and the holder's file is lost before.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Any

from scalepeft.cli import main
from scalepeft.run import checkpoint, lease
from scalepeft.run import saver as saving

FAULT = os.environ["FAULT"]


AT = {"row": range(6, 9), "save": range(4, 6), "end": range(14, 16), "memory": range(4, 8)}[FAULT]


count = 0


write, claim = saving.write_tensors, checkpoint.RunFolder.claim


look = lease.stored_generation


def write_without_memory(*words: Any) -> dict[str, Any]:
    global count
    count += 1  # two files a save; a failed one stops at its first
    if os.environ["RANK"] == "1" and count in AT:
        raise MemoryError("no room")
    return write(*words)


def look_at_a_stale_handle(run_dir: Path) -> int:
    global count
    count += 1
    if count in AT:
        raise OSError(errno.ESTALE, "Stale file handle")
    if count == AT[0] - 1:
        for holder in run_dir.glob("holder*.json"):
            holder.unlink()
    return look(run_dir)


def claim_then_trouble(self: checkpoint.RunFolder, *args: Any) -> None:
    claim(self, *args)
    lease.stored_generation = look_at_a_stale_handle


if FAULT == "memory":
    saving.write_tensors = write_without_memory
else:
    checkpoint.RunFolder.claim = claim_then_trouble  # type: ignore[method-assign]


code = main()


print(f"looked {count} times", flush=True)


sys.exit(code)
