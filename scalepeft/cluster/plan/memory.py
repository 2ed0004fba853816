"""A rank's bytes: between steps by arithmetic over all parameters, at the peak by simulation."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.build import check_batch, engine_class
from scalepeft.cluster.plan.simulate import KINDS, Figures, Step, empty_model, simulate, stretch
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models.dimensions import Source
from scalepeft.models.quantized_copy import folder_of

SHORT = (3, 4)  # blocks of the two models: with three, the first, a middle and the last one differ
WHEN = {"micro": ("last", "other"), "last": ("last",), "step": ("control",)}  # parts of a step


def resident(config: RunConfig, source: Source, world: int, per_node: int) -> Step:
    """The part that needs no simulation; the peak is what stays. Raises UserError: no such number
    of ranks, no such target, or a sequence beyond the model's positions.
    """
    engine = engine_class(config)
    engine.check(world)
    check_batch(config, world)
    with source.folder(source.layers) as folder:
        limit = models.Base(config.model, folder).positions
        if limit is not None and config.data.cutoff > limit:
            what = f"data.cutoff={config.data.cutoff} is beyond the model's {limit} positions"
            raise UserError(f"{what}; lower it")
        model = empty_model(config, folder)
    shares = engine.shares(config.engine, model, world, per_node)
    local_batch = config.train.global_batch // world
    rows = min(local_batch, config.train.micro_batch)
    if config.train.micro_tokens and config.train.batching != "padded":
        rows = min(local_batch, -(-config.train.micro_tokens // config.data.cutoff))
    saved = injection.tensors(model).values()
    trained = [p for p in saved if p.requires_grad]
    base = _base_shapes(model)

    def part(parameters: Iterable[Tensor], ranks: int) -> int:
        by_rows = shares.by_rows
        return sum(_rank_bytes(p.shape, p.element_size(), ranks, by_rows) for p in parameters)

    kinds: dict[str, float] = {
        "base": part((p for p in model.parameters() if not p.requires_grad), shares.base),
        "adapter": part(trained, shares.adapter),
        "optimizer": (2 + shares.copies) * part(trained, shares.optimizer) + 4 * len(trained),
    }
    if shares.gradients > 1 and not shares.simulated:
        kinds["gradients"] = part(trained, shares.gradients)
    stays = {kind: size for kind, size in kinds.items() if kind not in shares.on_host}
    read = {
        name: _rank_bytes(shape, source.item_bytes(name), shares.base, by_rows=True)
        for name, shape in base.items()
    }
    held = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    copy = folder_of(config.model.quantized_cache, sum(p.numel() for p in held.values()))
    plain = sum(size for name, size in read.items() if name not in held)
    looks = {
        tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
        for block in structure.blocks_of(model)
    }
    return Step(
        rows,
        -(-local_batch // rows),
        (sum(map(math.prod, base.values())), sum(p.numel() for p in trained)),
        shares,
        host=sum(kinds.get(kind, 0) for kind in shares.on_host),
        load=sum(read.values()),
        restart=plain + part(held.values(), shares.base) if copy else sum(read.values()),
        checkpoint=sum(p.nbytes for p in (*saved, *trained, *trained)) + 4 * len(trained),
        resident=stays,
        peak=stays,
        alike=len(looks) == 1 and len(set(source.text.get("layer_types") or ())) <= 1,
    )


def _rank_bytes(shape: tuple[int, ...], item: int, ranks: int, by_rows: bool) -> int:
    """Bytes of the first rank's part, as large as any: whole rows, or any 1/N of the numbers."""
    row = math.prod(shape[1:]) if by_rows else 1
    return -(-math.prod(shape) // (row * ranks)) * row * item


def _base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in the files -> whole shape of the base's tensors, ties once, scales left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad and not name.endswith("weight_scale") and ".adapter." not in name:
            module: Any = model.get_submodule(name.rpartition(".")[0])
            quantized = isinstance(module, quant.QuantLinear) and p is module.weight
            shapes[name] = (len(p), module.in_features) if quantized else p.shape
    return shapes


def measure(config: RunConfig, source: Source, world: int, per_node: int) -> Step:
    """Memory, collectives and work of rank 0. Raise UserError as ``resident`` does."""
    step = resident(config, source, world, per_node)
    shares, layers = step.shares, source.layers

    def simulated(config: RunConfig, layers: int) -> Figures:
        with source.folder(layers) as folder:
            return simulate(config, folder, world, per_node, step)

    if layers > SHORT[1] and step.alike:
        step.simulated = SHORT
        short = replace(config, adapter=replace(config.adapter, layers="all"))
        figures = stretch(simulated(short, SHORT[0]), simulated(short, SHORT[1]), SHORT, layers)
    else:
        step.simulated = (layers,)
        figures = simulated(config, layers)
    if not shares.simulated:
        parts = {kind: step.resident.get(kind, 0.0) for kind in ("base", "adapter", "optimizer")}
        parts |= shares.transient
        parts["gradients"] = parts.get("gradients", 0.0) + step.resident.get("gradients", 0.0)
        for kinds in figures.moments.values():
            kinds |= parts
    for name, when, count, size in shares.exchanges:
        exchange = name, world, -(-world // per_node)
        for part in WHEN[when]:
            figures.work[part, exchange, "count"] = count
            figures.work[part, exchange, "bytes"] = size
    step.moment = max(figures.moments, key=lambda moment: sum(figures.moments[moment].values()))
    step.peak = {kind: figures.moments[step.moment].get(kind, 0.0) for kind in KINDS}
    times = {"other": step.micro - 1, "last": 1, "control": 1}
    total: dict[Any, float] = defaultdict(float)
    for (part, key, unit), value in figures.work.items():
        total[key, unit] += times[part] * value
    step.flops = total[None, "flops"]
    step.exchanges = {key: (total[key, "count"], total[key, "bytes"]) for key, _ in total if key}
    return step
