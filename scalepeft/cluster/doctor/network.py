"""The links between the ranks: collectives with known results, bytes through FSDP2, clocks."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalepeft.cluster.doctor.findings import Finding, by_value, fix, warn, where
from scalepeft.cluster.doctor.rendezvous import Outcome
from scalepeft.core.errors import UserError
from scalepeft.parallel.base import copy_rows
from scalepeft.parallel.fsdp2 import FSDP2, FSDP2Config
from scalepeft.parallel.ranks import Ranks

BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of the timed all-reduce
SKEW = 1.0  # seconds from which clocks are worth a warning


def join(ranks: Ranks, store: Any, seconds: float) -> None:
    """Makes the process group over gloo, for what runs on the CPU."""
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("control", store), rank=ranks.rank,
        world_size=ranks.world_size, timeout=timedelta(seconds=seconds),
    )  # fmt: skip


def join_devices(ranks: Ranks, store: Any, seconds: float) -> None:
    """Makes the group that engines train with: that of ``join`` on CPUs, NCCL too on GPUs."""
    if ranks.device.type == "cpu":
        return
    dist.destroy_process_group()
    # NCCL's watchdog ends the process: it must come later than doctor's own limit.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.PrefixStore("devices", store), rank=ranks.rank,
        world_size=ranks.world_size, timeout=timedelta(seconds=3 * seconds + 60),
        device_id=ranks.device,
    )  # fmt: skip


def try_collectives(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Runs the three collectives of training; returns which are wrong, and how fast they are."""
    n, each = ranks.world_size, 4099
    total = n * (n - 1) // 2
    base = torch.arange(n * each, device=device, dtype=torch.float32) % 97
    wrong = []

    x = base[:each] + ranks.rank
    dist.all_reduce(x)
    if not torch.equal(x, n * base[:each] + total):
        wrong.append("all-reduce")

    gathered = torch.empty_like(base)
    _single("all_gather")(gathered, base[:each] + ranks.rank)
    if not torch.equal(
        gathered.view(n, each), base[:each] + torch.arange(n, device=device)[:, None]
    ):
        wrong.append("all-gather")

    part = torch.empty(each, device=device)
    _single("reduce_scatter")(part, base + ranks.rank)
    mine = base[ranks.rank * each : (ranks.rank + 1) * each]
    if not torch.equal(part, n * mine + total):
        wrong.append("reduce-scatter")

    large = torch.zeros(BYTES[device.type] // 4, device=device)
    return {
        "wrong": wrong,
        "latency": _fastest(torch.zeros(1, device=device), 10),
        "bandwidth": large.nbytes / _fastest(large, 3),
    }


def _single(name: str) -> Any:
    """The collective on one tensor under its name of this torch: the older ones now warn."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    return getattr(dist, f"{name}_single", None) or getattr(dist, older[name])


def _fastest(x: Tensor, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        dist.all_reduce(x)
        x[:1].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def patterns(world_size: int) -> Tensor:
    """Every 16-bit pattern, hence every byte, as (rows, 512) uint8; no world size divides the
    rows.

    bf16 has 254 NaNs among them; quantised weights take any pattern.
    """
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(-1, 512)
    extra = 1 if world_size > 1 and len(every) % world_size == 0 else 0
    return torch.cat([every, every.flip(1)[:extra]])


def changed(got: Tensor, want: Tensor) -> str | None:
    """Says how many bytes differ and which is the first; None if none does."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{tuple(got.shape)} {got.dtype}, expected {tuple(want.shape)} {want.dtype}"
    one, other = (t.detach().contiguous().view(torch.uint8).cpu().view(-1) for t in (got, want))
    where_not = (one != other).nonzero().view(-1)
    if not len(where_not):
        return None
    at = int(where_not[0])
    return (
        f"{len(where_not)} of {len(one)} bytes changed, the first at {at}:"
        f" {int(other[at]):#04x} became {int(one[at]):#04x}"
    )


class _Block(nn.Module):
    """A unit of sharding: frozen storage and something that trains, as a decoder block has."""

    def __init__(self, stored: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in stored.items():
            trains = name == "adapter"
            empty = torch.empty_like(tensor, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=trains))

    def forward(self) -> dict[str, Tensor]:
        """What the block computes with: its gathered parameters."""
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def gathered_bytes(ranks: Ranks, stored: dict[str, Tensor]) -> str | None:
    """Shards the tensors as the engine does, gathers them in a forward, and compares the bytes.

    Args:
        ranks: the process group is that of the engines.
        stored: name -> full tensor; ``adapter`` trains.
    """
    model = nn.Sequential(_Block(stored))
    FSDP2(FSDP2Config(), ranks).shard(model, list(model))
    model.to_empty(device=ranks.device)
    for name, parameter in model[0].named_parameters():
        copy_rows(parameter, stored[name].to(ranks.device))
    for name, tensor in model[0]().items():
        if difference := changed(tensor, stored[name]):
            return f"{name}: {difference}"
    return None


def try_bytes(ranks: Ranks) -> dict[str, Any]:
    """Gathers 4-bit storage as scalepeft carries it (uint8) and as other tools do (bf16)."""
    every = patterns(ranks.world_size)
    beside = {
        "scales": every[:, ::4].contiguous(),
        "norm": torch.linspace(-2, 2, 130).bfloat16(),
        "adapter": torch.sin(torch.arange(3 * 64.0)).view(3, 64),
    }
    try:
        as_bytes = gathered_bytes(ranks, {"weight": every, **beside})
    except UserError as error:  # torch is too old
        return {"uint8": None, "refused": str(error)}
    as_bf16 = {"weight": every.view(torch.bfloat16), "adapter": beside["adapter"]}
    return {"uint8": as_bytes, "bf16": gathered_bytes(ranks, as_bf16)}


def clock_offsets(
    ranks: Ranks, clock: Callable[[], float] = time.time, rounds: int = 8
) -> list[tuple[float, float]]:
    """Returns on rank 0 for every rank how far its clock is ahead, and half the round trip in
    which that was found: the error at most. An empty list elsewhere.

    Args:
        ranks: have a process group on the CPU.
        clock: seconds of the epoch.
        rounds: of which the quickest counts.
    """
    found = [(0.0, 0.0)]
    word = torch.zeros(1, dtype=torch.float64)
    for other in range(1, ranks.world_size):
        best = (0.0, float("inf"))
        for _ in range(rounds):
            if ranks.rank == other:
                dist.recv(word, 0)
                word[0] = clock()
                dist.send(word, 0)
            elif ranks.rank == 0:
                sent, began = clock(), time.perf_counter()
                dist.send(word, other)
                dist.recv(word, other)
                half = (time.perf_counter() - began) / 2
                if half < best[1]:
                    best = (word.item() - sent - half, half)
        found.append(best)
    return found if ranks.rank == 0 else []


def judge_links(check: str, kind: str, outcomes: list[Outcome], hosts: dict[int, str]) -> Finding:
    """Whether the collectives came through with the right numbers."""
    hint = (
        "ranks on several nodes: set NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO says which it takes)"
        if kind == "nccl"
        else "set GLOO_SOCKET_IFNAME to the interface that the nodes share; open the ports between"
        " them"
    )
    failed = {r: o.error for r, o in enumerate(outcomes) if o.error is not None}
    if failed:
        return fix(check, f"{kind}: {by_value(failed, hosts)}", hint)
    wrong = {r: ", ".join(o.value["wrong"]) for r, o in enumerate(outcomes) if o.value["wrong"]}
    if wrong:
        return fix(check, f"{kind} gives wrong sums: {by_value(wrong, hosts)}",
                   "update torch or the driver; take that node out")  # fmt: skip
    n = len(outcomes)
    if n == 1:
        return Finding(check, "info", f"{kind}: one rank, no links to try")
    latency = max(o.value["latency"] for o in outcomes)
    bandwidth = min(o.value["bandwidth"] for o in outcomes)
    return Finding(
        check, "ok",
        f"{kind}: all-reduce, all-gather and reduce-scatter right on {n} ranks;"
        f" {1e6 * latency:.0f} us, {bandwidth / 1e9:.2f} GB/s all-reduced",
    )  # fmt: skip


def judge_bytes(outcomes: list[Outcome], hosts: dict[int, str], needed: bool) -> list[Finding]:
    """Whether stored bytes survive an all-gather.

    Args:
        outcomes: of ``try_bytes``.
        hosts: of all ranks.
        needed: the config shards a quantised base; otherwise a fault is only worth a warning.
    """
    judge = fix if needed else warn
    failed = {r: o.error for r, o in enumerate(outcomes) if o.error is not None}
    if failed:
        return [judge("4-bit bytes", f"fsdp2: {by_value(failed, hosts)}", "update torch")]
    if refused := outcomes[0].value.get("refused"):
        return [Finding("4-bit bytes", "info", f"not tried: {refused}")]
    listed = []
    if bad := {r: o.value["uint8"] for r, o in enumerate(outcomes) if o.value["uint8"]}:
        listed.append(
            judge("4-bit bytes", f"an all-gather changes bytes: {by_value(bad, hosts)}: training"
                  " on a sharded quantised base would be wrong without an error",
                  "update torch or the driver, or take engine.name=ddp")
        )  # fmt: skip
    else:
        listed.append(
            Finding("4-bit bytes", "ok", "all 65,536 16-bit patterns come through fsdp2's"
                    " all-gather as uint8"
                    + (f", uneven shards on {len(outcomes)} ranks" if len(outcomes) > 1 else ""))
        )  # fmt: skip
    if altered := [r for r, o in enumerate(outcomes) if o.value["bf16"]]:
        found = (
            f"stored as bf16 they do not ({outcomes[altered[0]].value['bf16']}, on"
            f" {where(altered, hosts)}): scalepeft does not do that; tools that keep 4-bit weights"
            " in bf16 under FSDP2 are not safe here (bitsandbytes #1945)"
        )
    else:
        found = "stored as bf16, as other tools do (bitsandbytes #1945), they come through here too"
    return [*listed, Finding("4-bit bytes", "info", found)]


def judge_clocks(outcomes: list[Outcome], hosts: dict[int, str]) -> Finding:
    """The largest difference between two clocks, of what rank 0 found."""
    if failed := {r: o.error for r, o in enumerate(outcomes) if o.error is not None}:
        return fix("clocks", f"gloo: {by_value(failed, hosts)}")
    offsets = outcomes[0].value
    ahead = [offset for offset, _ in offsets]
    first, last = ahead.index(min(ahead)), ahead.index(max(ahead))
    apart = ahead[last] - ahead[first]
    error = max(half for _, half in offsets)
    text = f"{1000 * apart:.1f} ms apart at most (to {1000 * error:.1f} ms)"
    if apart - error <= SKEW:
        return Finding("clocks", "ok", text)
    return warn(
        "clocks",
        f"{text}: {where([last], hosts)} is ahead of {where([first], hosts)}; times in report and"
        " status are off by that, checkpoints do not depend on clocks",
        "switch NTP (chrony) on",
    )
