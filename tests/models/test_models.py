"""Loading a base: the same function as transformers' own, from the bytes it needs and no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from scalepeft.config.files import load
from scalepeft.core.errors import UserError
from scalepeft.data import token_file
from scalepeft.data.tasks.commonsense import Commonsense
from scalepeft.models import hub as models
from scalepeft.models import quant, structure
from scalepeft.models import weights as weights_io
from scalepeft.models.hub import ModelConfig
from scalepeft.parallel.ranks import Ranks

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256,
}  # fmt: skip


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


# name -> (architecture, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "hidden_size": 128}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "hidden_size": 128}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
}


families = pytest.mark.parametrize("family", FAMILIES)


def save(folder: Path, family: str, **how: Any) -> Path:
    import transformers

    architecture, differs = FAMILIES[family]
    settings = {"tie_word_embeddings": False, **SIZES, **differs}
    torch.manual_seed(6)
    made = getattr(transformers, f"{architecture}ForCausalLM")(
        getattr(transformers, f"{architecture}Config")(**settings)
    )
    with torch.no_grad():
        for name, p in made.named_parameters():  # biases start as 0, norms as 1: nothing to test
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
            elif "embed" not in name:
                p.mul_(4)
    made.save_pretrained(folder, **how)
    return folder


def build(
    folder: Path,
    precision: str = "fp32",
    weights: weights_io.Weights | None = None,
    **settings: Any,
) -> nn.Module:
    return structure.build(ModelConfig(path=str(folder), **settings), folder, precision, weights)


def loaded(folder: Path, precision: str = "fp32", **settings: Any) -> Any:
    weights = weights_io.Weights(folder)
    model = build(folder, precision, weights, **settings)
    structure.materialize(model, torch.device("cpu"))
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.fill_(float("nan"))  # what is not loaded must show
    for _ in weights_io.load_weights(model, weights):
        pass
    return model.eval()


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(96, (3, 21), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids).logits


def needed_bytes(folder: Path) -> int:
    """Bytes of the tensors that transformers' own state dict has, a tied one once."""
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in theirs(folder).state_dict().values()}
    return sum(held.values())


def error(work: Any) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", "llama")


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """The shards of a llama of several files with an index."""
    folder = save(tmp_path / "sharded", "llama", max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return sorted(folder.glob("*.safetensors"))


@families
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "60KB"}], ids=["one-file", "shards"])
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, how: Any) -> None:
    folder = save(tmp_path, family, **how)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(how)
    got, want = logits(loaded(folder)), logits(theirs(folder))
    assert want.std() > 0.1
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama3-rope", "qwen2-tied", "qwen3"])
def test_logits_in_bf16_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path, family)
    got = logits(loaded(folder, "bf16"))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, logits(theirs(folder, torch.bfloat16)))


@families
@pytest.mark.parametrize(
    "settings",
    [{"quant": "nf4"}, {"quant": "nf4", "double_quant": True}, {"quant": "int8"}],
    ids=["nf4", "nf4-dq", "int8"],
)
def test_a_quantized_base_is_the_base_with_rounded_block_weights(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    folder = save(tmp_path, family)
    mine, reference = loaded(folder, **settings), theirs(folder)
    exact = logits(reference)
    fmt = quant.get_format(settings["quant"], settings.get("double_quant", False))
    count = 0
    for name, layer in reference.model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            stored = fmt.encode(layer.weight.detach())
            rounded = fmt.decode(*stored, layer.in_features, torch.float32)
            layer.weight.data.copy_(rounded)
            count += 1
            assert isinstance(mine.model.layers.get_submodule(name), quant.QuantLinear)
    assert count == 14
    assert not isinstance(mine.lm_head, quant.QuantLinear)
    got, want = logits(mine), logits(reference)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert (got - exact).abs().max() > 1e-4 * want.abs().max(), "nothing was rounded"


def test_pieces_do_not_change_the_bytes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loaded(llama, quant="nf4").state_dict()
    monkeypatch.setattr(weights_io, "PIECE_BYTES", 5 * 64 * 4)
    pieces = loaded(llama, quant="nf4").state_dict()
    assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_fp16_and_bf16_files_load_into_fp32(llama: Path) -> None:
    file = llama / "model.safetensors"
    tensors = load_file(file)
    for dtype in (torch.float16, torch.bfloat16):
        save_file({k: v.to(dtype) for k, v in tensors.items()}, file, {"format": "pt"})
        assert torch.equal(logits(loaded(llama)), logits(theirs(llama)))


@families
def test_bytes_read_are_the_bytes_needed_and_a_tie_stays_a_tie(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path, family)
    extra = load_file(folder / "model.safetensors") | {"of.another.model": torch.zeros(999)}
    save_file(extra, folder / "model.safetensors", {"format": "pt"})
    weights = weights_io.Weights(folder)
    model = build(folder, weights=weights, unexpected="ignore")
    structure.materialize(model, torch.device("cpu"))
    turns = len(list(weights_io.load_weights(model, weights)))
    assert weights.bytes_read == needed_bytes(folder)
    owners = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert turns == len(owners), "a turn for each module with parameters, tied or not"
    tied = FAMILIES[family][1].get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert weights_io.resident_bytes(model) == needed_bytes(folder)


def test_an_adapter_is_not_looked_for_in_the_files(llama: Path) -> None:
    from scalepeft.adapters.inject import inject

    weights = weights_io.Weights(llama)
    model = inject(build(llama, weights=weights), {"name": "lora", "rank": 2, "dropout": 0.0})
    structure.materialize(model, torch.device("cpu"))
    list(weights_io.load_weights(model, weights))
    assert weights.bytes_read == needed_bytes(llama)


def test_a_layer_that_cannot_be_quantized_stays_plain_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FAMILIES, "odd", ("Llama", {"intermediate_size": 172}))
    folder = save(tmp_path / "a", "odd")
    block = loaded(folder, quant="nf4").model.layers[0]
    assert type(block.mlp.down_proj) is nn.Linear
    assert isinstance(block.mlp.up_proj, quant.QuantLinear)
    printed = "".join(capsys.readouterr())
    assert printed.count("down_proj stays unquantized") == 1
    assert "172" in printed
    none = {"hidden_size": 48, "intermediate_size": 172, "num_attention_heads": 4}
    monkeypatch.setitem(FAMILIES, "odd", ("Llama", none))
    folder = save(tmp_path / "b", "odd")
    message = error(lambda: build(folder, quant="nf4"))
    assert all(part in message for part in ("model.quant=nf4", str(folder), "48"))


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    message = error(lambda: weights_io.Weights(shards[0].parent))
    assert f"{shards[1]}: shard cannot be read: No such file" in message


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_truncated_shard_is_named(shards: list[Path], left: int) -> None:
    shards[1].write_bytes(shards[1].read_bytes()[:left])
    message = error(lambda: weights_io.Weights(shards[0].parent))
    assert f"{shards[1]}: truncated" in message


def test_a_shard_with_something_behind_it_is_refused(llama: Path) -> None:
    with (llama / "model.safetensors").open("ab") as f:
        f.write(b"\0")
    assert "model.safetensors: truncated or damaged" in error(lambda: weights_io.Weights(llama))


@pytest.mark.parametrize(
    "header",
    [b"garbage!", b"\xff\xfe\xfd\xfc", b"[1, 2]", b'{"x": 3}', b'{"x": {"dtype": "F32"}}', b"null"],
)
def test_a_garbage_header_is_named(llama: Path, header: bytes) -> None:
    (llama / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    message = error(lambda: weights_io.Weights(llama))
    assert "model.safetensors: not a safetensors file" in message


def test_a_git_lfs_pointer_is_no_shard(llama: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000\n"
    (llama / "model.safetensors").write_text(pointer)
    assert "model.safetensors: truncated" in error(lambda: weights_io.Weights(llama))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": 3}'])
def test_a_broken_index_is_named(shards: list[Path], text: str) -> None:
    index = shards[0].parent / "model.safetensors.index.json"
    index.write_text(text)
    assert f"{index}: broken index" in error(lambda: weights_io.Weights(index.parent))


def test_a_missing_tensor_is_named(shards: list[Path]) -> None:
    with safe_open(shards[1], "pt") as f:
        name = sorted(f.keys())[0]
    tensors = load_file(shards[1])
    del tensors[name]
    save_file(tensors, shards[1], {"format": "pt"})
    message = error(lambda: loaded(shards[0].parent))
    assert f"lists '{name}' in {shards[1].name}" in message
    assert str(shards[0].parent) in message


@pytest.mark.parametrize("quantized", ["none", "nf4"])
def test_a_shape_that_config_json_does_not_say_is_named(llama: Path, quantized: str) -> None:
    file = llama / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(32, 128)
    save_file(tensors, file, {"format": "pt"})
    message = error(lambda: loaded(llama, quant=quantized))
    parts = [str(file), "'model.layers.1.self_attn.q_proj.weight'", "[32, 128]", "[64, 64]"]
    assert [p for p in parts if p not in message] == [], message


def test_a_shard_that_shrinks_while_it_is_read_is_named(llama: Path) -> None:
    weights = weights_io.Weights(llama)
    file = llama / "model.safetensors"
    model = build(llama, weights=weights)
    file.write_bytes(file.read_bytes()[:5000])
    structure.materialize(model, torch.device("cpu"))
    assert f"{file}: ended while" in error(lambda: list(weights_io.load_weights(model, weights)))


def test_a_folder_without_safetensors_is_named(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    message = error(lambda: weights_io.Weights(llama))
    assert f"model.path={llama}: no model.safetensors" in message


def test_a_missing_config_json_is_named(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert f"model.path={llama}: no config.json" in error(lambda: build(llama))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not a valid JSON"),
        ('{"model_type": "nonesuch"}', "nonesuch"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}', "100"),
        ('{"model_type": "t5"}', "t5 has an encoder"),
    ],
)
def test_a_config_json_that_makes_no_model_is_named(llama: Path, text: str, what: str) -> None:
    (llama / "config.json").write_text(text)
    message = error(lambda: build(llama))
    assert str(llama) in message
    assert what in message


def test_an_architecture_without_a_list_of_blocks_is_refused_by_name(llama: Path) -> None:
    model: Any = build(llama)
    model.config.num_hidden_layers = 99
    message = error(lambda: structure.blocks_of(model))
    assert all(part in message for part in ("LlamaForCausalLM", "no list of blocks"))


def test_the_fingerprint_is_stable_and_sees_every_shard(shards: list[Path]) -> None:
    def fingerprint() -> str:
        return weights_io.Weights(shards[0].parent).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    seen = {first}
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(fingerprint())
        shard.write_bytes(content)
    assert len(seen) == 1 + len(shards)
    assert fingerprint() == first


def test_a_folder_that_is_not_there_is_named_without_asking_the_hub(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tmp_path / "gone"))
    message = error(lambda: models.open_base(config, Ranks()))
    assert f"model.path={tmp_path}/gone: no such folder" in message
    assert models.open_base(ModelConfig(path=str(tmp_path)), Ranks()).folder == tmp_path


def tokenizer_error(folder: Path, **settings: Any) -> str:
    return error(lambda: models.load_tokenizer(ModelConfig(path=str(folder), **settings), folder))


def test_a_folder_without_a_tokenizer_is_named(llama: Path) -> None:
    message = tokenizer_error(llama)
    assert f"model.path={llama}: no tokenizer.json there; set model.tokenizer" in message
    (llama / "other").mkdir()
    message = tokenizer_error(llama, tokenizer=str(llama / "other"))
    assert f"model.tokenizer={llama}/other: no tokenizer.json" in message


def test_a_bare_sentencepiece_file_is_refused_with_the_way_out(llama: Path) -> None:
    (llama / "tokenizer.model").write_bytes(b"\0")
    message = tokenizer_error(llama)
    assert "has tokenizer.model but no tokenizer.json" in message
    assert "convert_slow_tokenizer" in message


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", "", '{"version": "1.0", "model": {"type": "?"}}']
)
def test_a_damaged_tokenizer_is_named(llama: Path, text: str) -> None:
    (llama / "tokenizer.json").write_text(text)
    assert f"model.path={llama}: no tokenizer can be loaded" in tokenizer_error(llama)


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models/stories260K/hf"


def test_a_tokenizer_without_end_of_text_is_refused(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(stories / name, folder / name)
    settings = json.loads((stories / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no end-of-text token; set eos_token" in tokenizer_error(folder)


def test_the_tokenizer_of_another_model_is_found_out(
    stories: Path, llama: Path, tmp_path: Path
) -> None:
    row = {"instruction": "Once upon a time?", "output": "answer1", "answer": "answer1"}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 2))
    settings = [
        "run_dir=x", "train.max_steps=1", "data.name=commonsense", f"model.path={llama}",
        f"model.tokenizer={stories}", f"data.train={tmp_path}/rows.json", f"data.cache={tmp_path}",
    ]  # fmt: skip
    config, _ = load(None, settings)
    base = models.open_base(config.model, Ranks())
    assert base.vocab_size == SIZES["vocab_size"]
    task = Commonsense(config.data)
    message = error(lambda: token_file.files(task, base.tokenizer, base.vocab_size, []))
    assert all(part in message for part in ("model.tokenizer", "the model has 96 ids (0..95)"))


def test_a_real_model_writes_the_text_that_transformers_writes(stories: Path) -> None:
    mine = loaded(stories)
    tokenizer = models.load_tokenizer(ModelConfig(path=str(stories)), stories)
    ids = tokenizer("Once upon a time, Lily", return_tensors="pt")["input_ids"]
    got, want = (
        m.generate(ids, max_new_tokens=40, do_sample=False) for m in (mine, theirs(stories))
    )
    assert got.tolist() == want.tolist()
    text = tokenizer.decode(got[0])
    assert "little girl named Lily went to the park" in text
