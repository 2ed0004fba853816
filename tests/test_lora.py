"""LoRA against HF PEFT with the same A and B: outputs and gradients."""

import peft
import pytest
import torch
from torch import nn

import scalepeft


@pytest.mark.parametrize("bias", [True, False])
def test_equals_hf_peft(bias: bool) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(48, 80, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    net = Net()
    mine = nn.Linear(48, 80, bias=bias)
    mine.load_state_dict(net.proj.state_dict())
    scalepeft.adapt(mine, "lora", rank=4, alpha=12)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["proj"]))
    layer = theirs.base_model.model.proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        mine.adapter.B.normal_()
        a.copy_(mine.adapter.A)
        b.copy_(mine.adapter.B)
    x = torch.randn(5, 48)
    want, got = theirs(x), mine(x)
    assert (want - got).abs().max() < 1e-5
    want.square().sum().backward()
    got.square().sum().backward()
    for reference, grad in ((a.grad, mine.adapter.A.grad), (b.grad, mine.adapter.B.grad)):
        assert (reference - grad).abs().max() <= 1e-5 * reference.abs().max()


def test_dropout_acts_in_training_only() -> None:
    layer = scalepeft.adapt(nn.Linear(32, 32), "lora", rank=4, dropout=0.5)
    with torch.no_grad():
        layer.adapter.B.normal_()
    x = torch.randn(8, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_only_lora_takes_weight_decay() -> None:
    from scalepeft.injection import decayed_names, inject

    for name, decayed in (("lora", 2), ("hoft", 0), ("shoft", 0)):
        net = inject(
            nn.Sequential(nn.Linear(16, 16)), {"name": name, "rank": 2, "target_modules": ["0"]}
        )
        assert len(decayed_names(net)) == decayed
