"""Dimensions of well-known models by name: for counts and benchmarks without a download."""

from pathlib import Path
from typing import Any

from scalepeft.core.errors import unknown
from scalepeft.core.launch import importing
from scalepeft.models import hub
from scalepeft.models.experts import replace_experts

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip


def _llama(*sizes: int, **more: Any) -> dict[str, Any]:
    """A LLaMA with these ``SIZES``; ``more`` is laid over it."""
    kind = {"model_type": "llama", "max_position_embeddings": 131072, "tie_word_embeddings": False}
    return {**kind, **dict(zip(SIZES, sizes, strict=True)), **more}


LLAMA2: dict[str, Any] = {"max_position_embeddings": 4096}
MISTRAL: dict[str, Any] = {"model_type": "mistral", "max_position_embeddings": 32768}
QWEN: dict[str, Any] = {"model_type": "qwen2"}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960}
EXPERTS: dict[str, Any] = {
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2", "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, **LLAMA2),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, **LLAMA2),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, **LLAMA2),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, max_position_embeddings=8192),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True),
    "llama-3.3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b-v0.1": _llama(4096, 14336, 32, 32, 8, 32000, **MISTRAL),
    "mistral-7b-v0.3": _llama(4096, 14336, 32, 32, 8, 32768, sliding_window=None, **MISTRAL),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, **QWEN),
    "qwen2.5-14b": _llama(5120, 13824, 48, 40, 8, 152064, **QWEN),
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, 8, 152064, **QWEN),
    "qwen2.5-72b": _llama(8192, 29568, 80, 64, 8, 152064, **QWEN),
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, 151936, **QWEN3),
    "qwen3-32b": _llama(5120, 25600, 64, 64, 8, 151936, **QWEN3),
    "qwen3-30b-a3b": _llama(
        2048, 6144, 48, 32, 4, 151936, **(QWEN3 | EXPERTS | {"model_type": "qwen3_moe"})
    ),
    "gemma-2-9b": _llama(3584, 14336, 42, 16, 8, 256000, **GEMMA2),
    # For benchmarks: one block of the real dimensions, and what two CPU cores can train.
    "llama-8b-block": _llama(4096, 14336, 1, 32, 8, 1024),
    "llama-70b-block": _llama(8192, 28672, 1, 64, 8, 1024),
    "small": _llama(1024, 2816, 4, 16, 16, 1024),
    "mini": _llama(256, 704, 2, 4, 2, 512),
}
ORGANIZATIONS = ("meta-llama", "mistralai", "qwen", "google")


def of_hub_id(name: str) -> str | None:
    """Returns the shape of a hub id (``meta-llama/Llama-3.1-70B-Instruct``), None if not known."""
    organization, _, model = name.lower().partition("/")
    model = model.removeprefix("meta-")
    for ending in ("-hf", "-instruct", "-chat", "-it", "-base"):
        model = model.removesuffix(ending)
    return model if organization in ORGANIZATIONS and model in SHAPES else None


@importing()
def architecture(name: str) -> Any:
    """Returns the transformers config of a shape or model folder. Raises UserError: neither."""
    from transformers import AutoConfig

    if name in SHAPES:
        values = dict(SHAPES[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if Path(name).is_dir():
        return hub.architecture(Path(name))
    raise unknown("shape or model folder", name, SHAPES)


def meta_model(name: str) -> Any:
    """Returns the causal LM of ``architecture(name)`` on the meta device, or raises UserError."""
    model = hub.meta_model(architecture(name), name)
    replace_experts(model)
    return model
