"""How doctor's ranks meet: through a TCPStore and with time limits, so that a rank that never
comes, dies or hangs is a finding and not a hang.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from scalepeft.cluster.doctor.findings import where

GRACE = 10.0  # seconds that an answer may take beyond the work itself


class RendezvousError(Exception):
    """The ranks do not come together; the message says who is missing and where to look."""


@dataclass
class Rendezvous:
    """The ranks that meet at a store.

    Attributes:
        rank: of this process.
        world_size: number of ranks that the launcher started.
        store: the main thread's: one client serves one thread at a time.
        timeout: seconds that a round may take.
        hosts: rank -> host of those that came, on rank 0.
    """

    rank: int
    world_size: int
    store: Any
    timeout: float
    hosts: dict[int, str] = field(default_factory=dict)
    _round: int = 0

    def client(self) -> Any:
        """Return a store for another thread, which may hang in it."""
        return self.store.clone()

    def gather(self, value: Any, seconds: float) -> dict[int, Any]:
        """Return rank -> value of those that answer in time on rank 0; nothing elsewhere.

        Args:
            value: of this rank, of JSON's types.
            seconds: to wait for the last rank.
        """
        self._round += 1
        keys = [f"{self._round}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        if self.rank:
            return {}
        until = time.monotonic() + seconds
        # Not store.wait: it prints warnings of its own when the time is up.
        while not self.store.check(keys) and time.monotonic() < until:
            time.sleep(0.02)
        came = {rank: key for rank, key in enumerate(keys) if self.store.check([key])}
        return {rank: json.loads(self.store.get(key)) for rank, key in came.items()}

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank.

        Raises:
            RendezvousError: rank 0 is gone.
        """
        self._round += 1
        key = f"{self._round}"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        try:
            self.store.wait([key], timedelta(seconds=2 * (self.timeout + GRACE)))
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise RendezvousError(f"rank 0 is gone ({first_line(error)})") from None

    def close(self) -> None:
        """Leave; rank 0, which may serve the store, is the last."""
        self.store.add("leaving", 1)
        until = time.monotonic() + GRACE if self.rank == 0 else 0.0
        while time.monotonic() < until and self.store.add("leaving", 0) < len(self.hosts):
            time.sleep(0.02)


def join(env: Mapping[str, str], timeout: float) -> Rendezvous:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT; rank 0 learns who is there.

    Args:
        env: the launcher's variables (``ranks.launch_variables``).
        timeout: seconds to wait for the last one, and for each later round.

    Raises:
        RendezvousError: the store cannot be reached, or ranks did not come.
    """
    rank, world_size, host = int(env["RANK"]), int(env["WORLD_SIZE"]), socket.gethostname()
    if world_size == 1:
        return Rendezvous(0, 1, dist.HashStore(), timeout, {0: host})
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    at = f"{address}:{port}"
    # torchrun serves the store itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves and (error := _unreachable(address, port, timeout)):
        raise RendezvousError(
            f"rank {rank} on {host} does not reach rank 0 at {at} within {timeout:.0f} s ({error}):"
            f" is rank 0 there (its lines say), does {host} take {address} for the right machine"
            " (set MASTER_ADDR), is a firewall in between"
        )
    limit = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore(address, port, None, serves, limit, wait_for_workers=False)
    except RuntimeError as failure:
        raise RendezvousError(
            f"rank {rank} on {host}, {at}: {first_line(failure)}; if the port is taken, set"
            " MASTER_PORT to a free one"
        ) from None
    # A restart by torchrun meets at the same store, where the keys of the first start still are.
    prefix = f"doctor {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    rendezvous = Rendezvous(rank, world_size, dist.PrefixStore(prefix, store), timeout)
    rendezvous.hosts = rendezvous.gather(host, timeout)
    missing = rendezvous.share([r for r in range(world_size) if r not in rendezvous.hosts])
    if not missing:
        return rendezvous
    rendezvous.close()
    if rank:
        raise RendezvousError(f"{where(missing, {})} did not come; rank 0 has the list")
    hosts = rendezvous.hosts
    empty = sorted(_step_nodes() - {host.split(".")[0] for host in hosts.values()})
    raise RendezvousError(
        f"{where(missing, {})} of {world_size} did not come to {at} within {timeout:.0f} s; there:"
        f" {where(hosts, hosts)}" + f"; no rank of {', '.join(empty)} came" * bool(empty)
    )


def _step_nodes() -> set[str]:
    """Return the nodes of this Slurm step; none where that is not to be had."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes or not shutil.which("scontrol"):
        return set()
    command = ["scontrol", "show", "hostnames", nodes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return {name.split(".")[0] for name in done.stdout.split()}


def _unreachable(address: str, port: int, timeout: float) -> str | None:
    """Return why nobody listens there in time. TCPStore's own waiting prints stacks."""
    until, error = time.monotonic() + timeout, ""
    while (remaining := until - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=remaining).close()
            return None
        except OSError as failure:
            error = failure.strerror or str(failure)
            time.sleep(min(0.1, remaining))
    return error


def first_line(error: Exception) -> str:
    """Return the first line of the message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
