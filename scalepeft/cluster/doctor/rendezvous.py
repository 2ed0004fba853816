"""How doctor's ranks meet: through a store and with time limits, so that a rank that never comes,
dies or hangs is a finding and not a hang.
"""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scalepeft.cluster.doctor.findings import where
from scalepeft.core.log import say

GRACE = 10.0  # seconds: what an answer may take beyond the work itself
SAY_AFTER = 10.0


class Apart(Exception):
    """The ranks do not come together; the message says who is missing and where to look."""


@dataclass(frozen=True)
class Outcome:
    """What one rank made of a piece of work.

    Attributes:
        value: its result, of JSON's types.
        error: why there is none.
        hangs: the work is still at it.
        gone: the rank does not even say so.
    """

    value: Any = None
    error: str | None = None
    hangs: bool = False
    gone: bool = False


@dataclass
class Meeting:
    """The ranks that came. ``store`` is the main thread's; work in a stage takes a ``client``."""

    rank: int
    world_size: int
    store: Any
    timeout: float
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hosts: dict[int, str] = field(default_factory=dict)
    """Of every rank; on rank 0 alone."""
    _turn: int = 0

    def client(self) -> Any:
        """A store for another thread: one client serves one thread at a time, and may hang."""
        return self.store.clone()

    def stage(self, work: Callable[[], Any]) -> list[Outcome]:
        """Runs ``work`` on every rank for ``timeout`` seconds at most; returns all outcomes on rank
        0, an empty list elsewhere.

        Args:
            work: returns a value of JSON's types; may use collectives.
        """
        self._turn += 1
        mine = self.limited(work)
        if self.world_size == 1:
            return [mine]
        name = f"stage {self._turn}"
        self.store.set(f"{name}/{self.rank}", json.dumps(astuple(mine)))
        if self.rank:
            return []
        until = time.monotonic() + self.timeout + GRACE
        missing = self._wait_for(name, until)
        gone = Outcome(error=f"no answer within {self.timeout:.0f} s: it died, or hangs", gone=True)
        return [
            gone if r in missing else Outcome(*json.loads(self.store.get(f"{name}/{r}")))
            for r in range(self.world_size)
        ]

    def agree(self, value: Any) -> Any:
        """Returns rank 0's value on every rank.

        Raises:
            Apart: rank 0 is gone.
        """
        self._turn += 1
        if self.world_size == 1:
            return value
        key = f"agreed {self._turn}"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        try:
            self.store.wait([key], timedelta(seconds=2 * (self.timeout + GRACE)))
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise Apart(f"rank 0 does not answer any more ({_first_line(error)})") from None

    def part(self) -> None:
        """Rank 0, which may hold the store, is the last to go."""
        if self.world_size == 1:
            return
        self.store.add("leaving", 1)
        until = time.monotonic() + GRACE
        while self.rank == 0 and time.monotonic() < until:
            if self.store.add("leaving", 0) >= len(self.hosts):
                return
            time.sleep(0.02)

    def limited(self, work: Callable[[], Any]) -> Outcome:
        """Runs ``work`` in a thread, ``timeout`` seconds at most, without the other ranks."""
        done: list[Outcome] = []

        def call() -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # it is the thread's
            try:
                done.append(Outcome(work()))
            except Exception as error:  # whatever it is, it is what doctor was asked to find
                done.append(Outcome(error=_first_line(error)))

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not done:
            return Outcome(error=f"still not done after {self.timeout:.0f} s", hangs=True)
        return done[0]

    def _wait_for(self, name: str, until: float) -> list[int]:
        """Waits for the key ``name/RANK`` of every rank; returns those that did not set it."""
        missing = list(range(self.world_size))
        say_at = time.monotonic() + SAY_AFTER
        while missing and time.monotonic() < until:
            while missing and self.store.check([f"{name}/{missing[0]}"]):
                del missing[0]
            if missing and time.monotonic() > say_at:
                say(f"waiting for {where(missing, self.hosts)}")
                say_at = until
            time.sleep(0.02 if missing else 0)
        return [r for r in missing if not self.store.check([f"{name}/{r}"])]


def meet(env: Mapping[str, str], timeout: float) -> Meeting:
    """Meets the other ranks at MASTER_ADDR:MASTER_PORT.

    Args:
        env: the launcher's variables (``mesh.launch_variables``).
        timeout: seconds to wait for the last one, and for each later stage.

    Raises:
        Apart: the rendezvous cannot be reached, or ranks did not come.
    """
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    host = socket.gethostname()
    if world_size == 1:
        return Meeting(0, 1, dist.HashStore(), timeout, hosts={0: host})
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    # torchrun serves the store itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves and (error := _unreachable(address, port, timeout)):
        raise Apart(
            f"rank {rank} on {host} does not reach rank 0 at {address}:{port} within"
            f" {timeout:.0f} s ({error}): is rank 0 there (its lines say), does {host} take"
            f" {address} for the right machine (set MASTER_ADDR), is a firewall in between"
        )
    try:
        store = dist.TCPStore(
            address, port, is_master=serves, timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )  # fmt: skip
    except RuntimeError as failure:
        raise Apart(
            f"rank {rank} on {host}, {address}:{port}: {_first_line(failure)}; if the port is"
            " taken, set MASTER_PORT to a free one"
        ) from None
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    meeting = Meeting(rank, world_size, dist.PrefixStore(f"doctor {start}", store), timeout)
    meeting.store.set(f"host/{rank}", host)
    if rank == 0:
        missing = meeting._wait_for("host", time.monotonic() + timeout)
        meeting.hosts = {
            r: meeting.store.get(f"host/{r}").decode()
            for r in range(world_size)
            if r not in missing
        }
        meeting.agree(missing)
        if missing:
            meeting.part()
            raise Apart(_absent(meeting, missing, f"{address}:{port}"))
    elif missing := meeting.agree(None):
        meeting.part()
        raise Apart(f"{where(missing, {})} did not come; rank 0 has the list")
    return meeting


def _unreachable(address: str, port: int, timeout: float) -> str | None:
    """Waits until somebody listens there; returns why it is in vain. (TCPStore's own waiting prints
    stacks.)
    """
    until, error = time.monotonic() + timeout, ""
    while (left := until - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=left).close()
            return None
        except OSError as failure:
            error = failure.strerror or str(failure)
            time.sleep(min(0.1, max(0.0, left)))
    return error


def _absent(meeting: Meeting, missing: list[int], address: str) -> str:
    there = where(meeting.hosts, meeting.hosts)
    text = (
        f"{where(missing, {})} of {meeting.world_size} did not come to {address} within"
        f" {meeting.timeout:.0f} s; there: {there}"
    )
    if empty := sorted(_step_nodes() - {h.split(".")[0] for h in meeting.hosts.values()}):
        text += f"; no rank of {', '.join(empty)} came"
    return text


def _step_nodes() -> set[str]:
    """The nodes of this Slurm step; none where that is not to be had."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes or not shutil.which("scontrol"):
        return set()
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False,
        timeout=20,
    )  # fmt: skip
    return {name.split(".")[0] for name in done.stdout.split()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
