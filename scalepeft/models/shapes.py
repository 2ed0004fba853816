"""Dimensions of well-known models by name: for counts and benchmarks without a download."""

from pathlib import Path
from typing import Any

from scalepeft.core.errors import UserError, unknown


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **more,
    }


LLAMA2: dict[str, Any] = {"max_position_embeddings": 4096}
MISTRAL: dict[str, Any] = {"model_type": "mistral", "max_position_embeddings": 32768}
QWEN: dict[str, Any] = {"model_type": "qwen2"}
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
    # For benchmarks: one block of the real dimensions, and what two CPU cores can train.
    "llama-8b-block": _llama(4096, 14336, 1, 32, 8, 1024),
    "llama-70b-block": _llama(8192, 28672, 1, 64, 8, 1024),
    "small": _llama(1024, 2816, 4, 16, 16, 1024),
    "mini": _llama(256, 704, 2, 4, 2, 512),
}
ORGANISATIONS = ("meta-llama", "mistralai", "qwen")


def of_hub_id(name: str) -> str | None:
    """Returns the shape of a hub id: that of ``meta-llama/Llama-3.1-70B-Instruct`` is
    ``llama-3.1-70b``; None for an id that is not known.
    """
    organisation, _, model = name.lower().partition("/")
    model = model.removeprefix("meta-")
    for ending in ("-hf", "-instruct", "-chat"):
        model = model.removesuffix(ending)
    return model if organisation in ORGANISATIONS and model in SHAPES else None


def architecture(name: str) -> Any:
    """Returns the transformers config of a shape by name, or of a model folder.

    Raises:
        UserError: neither.
    """
    from transformers import AutoConfig

    if name in SHAPES:
        values = dict(SHAPES[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if Path(name).is_dir():
        from scalepeft.models import hub as models

        return models.architecture(Path(name))
    raise unknown("shape or model folder", name, SHAPES)


def meta_model(name: str) -> Any:
    """Returns the causal LM of ``architecture(name)`` on the meta device.

    Raises:
        UserError: no such shape, or an architecture that cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = architecture(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from None
