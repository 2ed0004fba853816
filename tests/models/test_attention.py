"""Rows of packed lines that are read alone: the same numbers as under a mask, and as padded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import config_of
from processes import losses, train
from transformers import AutoModelForCausalLM, masking_utils
from transformers.integrations import sdpa_attention

from scalepeft.models import attention

POSITIONS = torch.tensor([[*range(5), *range(9), *range(2)], [*range(16)]])


def mask_of(implementation: str, window: int | None, **options: Any) -> Any:
    config = SimpleNamespace(_attn_implementation=implementation, sliding_window=window)
    make: Any = masking_utils.create_causal_mask
    if window:
        make = masking_utils.create_sliding_window_causal_mask
    options = {"attention_mask": None, "position_ids": POSITIONS, **options}
    return make(config, torch.zeros(2, 16, 8), past_key_values=None, **options)


@pytest.fixture(autouse=True)
def registered() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama"))
    attention.read_rows_alone(model)
    assert model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("window", [None, 2, 4, 40])
@pytest.mark.parametrize("heads", [4, 2])
def test_rows_are_read_as_under_the_mask(window: int | None, heads: int) -> None:
    rows, dense = mask_of(attention.NAME, window), mask_of("sdpa", window)
    assert isinstance(rows, attention.Rows) and isinstance(dense, torch.Tensor)
    assert rows.lengths == [5, 9, 2, 16]
    hidden = [window is not None and n > window for n in rows.lengths]
    assert [mask is not None for mask in rows.masks] == hidden
    generator = torch.Generator().manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=4 // heads)
    found = []
    q, k, v = (torch.randn(2, h, 16, 8, generator=generator) for h in (4, heads, heads))
    for mask in (rows, dense):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, _ = attention.row_attention(module, *inputs, mask, scaling=0.3)
        assert out.shape == (2, 16, 4, 8)
        found.append([out, *torch.autograd.grad((out * out).sum(), inputs)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_is_not_causal_over_packed_rows_is_masked_as_before() -> None:
    padding = torch.ones(2, 16, dtype=torch.bool).tril(-2)
    blocks = torch.tensor([[-1] * 2 + [0] * 3 + [-1] * 11] * 2)
    for options in (
        {"position_ids": torch.arange(16)[None]},
        {"position_ids": torch.arange(16)[None], "allow_is_causal_skip": False},
        {"attention_mask": padding},
        {"block_sequence_ids": blocks},  # an image sees itself
        {"and_mask_function": lambda line, head, q, kv: kv + 3 > q},
    ):
        got, want = (mask_of(name, None, **options) for name in (attention.NAME, "sdpa"))
        assert got is None if want is None else torch.equal(got, want)


def test_a_micro_batch_makes_one_mask_and_a_layer_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = AutoModelForCausalLM.from_config(config_of("gemma3"))
    model.config._attn_implementation = attention.NAME
    sdpa, rows = sdpa_attention.sdpa_attention_forward, attention.Rows.__init__
    lengths, made = list[int](), list[Any]()
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *a, **o: (
        lengths.append(a[1].shape[2]), sdpa(*a, **o))[1])  # fmt: skip
    monkeypatch.setattr(attention.Rows, "__init__", lambda *a: (made.append(a), rows(*a))[1])
    model(input_ids=POSITIONS, position_ids=POSITIONS, use_cache=False)
    assert lengths == [5, 9, 2, 16] * model.config.num_hidden_layers
    assert len(made) == 2  # gemma3 makes a mask of each kind, whatever its layers are


@pytest.mark.parametrize(
    "base",
    [
        ["model.quant=nf4"],
        pytest.param(["engine.activation_checkpointing=true"], marks=pytest.mark.full),
    ],
)
def test_twenty_steps_are_those_of_padded_rows(base: list[str], tmp_path: Path) -> None:
    words = [*base, "adapter.name=lora", "adapter.dropout=0.2", "train.max_steps=20"]
    train(1, tmp_path / "padded", *words, "train.batching=padded")
    train(1, tmp_path / "one", *words, "train.batching=packed")
    train(2, tmp_path / "two", *words, "train.batching=packed", "engine=fsdp2")
    want = losses(tmp_path / "padded")
    assert len(want) == 20
    for run in ("one", "two"):
        assert losses(tmp_path / run) == pytest.approx(want, rel=1e-5)
