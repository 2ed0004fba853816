"""Tiny checkpoints of transformers' decoder families, made from its own config classes.

    python tests/support/families.py OUT [NAME ...]    makes them, prints the right losses
    python tests/support/families.py --docs > docs/models.md

``FAMILIES`` is the conformance table: name -> what differs from ``SIZES``. Only sizes that a config
class knows are given to it, so an entry says what is special about its family and no more.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from scalepeft.eval.slots import Row

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT: dict[str, Any] = {  # DeepSeek's attention
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "head_dim": None, "num_key_value_heads": 4,
}  # fmt: skip
ROUTED: dict[str, Any] = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 128,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """An entry of the table.

    Attributes:
        kind: ``model_type`` of transformers.
        differs: settings beside ``SIZES``; of a wrapper those of its text model.
        outer: settings of a multimodal wrapper around the text model; None for a plain decoder.
        refused: part of the one line that says why it is not supported; empty if it is.
        no_nf4: the same for ``model.quant`` alone.
        no_export: the same for ``export`` alone.
    """

    kind: str
    differs: dict[str, Any] = field(default_factory=dict)
    outer: dict[str, Any] | None = None
    refused: str = ""
    no_nf4: str = ""
    no_export: str = ""


def _family(kind: str, **differs: Any) -> Family:
    return Family(kind, differs)


def _shared(kind: str, **differs: Any) -> Family:
    return Family(kind, differs, no_export="HF PEFT takes its shared experts for the experts")


FAMILIES: dict[str, Family] = {
    "llama": _family("llama"),
    "llama-tied": _family("llama", tie_word_embeddings=True),
    "llama-3.1-rope": _family("llama", rope_parameters=LLAMA3_ROPE),
    "llama-yarn": _family("llama", rope_parameters=YARN),
    "llama-dynamic-ntk": _family(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama4-text": _family("llama4_text", intermediate_size_mlp=128, moe_layers=[1]),
    "mistral": _family("mistral", sliding_window=None),
    "mistral-swa": _family("mistral", sliding_window=16),
    "ministral": _family("ministral", sliding_window=16),
    "ministral3": _family("ministral3"),
    "mixtral": _family("mixtral"),
    "qwen2": _family("qwen2"),
    "qwen2.5-tied-yarn": _family("qwen2", tie_word_embeddings=True, rope_parameters=YARN),
    "qwen2-moe": _family("qwen2_moe"),
    "qwen3": _family("qwen3"),
    "qwen3-moe": _family("qwen3_moe"),
    "qwen3-next": _shared("qwen3_next", **LINEAR_ATTENTION),
    "qwen3.5": _family("qwen3_5_text", **LINEAR_ATTENTION),
    "qwen3.5-moe": _family("qwen3_5_moe_text", **LINEAR_ATTENTION),
    "gemma": _family("gemma"),
    "gemma2": _family("gemma2", query_pre_attn_scalar=16, sliding_window=16),
    "gemma3": _family("gemma3_text", query_pre_attn_scalar=16, sliding_window=16),
    "gemma3n": _family(
        "gemma3n_text", intermediate_size=[128, 128], activation_sparsity_pattern=[0.5, 0.0],
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=64, vocab_size_per_layer_input=320, laurel_rank=64,
        sliding_window=16,
    ),
    "gemma4": _family(
        "gemma4_text", hidden_size_per_layer_input=64, vocab_size_per_layer_input=320,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
        sliding_window=16, global_head_dim=16,
    ),
    "vaultgemma": _family("vaultgemma", query_pre_attn_scalar=16, sliding_window=16),
    "phi": _family("phi"),
    "phi3": _family("phi3"),
    "phi4-mini-longrope": _family("phi3", rope_parameters=LONGROPE, partial_rotary_factor=0.5),
    "phimoe": _family("phimoe"),
    "granite": _family(
        "granite", logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.22,
        attention_multiplier=0.0625,
    ),
    "granitemoe": _family("granitemoe", logits_scaling=8.0),
    "granitemoe-shared": _family("granitemoeshared", shared_intermediate_size=64),
    "granite4-hybrid": _family(
        "granitemoehybrid", layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, shared_intermediate_size=64,
        position_embedding_type="rope",
    ),
    "cohere": _family("cohere", logit_scale=0.0625),
    "cohere2": _family("cohere2", sliding_window=16),
    "olmo": _family("olmo"),
    "olmo2": _family("olmo2"),
    "olmo3": _family("olmo3", sliding_window=16),
    "olmoe": _family("olmoe"),
    "flex-olmo": _family("flex_olmo"),
    "deepseek-v2": _shared("deepseek_v2", **LATENT, **ROUTED),
    "deepseek-v3": _shared("deepseek_v3", **LATENT, **ROUTED),
    "dots1": _shared("dots1", n_shared_experts=1, **ROUTED),
    "gpt-oss": _family("gpt_oss", sliding_window=16),
    "glm": _family("glm"),
    "glm4": _family("glm4"),
    "glm4-moe": _shared("glm4_moe", **ROUTED),
    "ernie4.5": _family("ernie4_5"),
    "ernie4.5-moe": _shared("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    "hunyuan-dense": _family("hunyuan_v1_dense"),
    "hunyuan-moe": _shared("hunyuan_v1_moe", moe_topk=2),
    "minimax": _family("minimax", layer_types=["linear_attention", "full_attention"]),
    "minicpm3": _family("minicpm3", **{**LATENT, "head_dim": 32}, dim_model_base=16),
    "jetmoe": _family("jetmoe", kv_channels=16),
    "smollm3": _family("smollm3"),
    "apertus": _family("apertus"),
    "arcee": _family("arcee"),
    "exaone4": _family("exaone4", sliding_window=16),
    "helium": _family("helium"),
    "internlm3": _family("internlm3"),
    "seed-oss": _family("seed_oss"),
    "stablelm": _family("stablelm"),
    "starcoder2": _family("starcoder2"),
    "nemotron": _family("nemotron"),
    "lfm2": _family("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "lfm2-moe": _family(
        "lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "nemotron-h": _family(
        "nemotron_h", layers_block_type=["mamba", "attention", "moe", "mlp"], mamba_num_heads=8,
        mamba_head_dim=16, ssm_state_size=16, n_groups=1, num_hidden_layers=4, chunk_size=16,
        moe_shared_expert_intermediate_size=64, n_group=1, topk_group=1, moe_latent_size=None,
    ),
    "falcon-h1": _family(
        "falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
        mamba_chunk_size=16,
    ),
    "falcon": Family(
        "falcon", {"multi_query": True, "new_decoder_architecture": False},
        no_nf4="FalconForCausalLM computes with its weights",
    ),
    "gpt-neox": _family("gpt_neox"),
    "gptj": _family("gptj", rotary_dim=8),
    "gpt2": Family("gpt2", refused="matches no linear layer of this model"),
    "opt": _family("opt", ffn_dim=128, word_embed_proj_dim=64),
    "bloom": _family("bloom"),
    "mamba2": _family(
        "mamba2", num_heads=8, head_dim=16, state_size=16, n_groups=1, expand=2, chunk_size=16
    ),
    "gemma3-multimodal": Family(
        "gemma3", {"query_pre_attn_scalar": 16, "sliding_window": 16},
        {"vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
         "image_token_index": 319, "boi_token_index": 317, "eoi_token_index": 318},
    ),
    "llama4-multimodal": Family(
        "llama4", {"intermediate_size_mlp": 128, "moe_layers": [1]},
        {"vision_config": {**VISION, "vision_output_dim": 32, "projector_input_dim": 32,
                           "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
         "image_token_index": 319, "boi_token_index": 317, "eoi_token_index": 318},
    ),
    "mistral3-multimodal": Family(
        "mistral3", {"model_type": "mistral", "sliding_window": None},
        {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
         "image_token_index": 319},
    ),
    "qwen2.5-vl": Family(
        "qwen2_5_vl", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                           "rope_theta": 1e4}},
        {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 64, "fullatt_block_indexes": [0]},
         "image_token_id": 319, "video_token_id": 318, "vision_start_token_id": 316,
         "vision_end_token_id": 317},
    ),
    "qwen3-vl": Family(
        "qwen3_vl", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                         "rope_theta": 1e4}},
        {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 64, "deepstack_visual_indexes": [0],
                           "num_position_embeddings": 16},
         "image_token_id": 319, "video_token_id": 318, "vision_start_token_id": 316,
         "vision_end_token_id": 317},
    ),
}  # fmt: skip


PADDED = {
    "qwen3-next", "qwen3.5", "qwen3.5-moe", "granite4-hybrid", "gpt-oss", "minimax", "lfm2",
    "lfm2-moe", "nemotron-h", "falcon-h1", "falcon", "opt", "bloom", "mamba2", "qwen2.5-vl",
    "llama4-text", "llama4-multimodal",
}  # fmt: skip
"""Families whose rows are padded: packed they would see each other."""

MASKED = {"llama-dynamic-ntk", "gemma2", "vaultgemma", "jetmoe", "gptj"}
"""Families that are packed, and read whole lines under a mask: without sdpa, or not tried without
data (a table of RoPE or experts that depend on it)."""


def known_sizes(cls: Any, differs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``SIZES`` that the config class has, and all of ``differs``."""
    knows = {*cls.__dataclass_fields__, *cls.attribute_map}
    return {k: v for k, v in SIZES.items() if k in knows} | differs


def config_of(name: str) -> Any:
    """The transformers config of a family."""
    from transformers import CONFIG_MAPPING

    family = FAMILIES[name]
    cls = CONFIG_MAPPING[family.kind]
    if family.outer is None:
        return cls(**known_sizes(cls, family.differs))
    text = cls.sub_configs["text_config"]
    if "model_type" in family.differs:
        text = CONFIG_MAPPING[family.differs["model_type"]]
    ends = {k: SIZES[k] for k in ("tie_word_embeddings", "bos_token_id", "eos_token_id")}
    return cls(text_config=known_sizes(text, family.differs), **ends, **family.outer)


@cache
def tokenizer() -> Any:
    """A byte-level BPE of at most 320 ids, ``<s>`` 0 and ``</s>`` 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the correct answer is true", "the correct answer is false"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def stock_class(config: Any) -> Any:
    """The Auto class that has the model of a checkpoint as its authors publish it."""
    import transformers

    wrapper = hasattr(config, "text_config")
    return (
        transformers.AutoModelForImageTextToText if wrapper else transformers.AutoModelForCausalLM
    )


def make(name: str, folder: Path) -> Path:
    """Writes the family's checkpoint, with weights that make its logits differ from each other.

    Returns:
        ``folder``, as ``save_pretrained`` fills it, with a tokenizer.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = config_of(name)
    torch.manual_seed(0)
    model = stock_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        kept = model.state_dict()
        tensors = [*model.named_parameters(), *(b for b in model.named_buffers() if b[0] in kept)]
        for key, p in tensors:  # a tied one once
            if not p.is_floating_point() or key.endswith("A_log") or "conv" in key:
                continue  # a recurrence keeps its own start, which is what keeps it stable
            if p.dim() > 1 and p.any():
                p.mul_(4.0)
            else:  # biases start as 0 and norms as 1: nothing to test
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    """What transformers makes of a folder, in fp32."""
    from transformers import AutoConfig

    cls = stock_class(AutoConfig.from_pretrained(folder))
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def right(folder: Path) -> tuple[float, float]:
    """Mean token loss and spread of the logits that stock transformers computes on fixed ids."""
    logits = stock(folder)(input_ids=IDS).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return round(loss.item(), 4), round(logits.std().item(), 3)


IDS = torch.randint(5, 310, (2, 24), generator=torch.Generator().manual_seed(1))


def page() -> str:
    """docs/models.md."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    rows = []
    for name, family in FAMILIES.items():
        config = config_of(name)
        with torch.device("meta"):
            model = stock_class(config).from_config(config)
        layers = "" if family.refused else default_targets(model)
        says = f"refused: {family.refused}" if family.refused else ""
        says = f"`model.quant` is refused: {family.no_nf4}" if family.no_nf4 else says
        says = f"`export` is refused: {family.no_export}" if family.no_export else says
        says = "; ".join(filter(None, [says, "rows are padded" if name in PADDED else ""]))
        rows.append(f"| {name} | `{type(model).__name__}` | {layers} | {says} |")
    supported = sum(not family.refused for family in FAMILIES.values())
    return INTRODUCTION.format(supported=supported, all=len(FAMILIES)) + "\n".join(rows) + "\n"


def default_targets(model: Any) -> str:
    """What ``adapter.target_modules`` is where nothing is set."""
    from scalepeft.adapters.inject import adapted_layers, inject
    from scalepeft.adapters.targets import short
    from scalepeft.models.structure import _drop_towers

    _drop_towers(model)
    return short([name for name, _ in adapted_layers(inject(model, {"name": "lora"}))])


INTRODUCTION = """\
# Models

A base is any decoder of transformers whose blocks hold `nn.Linear` layers. Of the {all} families
below {supported} are supported and tested, with tiny random checkpoints made from transformers' own
config classes (`tests/models/test_families.py`): logits and loss equal stock transformers' to 1e-5
in fp32, plain and with NF4 blocks; greedy tokens equal `generate`'s; gradients of a LoRA equal
PEFT's; a merged checkpoint loads in stock transformers with the adapted model's logits; two FSDP2
ranks train as one process does. One command compares another family, or your own checkpoint:

```bash
scalepeft doctor model.path=MODEL train.precision=fp32 --against-transformers
```

`default targets` are the layers that `adapter.target_modules` means where it is not set:
projections to queries, keys and values, into the feed-forward layer and out of it. `all-linear`,
`attention` and `mlp` are presets; routers, experts and the head are in none of them. Experts are
adapted where they are named (`*.experts.*`). Of a multimodal model the text decoder is trained; the
rest is left as it is, and kept in a merge.

Which tensors are the model is transformers' own rule: `model.safetensors`, else the files of
`model.safetensors.index.json`; its renames and fused experts; its ties, which hold only where the
files do not say otherwise. What the files lack, or hold and the model does not use, stops the start
(`model.unexpected=ignore` leaves the latter out, as transformers does). [Bases that are quantized
already](checkpoints.md#the-base-already-quantized) are read too, and [the bytes of every
shard](checkpoints.md#the-base-the-same-bytes) are held to be the same. A base with an encoder, or
with code of its own, is refused.

| family | class | default targets | |
|---|---|---|---|
"""


if __name__ == "__main__":
    import time

    if sys.argv[1:] == ["--docs"]:
        print(page(), end="")
        sys.exit()
    out = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp())
    for each in sys.argv[2:] or FAMILIES:
        began = time.perf_counter()
        try:
            text = json.dumps(right(make(each, out / each)))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{each:22} {time.perf_counter() - began:5.2f} s  {text}", flush=True)


def answers(some: Any, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
    """The tokens that a ``Generator`` answers each prompt with, in slots where it can."""
    if some.whole:
        found: list[list[int]] = some.generate(prompts, limits)
        return found
    rows = [Row(i, *row) for i, row in enumerate(zip(prompts, limits, strict=True))]
    for _ in some.slots().run(iter(rows)):
        pass
    return [row.new for row in rows]
