"""LLaMA-class bases: where they come from, their tokenizer, their structure on the meta device."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalepeft import quant
from scalepeft.config import BUILTIN, ModelConfig
from scalepeft.lookup import UserError
from scalepeft.parallel.mesh import Ranks
from scalepeft.progress import say

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve(config: ModelConfig, ranks: Ranks) -> Path:
    """Returns the local folder of the model: as given, made (``builtin:tiny``), or downloaded once
    a node.

    Raises:
        UserError: no such folder, nothing to read in it, or a hub id that cannot be had.
    """

    def make() -> str | None:
        if ranks.local_rank != 0:
            return None
        if config.path == BUILTIN:
            from scalepeft import tiny

            return str(tiny.make(config.pretrain_steps))
        if Path(config.path).is_dir():
            return config.path
        return _download(config.path, config.revision)

    here = ranks.together(make)
    # Every rank of a node uses what its local rank 0 found; node paths may differ.
    folders = ranks.gather((here, ranks.local_rank))
    for folder, local_rank in folders[: ranks.rank + 1][::-1]:
        if local_rank == 0 and folder is not None:
            return Path(folder)
    raise AssertionError("local rank 0 of this node comes first")


def check_place(name: str) -> None:
    """Refuses a ``model.path`` that can be neither a folder nor a hub id; looks at no network."""
    if name == BUILTIN or Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model.path={name}: no such folder (from {Path.cwd()}), and not a hub id (ORG/NAME)"
        )


def _download(name: str, revision: str | None) -> str:
    check_place(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.path={name}{at}: no such folder here, and the hub does not give it"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}); download it where there is a"
            " network and name the folder"
        ) from None


def load_tokenizer(config: ModelConfig, folder: Path) -> Any:
    """Loads the model's tokenizer (``tokenizer.json``), checked for an end-of-text token.

    Raises:
        UserError: no tokenizer, only a SentencePiece file, or no end-of-text token.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer or str(folder)
    where = f"model.tokenizer={source}" if config.tokenizer else f"model.path={folder}"
    if Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file():
        if (Path(source) / "tokenizer.model").is_file():
            raise UserError(
                f"{where}: has tokenizer.model but no tokenizer.json; transformers loads a bare"
                " tokenizer.model without BOS and with other ids. Convert it once with"
                " convert_slow_tokenizer and save tokenizer.json"
            )
        raise UserError(f"{where}: no tokenizer.json there; set model.tokenizer=FOLDER_OR_HUB_ID")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # for a damaged file the tokenizers library raises a bare Exception
        raise UserError(
            f"{where}: no tokenizer can be loaded: {type(error).__name__}:"
            f" {' '.join(str(error).split())}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{where}: the tokenizer has no end-of-text token; set eos_token in"
            " tokenizer_config.json"
        )
    return tokenizer


def vocab_size(folder: Path) -> int:
    """Number of token ids that the model's embedding has."""
    return int(architecture(folder).vocab_size)


def positions(folder: Path) -> int | None:
    """Number of positions the model was made for; None where config.json does not say."""
    return getattr(architecture(folder), "max_position_embeddings", None)


def architecture(folder: Path) -> Any:
    """Reads the transformers config of a model folder. Raises UserError: missing or broken."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path={folder}: no config.json there; name the folder of a whole model"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(
            f"model.path={folder}: config.json: {' '.join(str(error).split())}"
        ) from None


def build(config: ModelConfig, folder: Path, precision: str) -> nn.Module:
    """Builds the causal LM on the meta device, block layers in the storage of ``model.quant``.

    Raises:
        UserError: config.json is missing, broken or of an unsupported architecture.
    """
    from transformers import AutoModelForCausalLM

    config_of_model = architecture(folder)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config_of_model, dtype=PRECISIONS[precision], attn_implementation="sdpa"
            )
    except (ValueError, KeyError) as error:
        raise UserError(f"model.path={folder}: {str(error).splitlines()[0]}") from None
    blocks_of(model)
    fmt = quant.get_format(config.quant, config.double_quant)
    if fmt is not None:
        _quantise_blocks(model, fmt, folder)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder blocks, the units of sharding and checkpointing."""
    blocks = getattr(getattr(model, "base_model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(
            f"{type(model).__name__} is not supported: its decoder has no list of blocks named"
            " 'layers'. Supported: LLaMA-class models (Llama, Mistral, Qwen2, Qwen3, ...)"
        )
    return list(blocks)


def _quantise_blocks(model: nn.Module, fmt: quant.Format, folder: Path) -> None:
    kept: dict[str, str] = {}
    for block in blocks_of(model):
        for name, layer in block.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            if reason := fmt.refuses(layer.in_features):
                kept[name.rsplit(".", 1)[-1]] = reason
            else:
                quant.quantise(layer, fmt)
    if len(kept) and not any(isinstance(m, quant.QuantLinear) for m in model.modules()):
        raise UserError(
            f"model.quant={fmt.name}: no layer of {folder} can be stored so:"
            f" {next(iter(kept.values()))}"
        )
    if kept and int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        for name, reason in kept.items():
            say(f"{name} stays unquantised in every block: {reason}")


def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives every meta parameter and buffer (sharded or whole) empty storage on ``device``; ties
    stay ties.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        torch.empty_like(p, device=device), requires_grad=p.requires_grad
                    )
                module._parameters[name] = made[id(p)]
    compute_tables(model, device)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"still on the meta device: {left}"


def compute_tables(model: nn.Module, device: torch.device) -> None:
    """Makes meta buffers real: they are in no checkpoint, so that their module is made again."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if any(b.is_meta for b in module.buffers(recurse=False)):
                setattr(parent, name, type(module)(module.config).to(device))  # rotary frequencies
