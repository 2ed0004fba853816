"""Speed and memory: an 8B shape with random weights made on the device, our own Trainer.step."""

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import profile

from scalepeft.adapters import inject as injection
from scalepeft.analysis.bench.cases import inject_peft
from scalepeft.analysis.bench.gpu.session import Session
from scalepeft.build import Built
from scalepeft.config import files as config_files
from scalepeft.data.loader import MicroBatch
from scalepeft.models import loss, quant, structure
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single
from scalepeft.trainer import Trainer

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = LLAMA | {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FROZEN, PEFT, GIB = "frozen", "peft-lora", 2**30
METHODS = {
    "hoft": ["adapter.rank=16"], "lora": ["adapter.rank=16", "adapter.alpha=32"],
    "shoft": ["adapter.rank=16"], "goft": [], "surm": [], "hut": [], "hadamard": [],
}  # fmt: skip
ROWS = ("hoft", FROZEN, PEFT, "lora", "shoft", "goft", "surm", "hut", "hadamard")
STORAGES = ("nf4 double", "none")


def _settings(session: Session, adapter: str, storage: str) -> list[str]:
    """Of ``scalepeft train`` and ``plan``: a step of the shape in a folder without weights."""
    folder, (rows, length) = session.out / "shape", (2, 64) if session.tiny else (4, 2048)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY if session.tiny else LLAMA))
    name, _, double = storage.partition(" ")
    return [
        f"model.path={folder}", f"model.quant={name}", f"model.double_quant={bool(double)}".lower(),
        "data.name=toy", f"data.cutoff={length}", "engine.name=single", "train.max_steps=1",
        "train.precision=bf16", f"train.global_batch={rows}", f"train.micro_batch={rows}",
        f"adapter.name={adapter if adapter in METHODS else 'lora'}", *METHODS.get(adapter, []),
        "run_dir=unused",
    ]  # fmt: skip


def _trainer(session: Session, adapter: str, storage: str) -> Trainer:
    """As ``build.build``, with random weights in place of files."""
    config, _ = config_files.load(None, _settings(session, adapter, storage))
    model: Any = structure.build(config.model, session.out / "shape", config.train.precision)
    model.requires_grad_(False)
    if adapter in METHODS:
        injection.inject(model, config.adapter)
    loss.add_token_loss(model)
    ranks = Ranks(device=str(session.device))
    engine = Single(config.engine, ranks)
    engine.shard(model, structure.blocks_of(model))
    structure.materialize(model, session.device)
    _fill(model)
    injection.reset_adapters(model, 0)
    if adapter == PEFT:
        _add_peft(model, config.adapter.target_modules)
    if adapter == FROZEN:  # one trained vector, so that a gradient goes through all of it
        embedding = model.get_input_embeddings()
        embedding.floor = nn.Parameter(torch.zeros_like(embedding.weight[0]))
        embedding.register_forward_hook(lambda module, _, y: y + module.floor)
    return Trainer(config, ranks, Built(engine, model.train(), {}, 0), "")


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random frozen weights: matrices N(0, 0.02^2), or bytes of about that size; norms one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, quant.QuantLinear):
            row = 0.02 * torch.randn(1, module.in_features, device=module.weight.device)
            module.weight.random_(0, 256)
            module.weight_scale.copy_(module.fmt.encode(row)[1].expand_as(module.weight_scale))
            continue
        for p in module.parameters(recurse=False):
            if not p.requires_grad:
                p.fill_(1) if p.dim() == 1 else p.normal_(std=0.02)


def _add_peft(model: Any, targets: list[str]) -> None:
    """PEFT's LoRA, over bitsandbytes' own layers where the base is quantized."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, quant.QuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
            plain.weight = nn.Parameter(quant.Frozen(layer).weight(torch.bfloat16), False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quant.bnb_linear(plain))
            model.is_loaded_in_4bit = True  # PEFT asks for it
    fields = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": targets}
    inject_peft(model, fields)


def training(session: Session) -> dict[str, Any]:
    """Every method, HF PEFT's LoRA and the frozen base alone, over NF4 and over plain weights."""
    n = 512 if session.tiny else 8192
    a = torch.randn(n, n, device=session.device, dtype=torch.bfloat16)
    rate = 2 * n**3 / min(session.milliseconds(lambda: a @ a, 10, 3)) / 1e9
    found: dict[str, Any] = {"bf16 product TFLOP/s": rate}
    for storage in STORAGES:
        for adapter in ROWS:
            found[f"{adapter} {storage}"] = session.attempt(_measure, adapter, storage, rate)
            session.keep("training", found)
    return found


def _measure(session: Session, adapter: str, storage: str, ceiling: float) -> dict[str, Any]:
    trainer = _trainer(session, adapter, storage)
    config, losses = trainer.config, list[float | None]()
    rows, length = config.train.micro_batch, config.data.cutoff
    shape = TINY if session.tiny else LLAMA
    ids = torch.arange(rows * length).view(rows, length) * 7919 % shape["vocab_size"]
    batch = MicroBatch(ids, ids, torch.arange(rows))

    def step() -> None:
        bf16 = torch.autocast(session.device.type, torch.bfloat16)  # as HF's Trainer runs PEFT
        with bf16 if adapter == PEFT else contextlib.nullcontext():
            losses.append(trainer.step([batch], rows * (length - 1), 1e-4)[0])

    if session.cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = median(session.milliseconds(step, *((2, 1) if session.tiny else (10, 3))))
    d, kv = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    block = 2 * d * d * (1 + kv) + 3 * d * shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * block + d * shape["vocab_size"]
    rate = 4 * weights * rows * length / ms / 1e9
    peak = torch.cuda.max_memory_allocated() / GIB if session.cuda else None
    if None in losses:  # a step that was not finite is skipped
        raise FloatingPointError(
            f"loss or gradient was not finite in step {losses.index(None) + 1}"
        )
    return {
        "ms": ms, "tokens/s": 1e3 * rows * length / ms, "TFLOP/s": rate, "MFU": rate / ceiling,
        "peak GiB": peak, "first loss": losses[0], "last loss": losses[-1],
        **(_profile(step, ms) if session.cuda else {"launches": None, "idle": None}),
    }  # fmt: skip


def _profile(step: Callable[[], None], ms: float) -> dict[str, Any]:
    """Launches of one more step, the longest kernels, and the device's idle share of ``ms``."""
    with profile() as found:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for e in found.events() or ():
        note = getattr(e, "is_user_annotation", False) or e.name.startswith("Optimizer.")
        if e.device_type == torch.autograd.DeviceType.CUDA and not note:
            kernels.setdefault(e.name[:70], []).append(e.time_range.elapsed_us() / 1e3)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:15]
    return {
        "launches": sum(len(times) for times in kernels.values()),
        "idle": 1 - sum(sum(times) for times in kernels.values()) / ms,
        "longest (count, ms)": {name: [len(times), sum(times)] for name, times in longest},
    }


def plan(session: Session) -> dict[str, Any]:
    """What ``scalepeft plan`` says of the same steps, beside the measured peaks."""
    measured = session.results.get("training", {})
    rows = [(a, s) for s in STORAGES for a in METHODS if "ms" in measured.get(f"{a} {s}", {})]
    rows = rows[: 1 if session.tiny else None]
    with ThreadPoolExecutor(4) as pool:
        plans = pool.map(lambda row: session.attempt(_planned, *row), rows)
        return {" ".join(row): value for row, value in zip(rows, plans, strict=True)}


def _planned(session: Session, *row: str) -> dict[str, Any]:
    said = json.loads(session.call("plan", *_settings(session, *row), "--json"))
    planned, label = said["peak"]["total"] / GIB, " ".join(row)
    peak = session.results["training"][label]["peak GiB"]
    ratio = planned / peak if peak else None
    return {"planned GiB": planned, "measured GiB": peak, "ratio": ratio}


def generation(session: Session) -> dict[str, Any]:
    """Greedy generation over NF4, HOFT beside the frozen base."""
    return {adapter: session.attempt(_generate, adapter) for adapter in ("hoft", FROZEN)}


@torch.no_grad()
def _generate(session: Session, adapter: str) -> dict[str, Any]:
    model: Any = _trainer(session, adapter, STORAGES[0]).built.model.eval()
    rows, prompt, new = (2, 16, 6) if session.tiny else (32, 256, 32)
    ids = torch.randint(500, (rows, prompt), device=session.device)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, do_sample=False)

    def tokens(count: int) -> float:
        more = {"min_new_tokens": count, "max_new_tokens": count}
        call = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **more)  # noqa: E731
        return median(session.milliseconds(call, 3, 1))

    short = tokens(2)
    each = (tokens(new) - short) / (new - 2)
    return {"ms a token": each, "tokens/s": 1e3 * rows / each, "prompt and 2 tokens ms": short}
