"""This process among all ranks: its device, collectives on the CPU, and agreement."""

import gc
import json
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scalepeft.core.errors import UserError
from scalepeft.core.launch import launch_variables
from scalepeft.core.log import say
from scalepeft.core.preemption import StopFlag, Stopping
from scalepeft.parallel import rendezvous

T = TypeVar("T")
KEPT: dict[str, type[Exception]] = {"UserError": UserError, "Stopping": Stopping}
"""What one rank raises and all others then too; of another failure they tell as RuntimeError."""


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
        # Else each empty tensor is filled, in case somebody reads what nobody wrote.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Ranks:
    """This process among ``world_size``; collectives here, but ``sum`` of a GPU's tensor, run on
    the CPU (gloo) and never wait for a GPU. What is gathered travels as JSON or bytes: no pickle.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = torch.device("cpu")
        self.control: dist.ProcessGroup | None = None
        self.presence: rendezvous.Presence | None = None
        self.secret = b""

    @classmethod
    def start(cls, wanted_device: str, process_group: bool, deterministic: str = "auto") -> "Ranks":
        """Reads the launcher's variables, and joins the group if there is or must be one."""
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
        ranks.control, ranks.secret = rendezvous.join(
            ranks.device, ranks._meet(env), ranks.rank, ranks.world_size
        )
        return ranks

    def _meet(self, env: dict[str, str]) -> dist.Store:
        if rendezvous.on_one_machine(env):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self.world_size == 1:
            return dist.HashStore()
        if path := rendezvous.folder():
            self.presence = rendezvous.Presence(path, self.rank)
        elif self.is_main:
            where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
            say(f"the ranks meet at {where}, open to whoever reaches it (docs/security.md)")
        return rendezvous.open_store(env, "ranks")

    def check_groups(self, groups: list[dist.ProcessGroup]) -> None:
        """Raises UserError if somebody else took a rank's place in these groups. A collective."""
        if self.device.type == "cuda" or not self.secret:  # NCCL's; plan's, which reach nobody
            return
        proven = [rendezvous.prove(group, self.secret) for group in groups]
        if self.any(not all(proven)):
            raise UserError("another process answered at a port of these ranks; start once more")

    def ranks_a_node(self) -> int:
        """Number of ranks on each node; a collective. Raises UserError: it differs."""
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

    def check(self, stop: StopFlag) -> None:
        """Raises Stopping on every rank once a signal came on one; a collective."""
        if self.any(stop.signal is not None):
            raise Stopping

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a tensor over the ranks, where it is."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control if values.device.type == "cpu" else None)
        return values

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, of JSON's types, in rank order, on every rank."""
        assert _plain(value), f"to other ranks go JSON's types, not {value!r:.200}"
        if self.world_size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self.gather_bytes(mine)]

    def of_node(self, value: T | None) -> T:
        """Returns what local rank 0 of this rank's node gave; the others give None."""
        here: list[Any] = [socket.gethostname(), value]
        made = [v for host, v in self.gather(here)[: self.rank + 1] if host == here[0]]
        return [v for v in made if v is not None][-1]

    def gather_bytes(self, mine: torch.Tensor, everywhere: bool = True) -> Any:
        """Returns the ranks' bytes (uint8, n), in rank order, on rank 0 or ``everywhere``."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self.control)
        longest = int(max(sizes))
        padded = torch.nn.functional.pad(mine, (0, longest - mine.numel()))
        if not everywhere and not self.is_main:
            return dist.gather(padded, dst=0, group=self.control)
        every = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        if everywhere:
            dist.all_gather(every, padded, group=self.control)
        else:
            dist.gather(padded, every, dst=0, group=self.control)
        return [part[: int(size)] for part, size in zip(every, sizes, strict=True)]

    def assert_equal(self, value: str, what: str) -> str:
        """Returns ``value`` if it is equal on every rank. Raises UserError, naming the ranks."""
        values = self.gather(value)
        if others := [rank for rank, v in enumerate(values) if v != values[0]]:
            raise UserError(
                f"{what} on rank 0 and on ranks {others}; give every node the same copy"
            )
        return value

    def all_or_raise(self, work: Callable[[], T]) -> T:
        """Runs ``work`` (no collectives) here; if it fails on any rank, every rank raises."""
        try:
            result = work()
        except Exception as error:
            kind = next((name for name, kept in KEPT.items() if isinstance(error, kept)), "")
            self.gather([kind, str(error)])
            raise
        failures: list[Any] = self.gather(None)
        for rank, failed in enumerate(failures):
            if failed is not None:
                raise KEPT.get(failed[0], RuntimeError)(f"rank {rank}: {failed[1]}")
        return result

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0; its result, of JSON's types, or failure is everyone's."""
        return self.gather(self.alone(work))[0]  # type: ignore[return-value]

    def alone(self, work: Callable[[], T]) -> T | None:
        """Runs ``work`` on rank 0; its failure is everyone's, its result not."""
        return self.all_or_raise(lambda: work() if self.is_main else None)

    def finish(self) -> None:
        """Leaves the process group; call with no engine or model alive, which could hang."""
        if dist.is_initialized():
            dist.barrier(group=self.control)
            if self.presence:
                self.presence.leave()
            gc.collect()
            dist.destroy_process_group()


def _plain(value: Any) -> bool:
    """True if JSON gives back the very same."""
    if isinstance(value, dict):
        return all(type(key) is str and _plain(v) for key, v in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or type(value) in (str, int, float, bool)
