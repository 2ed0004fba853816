"""From a config to a loaded, sharded, adapted model: where adapters and engines meet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from scalepeft.adapters import inject as injection
from scalepeft.adapters.base import Dropout
from scalepeft.config.schema import RunConfig
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.core.launch import world_size
from scalepeft.data.tasks.base import Task
from scalepeft.models import attention, loss, staging, structure
from scalepeft.models.hub import Base
from scalepeft.models.quantized_copy import QuantizedCopy
from scalepeft.models.weights import load_weights
from scalepeft.parallel.base import Engine
from scalepeft.parallel.ranks import Ranks


@dataclass
class Built:
    """A loaded, sharded, adapted model and what belongs to it."""

    engine: Engine
    model: nn.Module
    base: dict[str, Any]  # which it is: path, revision, storage, fingerprint, sha256 of its files
    bytes_read: int
    unpacked: str = ""  # why its rows cannot be packed; empty where they can


def engine_class(config: RunConfig) -> type[Engine]:
    """Returns the engine that ``engine.name`` picks."""
    return registry.find_class("parallel", config.engine.name, "engine", Engine)


def task_of(config: RunConfig, tokenizer: Any = None) -> Task:
    """Returns the task that ``data.name`` picks; with the tokenizer its texts are a model's."""
    return registry.find_class("data.tasks", config.data.name, "task", Task)(config.data, tokenizer)


def start_ranks(config: RunConfig) -> Ranks:
    """Joins the other ranks; refuses, before it does, a number of them the engine cannot take."""
    engine_class(config).check(world_size())
    needs_group, order = engine_class(config).needs_group, config.train.deterministic
    return Ranks.start(config.engine.device, needs_group, order)


def build(
    config: RunConfig,
    base: Base,
    ranks: Ranks,
    poll: Callable[[], None],
    adapted: bool = True,
    check: Callable[[nn.Module], None] = lambda _: None,
) -> Built:
    """Structure on meta -> adapters -> ``check`` may refuse -> shard -> rows -> start values."""
    poll()

    def make() -> Any:
        model: Any
        model = structure.build(config.model, base.folder, config.train.precision, base.weights)
        unpacked = structure.unpacked(model)
        if unpacked and config.train.batching == "packed":
            raise UserError(f"train.batching=packed: {unpacked}; take auto or padded")
        if not unpacked and config.train.batching != "padded":
            attention.read_rows_alone(model)
        loss.add_token_loss(model)
        if adapted:
            injection.inject(model, config.adapter)
            check(model)
            head = model.get_output_embeddings() or nn.Identity()
            if any(isinstance(m, Dropout) for m in head.modules()):
                raise UserError(
                    "adapter.dropout: an adapter on the model's head, which sees a chunk of tokens"
                    " at a time, has none; set adapter.dropout=0, or name other target_modules"
                )
        else:
            model.requires_grad_(False)
        return injection.train_mode(model), unpacked

    model, unpacked = ranks.all_or_raise(make)
    weights = base.weights
    before = weights.bytes_read
    engine = engine_class(config)(config.engine, ranks)
    engine.shard(model, structure.blocks_of(model))
    structure.materialize(model, ranks.device)
    copy = QuantizedCopy(base, model, engine)
    staging.stage(base, copy, ranks, poll)
    turns = load_weights(model, weights, copy.fill)
    while ranks.all_or_raise(lambda: next(turns, "end")) != "end":
        poll()
    copy.keep()
    injection.reset_adapters(model, config.train.seed)
    kind = config.model
    description = {key: getattr(kind, key) for key in ("path", "revision", "quant", "double_quant")}
    description["sha256"] = base.digests(ranks)
    fingerprint = ranks.all_or_raise(lambda: base.fingerprint)
    what = f"model.path={kind.path}: files differ"
    description["fingerprint"] = ranks.assert_equal(fingerprint, what)
    read = weights.bytes_read - before + (copy.reader.bytes_read if copy.reader else 0)
    return Built(engine, model, description, read, unpacked)


def check_batch(config: RunConfig, world: int) -> None:
    """Refuses a world size that does not divide the global batch."""
    size = config.train.global_batch
    if size % world:
        near = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - world))
        raise UserError(
            f"train.global_batch={size} cannot be shared evenly by {world} ranks; start {near}"
            f" ranks, or take train.global_batch={max(1, size // world) * world}"
        )
