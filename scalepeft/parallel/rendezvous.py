"""Where ranks meet, proof that it is they who came, and who is gone (docs/security.md)."""

import atexit
import fcntl
import hmac
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scalepeft.core.errors import UserError
from scalepeft.core.files import read_text, write_atomically
from scalepeft.core.launch import FOLDER
from scalepeft.core.text import one_line

# Start-up work on one rank (tokenizing, a first download) keeps the others waiting in a control
# collective.
CONTROL_TIMEOUT = timedelta(hours=2)
MEETING = timedelta(minutes=30)
PROOF = timedelta(seconds=20)
ATTEMPTS = 3  # a stranger may take a rank's place at a port of gloo, which the proof finds out
GLOO = "gloo/transport"  # stands in what it raises
FINISHED = "finished"


def folder() -> Path | None:
    """The folder of this start, if it has one. Raises UserError: gone, or not this user's alone."""
    if not (name := os.environ.get(FOLDER)):
        return None
    path = Path(name)
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{FOLDER}={path}: {error.strerror}; unset it, or make it anew") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UserError(f"{FOLDER}={path}: other users may enter it; make it with mktemp -d")
    return path


def open_store(env: Mapping[str, str], name: str, timeout: timedelta = MEETING) -> dist.Store:
    """Return the store of ``name`` in which the ranks meet: a file of the start's folder, else at
    MASTER_ADDR:MASTER_PORT, on the interface of that address alone. Raises OSError, RuntimeError.
    """
    # A restart by torchrun meets at the same store, where the keys of the first start still are.
    name = f"{name} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if path := folder():
        store: dist.Store = dist.FileStore(str(path / "store"), -1)
        store.set_timeout(timeout)
        return dist.PrefixStore(name, store)
    address, port, listening = env["MASTER_ADDR"], int(env["MASTER_PORT"]), None
    if serves(env):
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if str(place[0]).startswith("127.") and not on_one_machine(env):
            place = ("", port)  # Debian's /etc/hosts: the machine's own name is 127.0.1.1
        listening = socket.create_server(place[:2], family=family).detach()
    at = address, port, None, listening is not None, timeout, False, False, listening
    return dist.PrefixStore(name, dist.TCPStore(*at))


def serves(env: Mapping[str, str]) -> bool:
    """True of rank 0, but under torchrun, which serves the store itself."""
    return env["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def on_one_machine(env: Mapping[str, str]) -> bool:
    """True if the ranks meet at the loopback interface, or in a Slurm step of one node."""
    local = env.get("MASTER_ADDR", "").startswith(("127.", "localhost", "::1"))
    return local or os.environ.get("SLURM_STEP_NUM_NODES") == "1"


def join(
    device: torch.device, store: dist.Store, rank: int, world_size: int
) -> tuple[dist.ProcessGroup, bytes]:
    """Make the default group and one for control, over gloo, in which every rank has proven to
    every other that it knows the secret of this start; return the latter, and the secret. Raises
    UserError: somebody else took a rank's place, again and again.
    """
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    place |= {"device_id": device} if on_gpu else {}
    for attempt in range(ATTEMPTS):
        meeting, good = dist.PrefixStore(f"{attempt}", store), False
        if rank == 0:  # another each time: what a stranger was sent proves nothing later
            meeting.set("secret", secrets.token_hex(32))
        secret = meeting.get("secret")
        try:
            dist.init_process_group(backend, store=meeting, **place)
            control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
            good = prove(dist.group.WORLD, secret) and prove(control, secret)
        except RuntimeError as error:
            if GLOO not in str(error):
                raise
        count = meeting.add("good", int(good))
        if meeting.add("all", 1) == world_size:
            meeting.set("proven", str(count))
        if int(meeting.get("proven")) == world_size:
            return control, secret
        if dist.is_initialized():
            dist.destroy_process_group()
    raise UserError(
        f"{ATTEMPTS} times somebody other than the ranks of this start answered at their ports, or"
        " connections between them broke; is another user of these machines at them?"
    )


def prove(group: Any, secret: bytes) -> bool:
    """True if each rank of ``group`` sent here what only one that knows ``secret`` can; over every
    connection of the group, as gloo takes whoever connects. A collective.
    """
    ranks = dist.get_process_group_ranks(group)

    def word(source: int, target: int) -> bytes:
        return hmac.digest(secret, f"{group.group_name} {source} {target}".encode(), "sha256")

    mine = dist.get_rank()
    sent = torch.frombuffer(bytearray(b"".join(word(mine, r) for r in ranks)), dtype=torch.uint8)
    came, options = torch.empty_like(sent), dist.AllToAllOptions()
    options.timeout = PROOF
    group.alltoall_base(came, sent, [], [], options).wait()
    return hmac.compare_digest(came.numpy().tobytes(), b"".join(word(r, mine) for r in ranks))


def of_a_connection(error: Exception) -> bool:
    """True of what gloo, NCCL or the store raise when another rank is gone."""
    return isinstance(error, dist.DistError) or GLOO in str(error)


class Presence:
    """A rank's file in the start's folder, locked while it lives: others see which one is gone."""

    def __init__(self, path: Path, rank: int) -> None:
        # A number, as the lock goes with the first descriptor of the file that is closed.
        self._file = os.open(path / f"rank-{rank}", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        self._size = os.write(self._file, f"{socket.gethostname()}\n".encode())
        atexit.register(self.leave)

    def leave(self) -> None:
        """Says that this rank ends in order, unless why it does not was told."""
        if os.fstat(self._file).st_size == self._size:
            with suppress(OSError):  # a full disk
                os.write(self._file, FINISHED.encode())


def tell(reason: str) -> None:
    """Leaves word in the start's folder why this rank is about to end."""
    mine = Path(os.environ.get(FOLDER, ""), f"rank-{os.environ.get('RANK')}")
    with suppress(OSError):  # no such start, or a full disk: the others say that it is gone
        fd = os.open(mine, os.O_WRONLY | os.O_APPEND)
        os.write(fd, one_line(reason).encode())
        os.close(fd)


def who_is_gone(seconds: float = 5.0) -> str | None:
    """Return which rank ended first, where and why, as far as that shows within ``seconds``."""
    if (path := folder()) is None:
        return None
    others = [r for r in range(int(os.environ["WORLD_SIZE"])) if r != int(os.environ["RANK"])]
    until = time.monotonic() + seconds
    while not (text := _gone(path, others)) and time.monotonic() < until:
        time.sleep(0.1)
    return text


def _gone(path: Path, ranks: list[int]) -> str | None:
    """What was said of the first rank that was gone; if nothing yet, says it of one of these."""
    note = path / "gone"
    with suppress(OSError, ValueError):
        return read_text(note, 10_000)
    for rank in ranks:
        try:
            with (path / f"rank-{rank}").open("r+") as f:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                host, _, how = f.read().partition("\n")
        except (OSError, ValueError):  # it lives, or has not come yet
            continue
        if host and how != FINISHED:
            how = how or "without a word: killed (out of memory?), or its node went down"
            text = f"rank {rank} on {host} ended: {how}"
            with suppress(OSError):  # a full disk
                write_atomically(note, text)
            return text
    return None
