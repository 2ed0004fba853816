"""Speed and memory: an 8B shape with random weights made on the device, our own Trainer.step."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile

from scalepeft.adapters import inject
from scalepeft.analysis.bench.entries import inject_peft, on_bitsandbytes, random_weights
from scalepeft.analysis.bench.gpu.session import Session
from scalepeft.build import Built
from scalepeft.config import files as config_files
from scalepeft.data.tokens import TokenSet
from scalepeft.models import attention, loss, shapes, structure
from scalepeft.parallel.single import Single
from scalepeft.trainer import Outcome, Trainer, batches

FROZEN, PEFT, GIB = "frozen", "peft-lora", 2**30
ONCE, EACH = "factors once", "factors in each forward"
ROWS: dict[str, list[str]] = {
    "hoft": ["adapter.rank=16"], FROZEN: [], PEFT: [],
    "lora": ["adapter.rank=16", "adapter.alpha=32", "adapter.dropout=0"],
    "shoft": ["adapter.rank=16"],
    "goft": [], "surm": [], "hut": [], "hadamard": [],
}  # fmt: skip
NF4, PLAIN = "nf4 double", "none"
CASES = [(adapter, NF4) for adapter in ROWS] + [(adapter, PLAIN) for adapter in list(ROWS)[:4]]
BF16 = torch.bfloat16
ON_DEVICE = ("peak GiB", "holes GiB", "CUDA GiB", "launches", "idle", "host syncs")
SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def settings(session: Session, adapter: str, storage: str, *more: str) -> list[str]:
    """Of ``scalepeft train`` and ``plan``: a step of the shape in a folder without weights."""
    rows, length = (2, 64) if session.tiny else (4, 2048)
    name, _, double = storage.partition(" ")
    return [
        f"model.path={session.out / 'shape'}", f"model.quant={name}",
        f"model.double_quant={bool(double)}".lower(), "data.name=toy", f"data.cutoff={length}",
        "engine.name=single", "train.max_steps=1", "train.precision=bf16",
        f"train.global_batch={rows}", f"train.micro_batch={rows}", "train.batching=padded",
        "run_dir=unused", f"adapter.name={'lora' if adapter in (FROZEN, PEFT) else adapter}",
        *ROWS[adapter], *more,
    ]  # fmt: skip


def trainer(session: Session, adapter: str, storage: str, *more: str) -> Trainer:
    """As ``build.build``, with random weights in place of files."""
    shapes.architecture(session.shape).save_pretrained(session.out / "shape")
    config, _ = config_files.load(None, settings(session, adapter, storage, *more))
    model: Any = structure.build(config.model, session.out / "shape", config.train.precision)
    attention.read_rows_alone(model)
    model = random_weights(model, None, session.device)
    if adapter == PEFT:
        targets = config.adapter.target_modules
        fields = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": targets}
        inject_peft(model if storage == PLAIN else on_bitsandbytes(model, BF16), fields)
    elif adapter == FROZEN:  # one trained vector, so that a gradient goes through all of it
        embedding = model.get_input_embeddings()
        embedding.floor = nn.Parameter(torch.zeros_like(embedding.weight[0]))
        embedding.register_forward_hook(lambda module, _, y: y + module.floor)
    else:
        inject.inject(model, config.adapter)
    loss.add_token_loss(model)
    engine = Single(config.engine, session.ranks)
    engine.shard(model, structure.blocks_of(model))
    return Trainer(config, session.ranks, Built(engine, inject.train_mode(model), {}, 0), "")


def figures(
    session: Session, trainer: Trainer, lengths: Tensor, autocast: bool = False
) -> dict[str, Any]:
    """Of a step over rows of these ``lengths`` (train.global_batch,); raises if not finite."""
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0))
    ids = torch.arange(int(ends[-1])) * 7919 % 512
    rows = TokenSet(ids.int(), ends, torch.ones_like(lengths, dtype=torch.int32))
    batch = next(iter(batches(trainer, rows, 0, 1)))
    steps: list[Outcome] = []

    def step() -> None:
        with torch.autocast(session.device.type, BF16, enabled=autocast):
            steps.append(trainer.step(batch.micro, batch.label_tokens, 1e-4))

    if session.cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = median(session.milliseconds(step, *((2, 1) if session.tiny else (8, 2))))
    on_device = _on_device(step, ms) if session.cuda else dict.fromkeys(ON_DEVICE)
    losses = [step.read()[0] for step in steps]
    if None in losses:  # a step that was not finite is skipped
        raise FloatingPointError(f"not finite: loss or gradient of step {losses.index(None) + 1}")
    return {
        "ms": ms, "tokens/s": 1e3 * batch.tokens / ms,
        "computed": sum(micro.input_ids.numel() for micro in batch.micro), **on_device,
        "first loss": losses[0], "last loss": losses[-1],
    }  # fmt: skip


def _on_device(step: Callable[[], None], ms: float) -> dict[str, Any]:
    """Memory of the steps so far; of one more launches, syncs, kernels, idle share of ``ms``."""
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    with profile() as profiled:
        step()
        torch.cuda.synchronize()
    events = profiled.key_averages()
    kernels = [
        (e.self_device_time_total / 1e3, e.count, e.key)
        for e in events if e.device_type == DeviceType.CUDA
        and not e.is_user_annotation and not e.key.startswith("Optimizer.")
    ]  # fmt: skip
    return {
        "peak GiB": peak / GIB, "holes GiB": (reserved - peak) / GIB, "CUDA GiB": outside / GIB,
        "launches": sum(count for _, count, _ in kernels),
        "idle": 1 - sum(time for time, _, _ in kernels) / ms,
        "host syncs": sum(e.count for e in events if e.key in SYNCS),
        "longest (count, ms)": {k[:70]: [n, t] for t, n, k in sorted(kernels, reverse=True)[:15]},
    }  # fmt: skip


def training(session: Session) -> dict[str, Any]:
    """Every method, HF PEFT's LoRA and the frozen base alone, over NF4 and over plain weights."""
    n = 512 if session.tiny else 8192
    a = torch.randn(n, n, device=session.device, dtype=BF16)
    rate = 2 * n**3 / min(session.milliseconds(lambda: a @ a, 10, 3)) / 1e9
    linear = [m for m in shapes.meta_model(session.shape).modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    found: dict[str, Any] = {"bf16 product TFLOP/s": rate}
    for adapter, storage in CASES:
        row = found[f"{adapter} {storage}"] = session.attempt(_measure, adapter, storage)
        if "ms" in row:
            row["TFLOP/s"] = 4e-12 * weights * row["tokens/s"]
            row["MFU"] = row["TFLOP/s"] / rate
        session.keep("training", found)
    return found


def _measure(session: Session, adapter: str, storage: str) -> dict[str, Any]:
    made = trainer(session, adapter, storage)
    lengths = torch.full((made.config.train.global_batch,), made.config.data.cutoff)
    # Under autocast as HF's Trainer runs PEFT.
    return figures(session, made, lengths, autocast=adapter == PEFT)


def plan(session: Session) -> dict[str, Any]:
    """What ``scalepeft plan`` says of the same steps, beside what was measured."""
    measured = session.results.get("training", {})
    ours = {" ".join(row): row for row in CASES if row[0] not in (FROZEN, PEFT)}
    rows = [key for key in ours if "ms" in measured.get(key, {})][: 1 if session.tiny else None]
    with ThreadPoolExecutor(4) as pool:
        plans = pool.map(lambda key: session.attempt(_planned, *ours[key]), rows)
        return dict(zip(rows, plans, strict=True))


def _planned(session: Session, *row: str) -> dict[str, Any]:
    said = json.loads(session.call("plan", *settings(session, *row), "--json"))
    planned, stays = (said[when]["total"] / GIB for when in ("peak", "resident"))
    step = session.results["training"][" ".join(row)]
    peak = step["peak GiB"]
    return {
        "planned GiB": planned, "measured GiB": peak, "ratio": planned / peak if peak else None,
        "holes": step["holes GiB"] / (planned - stays) if peak else None,
        "TFLOP/s of plan": said["flops"] / step["ms"] / 1e9,
    }  # fmt: skip


def choices(session: Session) -> dict[str, Any]:
    """A step one way and the other: factors once or in each forward, rows packed or padded."""
    rows, length = (8, 32) if session.tiny else (64, 512)
    # As questions with their answers are: 95 % have less than twice the median.
    drawn = torch.empty(rows).log_normal_(4.5, 0.45, generator=torch.Generator().manual_seed(0))
    drawn, same = drawn.long().clamp(16, 512), torch.full((4,), length)
    cases = {f"{a}, {how}": (a, how, same) for a in ("hoft", "goft") for how in (ONCE, EACH)}
    cases |= {f"hoft, {how}": ("hoft", how, drawn) for how in ("packed", "padded")}
    return {label: session.attempt(_choice, *case) for label, case in cases.items()}


def _choice(session: Session, adapter: str, how: str, lengths: Tensor) -> dict[str, Any]:
    batch = [f"train.global_batch={len(lengths)}", f"train.micro_batch={len(lengths) // 4}"]
    batch += ["data.cutoff=512", f"train.batching={'packed' if how == 'packed' else 'padded'}"]
    made = trainer(session, adapter, NF4, *batch)
    if how == EACH:
        made.factors.groups = []
    return figures(session, made, lengths)


def generation(session: Session) -> dict[str, Any]:
    """Greedy generation over NF4: HOFT, its factors made once or in each forward; frozen base."""
    cases = {f"hoft, {how}": ("hoft", how) for how in (ONCE, EACH)} | {FROZEN: (FROZEN, EACH)}
    return {label: session.attempt(_generate, *case) for label, case in cases.items()}


def _generate(session: Session, adapter: str, how: str) -> dict[str, Any]:
    made = trainer(session, adapter, NF4)
    if how == ONCE:
        made.factors.make()
    model: Any = made.built.model.eval()
    rows, prompt, new = (2, 16, 6) if session.tiny else (32, 256, 32)
    ids = torch.randint(500, (rows, prompt), device=session.device)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, do_sample=False)

    generate = partial(model.generate, ids, attention_mask=torch.ones_like(ids))
    calls = [partial(generate, min_new_tokens=n, max_new_tokens=n) for n in (2, new)]
    short, long = (median(session.milliseconds(call, 3, 1)) for call in calls)
    each = (long - short) / (new - 2)
    return {"ms a token": each, "tokens/s": 1e3 * rows / each, "prompt and 2 tokens ms": short}
