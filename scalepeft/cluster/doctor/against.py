"""``doctor --against-transformers``: is our model of a base the one that transformers makes?"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalepeft.build import build, start_ranks
from scalepeft.cluster.doctor.check import first_line
from scalepeft.config import files
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.launch import world_size
from scalepeft.core.log import say
from scalepeft.core.preemption import BROKEN, FINISHED
from scalepeft.models import dimensions, quant, structure
from scalepeft.models.experts import ExpertLinear
from scalepeft.models.hub import PRECISIONS, Base, open_base
from scalepeft.parallel.single import Single, SingleConfig

TOKENS = 64
# Relative, of loss and logits. In bf16 a product in another order moves a logit by its last digit,
# 0.4 %, in each layer; the mean over 63 tokens by less.
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (5e-3, 3e-2)}
SPARE = 1.2  # of the bytes of weights, for what loading and a forward take beside them


def run(settings: list[str], as_json: bool = False) -> int:
    """Print both losses and the largest difference of logits over one row of fixed tokens; return
    0, or 1 if they differ by more than ``TOLERANCE``.

    Args:
        settings: [CONFIG] [KEY=VALUE ...]; ``model``, ``train.precision`` and ``engine.device``
            count.
        as_json: print one JSON object instead of the line.

    Raises:
        UserError: a mistake in the settings, several processes, or a base that we or transformers
            refuse.
    """
    Single.check(world_size())
    path, overrides = files.config_first(settings)
    length = [] if path or any(s.startswith("train.epochs=") for s in overrides) else ["1"]
    alone = ["run_dir=.", *(f"train.max_steps={n}" for n in length)]
    config, _ = files.load(path, [*alone, *overrides])
    config = replace(config, engine=SingleConfig(device=config.engine.device))
    ranks = start_ranks(config)
    base = open_base(config.model, ranks)
    with _fitting(config, base, ranks.device) as (config, base):
        ids = fixed_ids(base.architecture.get_text_config().vocab_size).to(ranks.device)
        model = build(config, base, ranks, lambda: None, adapted=False).model
        loss, logits = _ours(model, ids, config.train.loss_chunk)
        want = _theirs(model, base, config, ids)
    reference = F.cross_entropy(want[:-1], ids[0, 1:].cpu()).item()
    difference, largest = (logits - want).abs().max().item(), want.abs().max().item()
    of_loss, of_logits = TOLERANCE[config.train.precision]
    equal = difference <= of_logits * max(1, largest) and abs(loss / reference - 1) <= of_loss
    if as_json:
        found = {"loss": loss, "transformers": reference, "logit_difference": difference}
        print(json.dumps({**found, "equal": equal}))
    else:
        print(
            f"base: loss {loss:.4f}, transformers {reference:.4f}, largest logit difference"
            f" {difference:.1e}"
        )
    if not equal:
        say(
            f"they differ by more than {of_loss:.1e} of the loss or {of_logits:.1e} of the largest"
            f" logit ({config.train.precision}): a training would be one of another model"
        )
    return FINISHED if equal else BROKEN


def fixed_ids(vocab_size: int) -> Tensor:
    """``ids[i] = 5 + 7919 i mod (vocab_size - 10)``, (1, 64)."""
    return 5 + (7919 * torch.arange(TOKENS)[None]) % (vocab_size - 10)


@torch.no_grad()
def put_stored_values(model: nn.Module, reference: nn.Module) -> int:
    """Give transformers' model the values that ours stores quantized; return how many layers."""
    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, quant.QuantLinear):
            values, theirs = quant.Frozen(layer).weight(torch.float32), f"{name}.weight"
            if isinstance(layer, ExpertLinear):  # theirs is a parameter of all experts
                values, theirs = layer.fused(values), name
            reference.get_parameter(theirs).copy_(values)
            count += 1
    return count


@torch.no_grad()
def _ours(model: nn.Module, ids: Tensor, chunk: int) -> tuple[float, Tensor]:
    """The loss of a training step, in the mode that ``build`` leaves, and logits (tokens,
    vocabulary) on the CPU in fp32.
    """
    total = model(ids, token_labels=ids, loss_chunk=chunk)
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return float(total) / (TOKENS - 1), logits[0].float().cpu()


@torch.no_grad()
def _theirs(model: nn.Module, base: Base, config: RunConfig, ids: Tensor) -> Tensor:
    """Logits of the stock class of our model; its place in memory is taken from ``model`` unless
    that holds quantized values.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind: Any = type(model)
    stock = getattr(sys.modules[kind.__module__], kind.__name__)  # ours is a class made from it
    if config.model.quant == "none":
        model.to("meta")
    try:
        reference = stock.from_pretrained(
            base.folder, dtype=PRECISIONS[config.train.precision], trust_remote_code=False
        )
    except Exception as error:  # whatever its loading may raise
        raise UserError(
            f"model.path={base.folder}: transformers cannot load it: {first_line(error)}"
        ) from None
    reference = reference.to(ids.device).eval()
    if count := put_stored_values(model, reference):
        say(f"transformers' model holds the {config.model.quant} values of {count} layers")
    logits: Tensor = reference(input_ids=ids, use_cache=False).logits
    return logits[0].float().cpu()


@contextmanager
def _fitting(
    config: RunConfig, base: Base, device: torch.device
) -> Iterator[tuple[RunConfig, Base]]:
    """Yield config and base; of a base that does not fit into memory, one of its first blocks.

    Raises:
        UserError: it is refused, or one block does not fit.
    """
    plain = replace(config.model, quant="none", double_quant=False)
    kinds = [plain] if config.model.quant == "none" else [plain, config.model]
    models = [
        structure.build(kind, base.folder, config.train.precision, base.weights) for kind in kinds
    ]
    whole = sum(_bytes(model) for model in models)
    blocks = [structure.blocks_of(model) for model in models]
    count, room = len(blocks[0]), _room(device) / SPARE
    block = max(1, sum(_bytes(b) for of_model in blocks for b in of_model) // count)
    fitting = min(count, int((room - whole) // block) + count)
    if fitting == count:
        yield config, base
        return
    if fitting < 1:
        raise UserError(
            f"model.path={config.model.path}: not one of its blocks fits into the"
            f" {room * SPARE / 2**30:.1f} GiB that are free; compare on a larger machine"
        )
    say(f"the first {fitting} of {count} blocks are compared: more do not fit into memory")
    source = dimensions.find(replace(config.model, path=str(base.folder)))
    with source.folder(fitting) as folder:
        for file in base.folder.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
        # The blocks that are left out are tensors that this model does not have.
        fewer = replace(config.model, path=str(folder), revision=None, unexpected="ignore")
        yield replace(config, model=fewer), Base(fewer, folder)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _room(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
