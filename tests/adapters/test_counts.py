"""Published parameter counts on the real dimensions, without a weight."""

from typing import Any

import pytest
import torch
from torch import nn

import scalepeft
from scalepeft.adapters.inject import trainable
from scalepeft.models.shapes import meta_model


def count(model: nn.Module, **settings: Any) -> int:
    scalepeft.inject(model, settings)
    return sum(p.numel() for p in trainable(model).values())


def encoder(kind: str) -> Any:
    """BERT-base or DeBERTa-v3-base (their dimensions by hand) on the meta device."""
    import transformers

    base = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    if kind == "bert":
        config: Any = transformers.BertConfig(vocab_size=30522, **base)
        model: Any = transformers.BertModel
    else:
        config = transformers.DebertaV2Config(
            vocab_size=128100,
            relative_attention=True,
            position_buckets=256,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            max_relative_positions=-1,
            position_biased_input=False,
            type_vocab_size=0,
            **base,
        )
        model = transformers.DebertaV2Model
    with torch.device("meta"):
        return model(config)


def test_hoft_on_llama() -> None:
    model = meta_model("llama-3.1-8b")
    base = sum(p.numel() for p in model.parameters())
    # The default targets are q, k, v, up and down: what the paper's counts hold.
    found = count(model, name="hoft", rank=16)
    assert found == 28_311_552
    assert round(100 * found / (base + found), 3) == 0.351
    targets = ["q_proj", "v_proj"]
    for name in ("hoft", "lora"):
        model = meta_model("llama-2-7b")
        assert count(model, name=name, rank=8, target_modules=targets) == 4_194_304


@pytest.mark.parametrize(("name", "llama", "deberta"), [
    ("goft", 524_160, 82_872),
    ("qgoft", 2_096_640, 331_488),
])  # fmt: skip
def test_goft(name: str, llama: int, deberta: int) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert count(meta_model("llama-2-7b"), name=name, target_modules=targets) == llama
    # All linear layers of DeBERTa's encoder: three projections and three called dense.
    targets = ["query_proj", "key_proj", "value_proj", "dense"]
    model = encoder("deberta")
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert count(model, name=name, target_modules=targets) == deberta
    assert {n.removesuffix(".adapter.p") for n in trainable(model)} == linear
    assert len(linear) == 72


@pytest.mark.parametrize("structure", ["circulant", "toeplitz", "kronecker", "auto"])
def test_surm_on_bert(structure: str) -> None:
    model = encoder("bert")
    targets = ["query", "key", "value"]
    assert count(model, name="surm", structure=structure, target_modules=targets) == 55_296
    if structure == "kronecker":
        shapes = {k.rsplit(".", 1)[1]: tuple(p.shape) for k, p in trainable(model).items()}
        assert shapes == {"A": (32, 24), "B": (24, 32)}


def test_hadamard() -> None:
    assert count(meta_model("llama-2-7b"), name="hadamard", train_norm=False) == 262_144
    assert count(meta_model("llama-2-7b"), name="hadamard") == 393_216
    settings = {
        "name": "hadamard",
        "target_modules": ["*.attention.output.dense"],
        "norm": "*.attention.output.LayerNorm",
    }
    model = encoder("bert")
    base = sum(p.numel() for p in model.parameters())
    found = count(model, **settings)
    assert found == 12 * (2 * 768 + 2 * 768) == 36_864
    # The paper says 0.033 and 0.022 % (8 of 12 layers).
    assert 100 * found / base == pytest.approx(0.0335, abs=5e-4)
    found = count(encoder("bert"), layers=list(range(4, 12)), **settings)
    assert 100 * found / base == pytest.approx(0.0222, abs=5e-4)
