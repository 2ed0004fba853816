"""The links between ranks: collectives with known results, 4-bit bytes through an all-gather."""

import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalepeft.cluster.doctor.check import Check, Context, Verdict
from scalepeft.cluster.doctor.findings import Hosts, Values, by_value, where
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.parallel.base import copy_rows
from scalepeft.parallel.fsdp2 import FSDP2, FSDP2Config
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.zero import ZeroConfig

LARGE = {"cpu": 4 << 20, "cuda": 64 << 20}  # bytes of the timed all-reduce


def probe_links(context: Context, backend: str) -> dict[str, Any]:
    """Join the process group, in place of an earlier one, and run its collectives."""
    ranks, seconds = context.ranks, context.rendezvous.timeout
    device = torch.device("cpu") if backend == "gloo" else ranks.device
    if dist.is_initialized():
        dist.destroy_process_group()
    if device.type == "cuda":
        # NCCL's watchdog ends the process: it must come later than doctor's own limit.
        backend, seconds = "cpu:gloo,cuda:nccl", 3 * seconds + 60
    dist.init_process_group(
        backend, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(seconds=seconds),
        store=dist.PrefixStore(backend, context.rendezvous.client()),
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    if device.type == "cpu":
        dist.monitored_barrier(wait_all_ranks=True)  # its error names ranks that stay away
    return try_collectives(ranks, device)


def try_collectives(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Run the three collectives of training.

    Returns:
        ``wrong``: names of those that gave wrong numbers; ``latency``: seconds; ``bandwidth``:
        bytes per second.
    """
    n, each = ranks.world_size, 4099
    total = n * (n - 1) // 2
    base = torch.arange(n * each, device=device, dtype=torch.float32) % 97
    x = base[:each] + ranks.rank
    gathered, part = torch.empty_like(base), torch.empty_like(x)
    _single("all_gather")(gathered, x)
    _single("reduce_scatter")(part, base + ranks.rank)
    dist.all_reduce(x)
    of_ranks = base[:each] + torch.arange(n, device=device)[:, None]
    pairs = {
        "all-reduce": (x, n * base[:each] + total),
        "all-gather": (gathered.view(n, each), of_ranks),
        "reduce-scatter": (part, n * base[ranks.rank * each :][:each] + total),
    }
    large = torch.zeros(LARGE[device.type] // 4, device=device)
    return {
        "wrong": ", ".join(name for name, (x, want) in pairs.items() if not torch.equal(x, want)),
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
        start = time.perf_counter()
        dist.all_reduce(x)
        x[:1].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def check_links(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield whether the collectives came through with the right numbers."""
    if wrong := {rank: v["wrong"] for rank, v in values.items() if v["wrong"]}:
        remedy = "update torch or the driver; take that node out"
        yield "fix", f"wrong sums: {by_value(wrong, hosts)}", remedy
    elif len(values) == 1:
        yield "info", "one rank, no links to try"
    latency = max(v["latency"] for v in values.values())
    bandwidth = min(v["bandwidth"] for v in values.values())
    if len(values) > 1:
        yield (
            "ok",
            (
                f"all-reduce, all-gather and reduce-scatter right on {len(values)} ranks;"
                f" {1e6 * latency:.0f} us, {bandwidth / 1e9:.2f} GB/s all-reduced"
            ),
        )


def shards_bytes(config: RunConfig) -> bool:
    """Return True if a run of this config shards a quantized base."""
    engine = config.engine
    sharded = engine.name == "fsdp2" or (isinstance(engine, ZeroConfig) and engine.stage == 3)
    return sharded and config.model.quant != "none"


def probe_bytes(context: Context) -> dict[str, Any]:
    """Gather 4-bit storage as scalepeft carries it (uint8) and as other tools do (bf16).

    Returns:
        What changed, or None, stored as ``uint8`` and as ``bf16``; ``refused`` by an old torch.
    """
    every = patterns(context.ranks.world_size)
    adapter = torch.sin(torch.arange(3 * 64.0)).view(3, 64)
    stored = {
        "weight": every,
        "scales": every[:, ::4].contiguous(),
        "norm": torch.linspace(-2, 2, 130).bfloat16(),
        "adapter": adapter,
    }
    try:
        as_bytes = gathered_bytes(context.ranks, stored)
    except UserError as error:
        return {"refused": str(error)}
    as_bf16 = {"weight": every.view(torch.bfloat16), "adapter": adapter}
    return {"uint8": as_bytes, "bf16": gathered_bytes(context.ranks, as_bf16)}


def check_bytes(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield whether stored bytes survive an all-gather."""
    needed = context.config is None or shards_bytes(context.config)
    if refused := values[0].get("refused"):
        uses_fsdp2 = context.config is not None and context.config.engine.name == "fsdp2"
        yield "fix" if needed and uses_fsdp2 else "info", f"not tried: {refused}"
        return
    if wrong := {rank: v["uint8"] for rank, v in values.items() if v["uint8"]}:
        text = (
            f"an all-gather changes bytes: {by_value(wrong, hosts)}: training on a sharded"
            " quantized base would be wrong without an error"
        )
        yield "fix" if needed else "warn", text, "update torch or the driver; take engine.name=ddp"
    else:
        uneven = f", uneven shards on {len(values)} ranks" if len(values) > 1 else ""
        yield "ok", f"all 65,536 16-bit patterns come through fsdp2's all-gather as uint8{uneven}"
    # Tools that keep 4-bit weights in bf16 under FSDP2 depend on it, scalepeft does not.
    text = "stored as bf16, as other tools do (bitsandbytes #1945), they come through here too"
    if altered := [rank for rank, v in values.items() if v["bf16"]]:
        text = (
            f"stored as bf16 they do not ({values[altered[0]]['bf16']}, on"
            f" {where(altered, hosts)}): scalepeft does not do that, other tools do (bitsandbytes"
            " #1945)"
        )
    yield "info", text


def patterns(world_size: int) -> Tensor:
    """Return every 16-bit pattern, hence every byte, as (rows, 512) uint8; no world size divides
    the rows. bf16 has 254 NaNs among them; quantized weights take any pattern.
    """
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(-1, 512)
    extra = 1 if world_size > 1 and len(every) % world_size == 0 else 0
    return torch.cat([every, every.flip(1)[:extra]])


class _Block(nn.Module):
    """A unit of sharding: frozen storage and something that trains, as a decoder block has."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in stored.items():
            empty = torch.empty_like(tensor, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=name == "adapter"))

    def forward(self) -> dict[str, Tensor]:
        """Return what the block computes with: its gathered parameters."""
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def gathered_bytes(ranks: Ranks, stored: Mapping[str, Tensor]) -> str | None:
    """Shard the tensors as the engine does, gather them in a forward, return which bytes changed.

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


def changed(tensor: Tensor, expected: Tensor) -> str | None:
    """Return how many bytes differ and which is the first; None if none does."""
    flat = (t.detach().contiguous().cpu().view(torch.uint8).view(-1) for t in (tensor, expected))
    got, want = flat
    if got.shape != want.shape:
        return f"{len(got)} bytes, expected {len(want)}"
    different = (got != want).nonzero().view(-1)
    if not len(different):
        return None
    at = int(different[0])
    return (
        f"{len(different)} of {len(got)} bytes changed, the first at {at}:"
        f" {int(want[at]):#04x} became {int(got[at]):#04x}"
    )


GLOO = Check(
    "links", partial(probe_links, backend="gloo"), check_links,
    remedy="set GLOO_SOCKET_IFNAME to the interface that the nodes share; open the ports between"
    " them",
)  # fmt: skip
NCCL = Check(
    "GPU links", partial(probe_links, backend="nccl"), check_links,
    remedy="ranks on several nodes: set NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO says which it takes)",
)  # fmt: skip
BYTES = Check("4-bit bytes", probe_bytes, check_bytes, remedy="update torch")
