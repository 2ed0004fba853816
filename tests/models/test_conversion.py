"""Which tensors of a folder are the model: as stock transformers reads it, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalepeft.adapters.inject import inject
from scalepeft.core.errors import UserError
from scalepeft.models import structure
from scalepeft.models.hub import ModelConfig
from scalepeft.models.weights import Weights, load_weights

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
IDS = torch.tensor([[5 + (7919 * i) % 310 for i in range(40)]])


def save(folder: Path, name: str, **settings: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return folder


def ours(folder: Path, precision: str = "fp32", **settings: Any) -> Any:
    weights = Weights(folder)
    config = ModelConfig(path=str(folder), **settings)
    model: Any = structure.build(config, folder, precision, weights)
    structure.materialize(model, torch.device("cpu"))
    for _ in load_weights(model, weights):
        pass
    model.bytes_read = weights.bytes_read
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        ours(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", "Llama")


def test_a_tied_flag_with_another_head_in_the_files(llama: Path) -> None:
    set_config(llama, tie_word_embeddings=True)
    model = ours(llama)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(stock(llama)))


@pytest.mark.parametrize("held", ["embedding", "head", "both"])
def test_a_tie_takes_the_tensor_that_is_there(held: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "tied", "Llama", tie_word_embeddings=True)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if held == "head":
            del tensors["model.embed_tokens.weight"]
        if held == "embedding":
            del tensors["lm_head.weight"]

    edit(folder, change)
    model = ours(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(stock(folder)))


def test_a_stray_file_is_not_the_model(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {k: v * 0.5 for k, v in load_file(llama / "model.safetensors").items()}
    save_file(other, llama / "model_old.safetensors", {"format": "pt"})
    assert torch.equal(logits(ours(llama)), logits(stock(llama)))
    assert "model_old.safetensors not read" in "".join(capsys.readouterr())


def test_a_stale_index_beside_one_file_is_not_read(llama: Path) -> None:
    other = {k: v * 0.5 for k, v in load_file(llama / "model.safetensors").items()}
    save_file(other, llama / "a.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(other, "a.safetensors")}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(ours(llama)), logits(stock(llama)))


def test_a_tensor_that_the_model_does_not_have(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(llama, lambda tensors: tensors.update({name: torch.ones(64)}))
    message = refused(llama)
    assert all(part in message for part in (name, "LlamaForCausalLM", "model.unexpected=ignore"))
    assert torch.equal(logits(ours(llama, unexpected="ignore")), logits(stock(llama)))
    assert name in "".join(capsys.readouterr())


def test_what_transformers_expects_to_ignore_is_ignored(llama: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"  # of checkpoints of 2023
    edit(llama, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert torch.equal(logits(ours(llama)), logits(stock(llama)))


def test_a_missing_tensor_is_not_drawn_at_random(llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(llama, lambda tensors: tensors.pop(name))
    assert name in refused(llama, unexpected="ignore")


def test_names_without_the_prefix_of_the_decoder(llama: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit(llama, change)
    assert torch.equal(logits(ours(llama)), logits(stock(llama)))


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/hostname", "sub/a.safetensors"]
)
def test_an_index_that_leaves_the_folder(name: str, llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "a.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"'{name}' is no file name" in refused(llama)


def test_a_tensor_in_two_shards(llama: Path) -> None:
    file = llama / "model.safetensors"
    shutil.copyfile(file, llama / "a.safetensors")
    file.rename(llama / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "a.safetensors too" in refused(llama)


def test_an_empty_shard(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: truncated: 0 bytes" in refused(llama)


MOE = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MOE)
def test_experts_are_fused_as_transformers_does(family: str, tmp_path: Path) -> None:
    kind, settings = MOE[family]
    folder = save(tmp_path / family, kind, **settings)
    model = ours(folder)
    assert (logits(model) - logits(stock(folder))).abs().max() < 1e-5
    size = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert model.bytes_read == size, "each byte once"


def test_what_stays_in_fp32_does(tmp_path: Path) -> None:
    kind, settings = MOE["deepseek_v3"]
    folder = save(tmp_path / "deepseek", kind, **settings)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(folder, lambda tensors: tensors.update({name: torch.tensor([0.1001, 0.2003, 0.0, 1 / 3])}))
    mine, theirs = ours(folder, "bf16"), stock(folder, torch.bfloat16)
    held = mine.get_buffer(name)
    assert held.dtype == torch.float32
    assert torch.equal(held, theirs.get_buffer(name))
    assert torch.equal(logits(mine), logits(theirs))


def test_rows_of_fused_experts_are_read_alone_and_written_back(tmp_path: Path) -> None:
    kind, settings = MOE["mixtral"]
    folder = save(tmp_path / "mixtral", kind, **settings)
    weights = Weights(folder)
    structure.build(ModelConfig(path=str(folder)), folder, "fp32", weights)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    source = weights.layout.sources[name]
    before = weights.bytes_read
    rows = source.rows(1, 3)
    assert weights.bytes_read - before == rows.nbytes
    assert torch.equal(rows, source.whole()[1:3])
    files = load_file(folder / "model.safetensors")
    for key, group in weights.layout.groups.items():
        if group.first_target == name:
            assert torch.equal(group.restore(key, {name: source.whole()}), files[key])


def test_a_layer_read_by_a_fused_kernel_takes_no_adapter_and_no_bytes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}
    settings |= {"mamba_d_state": 16, "mamba_n_groups": 1, "head_dim": 16}
    folder = save(tmp_path / "falcon_h1", "FalconH1", **settings)
    model = ours(folder, quant="nf4")
    mamba = model.model.layers[0].mamba
    assert type(mamba.out_proj) is torch.nn.Linear
    assert type(mamba.in_proj) is not torch.nn.Linear
    with pytest.raises(UserError, match=r"mamba.out_proj has a weight that is read by"):
        inject(model, {"name": "lora", "rank": 2, "dropout": 0.0, "target_modules": ["out_proj"]})


def test_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import BartConfig

    BartConfig(d_model=16, vocab_size=32, encoder_layers=1, decoder_layers=1).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="bart has an encoder; take a decoder-only model"):
        structure.build(ModelConfig(path=str(tmp_path)), tmp_path, "fp32")


def test_an_index_that_lists_what_its_shard_lacks(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "a.safetensors")
    index = {"weight_map": {"nobody.weight": "a.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lists 'nobody.weight' in a.safetensors" in refused(llama)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 1}, "does not use, first 'model.layers.1.input_layernorm.weight'"),
        ({"num_hidden_layers": 3}, "no tensor 'model.layers.2.input_layernorm.weight'"),
        ({"vocab_size": 400}, "config.json says [400, 64]"),
        ({"quantization_config": []}, "config.json"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method=hqq"),
        ({"hidden_act": "zzz"}, "does not know 'zzz'"),
    ],
)
def test_a_config_of_another_model(llama: Path, values: dict[str, Any], words: str) -> None:
    set_config(llama, **values)
    assert words in refused(llama)
