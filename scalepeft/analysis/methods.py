"""What there is to choose from: every shipped method config on a given model, counted."""

import json
from typing import Any

from torch import nn

from scalepeft.adapters import inject
from scalepeft.adapters import inject as injection
from scalepeft.adapters.base import Adapter
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.models import quant, shapes


def run(model: str, as_json: bool) -> None:
    """Prints a table (or JSON) of the files of ``configs/adapters`` on a shape or model folder.

    Raises:
        UserError: no such shape or folder.
    """
    rows = [describe(name, model) for name in config_files.config_names("adapter")]
    if as_json:
        print(json.dumps({"model": model, "methods": rows}, indent=1))
        return
    print(f"methods on {model} (adapter=NAME; parameters, share, and forward FLOP a token over the")
    print("adapted model's linear layers are those of the shipped settings)\n")
    print(
        f"{'adapter':<17}{'parameters':>13}{'share':>9}{'cost':>8}{'lr':>9}  {'merge':<6}"
        f"{'export':<11}paper"
    )
    for row in rows:
        if "refused" in row:
            print(f"{row['name']:<17}  {row['refused']}")
            continue
        merge = "yes" if not row["no_merge"] else "no"
        cost = f"{row['cost']:+.1%}" if row["cost"] is not None else "weight"
        print(
            f"{row['name']:<17}{row['parameters']:>13,}{row['share']:>9.4%}{cost:>8}"
            f"{row['lr']:>9g}  {merge:<6}{','.join(row['exports']) or '-':<11}{row['paper']}"
        )
    print("\ncost 'weight': a changed weight is made in every forward and backward, whatever the")
    print(
        "batch; dora reads the weight once more. merge 'no': keeps its adapter. export: see --help."
    )


def describe(name: str, model: str) -> dict[str, Any]:
    """One config on one model: parameters, share of all, forward cost, merge, exports, lr, paper.

    A config that the model cannot take has ``refused`` with the reason instead.
    """
    values = config_files.named_file("adapter", name)
    config = inject.adapter_config(values["adapter"])
    net = shapes.meta_model(model)
    base = sum(p.numel() for p in net.parameters())
    # Of the blocks: the head's logits are no cost of the layers an adapter sits on.
    linear = sum(
        2 * m.in_features * m.out_features
        for n, m in net.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    )
    row: dict[str, Any] = {"name": name, "method": config.name, "settings": cfg.to_dict(config)}
    try:
        injection.inject(net, config)
    except UserError as error:
        return {**row, "refused": str(error)}
    layers = list(injection.adapted_layers(net))
    found = [adapter for _, adapter in injection.adapters(net)]
    count = sum(p.numel() for a in found for p in a.parameters())
    # On meta tensors: what comes out is None or not. One layer that cannot go decides for all.
    pairs = [(layer.adapter, quant.Frozen(layer)) for _, layer in layers]
    peft = all(adapter.to_peft(frozen) is not None for adapter, frozen in pairs)
    lora = all(adapter.to_lora(frozen) is not None for adapter, frozen in pairs)
    return {
        **row,
        "parameters": count,
        "share": count / (base + count),
        "cost": _cost(found, linear),
        "no_merge": next((a.unmergeable_reason for a in found if a.unmergeable_reason), ""),
        "exports": ["peft"] * peft + ["lora"] * lora,
        "lr": values.get("train", {}).get("lr", cfg.TrainConfig().lr),
        "paper": layers[0][1].adapter.paper,
    }


def _cost(found: list[Adapter], linear: int) -> float | None:
    """Forward FLOP a token over those of the linear layers; None where the work is on W itself."""
    if any(adapter.needs_weight for adapter in found):
        return None
    return sum(adapter.flops() for adapter in found) / linear
