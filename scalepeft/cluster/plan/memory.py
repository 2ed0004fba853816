"""Bytes of a rank: between steps by arithmetic over all parameters, at the peak by simulation.

No engine is known here by name: each says in ``Engine.shares`` what a rank holds and exchanges.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.build import check_batch, engine_class
from scalepeft.cluster.plan.simulate import empty_model, simulate
from scalepeft.cluster.plan.tracker import KINDS, Bytes, Exchange, Figures, stretch
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models.dimensions import Source
from scalepeft.parallel.base import Shares

SHORT = (3, 4)  # blocks of the two models: with three, the first, a middle and the last one differ
WHEN = {"micro": ("last", "other"), "last": ("last",), "step": ("control",)}  # parts of a step


@dataclass
class Step:
    """A rank's memory and work in one optimizer step.

    Attributes:
        rows: of a micro-batch, of ``data.cutoff`` tokens each.
        micro: micro-batches of a step on this rank.
        parameters: (of the base, trained).
        shares: what the engine says.
        resident: bytes between steps, by kind.
        peak: bytes at the peak, by kind.
        moment: of the step where the peak is.
        host: bytes of this rank in the node's memory.
        load: bytes that this rank reads from the model's files.
        checkpoint: bytes of a checkpoint's tensors.
        exchanges: collective -> (count, bytes of the full tensors) in a step.
        flops: of this rank in a step.
        simulated: blocks of the simulated models.
    """

    rows: int
    micro: int
    parameters: tuple[int, int]
    shares: Shares
    resident: Bytes = field(default_factory=dict)
    peak: Bytes = field(default_factory=dict)
    moment: str = ""
    host: float = 0.0
    load: int = 0
    checkpoint: int = 0
    exchanges: dict[Exchange, tuple[float, float]] = field(default_factory=dict)
    flops: float = 0.0
    simulated: tuple[int, ...] = ()

    @property
    def resident_bytes(self) -> float:
        """Bytes between steps."""
        return sum(self.resident.values())

    @property
    def peak_bytes(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak.values())


def rank_bytes(shape: tuple[int, ...], item: int, ranks: int, rows: bool) -> int:
    """Bytes of the first rank's part, as large as any: whole rows, or any 1/N of the numbers."""
    first, rest = (shape[0], math.prod(shape[1:])) if rows and shape else (math.prod(shape), 1)
    return -(-first // ranks) * rest * item


def resident(
    config: RunConfig, source: Source, world: int, per_node: int
) -> tuple[Step, nn.Module]:
    """The part that needs no simulation, and the model on the meta device.

    Raises:
        UserError: the engine or the global batch cannot be had at this number of ranks; no such
            target in the model; a sequence beyond the model's positions.
    """
    engine = engine_class(config)
    engine.check(world)
    check_batch(config, world)
    with source.folder(source.layers) as folder:
        limit = models.Base(config.model, folder).positions
        if limit is not None and config.data.cutoff > limit:
            raise UserError(
                f"data.cutoff={config.data.cutoff} is beyond the model's {limit} positions;"
                " lower it"
            )
        model = empty_model(config, folder)
    shares = engine.shares(config.engine, model, world, per_node)
    local_batch = config.train.global_batch // world
    rows = min(local_batch, config.train.micro_batch)
    trained = list(injection.trainable(model).values())
    base = _base_shapes(model)

    def part(parameters: Iterable[Tensor], ranks: int) -> int:
        return sum(rank_bytes(p.shape, p.element_size(), ranks, shares.by_rows) for p in parameters)

    step = Step(
        rows,
        -(-local_batch // rows),
        (sum(map(math.prod, base.values())), sum(p.numel() for p in trained)),
        shares,
        load=sum(
            rank_bytes(shape, source.item_bytes(name), shares.base, rows=True)
            for name, shape in base.items()
        ),
        checkpoint=3 * sum(p.nbytes for p in trained) + 4 * len(trained),
    )
    kinds: Bytes = {
        "base": part((p for p in model.parameters() if not p.requires_grad), shares.base),
        "adapter": part(trained, shares.adapter),
        "optimizer": (2 + shares.copies) * part(trained, shares.optimizer) + 4 * len(trained),
    }
    if shares.gradients > 1 and not shares.simulated:
        kinds["gradients"] = part(trained, shares.gradients)
    step.host = sum(kinds.get(kind, 0) for kind in shares.on_host)
    step.resident = {kind: size for kind, size in kinds.items() if kind not in shares.on_host}
    return step, model


def _base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in the files -> whole shape of the base's tensors, ties once, scales left out."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad or name.endswith("weight_scale"):
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        quantized = isinstance(module, quant.QuantLinear) and p is module.weight
        found[name] = (module.out_features, module.in_features) if quantized else tuple(p.shape)
    return found  # type: ignore[return-value]


def measure(config: RunConfig, source: Source, world: int, per_node: int) -> Step:
    """Memory, collectives and work of rank 0. Raise UserError as ``resident`` does."""
    step, model = resident(config, source, world, per_node)
    figures, step.simulated = _figures(config, source, model, step, world, per_node)
    nodes = -(-world // per_node)
    if not step.shares.simulated:
        parts = {kind: step.resident.get(kind, 0.0) for kind in ("base", "adapter", "optimizer")}
        parts |= step.shares.transient
        parts["gradients"] = parts.get("gradients", 0.0) + step.resident.get("gradients", 0.0)
        for kinds in figures.moments.values():
            kinds |= parts
    for name, when, count, size in step.shares.exchanges:
        for part in WHEN[when]:
            figures.exchanges.setdefault(part, {})[name, world, nodes] = count, size
    moments = {name: sum(kinds.values()) for name, kinds in figures.moments.items()}
    step.moment = max(moments, key=moments.__getitem__)
    step.peak = {k: figures.moments[step.moment].get(k, 0.0) for k in KINDS}
    times = {"other": step.micro - 1, "last": 1, "control": 1}
    for part, exchanges in figures.exchanges.items():
        for key, (count, size) in exchanges.items():
            before = step.exchanges.get(key, (0.0, 0.0))
            step.exchanges[key] = before[0] + times[part] * count, before[1] + times[part] * size
    step.flops = sum(times[part] * flops for part, flops in figures.flops.items())
    return step


def _figures(
    config: RunConfig, source: Source, model: nn.Module, step: Step, world: int, per_node: int
) -> tuple[Figures, tuple[int, ...]]:
    """Simulate all blocks where they are few or differ, else two short models."""

    def one(config: RunConfig, layers: int) -> Figures:
        with source.folder(layers) as folder:
            return simulate(config, folder, world, per_node, step.rows, step.micro, step.shares)

    layers = source.layers
    if layers <= SHORT[1] or not _alike(source, structure.blocks_of(model)):
        return one(config, layers), (layers,)
    short = replace(config, adapter=replace(config.adapter, layers="all"))
    a, b = (one(short, n) for n in SHORT)
    return stretch((a, b), SHORT, layers), SHORT


def _alike(source: Source, blocks: list[nn.Module]) -> bool:
    def look(block: nn.Module) -> list[tuple[Any, ...]]:
        return [(n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()]

    first = look(blocks[0])
    kinds = set(source.values.get("layer_types") or ())
    return len(kinds) <= 1 and all(look(block) == first for block in blocks)
