"""Bytes of a rank: between steps by arithmetic over all parameters, at the peak by simulation."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.build import check_batch, engine_class
from scalepeft.cluster.plan import zero
from scalepeft.cluster.plan.simulate import SIMULATED, empty_model, simulate
from scalepeft.cluster.plan.tracker import KINDS, Bytes, Exchange, Figures, stretch
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models.dimensions import Source
from scalepeft.parallel import ddp

SHORT = (3, 4)  # blocks of the two models: with three, the first, a middle and the last one differ


@dataclass
class Step:
    """A rank's memory and work in one optimiser step.

    Attributes:
        rows: of a micro-batch, of ``data.cutoff`` tokens each.
        micro: micro-batches of a step on this rank.
        parameters: (of the base, trained).
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
    resident: Bytes
    peak: Bytes = field(default_factory=dict)
    moment: str = ""
    host: float = 0.0
    load: int = 0
    checkpoint: int = 0
    exchanges: dict[Exchange, tuple[float, float]] = field(default_factory=dict)
    flops: float = 0.0
    simulated: tuple[int, ...] = ()

    @property
    def held(self) -> float:
        """Bytes between steps."""
        return sum(self.resident.values())

    @property
    def most(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak.values())


@dataclass(frozen=True)
class Shares:
    """Among how many ranks one copy of each kind is split."""

    base: int = 1
    adapter: int = 1
    gradients: int = 1
    optimizer: int = 1


def shares(config: RunConfig, world: int, each: int) -> Shares:
    """How the config's engine spreads a model."""
    engine: Any = config.engine
    if engine.name == "fsdp2":
        named = {"world": world, "node": min(world, each)}
        ranks = named.get(engine.shard_over) or int(engine.shard_over)
        return Shares(ranks, ranks, ranks, ranks)
    if engine.name == "zero":
        whole = world if engine.stage == 3 else 1
        return Shares(whole, whole, world if engine.stage > 1 else 1, world)
    if engine.name not in SIMULATED:
        raise UserError(f"engine.name={engine.name}: plan knows {', '.join(SIMULATED)} and zero")
    return Shares()


def rank_bytes(shape: tuple[int, ...], item: int, ranks: int, rows: bool) -> int:
    """Bytes of the first rank's part, as large as any: whole rows, or any 1/N of the numbers."""
    first, rest = (shape[0], math.prod(shape[1:])) if rows else (math.prod(shape), 1)
    return -(-first // ranks) * rest * item


def resident(config: RunConfig, source: Source, world: int, each: int) -> tuple[Step, nn.Module]:
    """The part that needs no simulation, and the model on the meta device.

    Raises:
        UserError: the engine or the global batch cannot be had at this number of ranks; no such
            target in the model; a sequence beyond the model's positions.
    """
    engine_class(config).check(world)
    check_batch(config, world)
    with source.folder(source.layers) as folder:
        limit = models.Base(config.model, folder).positions
        if limit is not None and config.data.cutoff > limit:
            raise UserError(
                f"data.cutoff={config.data.cutoff} is beyond the model's {limit} positions;"
                " lower it"
            )
        model = empty_model(config, folder)
    mine = config.train.global_batch // world
    rows = min(mine, config.train.micro_batch)
    trained = list(injection.trainable(model).values())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    spread = shares(config, world, each)
    whole = sum(p.nbytes for p in trained)
    step = Step(rows, -(-mine // rows), (_numbers(model), sum(p.numel() for p in trained)), {})

    def of(parameters: list[nn.Parameter], ranks: int) -> int:
        by_rows = config.engine.name == "fsdp2"
        return sum(rank_bytes(p.shape, p.element_size(), ranks, by_rows) for p in parameters)

    step.resident = {
        "base": of(frozen, spread.base),
        "adapter": of(trained, spread.adapter),
        "optimizer": 2 * of(trained, spread.optimizer) + 4 * len(trained),
    }
    step.load = _load_bytes(model, source, spread.base)
    step.checkpoint = 3 * whole + 4 * len(trained)
    if config.engine.name == "zero":
        zero.hold(config.engine, step.resident, of(trained, world))
        step.host = sum(step.resident.pop(f"{kind} on the host", 0) for kind in KINDS)
    return step, model


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """(name in the files, module, parameter) of the base, ties once, scales with their weight."""
    return [
        (name, model.get_submodule(name.rpartition(".")[0]), p)
        for name, p in model.named_parameters()
        if not p.requires_grad and not name.endswith("weight_scale")
    ]


def _numbers(model: nn.Module) -> int:
    """Numbers of the base, however they are stored."""
    return sum(math.prod(_full_shape(module, p)) for _, module, p in _base_parameters(model))


def _full_shape(module: nn.Module, p: Tensor) -> tuple[int, ...]:
    if isinstance(module, quant.QuantLinear) and p is module.weight:
        return module.out_features, module.in_features
    return tuple(p.shape)


def _load_bytes(model: nn.Module, source: Source, ranks: int) -> int:
    found = 0
    for name, module, p in _base_parameters(model):
        found += rank_bytes(_full_shape(module, p), source.item_bytes(name), ranks, rows=True)
    return found


def measure(config: RunConfig, source: Source, world: int, each: int) -> Step:
    """Memory, collectives and work of rank 0; ``resident``'s errors."""
    step, model = resident(config, source, world, each)
    figures, step.simulated = _figures(config, source, model, step, world, each)
    if config.engine.name == "ddp" and "last" in figures.exchanges:
        _count_buckets(figures.exchanges["last"], list(injection.trainable(model).values()))
    if config.engine.name == "zero":
        zero.add(figures, config.engine, step, model, world, each)
    moments = {name: sum(kinds.values()) for name, kinds in figures.moments.items()}
    step.moment = max(moments, key=moments.__getitem__)
    step.peak = {k: figures.moments[step.moment].get(k, 0.0) for k in KINDS}
    times = {"other": step.micro - 1, "last": 1, "control": 1}
    for part, found in figures.exchanges.items():
        for key, (count, size) in found.items():
            held = step.exchanges.get(key, (0.0, 0.0))
            step.exchanges[key] = held[0] + times[part] * count, held[1] + times[part] * size
    step.flops = sum(times[part] * flops for part, flops in figures.flops.items())
    return step


def _figures(
    config: RunConfig, source: Source, model: nn.Module, step: Step, world: int, each: int
) -> tuple[Figures, tuple[int, ...]]:
    """Simulates all blocks where they are few or differ, else two short models."""

    def one(config: RunConfig, layers: int) -> Figures:
        with source.folder(layers) as folder:
            return simulate(config, folder, world, each, step.rows, step.micro)

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


def _count_buckets(
    exchanges: dict[Exchange, tuple[float, float]], trained: list[nn.Parameter]
) -> None:
    """Short models fill fewer buckets: how many, alone of all figures, is not linear."""
    buckets, size = 1, 0
    for p in trained:
        if size and size + p.numel() > ddp.BUCKET:
            buckets, size = buckets + 1, 0
        size += p.numel()
    ((key, (_, total)),) = exchanges.items()
    exchanges[key] = buckets, total
