"""Dimensions of well-known models by name: for counts and benchmarks without a download."""

from pathlib import Path
from typing import Any

from scalepeft.lookup import UserError, unknown


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    # For benchmarks: one block of the real dimensions, and what two CPU cores can train.
    "llama-8b-block": _llama(4096, 14336, 1, 32, 8, 1024),
    "llama-70b-block": _llama(8192, 28672, 1, 64, 8, 1024),
    "small": _llama(1024, 2816, 4, 16, 16, 1024),
    "mini": _llama(256, 704, 2, 4, 2, 512),
}


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
        from scalepeft import models

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
