"""``engine.compile=blocks``: the numbers without it, no graph for a block or a length alone.

With --full: a method takes a minute of inductor.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import losses, train
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import scalepeft
from scalepeft.adapters.base import Dropout, dropout_keys
from scalepeft.adapters.factors import Factors
from scalepeft.adapters.inject import train_mode, trainable
from scalepeft.config import files as config_files
from scalepeft.core.errors import UserError
from scalepeft.models import quant
from scalepeft.parallel.base import EngineConfig
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single

METHODS: dict[str, dict[str, Any]] = {
    "hoft": {"rank": 6, "form": "cayley"},
    "lora": {"rank": 4, "dropout": 0.3},
    "surm": {"structure": "circulant", "init_std": 0.2},
    "boft": {"block_size": 4, "factors": 2},
    "dora": {"rank": 4, "dropout": 0.0},
    "goft": {"scale": True},
    "hadamard": {"train_norm": True},
    "hira": {"rank": 3},
    "hra": {"rank": 6, "form": "pairs"},
    "hut": {"rank": 4, "shift": True},
    "ia3": {},
    "oft": {"block_size": 4},
    "oftv2": {"block_size": 4},
    "qgoft": {},
    "shoft": {"rank": 6},
}


@pytest.fixture(autouse=True)
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Not the user's: another torch's libraries may lie there, and profiles of other shapes.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def steps(method: str, settings: dict[str, Any], **engine: Any) -> tuple[list[float], list[int]]:
    """(loss and gradient norm, graphs so far) of four steps of three lengths, none like another."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=96, **shape, **heads))
    blocks = list(model.model.layers)
    if kind := engine.pop("quant", ""):
        for layer in model.model.layers.modules():
            if type(layer) is torch.nn.Linear:
                quant.quantize(layer, quant.get_format(kind, double=True))
    targets = ["q_proj", "o_proj", "down_proj"]
    train_mode(scalepeft.inject(model, {"name": method, "target_modules": targets, **settings}))
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn_like(p) * 0.02)
    single = Single(EngineConfig(name="single", **engine), Ranks())
    single.shard(model, blocks)
    factors, parameters = Factors(model, single), list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    found, made = [], []
    for step in range(4):
        with factors.of_step():
            for lines, length in ((2, 32 + 8 * step), (1, 48 + 8 * step), (3, 80 - 8 * step)):
                ids = torch.arange(lines * length).view(lines, length) * (7 + step) % 96
                for dropout in (m for m in model.modules() if isinstance(m, Dropout)):
                    dropout.keys = dropout_keys(torch.arange(lines) + 9 * step, 0)
                loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
                found.append(float(loss))
        found.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        made.append(graphs())
    return found, made


@pytest.mark.full
@pytest.mark.parametrize("how", [{}, {"quant": "nf4", "activation_checkpointing": True}])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_steps_are_those_without(method: str, how: dict[str, Any]) -> None:
    want, none = steps(method, METHODS[method], **how)
    assert none == [0] * 4
    got, made = steps(method, METHODS[method], compile="blocks", **how)
    assert got == pytest.approx(want, rel=1e-5)
    assert made[-1] == made[1] > 0, "none after warm-up"


def test_each_method_is_there() -> None:
    from scalepeft.core import registry

    assert sorted(METHODS) == registry.available("adapters.methods")


@pytest.mark.full
@pytest.mark.multiprocess
def test_under_engines(tmp_path: Path) -> None:
    common = ["adapter=lora", "adapter.dropout=0.1", "model.quant=nf4", "train.max_steps=4"]
    train(1, tmp_path / "one", *common)
    for ranks, name in ((2, "fsdp2"), (2, "ddp"), (1, "single")):
        engine = [f"engine.name={name}", "engine.compile=blocks"]
        train(ranks, tmp_path / name, *common, *engine, "engine.activation_checkpointing=true")
        pairs = zip(losses(tmp_path / name), losses(tmp_path / "one"), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    engine = Single(EngineConfig(name="single", compile="blocks", device="cpu"), Ranks())
    with pytest.raises(UserError, match=r"C\+\+ compiler .*engine.compile=off$"):
        engine.shard(torch.nn.Linear(2, 2), [])


def test_the_key(tmp_path: Path) -> None:
    keys = ["data=toy", "train.max_steps=1", "engine.name=single", f"run_dir={tmp_path}"]
    assert config_files.load(None, [*keys, "engine.compile=off"])[0].engine.compile == "off"
    for value in ("true", "model"):
        with pytest.raises(UserError, match=r"engine.compile=.*'off' or 'blocks'"):
            config_files.load(None, [*keys, f"engine.compile={value}"])
    with pytest.raises(UserError, match=r"DeepSpeed's hooks.*fsdp2 or ddp"):
        config_files.load(None, [*keys, "engine.name=zero", "engine.compile=blocks"])
