"""Tiny bases: a LLaMA and a byte-level BPE tokenizer of lines of text; built in is the toy's."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scalepeft.core.files import cache_folder, share, shared_folder, writing
from scalepeft.core.log import say
from scalepeft.data.tasks import toy

SPEC: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 768, "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "version": 1, "seed": 0, "batch": 16, "length": 128, "lr": 3e-3, "lines": 6000,
}  # fmt: skip


def make(pretrain_steps: int) -> Path:
    """The built-in model's folder in the cache, made once for a recipe and ``pretrain_steps``."""
    text = toy.corpus(random.Random(RECIPE["seed"]), RECIPE["lines"])
    return pretrain(text, SPEC, {**RECIPE, "steps": pretrain_steps}, "tiny")


def pretrain(text: list[str], spec: dict[str, Any], recipe: dict[str, Any], name: str) -> Path:
    """The folder in the cache of a LLaMA and its tokenizer, made once for these and for torch's."""
    words = hashlib.sha256("\n".join(text).encode()).hexdigest()
    made_of = {**spec, **recipe, "torch": torch.__version__, "text": words}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{name}-{key}"
    if (folder / "model.safetensors").is_file():
        return folder
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    with writing(f"cache {folder.parent}", "set SCALEPEFT_CACHE=FOLDER"):
        shared_folder(temporary)
    tokenizer = _tokenizer(text, spec["vocab_size"])
    tokenizer.save_pretrained(temporary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        model = _pretrained(text, tokenizer, spec, recipe)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(temporary)
    share(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process made it meanwhile
        shutil.rmtree(temporary)
    return folder


def _tokenizer(text: list[str], pieces: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def _pretrained(text: list[str], tokenizer: Any, spec: Any, recipe: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**spec, bos_token_id=0, eos_token_id=1))
    if not (steps := recipe["steps"]):
        return model
    ids = [i for row in tokenizer(text)["input_ids"] for i in [*row, 1]]
    length, batch = recipe["length"], recipe["batch"]
    stream = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=0.01)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, recipe["lr"], total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        rows = stream[torch.randint(len(stream), (batch,))]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            say(f"pretraining: step {step + 1}/{steps} loss {loss.item():.3f}")
    return model.eval()
