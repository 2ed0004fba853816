"""Speed and memory: an 8B shape with random weights made on the device, our own Trainer.step."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile

from scalepeft.adapters import inject
from scalepeft.analysis.bench.cases import inject_peft, on_bitsandbytes, random_weights
from scalepeft.analysis.bench.gpu.session import Session
from scalepeft.build import Built
from scalepeft.config import files as config_files
from scalepeft.data.loader import MicroBatch
from scalepeft.data.tokens import label_places
from scalepeft.models import loss, quant, shapes, structure
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single
from scalepeft.trainer import Outcome, Trainer

FROZEN, PEFT, GIB = "frozen", "peft-lora", 2**30
ROWS: dict[str, list[str]] = {
    "hoft": ["adapter.rank=16"], FROZEN: [], PEFT: [],
    "lora": ["adapter.rank=16", "adapter.alpha=32"], "shoft": ["adapter.rank=16"],
    "goft": [], "surm": [], "hut": [], "hadamard": [],
}  # fmt: skip
STORAGES = ("nf4 double", "none")
BF16 = torch.bfloat16


def _settings(session: Session, adapter: str, storage: str) -> list[str]:
    """Of ``scalepeft train`` and ``plan``: a step of the shape in a folder without weights."""
    rows, length = (2, 64) if session.tiny else (4, 2048)
    name, _, double = storage.partition(" ")
    return [
        f"model.path={session.out / 'shape'}", f"model.quant={name}",
        f"model.double_quant={bool(double)}".lower(), "data.name=toy", f"data.cutoff={length}",
        "engine.name=single", "train.max_steps=1", "train.precision=bf16",
        f"train.global_batch={rows}", f"train.micro_batch={rows}", "run_dir=unused",
        f"adapter.name={'lora' if adapter in (FROZEN, PEFT) else adapter}", *ROWS[adapter],
    ]  # fmt: skip


def _trainer(session: Session, adapter: str, storage: str) -> Trainer:
    """As ``build.build``, with random weights in place of files."""
    shapes.architecture(session.shape).save_pretrained(session.out / "shape")
    config, _ = config_files.load(None, _settings(session, adapter, storage))
    fmt = quant.get_format(config.model.quant, config.model.double_quant)
    model = random_weights(shapes.meta_model(session.shape).to(BF16), fmt, session.device)
    if adapter == PEFT:
        targets = config.adapter.target_modules
        fields = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": targets}
        inject_peft(model if fmt is None else on_bitsandbytes(model, BF16), fields)
    elif adapter == FROZEN:  # one trained vector, so that a gradient goes through all of it
        embedding = model.get_input_embeddings()
        embedding.floor = nn.Parameter(torch.zeros_like(embedding.weight[0]))
        embedding.register_forward_hook(lambda module, _, y: y + module.floor)
    else:
        inject.inject(model, config.adapter)
    loss.add_token_loss(model)
    ranks = Ranks(device=str(session.device))
    engine = Single(config.engine, ranks)
    engine.shard(model, structure.blocks_of(model))
    return Trainer(config, ranks, Built(engine, inject.train_mode(model), {}, 0), "")


def training(session: Session) -> dict[str, Any]:
    """Every method, HF PEFT's LoRA and the frozen base alone, over NF4 and over plain weights."""
    n = 512 if session.tiny else 8192
    a = torch.randn(n, n, device=session.device, dtype=BF16)
    rate = 2 * n**3 / min(session.milliseconds(lambda: a @ a, 10, 3)) / 1e9
    linear = [m for m in shapes.meta_model(session.shape).modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    found: dict[str, Any] = {"bf16 product TFLOP/s": rate}
    for adapter, storage in [(a, s) for s in STORAGES for a in ROWS]:
        row = session.attempt(_measure, adapter, storage, rate, weights)
        found[f"{adapter} {storage}"] = row
        session.keep("training", found)
    return found


def _measure(
    session: Session, adapter: str, storage: str, ceiling: float, weights: int
) -> dict[str, Any]:
    trainer = _trainer(session, adapter, storage)
    steps: list[Outcome] = []
    rows, length = trainer.config.train.micro_batch, trainer.config.data.cutoff
    ids = torch.arange(rows * length).view(rows, length) * 7919 % 512
    batch = MicroBatch(ids, ids, torch.arange(rows), label_places(ids))

    def step() -> None:  # under autocast as HF's Trainer runs PEFT
        with torch.autocast(session.device.type, BF16, enabled=adapter == PEFT):
            steps.append(trainer.step([batch], rows * (length - 1), 1e-4))

    if session.cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = median(session.milliseconds(step, *((2, 1) if session.tiny else (10, 3))))
    peak = torch.cuda.max_memory_allocated() / GIB if session.cuda else None
    rate = 4 * weights * rows * length / ms / 1e9
    losses = [step.read()[0] for step in steps]
    if None in losses:  # a step that was not finite is skipped
        raise FloatingPointError(f"not finite: loss or gradient of step {losses.index(None) + 1}")
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
    kernels = [
        e for e in found.key_averages() if e.device_type == DeviceType.CUDA
        and not e.is_user_annotation and not e.key.startswith("Optimizer.")
    ]  # fmt: skip
    kernels.sort(key=lambda e: -e.self_device_time_total)
    times = [e.self_device_time_total / 1e3 for e in kernels]
    longest = list(zip(kernels, times, strict=True))[:15]
    return {
        "launches": sum(e.count for e in kernels),
        "idle": 1 - sum(times) / ms,
        "longest (count, ms)": {e.key[:70]: [e.count, time] for e, time in longest},
    }


def plan(session: Session) -> dict[str, Any]:
    """What ``scalepeft plan`` says of the same steps, beside the measured peaks."""
    measured = session.results.get("training", {})
    rows = [(a, s) for s in STORAGES for a in ROWS if "ms" in measured.get(f"{a} {s}", {})]
    rows = [row for row in rows if row[0] not in (FROZEN, PEFT)][: 1 if session.tiny else None]
    with ThreadPoolExecutor(4) as pool:
        plans = pool.map(lambda row: session.attempt(_planned, *row), rows)
        return {" ".join(row): value for row, value in zip(rows, plans, strict=True)}


def _planned(session: Session, *row: str) -> dict[str, Any]:
    said = json.loads(session.call("plan", *_settings(session, *row), "--json"))
    planned = said["peak"]["total"] / GIB
    peak = session.results["training"][" ".join(row)]["peak GiB"]
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
