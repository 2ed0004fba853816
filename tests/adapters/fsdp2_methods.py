"""A rank of test_two_fsdp2_ranks_give_the_gradients_of_one_process: every variant, sharded.

Each rank computes half the batch with sharded blocks, and the whole batch with a copy that is not
sharded. Gradients are summed over ranks, as in training.
"""

import copy
from typing import Any

import torch
from test_conformance import VARIANTS, Variant, random, scatter
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import scalepeft
from scalepeft.adapters import inject as injection
from scalepeft.models import quant
from scalepeft.parallel.fsdp2 import FSDP2, FSDP2Config
from scalepeft.parallel.ranks import Ranks

WIDTH = 64


class Block(nn.Module):
    """The layers of a decoder block by name and shape: square, narrow, tall and wide."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, 16, bias=False)
        self.up_proj = nn.Linear(WIDTH, 192)
        self.down_proj = nn.Linear(192, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(x) * self.k_proj(x).repeat(1, 4)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm(x))))


def build(name: str, variant: Variant) -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(Block(), Block())
    fmt = quant.get_format("nf4")
    for layer in [m for m in net.modules() if isinstance(m, nn.Linear)]:
        quant.quantize(layer, fmt)
    square = variant.settings.get("structure") == "ldr" and "placement" not in variant.settings
    layers = ["q_proj"] if square else ["q_proj", "k_proj", "up_proj", "down_proj"]
    settings: dict[str, Any] = {"name": name, **variant.settings, "target_modules": layers}
    if name == "hadamard":
        settings |= {"norm": "norm", "train_norm": True}
    scalepeft.inject(net, settings)
    scatter(net, 0.1)
    return net


def full(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.full_tensor() if isinstance(t, DTensor) else t


def compare(got: Tensor, want: Tensor, what: str) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max(), what


def penalty_gradients(net: nn.Module) -> tuple[Tensor | None, list[Tensor]]:
    value = injection.penalty(net)
    if value is None:
        return None, []
    parameters = list(injection.trainable(net).values())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return value.detach(), [full(g) for g in grads]


def check(name: str, variant: Variant, ranks: Ranks) -> None:
    net = build(name, variant)
    whole = copy.deepcopy(net)
    FSDP2(FSDP2Config(), ranks).shard(net, list(net))
    assert all(isinstance(p, DTensor) for p in net.parameters())
    batch = random(6, WIDTH)
    whole(batch).square().sum().backward()
    mine = batch.chunk(2)[ranks.rank]
    net(mine).square().sum().backward()
    want, got = injection.trainable(whole), injection.trainable(net)
    assert want.keys() == got.keys()
    for key, p in want.items():
        compare(full(got[key].grad), full(p.grad), f"{name}: {key}")
    (want_value, want_grads), (value, grads) = penalty_gradients(whole), penalty_gradients(net)
    assert (value is None) == (want_value is None) == ("penalty" not in variant.settings)
    if value is not None and want_value is not None:
        compare(value, want_value, "penalty")
        for key, grad, reference in zip(want, grads, want_grads, strict=True):
            assert reference.abs().max() > 0
            compare(grad, reference, f"penalty: {key}")


def main() -> None:
    ranks = Ranks.start("cpu", process_group=True)
    for name, variants in VARIANTS.items():
        for i, variant in enumerate(variants):
            check(name, variant, ranks)
            print(f"ok {name} {i}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
