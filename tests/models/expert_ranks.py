"""Two ranks of test_engines_give_the_steps_of_one_process: adapted NF4 experts under each engine.

The rank's rows hit few experts, and not those of the other rank.
"""

import copy
import sys

import torch
from test_experts import eager, experts_of
from torch import nn
from torch.distributed.tensor import DTensor

import scalepeft
from scalepeft.adapters import inject as injection
from scalepeft.core import registry
from scalepeft.models import quant, structure
from scalepeft.models.experts import replace_experts
from scalepeft.parallel.base import Engine, copy_rows, local_part
from scalepeft.parallel.ranks import Ranks

ROWS = torch.tensor([[3] * 16, [11, 70] * 8, [3] * 16, [42, 5] * 8])
ENGINES = {
    "ddp": {}, "fsdp2": {}, "zero stage=3": {"stage": 3, "whole_below": 0},
    "fsdp2 checkpointing": {"activation_checkpointing": True},
    "zero checkpointing": {"stage": 3, "whole_below": 0, "activation_checkpointing": True},
}  # fmt: skip


def build(family: str, adapter: dict[str, object], storage: str) -> nn.Module:
    model = eager(family)
    replace_experts(model)
    if fmt := quant.get_format(storage):
        for _, layer in experts_of(model):
            quant.quantize(layer, fmt)
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    scalepeft.inject(model, {**adapter, "target_modules": targets})
    return model.train()


def steps(model: nn.Module, name: str, settings: dict[str, object], ranks: Ranks) -> list[float]:
    """(loss, gradient norm, penalty) of three steps, then each trained tensor's sum of squares."""
    whole = {key: p.detach().clone() for key, p in model.named_parameters()}
    kind = registry.find_class("parallel", name, "engine", Engine)
    engine = kind(kind.Config(name=name, **settings), ranks)
    engine.shard(model, structure.blocks_of(model))
    for key, p in model.named_parameters():
        copy_rows(p, whole[key])
        if ranks.world_size > 1 and (isinstance(p, DTensor) or hasattr(p, "ds_tensor")):
            held = local_part(p).data.numel()
            assert held <= -(-len(whole[key]) // ranks.world_size) * whole[key][0].numel(), (
                key,
                held,
            )
    trained = injection.trainable(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, fused=True)
    call = engine.attach(model, optimizer)
    found: list[float] = []
    rows = ROWS[ranks.rank :: ranks.world_size]
    for _ in range(3):
        with engine.accumulate(True):
            logits = call(input_ids=rows, use_cache=False).logits
            loss = (
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
                )
                / ROWS[:, 1:].numel()
            )
            engine.backward(loss, True)
        parameters = list(trained.values())
        with engine.gathered(parameters):
            value = injection.penalty(model)
            grads = (
                torch.autograd.grad(value, parameters, allow_unused=True)
                if value is not None
                else []
            )
        if value is not None:
            engine.add_gradients(parameters, list(grads))
            found.append(float(value.detach()))
        norm = engine.grad_norm(parameters)
        engine.update(optimizer, 0.5, norm, norm.isfinite())
        found += [float(ranks.sum(loss.detach().double())), float(norm)]
    for key, part in sorted(engine.state_parts(trained, optimizer).items()):
        if "/" not in key:
            square = part.data.double().square().sum() * (part.mine or name == "zero")
            found.append(float(ranks.sum(square)))
    return found


def main() -> None:
    ranks = Ranks.start("cpu", process_group=True)
    for family, adapter, storage in (  # two of them, or all
        ("mixtral", {"name": "hoft", "rank": 4}, "nf4"),
        ("mixtral", {"name": "qgoft", "penalty": 0.1}, "nf4"),
        ("qwen3_moe", {"name": "lora", "rank": 4, "alpha": 32, "dropout": 0.0}, "nf4"),
        ("gpt_oss", {"name": "hoft", "rank": 4}, "none"),
        ("gpt_oss", {"name": "lora", "rank": 4, "alpha": 32, "dropout": 0.0}, "nf4"),
        ("llama4_text", {"name": "hoft", "rank": 4}, "int8"),
    )[:: 1 if "all" in sys.argv else 4]:
        model = build(family, adapter, storage)
        want = steps(copy.deepcopy(model), "single", {}, Ranks())
        for label, settings in ENGINES.items():
            got = steps(copy.deepcopy(model), label.split()[0], settings, ranks)
            for a, b in zip(got, want, strict=True):
                assert abs(a - b) <= 2e-5 * abs(b), (
                    f"{family} {adapter} {label}: {got}, alone {want}"
                )
            print(f"ok {family} {adapter['name']} {label}", flush=True)
    ranks.finish()


if __name__ == "__main__":
    main()
