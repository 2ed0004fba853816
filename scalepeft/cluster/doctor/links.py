"""The links between ranks: collectives with known results, 4-bit bytes through an all-gather."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalepeft.cluster.doctor.check import Context
from scalepeft.parallel.base import copy_rows
from scalepeft.parallel.fsdp2 import FSDP2, FSDP2Config
from scalepeft.parallel.ranks import Ranks


def collectives(context: Context, backend: str) -> Any:
    """Join the group anew, run training's collectives. Raises RuntimeError: failed, or wrong."""
    ranks, n, seconds = context.ranks, context.ranks.world_size, context.timeout
    device = torch.device("cpu") if backend == "gloo" else ranks.device
    if dist.is_initialized():
        dist.destroy_process_group()
    if device.type == "cuda":
        # NCCL's watchdog ends the process: it must come later than doctor's own limit.
        backend, seconds = "cpu:gloo,cuda:nccl", 3 * seconds + 60
    dist.init_process_group(
        backend, rank=ranks.rank, world_size=n, timeout=timedelta(seconds=seconds),
        store=dist.PrefixStore(backend, context.store.clone()),
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    if device.type == "cpu":
        dist.monitored_barrier(wait_all_ranks=True)  # its error names ranks that stay away
    if wrong := wrong_collectives(ranks, device):
        raise RuntimeError(f"wrong sums: {', '.join(wrong)}; update torch or the driver")
    if n == 1:
        return "info", "one rank, no links to try"
    return f"all-reduce, all-gather and reduce-scatter right on {n} ranks"


def wrong_collectives(ranks: Ranks, device: torch.device) -> list[str]:
    """Run all-reduce, all-gather and reduce-scatter; return those that gave wrong numbers."""
    n, each = ranks.world_size, 4099
    base = torch.arange(n * each, device=device, dtype=torch.float32).view(n, each) % 97
    rows = base[0] + torch.arange(n, device=device)[:, None]
    gathered, reduced, part = torch.empty_like(base), rows[ranks.rank].clone(), rows[0].clone()
    # On one tensor under their names of this torch: the older ones now warn.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather(gathered.view(-1), reduced)
    scatter(part, (base + ranks.rank).view(-1))
    dist.all_reduce(reduced)
    results = {
        "all-reduce": (reduced, rows.sum(0)),
        "all-gather": (gathered, rows),
        "reduce-scatter": (part, n * base[ranks.rank] + n * (n - 1) // 2),
    }
    return [name for name, (result, right) in results.items() if not torch.equal(result, right)]


def stored_bytes(context: Context) -> Any:
    """Shard 4-bit storage as the engine does, in uint8, and gather it; raise if bytes changed."""
    n, config, every = context.ranks.world_size, context.config, patterns()
    needed = config is None or (
        config.model.quant != "none"
        and (config.engine.name == "fsdp2" or getattr(config.engine, "stage", 0) == 3)
    )
    stored = {
        "weight": every,
        "scales": every[:, ::4].contiguous(),
        "norm": torch.linspace(-2, 2, 130).bfloat16(),
        "adapter": torch.linspace(-1, 1, 192).view(3, 64),
    }
    for name, tensor in gather(context.ranks, stored).items():
        if text := changed(tensor, stored[name]):
            text = f"an all-gather changes bytes: {name}: {text}: training on a sharded quantized"
            text += " base would be wrong without an error"
            if not needed:
                return "warn", text
            raise RuntimeError(text)
    uneven = f", uneven shards on {n} ranks" if n > 1 else ""
    return f"all 65,536 16-bit patterns come through fsdp2's all-gather as uint8{uneven}"


def patterns() -> Tensor:
    """Return every 16-bit pattern, hence every byte, as (257, 512) uint8: a prime number of rows,
    so that shards are uneven. bf16 has 254 NaNs among them; quantized weights take any pattern.
    """
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(-1, 512)
    return torch.cat([every, every[:1].flip(1)])


def gather(ranks: Ranks, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard tensors as the engine does a block's, of which ``adapter`` trains, and gather them."""
    block: Any = nn.ParameterDict({
        name: nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=name == "adapter")
        for name, tensor in stored.items()
    })  # fmt: skip
    model = nn.Sequential(block)
    FSDP2(FSDP2Config(), ranks).shard(model, [block])
    model.to_empty(device=ranks.device)
    for name, parameter in block.named_parameters():
        copy_rows(parameter, stored[name].to(ranks.device))
    block.unshard()
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def changed(tensor: Tensor, expected: Tensor) -> str | None:
    """Return how many bytes differ and which is the first; None if none does."""
    got, want = (t.contiguous().cpu().view(torch.uint8).view(-1) for t in (tensor, expected))
    different = (got != want).nonzero().view(-1)
    if not len(different):
        return None
    at = int(different[0])
    text = f"{len(different)} of {len(got)} bytes changed, the first at {at}:"
    return f"{text} {int(want[at]):#04x} became {int(got[at]):#04x}"
