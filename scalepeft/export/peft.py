"""A run's adapter for HF PEFT, or as a plain LoRA, both in PEFT's layout; peft is not needed."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.adapters import layout
from scalepeft.adapters.base import Adapter, Base
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.export.streaming import FinishedRun, Streamed, refuse_existing, whole_folder
from scalepeft.models import quant
from scalepeft.models.experts import ExpertLinear

Exported = tuple[dict[str, Any], dict[str, Tensor]]


class _Real(quant.Frozen):
    """The frozen layer, whose W is read when it is asked for and not held afterwards."""

    def __init__(self, model: Streamed, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._model = model

    def __call__(self, x: Tensor) -> Tensor:
        with self._model.held(self._layer):
            return super().__call__(x)

    def weight(self, dtype: torch.dtype) -> Tensor:
        with self._model.held(self._layer):
            return super().weight(dtype)


@torch.no_grad()
def run(run_dir: str, out: str, settings: list[str], format: str) -> None:
    """Writes a run's adapter to ``out``, a new folder: ``peft``, the same method there, or
    ``lora``, one of scaling 1 with ``B A = W' - W``; W as training saw it, dequantized. Raises
    UserError: the format has no place for the method, base and adapter do not belong together,
    ``out`` cannot be written; nothing is written then.
    """
    target = Path(out)
    refuse_existing(target)
    finished = FinishedRun.open(run_dir, settings, "an export")
    model = finished.structure(quantized=True)
    convert = {"peft": _to_peft, "lora": _to_lora}[format]
    of_experts = _names_of_experts(model)
    fields: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in injection.adapted_layers(model.model):
        if isinstance(layer, ExpertLinear):
            what = f"{name} has an adapter for each expert, which the format has no place for"
            raise UserError(f"--format {format}: {what}; use scalepeft merge, or keep the adapter")
        fields[name], parts = convert(layer.adapter.double(), layer, _Real(model, layer))
        if name.rsplit(".", 1)[-1] in of_experts and fields[name]["peft_type"] == "LORA":
            raise UserError(
                f"--format {format}: HF PEFT takes {name} for a layer of the experts, which has the"
                " same name in the files of this family; use scalepeft merge, or keep the adapter"
            )
        for key, tensor in parts.items():  # computed in fp64, rounded once
            tensors[f"{layout.PREFIX}{name}.{key}"] = tensor.float().cpu().contiguous()
    adapters = dict(injection.adapters(model.model))
    assert fields.keys() == adapters.keys(), "no method with trained norms has an export"
    revision = finished.config.model.revision
    description = layout.peft_config(model.model, fields, finished.base.name, revision)
    with whole_folder(target) as folder:
        weights = folder / layout.WEIGHTS
        save_file(tensors, weights, {"format": "pt"})
        layout.write_config(folder, description)
        # safetensors makes it for the owner alone
        weights.chmod((folder / layout.CONFIG).stat().st_mode)
    say(f"{description['peft_type']} adapter of {len(fields)} layers in {out}")
    if description.get("boft_n_butterfly_factor", 1) > 1:
        say("HF PEFT loads more than one butterfly factor only with its CUDA extension")


def _names_of_experts(model: Streamed) -> set[str]:
    """Last names that HF PEFT takes for experts': of transformers 4, and of the files."""
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    config: Any = model.model.config
    if _MODEL_TO_CONVERSION_PATTERN.get(config.model_type) not in ("qwen2_moe", "mixtral"):
        return set()  # PEFT converts no others
    found = (re.search(r"\.experts\.\d+\.(\w+)\.weight$", name) for name in model.weights.entries)
    return {match[1] for match in found if match}


def _to_peft(adapter: Adapter, layer: nn.Linear, base: Base) -> Exported:
    exported = adapter.to_peft(base)
    if exported is None:
        other = " or --format lora" if adapter.to_lora(base) else ""
        raise _refused("peft", adapter, "with these settings: HF PEFT has no method like it", other)
    fields, tensors = exported
    if fields["peft_type"] == "IA3" and layer.bias is not None and len(tensors["ia3_l"]) > 1:
        reason = "has biases to leave here, and HF PEFT's IA3 scales a layer's bias too"
        raise _refused("peft", adapter, reason)
    return exported


def _to_lora(adapter: Adapter, layer: nn.Linear, base: Base) -> Exported:
    factors = adapter.to_lora(base)
    if factors is None:
        reason = adapter.unmergeable_reason or "W' - W has full rank"
        other = " or --format peft" if adapter.to_peft(base) else ""
        raise _refused("lora", adapter, f"is not W plus a matrix of low rank: {reason}", other)
    a, b = factors
    fields = {"peft_type": "LORA", "r": len(a), "lora_alpha": len(a), "use_rslora": False}
    return fields, {"lora_A.weight": a, "lora_B.weight": b}


def _refused(format: str, adapter: Adapter, reason: str, other: str = "") -> UserError:
    instead = "keep the adapter" if adapter.unmergeable_reason else "use scalepeft merge"
    return UserError(f"--format {format}: {type(adapter).__name__} {reason}; {instead}{other}")
