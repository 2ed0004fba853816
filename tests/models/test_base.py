"""What a base's config.json says beside its sizes: attention, dropout, RoPE, padding, logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import Job, call, losses
from transformers import AutoModelForCausalLM

from scalepeft.build import build
from scalepeft.config.files import load
from scalepeft.core.errors import UserError
from scalepeft.models import hub, structure, tiny
from scalepeft.models.hub import Base, ModelConfig
from scalepeft.parallel.ranks import Ranks

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 768,
    "tie_word_embeddings": False,
}  # fmt: skip


def save(folder: Path, family: str, **settings: Any) -> Path:
    """A random base with the built-in tokenizer."""
    config = getattr(transformers, f"{family}Config")(**(SIZES | settings))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    shutil.copytree(tiny.make(0), folder)
    model.save_pretrained(folder)
    return folder


def test_a_base_is_pretrained_on_lines_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [f"The {animal} sees the {thing}." for animal in ("cat", "dog", "owl") for thing in
            ("sun", "moon", "sea", "hill")]  # fmt: skip
    recipe = {"seed": 3, "steps": 40, "batch": 4, "length": 16, "lr": 1e-2}
    spec = {**SIZES, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 300}

    def made(cache: str, lines: list[str] = text, **changed: Any) -> Path:
        monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path / cache))
        return tiny.pretrain(lines, spec, recipe | changed, "small")

    def loss(folder: Path) -> float:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert model.config.hidden_size == 32 and len(tokenizer) <= 300
        ids = torch.tensor(tokenizer("</s>".join(text))["input_ids"])
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return -logp[torch.arange(len(ids) - 1), ids[1:]].mean().item()

    trained, start = made("a"), made("a", steps=0)
    assert trained.parent == start.parent == tmp_path / "a/models" and trained != start
    assert loss(start) > 5.0 > 2.5 > loss(trained), "ln 300 is 5.7"
    weights = trained / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert made("a") == trained and weights.stat().st_mtime_ns == before, "made once"
    assert made("b").name == trained.name, "a name for what it is made of"
    assert (made("b") / weights.name).read_bytes() == weights.read_bytes()
    for other in (made("a", text[1:]), made("a", seed=4), made("a", lr=2e-2)):
        assert other.name != trained.name


def loaded(folder: Path, *settings: str) -> Any:
    config, _ = load(None, [
        f"model.path={folder}", "data=toy", "run_dir=unused", "train.max_steps=1",
        "engine.name=single", "adapter.name=lora", "train.precision=fp32", *settings,
    ])  # fmt: skip
    return build(config, Base(config.model, folder), Ranks(), lambda: None, adapted=False).model


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def run_all(folder: Path, ranks: int, runs: dict[str, list[str]]) -> str:
    plan = folder / f"runs-{ranks}.json"
    plan.write_text(json.dumps([[str(folder / name), list(s)] for name, s in runs.items()]))
    program = str(Path(__file__).parents[1] / "parallel" / "many_runs.py")
    codes, text = Job(ranks, [str(plan)], program=(program,)).wait(120)
    assert codes == [0] * ranks, text
    return text


@pytest.mark.slow
def test_every_layout_trains_the_same_head_of_a_model_that_scales_its_logits(
    tmp_path: Path,
) -> None:
    """With dropout of the base's own, which is off, and the adapter's, which is on."""
    noise = {"attention_dropout": 0.2}
    base = save(tmp_path / "base", "Granite", logits_scaling=8.0, residual_multiplier=0.22, **noise)
    settings = [
        f"model.path={base}", "data=toy", "data.train_size=40", "train.precision=fp32",
        "train.max_steps=3", "train.global_batch=8", "train.lr=1e-2", "train.loss_chunk=32",
        "adapter.name=lora", "adapter.rank=2", "adapter.dropout=0",
        "adapter.target_modules=lm_head,q_proj,down_proj",
    ]  # fmt: skip
    said = run_all(
        tmp_path, 1,
        {
            "one": [*settings, "engine.name=single", "train.micro_batch=8"],
            "two": [*settings, "engine.name=single", "train.micro_batch=2"],
        },
    )  # fmt: skip
    sharded = [
        "engine.name=fsdp2",
        "engine.name=fsdp2 engine.activation_checkpointing=true",
        "engine.name=zero engine.stage=3 engine.whole_below=0",
    ]
    runs = {f"{i}": [*settings, *s.split(), "train.micro_batch=2"] for i, s in enumerate(sharded)}
    run_all(tmp_path, 2, runs)
    assert "computes as in inference, without attention_dropout=0.2" in said
    want = losses(tmp_path / "one")
    assert want[2] < want[0]
    for name in ("two", *runs):
        assert losses(tmp_path / name) == pytest.approx(want, rel=1e-5), name


@pytest.mark.parametrize(
    ("family", "settings", "chosen"),
    [
        ("Llama", {}, "sdpa"),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 2.0}, "eager"),
    ],
)
def test_attention_is_what_the_class_supports(
    tmp_path: Path, family: str, settings: dict[str, Any], chosen: str
) -> None:
    base = save(tmp_path / "base", family, **settings)
    config = ModelConfig(path=str(base))
    assert structure.build(config, base, "fp32").config._attn_implementation == chosen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_right_changes_no_loss(tmp_path: Path, attention: str) -> None:
    model = loaded(save(tmp_path / "base", "Qwen3", head_dim=16), f"model.attention={attention}")
    assert model.config._attn_implementation.removesuffix("_rows") == attention
    ids = torch.randint(3, 700, (1, 11))
    rows = [ids, torch.nn.functional.pad(ids, (0, 5))]
    labels = [ids, torch.nn.functional.pad(ids, (0, 5), value=-100)]
    alone, padded = (
        model(i, token_labels=y, loss_chunk=4) for i, y in zip(rows, labels, strict=True)
    )
    assert padded.item() == pytest.approx(alone.item(), rel=1e-6)


def test_an_attention_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "Gemma2", head_dim=16)
    for attention, precision, reason in (
        ("sdpa", "fp32", "does not support an attention implementation through"),
        ("flash_attention_2", "bf16", "FlashAttention2"),
        ("flash_attention_2", "fp32", "train.precision=bf16"),
    ):
        done = call(
            "train", "model=tiny", "data=toy", "adapter=lora", f"model.path={base}",
            f"model.attention={attention}", f"train.precision={precision}", "train.max_steps=1",
            f"run_dir={tmp_path}/run",
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
        assert f"model.attention={attention}" in line and reason in line


def test_a_padding_id_beyond_the_vocabulary_is_not_used(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "Llama")
    ids = torch.randint(3, 700, (1, 9))
    want = loaded(base)(ids).logits
    for pad in (768, 32000, -1):
        edit(base, pad_token_id=pad)
        assert torch.equal(loaded(base)(ids).logits, want)
    inner = transformers.Gemma3Config(text_config={"vocab_size": 96, "pad_token_id": 5}).to_dict()
    inner["text_config"]["pad_token_id"] = 96
    (base / "config.json").write_text(json.dumps(inner))
    assert hub.architecture(base).text_config.pad_token_id is None


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 1024),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 1024),
        (YARN, 2048),
        (YARN | {"original_max_position_embeddings": 128}, 512),
        (YARN | {"original_max_position_embeddings": 512}, 2048),
        (LLAMA3, 512),
    ],
)
def test_scaled_rope_has_more_positions(tmp_path: Path, rope: Any, positions: int) -> None:
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    assert Base(ModelConfig(path=str(tmp_path)), tmp_path).positions == positions


def test_a_wrapper_says_of_its_decoder_what_a_decoder_says_of_itself(tmp_path: Path) -> None:
    text = {"vocab_size": 96, "max_position_embeddings": 300, "pad_token_id": 0}
    transformers.Gemma3Config(text_config=text).save_pretrained(tmp_path)
    base = Base(ModelConfig(path=str(tmp_path)), tmp_path)
    assert (base.vocab_size, base.positions) == (96, 300)


def test_unmarked_attention_is_refused_by_the_config() -> None:
    with pytest.raises(UserError, match=r"model\.attention='fast'"):
        load(None, ["model=tiny", "data=toy", "adapter=lora", "run_dir=x", "model.attention=fast"])
