"""What a benchmark steps: a frozen layer or model of random weights, its input and its target."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.analysis.bench.methods import Layer
from scalepeft.core.log import say
from scalepeft.models import quant, shapes, structure

ROW = 512  # tokens of a row, at most


@dataclass
class Case:
    """A frozen base, its input and its target.

    Attributes:
        title: for tables.
        base: one linear layer as ``nn.ModuleDict``, or a causal LM.
        name: of the layer; empty for a model.
        x: (tokens, in), or input embeddings (rows, length, hidden); takes a gradient.
        target: gradient of the output (tokens, out), or labels (rows, length).
        peft_base: the same weights as PEFT can read them.
    """

    title: str
    base: nn.Module
    name: str
    x: Tensor
    target: Tensor
    peft_base: nn.Module

    @torch.no_grad()
    def probe(self, module: nn.Module) -> Tensor:
        """The layer's output for the first tokens, or the logits of the first row, in fp32."""
        if self.name:
            y: Tensor = module.get_submodule(self.name)(self.x[:ROW])
            return y.float()
        logits: Tensor = module(inputs_embeds=self.x[:1], use_cache=False).logits
        return logits.float()

    def forward(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
        """What to call backward on: (tensors, their gradients); a method's penalty included."""
        tensors: list[Tensor]
        grads: list[Tensor | None]
        if self.name:
            tensors, grads = [module.get_submodule(self.name)(self.x)], [self.target]
        else:
            out = module(inputs_embeds=self.x, labels=self.target, use_cache=False)
            tensors, grads = [out.loss], [None]
        if (penalty := injection.penalty(module)) is not None:
            tensors, grads = [*tensors, penalty], [*grads, None]
        return tensors, grads


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own over the same parameters and buffers: no more memory."""
    shared: list[object] = [*model.parameters(), *model.buffers()]
    # bitsandbytes keeps its scales there.
    shared += [m.quant_state for m in model.modules() if hasattr(m, "quant_state")]
    return copy.deepcopy(model, {id(s): s for s in shared if s is not None})


def layer_sets(what: str, shape: str) -> list[list[Layer]]:
    """The layers that each case adapts: all of a model, or each distinct one of its first block.

    Raises:
        UserError: no such shape, or an architecture that is not supported.
    """
    layers = [
        (name.rsplit(".", 1)[-1], m.in_features, m.out_features)
        for block in structure.blocks_of(shapes.meta_model(shape))
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear)
    ]
    if what == "model":
        return [layers]
    distinct: dict[tuple[int, int], Layer] = {}
    for layer in layers:
        distinct.setdefault(layer[1:], layer)
    return [[layer] for layer in distinct.values()]


def layer_case(layer: Layer, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """One layer; input and output gradient are Gaussian."""
    name, width, out = layer
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        base = nn.ModuleDict({name: nn.Linear(width, out, bias=False, dtype=dtype)})
        x, target = torch.randn(tokens, width).to(dtype), torch.randn(tokens, out).to(dtype)
    return Case(f"{name} {out} x {width}", base, name, x.requires_grad_(), target, base)


def model_case(shape: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A causal LM of random weights; rows of at most 512 tokens, random labels."""
    from transformers import AutoModelForCausalLM

    architecture = shapes.architecture(shape)
    length = min(ROW, tokens)
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, attn_implementation="sdpa"
        )
        x = torch.randn(tokens // length, length, architecture.hidden_size).to(dtype)
        target = torch.randint(architecture.vocab_size, x.shape[:2])
    title = f"{len(structure.blocks_of(base))} blocks, rows of {length}"
    return Case(title, base.train(), "", x.requires_grad_(), target, base)


def freeze(case: Case, storage: str) -> None:
    """Freezes the base and stores its linear layers as ``--quant`` says, and PEFT's beside them."""
    case.base.requires_grad_(False)
    fmt = quant.get_format(storage)
    if fmt is None:
        return
    if fmt.name == "nf4":
        case.peft_base = shared_copy(case.base)
        setattr(case.peft_base, "is_loaded_in_4bit", True)  # noqa: B010  # PEFT asks for it
    for part in [case.base] if case.name else structure.blocks_of(case.base):
        for name, layer in list(part.named_modules()):
            if not isinstance(layer, nn.Linear):
                continue
            if reason := fmt.refuses(layer.in_features):
                say(f"{name} stays unquantised: {reason}")
                continue
            if fmt.name == "nf4":
                _replace(case.peft_base, case.base, layer)
            quant.quantize(layer, fmt)


def _replace(peft_base: nn.Module, base: nn.Module, layer: nn.Linear) -> None:
    path = next(name for name, m in base.named_modules() if m is layer)
    parent, _, last = path.rpartition(".")
    setattr(peft_base.get_submodule(parent), last, quant.bnb_linear(layer))
