"""``target_modules``: presets, the default in every family, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, config_of, make, stock_class
from processes import TINY, call
from torch import nn

from scalepeft.adapters import inject as injection
from scalepeft.adapters import targets
from scalepeft.adapters.methods.lora import LoRAConfig
from scalepeft.core.errors import UserError

DEFAULT = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}


def meta(name: str) -> Any:
    """A family's decoder as structure.build leaves it: without towers."""
    config = config_of(name)
    with torch.device("meta"):
        model = stock_class(config).from_config(config)
    for tower in ("visual", "vision_tower", "vision_model", "multi_modal_projector"):
        for parent in list(model.modules()):
            if tower in parent._modules:
                setattr(parent, tower, nn.Identity())
    return model


def adapted(model: nn.Module, *patterns: str) -> list[str]:
    settings = {"target_modules": list(patterns)} if patterns else {}
    injection.inject(model, {"name": "lora", "rank": 1, **settings})
    return [name for name, _ in injection.adapted_layers(model)]


def last(names: list[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


DEFAULTS = {  # by what they do: queries, keys, values, into and out of the feed-forward layer
    "phi3": {"qkv_proj", "gate_up_proj", "down_proj"},
    "glm4": {"q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "c_fc", "c_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "fc1", "fc2"},
    "gpt-neox": {"query_key_value", "dense_h_to_4h", "dense_4h_to_h"},
    "falcon": {"query_key_value", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "fc1", "fc2"},
    "gptj": {"q_proj", "k_proj", "v_proj", "fc_in", "fc_out"},
    "lfm2": {"q_proj", "k_proj", "v_proj", "in_proj", "w1", "w2", "w3"},
    "deepseek-v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "up_proj",
                    "down_proj"},
    "granitemoe-shared": {"q_proj", "k_proj", "v_proj", "input_linear", "output_linear"},
    "mixtral": {"q_proj", "k_proj", "v_proj"},
    "gpt-oss": {"q_proj", "k_proj", "v_proj"},
    "mamba2": {"in_proj"},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_means_the_same_projections_in_every_family(name: str) -> None:
    assert last(adapted(meta(name))) == DEFAULTS[name]


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma3", "qwen3.5", "glm4-moe"])
def test_the_default_stays_where_a_model_has_its_names(name: str) -> None:
    names = adapted(meta(name))
    assert last(names) == DEFAULT
    assert names == adapted(meta(name), *(f"*.{n}" for n in sorted(DEFAULT)))


@pytest.mark.parametrize("name", ["llama", "gemma3-multimodal", "llama4-text", "hunyuan-moe"])
def test_presets_of_a_llama_like_block(name: str) -> None:
    assert last(adapted(meta(name), "attention")) == ATTENTION
    assert last(adapted(meta(name), "mlp")) == FEED_FORWARD
    assert last(adapted(meta(name), "all-linear")) == ATTENTION | FEED_FORWARD
    assert last(adapted(meta(name), "attention", "down_proj")) == ATTENTION | {"down_proj"}


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"gpt2"}))
def test_no_preset_reaches_a_head_a_router_an_embedding_or_an_expert(name: str) -> None:
    model = meta(name)
    default, attention, names = (
        targets.expand(model, LoRAConfig(**({"target_modules": wanted} if wanted else {})))
        for wanted in ([], ["attention"], ["all-linear"])
    )
    assert set(attention) <= set(names)
    assert set(default) <= {*names, *DEFAULT}
    for layer in names:
        parts = layer.split(".")
        assert any(part.isdigit() for part in parts), layer
        assert not {"gate", "router", "experts", "lm_head"} & set(parts), layer


def wrap(**children: nn.Module) -> Any:
    block = nn.Module()
    for name, module in children.items():
        setattr(block, name, module)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model


def test_experts_that_are_layers_are_in_no_preset_and_no_default() -> None:
    def model() -> Any:
        attention, mlp, experts = nn.Module(), nn.Module(), nn.Module()
        attention.q_proj, attention.k_proj, attention.v_proj = (nn.Linear(8, 8) for _ in range(3))
        experts.up_proj, experts.down_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        mlp.experts, mlp.gate = experts, nn.Linear(8, 4)
        return wrap(self_attn=attention, mlp=mlp)

    assert last(adapted(model())) == {"q_proj", "k_proj", "v_proj"}
    assert last(adapted(model(), "all-linear")) == {"q_proj", "k_proj", "v_proj"}
    assert last(adapted(model(), "*.experts.*")) == {"up_proj", "down_proj"}
    with pytest.raises(UserError, match=r"'mlp' has no layer.*experts are taken by name"):
        adapted(model(), "mlp")
    with pytest.raises(UserError, match=r"layers.0.mlp.gate is a router"):
        adapted(model(), "gate")


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"lm_head shares its weight with model.embed_tokens"):
        adapted(meta("llama-tied"), "q_proj", "lm_head")
    assert "lm_head" in adapted(meta("llama"), "q_proj", "lm_head")


WRONG = {
    "": "nothing stands after the equals sign",
    "[]": "at least 1 item",
    "7": "valid list",
    "[[q_proj]]": "valid string",
    "'(q_proj|v_proj)$('": "matches no linear layer",
    "'*'": "take all-linear",
    "[q_proj,v_proj,q_proj]": "'q_proj' is there twice",
    "embed_tokens": "matches no linear layer",
    "input_layernorm": "matches no linear layer",
    "all_linear": "Did you mean 'all-linear'?",
    "q_prj": "Did you mean 'q_proj'?",
    "lm_head": "shares its weight",
    "gate": "router",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(name, folder / name) for name in ("llama-tied", "llama4-text")}


@pytest.mark.parametrize(("value", "words"), WRONG.items())
def test_a_wrong_value_is_one_line_and_leaves_nothing(
    value: str, words: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama4-text" if value == "gate" else "llama-tied"]
    value = "router" if value == "gate" else value
    done = call(
        "train", *TINY, f"model.path={base}", f"run_dir={tmp_path / 'run'}", "train.max_steps=1",
        "data.cutoff=256",
        f"adapter.target_modules={value}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    error = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(error) == 1 and words in error[0] and "target_modules" in error[0]
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_what_a_preset_became_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    done = call(
        "train", *TINY, f"model.path={bases['llama-tied']}", f"run_dir={tmp_path / 'run'}",
        "train.max_steps=1", "data.cutoff=256", "adapter.target_modules=attention",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "adapter.target_modules are q_proj, k_proj, v_proj, o_proj: 8 layers"
        in done.stderr + done.stdout
    )


def test_short_names_each_layer_once() -> None:
    assert targets.short(["a.0.q", "a.0.k", "a.1.q"]) == "q, k"
