"""``doctor --against-transformers``: is our model of a base the one that transformers makes?"""

import sys
from collections.abc import Collection, Iterator
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
from scalepeft.models.weights import resident_bytes
from scalepeft.parallel.base import EngineConfig
from scalepeft.parallel.single import Single

TOKENS = 64
# Relative, of loss and logits. In bf16 a product in another order moves a logit by its last digit,
# 0.4 %, in each layer; the mean over 63 tokens by less.
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (5e-3, 3e-2)}
BF16 = 2**-8  # relative, of one rounding
SPARE = 1.2  # times the bytes of weights, for what loading and a forward take beside them


def run(settings: list[str]) -> int:
    """Print both losses and the largest difference of logits over one row of tokens; return 0, or 1
    if they differ by more than ``TOLERANCE``. Raises UserError: a base that is refused, several
    processes.
    """
    Single.check(world_size())
    config = files.load_partly(settings)
    config = replace(config, engine=EngineConfig(name="single", device=config.engine.device))
    ranks = start_ranks(config)
    base = open_base(config.model, ranks)
    with _fitting(config, base, ranks.device) as (config, base):
        vocabulary = base.architecture.get_text_config().vocab_size
        ids = 5 + (7919 * torch.arange(TOKENS, device=ranks.device)[None]) % (vocabulary - 10)
        model: Any = build(config, base, ranks, lambda: None, adapted=False).model
        with torch.no_grad():  # in the mode that build leaves, which is a training's
            loss = float(model(ids, token_labels=ids, loss_chunk=config.train.loss_chunk))
            got = model.eval()(input_ids=ids, use_cache=False).logits[0].float().cpu()
            want = _theirs(model, base, config, ids)
    loss, reference = loss / (TOKENS - 1), F.cross_entropy(want[:-1], ids[0, 1:].cpu()).item()
    off, largest = (got - want).abs().max().item(), want.abs().max().item()
    both = f"loss {loss:.4f}, transformers {reference:.4f}"
    print(f"base: {both}, largest logit difference {off:.1e}")
    of_loss, of_logits = TOLERANCE[config.train.precision]
    if abs(loss / reference - 1) <= of_loss and off <= of_logits * max(1, largest):
        return FINISHED
    say(
        f"they differ by more than {of_loss:.1e} of the loss or {of_logits:.1e} of the largest"
        f" logit ({config.train.precision}): a training would be one of another model"
    )
    return BROKEN


def unpack(reference: Any, dtype: torch.dtype) -> set[str]:
    """Make layers that bitsandbytes holds in transformers' model plain; return their weights. Their
    own forward is in bf16 on many CPUs, and the rest in the files' dtype, whatever is asked.
    """
    packed = {name for name, p in reference.named_parameters() if not p.is_floating_point()}
    if not packed or getattr(reference, "quantization_method", None) != "bitsandbytes":
        return set()
    reference.dequantize()
    for p in reference.parameters():  # buffers keep theirs, as in any load
        p.data = p.data.to(dtype)
    structure.keep_fp32(reference, dtype)
    return packed


def put_stored_values(model: nn.Module, reference: nn.Module, packed: Collection[str] = ()) -> int:
    """Give transformers' model the values that ours stores quantized; return how many layers. Not
    one that it holds quantized, nor one of ``packed``, unless ours are its values before rounding.
    """
    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, quant.QuantLinear):
            values, theirs = quant.Frozen(layer).weight(torch.float32), f"{name}.weight"
            if isinstance(layer, ExpertLinear):  # theirs is a parameter of all experts
                values, theirs = layer.fused(values), name
            parameter = reference.get_parameter(theirs)
            if parameter.shape != values.shape:
                continue
            if theirs not in packed or torch.allclose(values, parameter.float(), BF16, 0):
                parameter.data.copy_(values)
                count += 1
    return count


def _theirs(model: Any, base: Base, config: RunConfig, ids: Tensor) -> Tensor:
    """Logits of the stock class of our model, which gives its memory up if it is not quantized."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Ours is of a class that was made from it, with its name.
    stock = getattr(sys.modules[type(model).__module__], type(model).__name__)
    if config.model.quant == "none":
        model.to("meta")
    try:
        reference = stock.from_pretrained(
            base.folder, dtype=PRECISIONS[config.train.precision], trust_remote_code=False
        )
    except Exception as error:  # whatever its loading may raise
        where = f"model.path={base.folder}"
        raise UserError(f"{where}: transformers cannot load it: {first_line(error)}") from None
    reference.to(ids.device).eval()
    packed = unpack(reference, PRECISIONS[config.train.precision])
    if count := put_stored_values(model, reference, packed):
        say(f"transformers' model holds the {config.model.quant} values of {count} layers")
    logits: Tensor = reference(input_ids=ids, use_cache=False).logits
    return logits[0].float().cpu()


@contextmanager
def _fitting(
    config: RunConfig, base: Base, device: torch.device
) -> Iterator[tuple[RunConfig, Base]]:
    """Yield config and base, of its first blocks if memory is short. Raises UserError: of none."""
    kinds = {config.model, replace(config.model, quant="none", double_quant=False)}
    args = base.folder, config.train.precision, base.weights
    models = [structure.build(kind, *args) for kind in kinds]  # both are held at a time
    blocks = [block for model in models for block in structure.blocks_of(model)]
    count = len(blocks) // len(models)
    room, of_one = _room(device) / SPARE, sum(map(resident_bytes, blocks)) / count
    fitting = min(count, int(count + (room - sum(map(resident_bytes, models))) // of_one))
    if fitting == count:
        yield config, base
        return
    if fitting < 1:
        raise UserError(
            f"model.path={base.folder}: {_room(device) / 2**30:.1f} GiB are free, which is too"
            " little for one of its blocks; compare on a larger machine"
        )
    say(f"the first {fitting} of {count} blocks are compared: memory does not hold more")
    with dimensions.find(replace(config.model, path=str(base.folder))).folder(fitting) as folder:
        for file in base.folder.iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
        # The other blocks are tensors that this model does not have.
        fewer = replace(config.model, path=str(folder), revision=None, unexpected="ignore")
        yield replace(config, model=fewer), Base(fewer, folder)


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
