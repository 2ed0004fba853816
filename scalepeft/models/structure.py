"""A base's modules on the meta device, its blocks, its non-persistent tables."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalepeft.core.errors import UserError
from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.models import quant
from scalepeft.models.hub import PRECISIONS, ModelConfig, architecture, meta_model


def build(config: ModelConfig, folder: Path, precision: str) -> nn.Module:
    """Builds the causal LM on the meta device, block layers in the storage of ``model.quant``.

    Raises:
        UserError: config.json is missing, broken or of an unsupported architecture.
    """
    where, attention = f"model.path={folder}", config.attention
    options: dict[str, Any] = {"dtype": PRECISIONS[precision]}
    if attention != "auto":
        where += f" model.attention={attention}"
        options["attn_implementation"] = attention
    if attention.startswith("flash") and precision == "fp32":
        raise UserError(f"{where}: computes in bf16 alone; set train.precision=bf16, or take sdpa")
    model: nn.Module = meta_model(architecture(folder), where, **options)
    blocks_of(model)
    _say_what_is_off(model)
    if fmt := quant.get_format(config.quant, config.double_quant):
        _quantize_blocks(model, fmt, folder)
    return model


def _say_what_is_off(model: Any) -> None:
    """Tells once which noise of its own training the base has, and that its loss has another."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        dropout = {name.rsplit(".", 1)[-1]: module.p} if isinstance(module, nn.Dropout) else {}
        found |= {k: v for k, v in vars(module).items() if "drop" in k or "jitter" in k} | dropout
    noise = [f"{k}={v:g}" for k, v in found.items() if isinstance(v, float) and v > 0]
    if noise and rank() == 0:
        say(f"the frozen base computes as in inference, without {', '.join(noise)}")
    if getattr(model.config.get_text_config(), "output_router_logits", False) and rank() == 0:
        say(
            "the routers' auxiliary loss (output_router_logits in config.json) moves adapters alone"
        )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder blocks, the units of sharding and checkpointing."""
    blocks = getattr(getattr(model, "base_model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(
            f"{type(model).__name__} is not supported: its decoder has no list of blocks named"
            " 'layers'. Supported: LLaMA-class models (Llama, Mistral, Qwen2, Qwen3, ...)"
        )
    return list(blocks)


def _quantize_blocks(model: nn.Module, fmt: quant.Format, folder: Path) -> None:
    kept: dict[str, str] = {}
    for block in blocks_of(model):
        for name, layer in block.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            if reason := fmt.refuses(layer.in_features):
                kept[name.rsplit(".", 1)[-1]] = reason
            else:
                quant.quantize(layer, fmt)
    if kept and not any(isinstance(m, quant.QuantLinear) for m in model.modules()):
        reason = next(iter(kept.values()))
        raise UserError(f"model.quant={fmt.name}: no layer of {folder} can be stored so: {reason}")
    for name, reason in kept.items() if rank() == 0 else ():
        say(f"{name} stays unquantized in every block: {reason}")


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives meta parameters and buffers (sharded or whole) empty storage there; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        torch.empty_like(p, device=device), requires_grad=p.requires_grad
                    )
                module._parameters[name] = made[id(p)]
    compute_tables(model, device)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"still on the meta device: {left}"


def compute_tables(model: nn.Module, device: torch.device) -> None:
    """Makes meta buffers real: they are in no checkpoint, so that their module is made again."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if any(b.is_meta for b in module.buffers(recurse=False)):
                setattr(parent, name, type(module)(module.config).to(device))  # rotary frequencies
