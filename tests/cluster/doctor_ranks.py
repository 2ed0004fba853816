"""``scalepeft doctor`` for test_doctor.py with a fault on rank 1, whose host is called n2:
doctor_ranks.py FAULT RUN_DIR TIMEOUT.
"""

import ctypes
import os
import socket
import subprocess
import sys
import time
from typing import Any

import torch

from scalepeft.cluster.doctor import command, links, machine

fault, run_dir, timeout = sys.argv[1:]


def hang(_: Any) -> None:
    time.sleep(1000)


def hang_in_the_lock(_: Any) -> None:
    # Nothing of this process runs any more, not even the thread that would say so.
    ctypes.PyDLL(None).sleep(1000)


def die(_: Any) -> None:
    os._exit(3)


def other_versions(context: Any) -> dict[str, str]:
    return {**versions(context), "torch": "2.12.1", "source": "abc"}


def mount_over(*words: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000) or subprocess.run(["mount", "--make-rprivate", "/"]).returncode:
        os._exit(77)
    if subprocess.run(["mount", *words, run_dir], check=False).returncode:
        os._exit(77)


if os.environ["RANK"] == "1":
    socket.gethostname = lambda: "n2"
    if fault in ("hang", "hang-in-the-lock", "die"):
        work = {"hang": hang, "die": die}.get(fault, hang_in_the_lock)
        machine.kernels = work
    if fault == "versions":
        versions, machine.versions = machine.versions, other_versions
    if fault == "folder":
        mount_over("-t", "tmpfs", "tmpfs")
    if fault == "read-only":
        mount_over("--bind", "-o", "ro", run_dir)
    if fault == "bytes":
        copy = links.copy_rows

        def wrong(parameter: Any, full: torch.Tensor) -> None:
            full = full.clone()
            if full.dtype == torch.uint8 and full.shape[1] == 512:
                full[-1, 17] ^= 0x40
            copy(parameter, full)

        links.copy_rows = wrong
    if fault == "sums":
        all_reduce = torch.distributed.all_reduce

        def off_by_one(x: torch.Tensor, *rest: Any, **options: Any) -> None:
            all_reduce(x, *rest, **options)
            x += 1

        torch.distributed.all_reduce = off_by_one
else:
    socket.gethostname = lambda: "n1"

sys.exit(command.run([], run_dir, float(timeout)))
