"""Run folders as a training leaves them, made by hand: config.yaml and adapter/ with any values."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scalepeft.adapters import inject as injection
from scalepeft.adapters import layout
from scalepeft.config import schema as cfg
from scalepeft.core.files import digest, sealed
from scalepeft.models import hub, structure
from scalepeft.models import hub as models
from scalepeft.models import structure as structure_
from scalepeft.models.weights import Weights, load_weights
from scalepeft.parallel.ranks import Ranks

METHODS: dict[str, dict[str, Any]] = {
    "hoft": {"name": "hoft", "rank": 4},
    "shoft": {"name": "shoft", "rank": 4},
    "goft": {"name": "goft", "scale": True},
    "qgoft": {"name": "qgoft"},
    "surm": {"name": "surm"},
    "surm-circulant": {"name": "surm", "structure": "circulant"},
    "surm-toeplitz": {"name": "surm", "structure": "toeplitz"},
    "surm-ldr": {"name": "surm", "structure": "ldr", "target_modules": ["q_proj", "o_proj"]},
    "hut-rank1-shift": {"name": "hut", "shift": True},
    "hut-rank2": {"name": "hut", "rank": 2},
    "hut-rank2-shift": {"name": "hut", "rank": 2, "shift": True, "layers": [1, 2]},
    "hadamard-after": {"name": "hadamard"},
    "hadamard-before": {"name": "hadamard", "position": "before", "train_norm": False},
    "lora": {"name": "lora", "rank": 4, "dropout": 0.0},
    "rslora": {"name": "lora", "rank": 4, "rslora": True, "dropout": 0.1},
    "dora": {"name": "dora", "rank": 4, "dropout": 0.0},
    "lora-pissa": {"name": "lora", "rank": 4, "dropout": 0.0, "start": "pissa"},
    "dora-pissa": {"name": "dora", "rank": 4, "alpha": 16, "rslora": True, "start": "pissa"},
    "oft": {"name": "oft", "block_size": 4},
    "oftv2": {"name": "oftv2", "block_size": 4},
    "boft": {"name": "boft", "block_size": 4, "factors": 1, "target_modules": ["q_proj"]},
    "boft-2": {"name": "boft", "block_size": 4, "target_modules": ["q_proj"]},
    "hra": {"name": "hra", "rank": 4},
    "ia3": {"name": "ia3"},
    "hira": {"name": "hira", "rank": 4},
}


SCATTER = dict.fromkeys(("qgoft", "surm", "surm-circulant", "ia3", "hadamard-before"), 0.1)
SCATTER["hira"] = 0.15
"""Where 0.03 would not change what stories260K tells."""


def make_run(
    folder: Path, model: Path | str, method: str, *, scatter: float | None = None, **settings: Any
) -> Path:
    """Writes RUN_DIR with an adapter whose every parameter is off its start; returns it.

    ``settings`` are those of the model (``quant``), and ``adapter`` to lay over the method's.
    """
    adapter = METHODS[method] | settings.pop("adapter", {})
    values = {
        "run_dir": str(folder),
        "model": {"path": str(model), **settings},
        "adapter": adapter,
        "train": {"max_steps": 1, "precision": "fp32"},
    }
    config = cfg.from_dict(values)
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump(config))
    base = models.open_base(config.model, Ranks()).folder
    structure = structure_.build(config.model, base, "fp32")
    injection.inject(structure, config.adapter)
    for _, part in injection.adapters(structure):
        part.to_empty(device="cpu")
    injection.reset_adapters(structure, 0)
    scatter = scatter or SCATTER.get(method, 0.03)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: (p + scatter * torch.randn(p.shape, generator=generator)).detach()
        for name, p in injection.tensors(structure).items()
    }
    write_adapter(folder, state, {
        "adapter": cfg.to_dict(config.adapter),
        "base_model": {
            "path": str(model),
            "revision": None,
            "quant": config.model.quant,
            "double_quant": config.model.double_quant,
            "fingerprint": Weights(base).fingerprint(),
        },
        "step": 1,
        "length": [1, None],
    })  # fmt: skip
    return folder


def write_adapter(folder: Path, state: dict[str, torch.Tensor], description: Any) -> None:
    config = hub.ModelConfig(path=description["base_model"]["path"], unexpected="ignore")
    base = models.open_base(config, Ranks())
    model = structure.build(config, base.folder, "fp32")
    injection.inject(model, injection.adapter_config(description["adapter"]))
    about = {key: description[key] for key in ("base_model", "step", "length")}
    adapters = dict(injection.adapters(model))
    layout.write(folder / "adapter", model, adapters, state, about, base.name)


def sealed_again(folder: Path, **changes: Any) -> None:
    """An adapter's folder after a change to its files, as if it had been written so."""
    about = json.loads((folder / layout.ABOUT).read_text()) | changes
    about["sha256"] = digest(folder / layout.WEIGHTS)
    about["config_sha256"] = digest(folder / layout.CONFIG)
    (folder / layout.ABOUT).write_text(json.dumps(sealed(about)))


def older_layout(folder: Path) -> None:
    """Makes an adapter's folder one as runs before 2026-11-30 left them."""
    config, state, about = injection.read_adapter(folder)
    for file in folder.iterdir():
        file.unlink()
    save_file(state, folder / layout.OLD)
    about |= {"format": 1, "adapter": cfg.to_dict(config), "sha256": digest(folder / layout.OLD)}
    del about["config_sha256"]
    (folder / layout.CONFIG).write_text(json.dumps(sealed(about)))


def adapted(run_dir: Path, quantized: bool = True) -> Any:
    """The run's model in memory, fp32, as ``scalepeft evaluate`` has it."""
    adapter, state, description = injection.read_adapter(run_dir / "adapter")
    keys = ("path", "quant", "double_quant")
    config = hub.ModelConfig(
        **{key: description["base_model"][key] for key in keys}, unexpected="ignore"
    )
    if not quantized:
        config = replace(config, quant="none", double_quant=False)
    base = models.open_base(config, Ranks()).folder
    model = structure.build(config, base, "fp32", weights := Weights(base))
    injection.inject(model, adapter)
    structure.materialize(model, torch.device("cpu"))
    for _ in load_weights(model, weights):
        pass
    injection.load_state(model, state, "adapter")
    return model.eval()


def stock(folder: Path) -> Any:
    """What transformers makes of a folder, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


IDS = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, f: int = 1) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()
