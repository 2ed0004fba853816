"""LoRA's dropout and weight decay; its equality with HF PEFT is in test_peft_parity.py."""

import pytest
import torch
from torch import nn

import scalepeft
from scalepeft.adapters.base import Dropout, dropout_keys


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
