"""LoRA's dropout and weight decay; its equality with HF PEFT is in test_peft_parity.py."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import scalepeft
from scalepeft.adapters import inject as injection
from scalepeft.adapters import sizing
from scalepeft.adapters.base import Dropout, dropout_keys
from scalepeft.core.errors import UserError
from scalepeft.models import quant


def test_dropout_acts_in_training_only() -> None:
    layer = scalepeft.adapt(nn.Linear(32, 32), "lora", rank=4, dropout=0.5)
    with torch.no_grad():
        layer.adapter.B.normal_()
    x = torch.randn(8, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_only_low_rank_factors_take_weight_decay() -> None:
    from scalepeft.adapters.inject import decayed_names, inject

    for name, decayed in (("lora", 2), ("dora", 2), ("hira", 2), ("hoft", 0), ("shoft", 0)):
        net = inject(
            nn.Sequential(nn.Linear(16, 16)), {"name": name, "rank": 2, "target_modules": ["0"]}
        )
        assert len(decayed_names(net)) == decayed


def dropped(
    keys: list[int], name: str = "a", p: float = 0.3, shape: tuple[int, ...] = (64, 512)
) -> torch.Tensor:
    dropout = Dropout(p, name).train()
    dropout.keys = torch.tensor(keys)
    return dropout(torch.ones(len(keys), *shape)) == 0


def test_dropout_is_a_function_of_the_sample_alone() -> None:
    """Neither of the row's place in the micro-batch, nor of the padding, nor of the others."""
    together = dropped([7, 8, 9])
    assert torch.equal(together[1:2], dropped([8]))
    assert torch.equal(together[2:3, :40], dropped([9], shape=(40, 512)))
    torch.manual_seed(1)
    assert torch.equal(together, dropped([7, 8, 9]))
    x = torch.randn(1, 64, 512)
    dropout = Dropout(0.3, "a").train()
    dropout.keys = torch.tensor([8])
    assert torch.equal(dropout(x), x.masked_fill(dropped([8]), 0) * (1 / 0.7))
    rows = x.repeat(2, 1, 1)
    dropout.keys = torch.tensor([8, 9])
    # as shared experts of Llama 4 and Qwen-MoE get it
    assert torch.equal(dropout(rows.flatten(0, 1)), dropout(rows).flatten(0, 1))
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_of_packed_rows_is_that_of_each_alone() -> None:
    dropout = Dropout(0.3, "a").train()
    dropout.keys = torch.tensor([[7] * 40 + [8] * 24])
    dropout.positions = torch.tensor([[*range(40), *range(24)]])
    packed = dropout(torch.ones(1, 64, 512)) == 0
    alone = (dropped([7], shape=(40, 512)), dropped([8], shape=(24, 512)))
    assert torch.equal(packed, torch.cat(alone, 1))


def test_keys_of_any_seed() -> None:
    samples = torch.tensor([0, 1, 2**31])
    keys = [dropout_keys(samples, seed).tolist() for seed in (0, 1, 2**23, 20240101, 2**31 - 1)]
    assert len({key for row in keys for key in row}) == 15
    assert isinstance(
        scalepeft.adapt(nn.Linear(8, 8), "lora", dropout=0).adapter.dropout, nn.Identity
    )


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_looks_like_independent_coins(p: float) -> None:
    """Shares, and agreement of masks that should have nothing to do with each other."""
    seeds = [(seed << 40) + sample for seed in (0, 1, 2**20) for sample in (0, 1, 2, 1_000_000)]
    mask = dropped(seeds, p=p).double()
    n = mask[0].numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert ((mask.mean((1, 2)) - p).abs() < 4.5 * sigma).all()
    assert ((mask.mean((0, 1)) - p).abs() < 5 * (p * (1 - p) / (len(seeds) * 64)) ** 0.5).all()
    assert ((mask.mean((0, 2)) - p).abs() < 5 * (p * (1 - p) / (len(seeds) * 512)) ** 0.5).all()
    flat = (mask - p).reshape(len(seeds), -1) / (p * (1 - p)) ** 0.5
    between = flat @ flat.T / n
    assert (between - torch.diag(between.diag())).abs().max() < 5 / n**0.5
    other = (dropped(seeds, "b", p).double() - p).reshape(len(seeds), -1) / (p * (1 - p)) ** 0.5
    assert ((flat * other).mean(1).abs() < 5 / n**0.5).all()
    one = flat[0].view(64, 512)
    for shifted in (one.roll(1, 0), one.roll(1, 1), one.roll(64, 1), one.flip(0), one.flip(1)):
        assert abs((one * shifted).mean().item()) < 5 / n**0.5
    rows = one @ one.T / 512
    assert (rows - torch.diag(rows.diag())).abs().max() < 8 / 512**0.5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bf16", "nf4"])
@pytest.mark.parametrize("shape", [(64, 192), (576, 320)])
def test_pissa_starts_from_the_leading_singular_values(
    shape: tuple[int, int], kind: str, rslora: bool
) -> None:
    """Of W as training sees it; past a side of 256 by a randomized SVD, of a decaying spectrum."""
    torch.manual_seed(0)
    small = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, small))[0] for side in shape)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = u @ torch.diag(0.98 ** torch.arange(small)) @ v.T
    layer = layer.bfloat16() if kind == "bf16" else layer
    if kind == "nf4":
        quant.quantize(layer, quant.get_format("nf4"))
    x = torch.randn(5, shape[1], dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    before, state = layer(x), torch.random.get_rng_state()
    settings = {"rank": 6, "alpha": 3, "rslora": rslora, "start": "pissa", "dropout": 0.5}
    adapter = scalepeft.adapt(layer, "lora", **settings).adapter
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(layer(x), before), "the base in bits, dropout or not"
    u, s, vh = torch.linalg.svd(quant.Frozen(layer).weight(torch.float64), full_matrices=False)
    scaling = 3 / 6**0.5 if rslora else 3 / 6
    a, b = adapter.A0.double(), adapter.B0.double()
    want = u[:, :6] @ torch.diag(s[:6]) @ vh[:6]
    assert (scaling * b @ a - want).abs().max() <= 1e-6 * want.abs().max()
    for gram in (a @ a.T, b.T @ b):
        assert (gram - torch.diag(s[:6] / scaling)).abs().max() <= 1e-5 * s[0] / scaling
    assert [key for key, p in adapter.named_parameters() if p.requires_grad] == ["A", "B"]


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_pefts(name: str, rslora: bool) -> None:
    """PEFT trains B0 + B and A0 + A over what is left of W; the same function and gradients."""
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(48, 32))
    more = {"lora_dropout": 0.0, "use_rslora": rslora, "use_dora": name == "dora"}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa", **more
    )
    theirs = peft.get_peft_model(copy.deepcopy(mine), config)
    settings = {"rank": 4, "alpha": 6, "dropout": 0.0, "rslora": rslora, "start": "pissa"}
    scalepeft.inject(mine, {"name": name, "target_modules": ["0"], **settings})
    adapter, peer = mine[0].adapter, theirs.base_model.model[0]
    a, b = peer.lora_A["default"].weight, peer.lora_B["default"].weight
    # A singular vector has no sign of its own.
    sign = (a * adapter.A0).sum(1).sign()
    assert (adapter.A0 - sign[:, None] * a).abs().max() <= 1e-5 * a.abs().max()
    assert (adapter.B0 - sign * b).abs().max() <= 1e-5 * b.abs().max()
    with torch.no_grad():
        adapter.A0 *= sign[:, None]
        adapter.B0 *= sign
    # Not DoRA's magnitude, which is one's difference and the other's length.
    optimizers = [torch.optim.Adam(pair, lr=0.01) for pair in ((adapter.A, adapter.B), (a, b))]
    for step in range(4):
        x = torch.randn(7, 48)
        outputs = [net(x) for net in (mine, theirs)]
        assert (outputs[0] - outputs[1]).abs().max() <= 2e-5 * outputs[1].abs().max(), step
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            y.sin().sum().backward()
        for got, want in ((adapter.A, a), (adapter.B, b)):
            assert (got.grad - want.grad).abs().max() <= 1e-4 * want.grad.abs().max(), step
        for optimizer in optimizers:
            optimizer.step()
    assert (adapter.A - (a - adapter.A0)).abs().max() <= 1e-5 * a.abs().max()


def test_pissa_goes_into_a_folder_and_a_resized_rank_counts_what_trains(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))

    settings = {"name": "dora", "rank": 4, "start": "pissa", "target_modules": ["0", "1"]}
    one = scalepeft.inject(net(), settings)
    count = sum(p.numel() for p in injection.trainable(one).values())
    assert count == 4 * (32 + 32 + 32 + 16) + 32 + 16
    assert sizing.count_parameters(net(), settings) == count
    shapes = sizing.adapted_shapes(net(), settings)
    assert sizing.fit({**settings, "rank": 1}, "rank", shapes, count)["rank"] == 4
    with torch.no_grad():
        for p in injection.tensors(one).values():
            p += 0.1 * torch.randn_like(p)
    injection.save_adapter(one, tmp_path / "adapter")
    x = torch.randn(3, 32)
    assert torch.equal(scalepeft.load_adapter(net(), tmp_path / "adapter").eval()(x), one.eval()(x))
    state = {k: v for k, v in injection.tensors(one).items() if not k.endswith("0.adapter.B0")}
    with pytest.raises(UserError, match=r"lacks 1 of 10 tensors, first 0.adapter.B0"):
        injection.load_state(net_with := scalepeft.inject(net(), settings), state, "here")
    assert (net_with[0].adapter.A0 != one[0].adapter.A0).any(), "refused before anything is copied"
    with pytest.raises(UserError, match=r"adapter.rank=17: start=pissa: the layer has 16 singular"):
        scalepeft.adapt(nn.Linear(64, 16), "lora", rank=17, start="pissa")
