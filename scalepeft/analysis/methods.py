"""What there is to choose from: every shipped method config on a given model, counted."""

import json
from typing import Any

from torch import nn

from scalepeft.adapters import inject
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.launch import importing
from scalepeft.core.text import table
from scalepeft.models import quant, shapes

TEXT = """\
methods on {model} (adapter=NAME; parameters, share, and forward FLOP a token over the
adapted model's linear layers are those of the shipped settings)

{table}

cost 'weight': a changed weight is made in every forward and backward, whatever the
batch; dora reads the weight once more. merge 'no': keeps its adapter. export: see --help."""
HEADER = ["adapter", "parameters", "share", "cost", "lr", "merge", "export", "paper"]


def run(model: str, as_json: bool) -> None:
    """Print a table (or JSON) of configs/adapters on a shape or folder, or raise UserError."""
    with importing():  # most of it is; of a model for each method nothing is worth a search
        rows = [describe(name, model) for name in config_files.config_names("adapter")]
    if as_json:
        print(json.dumps({"model": model, "methods": rows}, indent=1))
    else:
        lines = table([HEADER, *(_cells(row) for row in rows)], indent="")
        print(TEXT.format(model=model, table="\n".join(lines)))


def _cells(row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        return [row["name"], row["refused"]]
    cost = "weight" if row["cost"] is None else f"{row['cost']:+.1%}"
    size = [f"{row['parameters']:,}", f"{row['share']:.4%}", cost, f"{row['lr']:g}"]
    merge, exports = "no" if row["no_merge"] else "yes", ",".join(row["exports"]) or "-"
    return [row["name"], *size, merge, exports, row["paper"]]


def describe(name: str, model: str) -> dict[str, Any]:
    """One config on one model, counted; with ``refused``, why, if the model cannot take it."""
    values = config_files.named_file("adapter", name)
    config = inject.adapter_config(values["adapter"])
    net = shapes.meta_model(model)
    base = sum(p.numel() for p in net.parameters())
    # Of the blocks: the head's logits are no cost of the layers an adapter sits on.
    linears = [m for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    flops = sum(2 * m.in_features * m.out_features for m in linears)
    row: dict[str, Any] = {"name": name, "method": config.name, "settings": cfg.to_dict(config)}
    try:
        inject.inject(net, config)
    except UserError as error:
        return {**row, "refused": str(error)}
    adapters = [adapter for _, adapter in inject.adapters(net)]
    count = sum(p.numel() for p in inject.trainable(net).values())
    # On meta tensors: what comes out is None or not. One kind that cannot go decides for all.
    layers = inject.adapted_layers(net)
    kinds = {(n.rpartition(".")[2], m.in_features, m.out_features): m for n, m in layers}
    pairs = [(m.adapter, quant.Frozen(m)) for m in kinds.values()]
    peft = all(adapter.to_peft(frozen) is not None for adapter, frozen in pairs)
    lora = all(adapter.to_lora(frozen) is not None for adapter, frozen in pairs)
    by_weight = any(a.needs_weight for a in adapters)
    return {
        **row,
        "parameters": count,
        "share": count / (base + count),
        "cost": None if by_weight else sum(a.flops() for a in adapters) / flops,
        "no_merge": next((a.unmergeable_reason for a in adapters if a.unmergeable_reason), ""),
        "exports": ["peft"] * peft + ["lora"] * lora,
        "lr": values.get("train", {}).get("lr", cfg.TrainConfig().lr),
        "paper": pairs[0][0].paper,
    }
