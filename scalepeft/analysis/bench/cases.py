"""What a benchmark steps: a frozen base of random weights, its input, its logits' gradient."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.core.log import say
from scalepeft.models import quant, shapes, structure

Layer = tuple[str, int, int]
"""(last part of the name, in, out) of a linear layer."""
ROW = 512  # tokens of a model's row, at most


@dataclass
class Case:
    """What all entries share; the gradient is Gaussian, as a loss would cost all the same."""

    title: str
    base: nn.Module  # a causal LM
    peft_base: nn.Module  # the same weights as PEFT can read them
    x: Tensor  # input embeddings (rows, length, hidden); takes a gradient
    gradient: Tensor  # of the logits (rows, length, vocabulary)


def output(module: nn.Module, x: Tensor) -> Any:
    """Return the model's logits."""
    return module(inputs_embeds=x, use_cache=False).logits


def layers_of(shape: str) -> list[Layer]:
    """Return the linear layers of a model's blocks, which are all adapted. Raises UserError: no
    such shape, or an architecture that is not supported.
    """
    return [
        (name.rsplit(".", 1)[-1], m.in_features, m.out_features)
        for block in structure.blocks_of(shapes.meta_model(shape))
        for name, m in block.named_modules() if isinstance(m, nn.Linear)
    ]  # fmt: skip


@torch.no_grad()
def random_weights(model: Any, storage: quant.Format | None, device: torch.device) -> Any:
    """Make a meta model real and frozen, blocks in ``storage``: N(0, 0.02^2), norms 1, biases 0."""
    blocks = structure.blocks_of(model)
    for name, layer in [pair for block in blocks for pair in block.named_modules()]:
        if storage is not None and isinstance(layer, nn.Linear):
            if reason := storage.refuses(layer.in_features):
                say(f"{name} stays unquantized: {reason}")
            else:
                quant.quantize(layer, storage)
    structure.materialize(model, device)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, quant.QuantLinear):
            rows = 0.02 * torch.randn(module.out_features, module.in_features, device=device)
            module.weight.data, module.weight_scale.data = module.fmt.encode(rows)
        for name, p in module.named_parameters(recurse=False):
            if p.is_floating_point():
                p.normal_(std=0.02) if p.dim() > 1 else p.fill_(name == "weight")
    return model.requires_grad_(False)


def make_case(
    shape: str, tokens: int, dtype: torch.dtype, device: torch.device, storage: str
) -> Case:
    """Return the case of a causal LM with rows of at most 512 tokens."""
    model: Any = shapes.meta_model(shape).train()
    length = min(ROW, tokens)
    title = f"{len(structure.blocks_of(model))} blocks, rows of {length}"
    size = (tokens // length, length, model.config.hidden_size)
    base = peft_base = random_weights(model.to(dtype), quant.get_format(storage), device)
    if storage == "nf4":
        peft_base = on_bitsandbytes(shared_copy(base), dtype)
    x = torch.randn(size, dtype=dtype, device=device)
    with torch.no_grad():
        gradient = torch.randn_like(output(base, x))
    return Case(title, base, peft_base, x.requires_grad_(), gradient)


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy with modules of its own over the same parameters and buffers."""
    shared: list[object] = [*model.parameters(), *model.buffers()]
    # bitsandbytes keeps its scales there.
    shared += [m.quant_state for m in model.modules() if hasattr(m, "quant_state")]
    return copy.deepcopy(model, {id(s): s for s in shared if s is not None})


def on_bitsandbytes(model: Any, dtype: torch.dtype) -> Any:
    """Put bitsandbytes' own layers, which PEFT knows, in place of NF4 ones; return the model."""
    model.is_loaded_in_4bit = True  # PEFT asks for it
    for name, layer in list(model.named_modules()):
        if isinstance(layer, quant.QuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
            plain.weight = nn.Parameter(quant.Frozen(layer).weight(dtype), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, quant.bnb_linear(plain))
    return model


def inject_peft(model: nn.Module, fields: dict[str, Any], low: bool = False) -> None:
    """Put a method of PEFT on a model, in fp32 as ``get_peft_model`` does, or in its precision."""
    import peft

    peft.inject_adapter_in_model(peft.get_peft_config(dict(fields)), model)
    for parameter in model.parameters():
        if parameter.requires_grad and not low:
            parameter.data = parameter.data.float()
