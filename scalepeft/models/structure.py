"""A base's modules on the meta device, its blocks, its non-persistent tables."""

import inspect
import math
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from scalepeft.core.errors import UserError
from scalepeft.core.launch import rank
from scalepeft.core.log import say
from scalepeft.models import prequantized, quant
from scalepeft.models.experts import ExpertLinear, TallSource, replace_experts
from scalepeft.models.hub import PRECISIONS, ModelConfig, architecture, meta_model
from scalepeft.models.weights import Weights


def build(
    config: ModelConfig, folder: Path, precision: str, weights: Weights | None = None
) -> nn.Module:
    """The causal LM on the meta device, block layers in the storage of ``model.quant``; of a
    multimodal model decoder and head. ``weights`` of the folder are bound to it. Raises UserError:
    config.json is missing, broken or not supported, or the tensors are of another architecture.
    """
    where, attention, dtype = f"model.path={folder}", config.attention, PRECISIONS[precision]
    options: dict[str, Any] = {"dtype": dtype}
    if attention != "auto":
        where += f" model.attention={attention}"
        options["attn_implementation"] = attention
    if attention.startswith("flash") and precision == "fp32":
        raise UserError(f"{where}: computes in bf16 alone; set train.precision=bf16, or take sdpa")
    described = architecture(folder)
    if described.is_encoder_decoder:
        kind = described.model_type
        raise UserError(f"{where}: {kind} has an encoder; take a decoder-only model")
    model: Any = meta_model(described, where, **options)
    keep_fp32(model, dtype)
    if weights is not None:
        weights.bind(model, config.unexpected)
    _drop_towers(model)
    others = replace_experts(model)
    sources = weights.layout.sources if weights is not None else {}
    for name, layer in model.named_modules() if sources else ():
        if isinstance(layer, ExpertLinear):
            sources[f"{name}.weight"] = TallSource(sources[name], layer)
    blocks_of(model)
    _say_what_is_off(model)
    if fmt := quant.get_format(config.quant, config.double_quant):
        _quantize_blocks(model, fmt, folder, dict.fromkeys(others, "3-d weights of its own layout"))
    return model


def keep_fp32(model: Any, dtype: torch.dtype) -> None:
    """Keeps in fp32 what transformers does whatever the dtype (DeepSeek-V3's routing bias)."""
    kept = model._get_dtype_plan(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept):
            tensor.data = tensor.data.float()


def _drop_towers(model: Any) -> None:
    if model.config.get_text_config() is model.config:
        return
    for name, child in model.base_model.named_children():
        if child is not model.get_decoder() and any(True for _ in child.parameters()):
            setattr(model.base_model, name, None)


def _say_what_is_off(model: Any) -> None:
    """Tells once which noise of its own training the base has, and that its loss has another."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        dropout = {name.rsplit(".", 1)[-1]: module.p} if isinstance(module, nn.Dropout) else {}
        found |= {k: v for k, v in vars(module).items() if "drop" in k or "jitter" in k} | dropout
    noise = [f"{k}={v:g}" for k, v in found.items() if isinstance(v, float) and v > 0]
    if noise and rank() == 0:
        say(f"the frozen base computes as in inference, without {', '.join(noise)}")
    key = "output_router_logits"
    if getattr(model.config.get_text_config(), key, False) and rank() == 0:
        say(f"the routers' auxiliary loss ({key} in config.json) moves adapters alone")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder blocks, the units of sharding and checkpointing."""
    decoder: Any = model
    count = getattr(decoder.config.get_text_config(), "num_hidden_layers", 0)
    for module in decoder.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return list(module)
    what = "its decoder has no list of blocks, as many as num_hidden_layers in config.json"
    raise UserError(f"{type(model).__name__} is not supported: {what}")


def unpacked(model: Any) -> str:
    """Why rows in one line would see each other: states, or a mask without positions; or empty."""
    from transformers import masking_utils

    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or ())}
    if getattr(model, "_is_stateful", False) or kinds - {"full_attention", "sliding_attention"}:
        return f"{type(model).__name__} has layers that do not begin anew with each row"
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    asked = "find_packed_sequence_indices"
    look = mock.patch.object(masking_utils, asked, side_effect=InterruptedError)  # seen enough
    with suppress(Exception), look:  # what a class without such a mask does on meta is its own
        try:
            model.get_decoder()(input_ids=ids, position_ids=ids, use_cache=False)
        except InterruptedError:
            return ""
    return f"{type(model).__name__} makes its attention mask without the positions of tokens"


def is_router(name: str, layer: nn.Module) -> bool:
    """A layer chooses or weighs experts: a handful of rows that decide where tokens go."""
    parts, one_number = name.split("."), getattr(layer, "out_features", 0) == 1  # shared expert's
    return "gate" in parts or any("router" in part for part in parts) or one_number


@cache
def _weights_read_by(kind: type[nn.Module]) -> dict[str, bool]:
    """Children whose ``.weight`` a transformers class reads itself, as its source says; True where
    for more than its dtype or device (Mamba's fused kernels take the weight of ``out_proj``).
    """
    bases = [b for b in kind.__mro__ if b.__module__.startswith("transformers.models.")]
    named = [item for base in bases for item in vars(base).items() if inspect.isfunction(item[1])]
    code = [inspect.getsource(f) for n, f in named if n not in ("__init__", "_init_weights")]
    reads = re.findall(r"\bself\.(\w+)\.weight\b(\.dtype|\.device)?", "\n".join(code))
    return {child: (child, "") in reads for child, _ in reads}


def layers_read_directly(model: nn.Module, values: bool) -> set[nn.Module]:
    """Linear layers whose weight is read past their forward; ``values``: more than its dtype."""
    return {
        layer
        for module in model.modules()
        for name, more in _weights_read_by(type(module)).items()  # type: ignore[arg-type]
        if (more or not values) and isinstance(layer := getattr(module, name, None), nn.Linear)
    }


def _quantize_blocks(model: Any, fmt: quant.Format, folder: Path, kept: dict[str, str]) -> None:
    plain = layers_read_directly(model, values=False)
    skipped = prequantized.keeps(prequantized.settings_of(model.config.to_dict()))
    plain |= {m for name, m in model.named_modules() if skipped(name) or is_router(name, m)}
    for block in blocks_of(model):
        for name, layer in block.named_modules():
            # A subclass computes in its own way with the weight itself.
            if type(layer) not in (nn.Linear, ExpertLinear) or layer in plain:
                continue
            if reason := fmt.refuses(layer.in_features):
                kept[name.rsplit(".", 1)[-1]] = reason
            else:
                quant.quantize(layer, fmt)
    if not any(isinstance(m, quant.QuantLinear) for m in model.modules()):
        reason = next(iter(kept.values()), f"{type(model).__name__} computes with its weights")
        raise UserError(f"model.quant={fmt.name}: no layer of {folder} can be stored so: {reason}")
    for name, reason in kept.items() if rank() == 0 else ():
        say(f"{name} stays unquantized in every block: {reason}")


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives meta parameters and buffers (sharded or whole) empty storage there; ties stay ties."""

    @cache
    def real(p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)

    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[name] = real(p)
    compute_tables(model, device)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"still on the meta device: {left}"


def compute_tables(model: Any, device: torch.device) -> None:
    """Makes meta buffers real: of files empty, others by the model's own ``_init_weights``."""
    made: set[nn.Module] = set()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            real = torch.empty_like(buffer, device=device)
            if name in module._non_persistent_buffers_set:
                made.add(module)
                if real.is_floating_point():
                    real.fill_(math.nan)  # a table that nobody makes is then not silent
            module._buffers[name] = real
    if not made:
        return
    flagged: list[Any] = [m for m in model.modules() if m not in made]
    flagged += [p for module in made for p in module.parameters(recurse=False)]
    for item in flagged:
        item._is_hf_initialized = True  # transformers' word for: leave it
    model.initialize_weights()
    for decoder in model.modules():
        if hasattr(decoder, "initialize_weights"):  # may make the tables of its layers (Falcon-H1)
            decoder._init_weights(decoder)
    for item in [*flagged, *made]:
        del item._is_hf_initialized
