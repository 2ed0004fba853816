"""Who this process is among all: ranks from torchrun, srun or accelerate, devices, and agreement
between ranks.
"""

import gc
import os
import re
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scalepeft.core.errors import UserError
from scalepeft.core.preemption import Stopping

T = TypeVar("T")
# Start-up work on one rank (tokenising, a first download) keeps the others waiting in a control
# collective.
CONTROL_TIMEOUT = timedelta(hours=2)


def launch_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT as torchrun sets them, from
    srun if need be.

    Under plain ``srun`` (one task a rank, no torchrun) the rendezvous is the first node of the step
    and ``slurm_port``.

    Raises:
        UserError: a launcher set only some of the variables.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: env[name] for name in names if name in env}
    if "RANK" in given or "WORLD_SIZE" in given:
        given.setdefault(
            "LOCAL_RANK", given.get("RANK", "0") if given.get("WORLD_SIZE") == "1" else ""
        )
        missing = [name for name in names if not given.get(name)]
        if given.get("WORLD_SIZE") == "1":
            missing = [name for name in missing if not name.startswith("MASTER")]
        if missing:
            raise UserError(
                f"the launcher set {', '.join(sorted(k for k in given if given[k]))} but not"
                f" {', '.join(missing)}; start with torchrun, srun, accelerate launch or"
                " launch/local.sh"
            )
        return given
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_NTASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
            "MASTER_PORT": env.get("MASTER_PORT") or str(slurm_port(env)),
        }
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def slurm_port(env: Mapping[str, str]) -> int:
    """A port below the ephemeral ones, from job, step and restart.

    Two jobs on one node do not meet, nor do a restarted job and ranks of its earlier start that
    a hung node kept alive.
    """
    job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
    return 10000 + (job + 101 * step + 1009 * int(env.get("SLURM_RESTART_COUNT", "0"))) % 22000


def world_size() -> int:
    """Number of ranks that the launcher started, known before they meet."""
    return int(launch_variables(os.environ)["WORLD_SIZE"])


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: ``a[07-09,12],b3`` -> ``a07``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    assert match, nodelist
    return match[1] + (match[2] or "") + (match[3] or "")


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """Maps ``engine.device`` (auto, cpu, cuda) to this rank's device."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"engine.device=cuda: torch {torch.__version__} sees no CUDA device on"
            f" {socket.gethostname()}; take engine.device=cpu or check the driver and"
            " CUDA_VISIBLE_DEVICES"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # srun --gpus-per-task shows each task one GPU, as number 0.
    index = local_rank if count > 1 else 0
    if index >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: {count} visible; start fewer processes"
            " a node"
        )
    return torch.device("cuda", index)


class Ranks:
    """This process among ``world_size``; collectives here run on the CPU (gloo) and never wait for
    a GPU.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, local_rank: int = 0, device: str = "cpu"
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = torch.device(device)
        self.control: dist.ProcessGroup | None = None

    @classmethod
    def start(cls, wanted_device: str, process_group: bool) -> "Ranks":
        """Reads the launcher's variables and joins the process group (also alone, if
        ``process_group``).
        """
        env = launch_variables(os.environ)
        ranks = cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))
        ranks.device = pick_device(wanted_device, ranks.local_rank)
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        if ranks.world_size == 1 and not process_group:
            return ranks
        os.environ.update(env)
        backend = "gloo" if ranks.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        kwargs: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
        if ranks.world_size == 1:
            kwargs["store"] = dist.HashStore()
        if ranks.device.type == "cuda":
            kwargs["device_id"] = ranks.device
        dist.init_process_group(backend, **kwargs)
        ranks.control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        return ranks

    def ranks_a_node(self) -> int:
        """Number of ranks on each node; a collective.

        Raises:
            UserError: nodes have different numbers of ranks, or theirs do not follow each other.
        """
        local = self.gather(self.local_rank)
        size = max(local) + 1
        if local != [rank % size for rank in range(self.world_size)]:
            raise UserError(
                f"ranks {list(range(self.world_size))} have the local ranks {local}: for groups"
                " inside nodes each node needs the same number of ranks, one after the other"
                " (srun --distribution=block --ntasks-per-node=N)"
            )
        return size

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on one."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a CPU tensor over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Returns every rank's value, in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def same(self, value: str, what: str) -> str:
        """Returns ``value`` if it is equal on every rank, as a node's own copy of a file should be.

        Raises:
            UserError: it differs; the message begins with ``what`` and names the ranks.
        """
        values = self.gather(value)
        others = [rank for rank, v in enumerate(values) if v != values[0]]
        if others:
            raise UserError(
                f"{what} on rank 0 and on ranks {others}; give every node the same copy"
            )
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Runs ``work`` (without collectives) here; if it fails on any rank, every rank raises.

        So that a file missing on one node ends the job everywhere, and nobody waits for a dead
        rank.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        failures = self.gather(
            None if failure is None else (isinstance(failure, UserError), str(failure))
        )
        if failure is not None:
            raise failure
        for rank, failed in enumerate(failures):
            if failed is not None:
                kind, text = failed
                raise (UserError if kind else RuntimeError)(f"rank {rank}: {text}")
        return result  # type: ignore[return-value]

    def main_only(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0, returns its result on every rank; its failure is everyone's."""
        result = [self.together(lambda: work() if self.is_main else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0, group=self.control)
        return result[0]  # type: ignore[return-value]

    def finish(self, *_released: object) -> None:
        """Leaves the process group; call with no engine or model alive (DDP over gloo would hang at
        exit).
        """
        if dist.is_initialized():
            dist.barrier(group=self.control)
            gc.collect()
            dist.destroy_process_group()


def rank() -> int:
    """The rank of this process in a job of several, each of which runs its own child."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def alone(ranks: Ranks, work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 while the others wait; its Stopping is everyone's."""
    stopped = False

    def guarded() -> T | None:
        nonlocal stopped
        try:
            return work()
        except Stopping:
            stopped = True
            return None

    found = ranks.main_only(guarded)
    if ranks.any(stopped):
        raise Stopping
    return found  # type: ignore[return-value]
