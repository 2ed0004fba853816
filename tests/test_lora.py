"""LoRA's dropout and weight decay; its equality with HF PEFT is in test_peft_parity.py."""

import torch
from torch import nn

import scalepeft


def test_dropout_acts_in_training_only() -> None:
    layer = scalepeft.adapt(nn.Linear(32, 32), "lora", rank=4, dropout=0.5)
    with torch.no_grad():
        layer.adapter.B.normal_()
    x = torch.randn(8, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_only_low_rank_factors_take_weight_decay() -> None:
    from scalepeft.injection import decayed_names, inject

    for name, decayed in (("lora", 2), ("dora", 2), ("hira", 2), ("hoft", 0), ("shoft", 0)):
        net = inject(
            nn.Sequential(nn.Linear(16, 16)), {"name": name, "rank": 2, "target_modules": ["0"]}
        )
        assert len(decayed_names(net)) == decayed
