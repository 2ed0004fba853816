"""This process among all ranks: its device, collectives on the CPU, and agreement."""

import gc
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scalepeft.core.errors import UserError
from scalepeft.core.launch import launch_variables
from scalepeft.core.preemption import Stopping

T = TypeVar("T")
# Start-up work on one rank (tokenizing, a first download) keeps the others waiting in a control
# collective.
CONTROL_TIMEOUT = timedelta(hours=2)


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


def fix_order(deterministic: str, device: torch.device) -> None:
    """Sets what ``train.deterministic`` (auto, on, off) asks for, before CUDA starts."""
    if device.type == "cuda" and deterministic != "off":  # which costs nothing to speak of
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if deterministic == "on":  # flash and memory-efficient attention go by it, cuDNN's is left out
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Ranks:
    """This process among ``world_size``; collectives here, but ``sum`` of a GPU's tensor, run on
    the CPU (gloo) and never wait for a GPU.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, local_rank: int = 0, device: str = "cpu"
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = torch.device(device)
        self.control: dist.ProcessGroup | None = None

    @classmethod
    def start(cls, wanted_device: str, process_group: bool, deterministic: str = "auto") -> "Ranks":
        """Reads the launcher's variables and joins the process group (also alone, if
        ``process_group``).
        """
        # In TF32, as a user's program or NVIDIA's containers may have set, rotations are none.
        torch.set_float32_matmul_precision("highest")
        env = launch_variables(os.environ)
        ranks = cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))
        ranks.device = pick_device(wanted_device, ranks.local_rank)
        fix_order(deterministic, ranks.device)
        if ranks.device.type == "cuda":
            if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
                # Micro-batches differ in length: memory would be cut into pieces that fit none.
                os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
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
        """Adds a tensor over the ranks, where it is."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control if values.device.type == "cpu" else None)
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

    def assert_equal(self, value: str, what: str) -> str:
        """Returns ``value`` if it is equal on every rank, as a node's own copy of a file should be.

        Raises:
            UserError: it differs; the message begins with ``what`` and names the ranks.
        """
        values = self.gather(value)
        if others := [rank for rank, v in enumerate(values) if v != values[0]]:
            raise UserError(
                f"{what} on rank 0 and on ranks {others}; give every node the same copy"
            )
        return value

    def all_or_raise(self, work: Callable[[], T]) -> T:
        """Runs ``work`` (without collectives) here; if it fails on any rank, every rank raises.

        So that a file missing on one node ends the job everywhere, and nobody waits for a dead
        rank.
        """
        try:
            result = work()
        except Exception as error:
            self.gather((UserError if isinstance(error, UserError) else RuntimeError, str(error)))
            raise
        failures: list[Any] = self.gather(None)
        for rank, failed in enumerate(failures):
            if failed is not None:
                kind, text = failed
                raise kind(f"rank {rank}: {text}")
        return result

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0, returns its result on every rank; its failure is everyone's."""
        result = [self.all_or_raise(lambda: work() if self.is_main else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0, group=self.control)
        return result[0]  # type: ignore[return-value]

    def alone(self, work: Callable[[], T]) -> T:
        """``run_on_main`` for long work that polls for a signal: its Stopping is everyone's."""

        def guarded() -> tuple[T | None, bool]:
            try:
                return work(), False
            except Stopping:
                return None, True

        result, stopped = self.run_on_main(guarded)
        if stopped:
            raise Stopping
        return result  # type: ignore[return-value]

    def finish(self, *_released: object) -> None:
        """Leaves the process group; call with no engine or model alive (DDP over gloo would hang at
        exit).
        """
        if dist.is_initialized():
            dist.barrier(group=self.control)
            gc.collect()
            dist.destroy_process_group()
