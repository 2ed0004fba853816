"""``scalepeft plan``: memory, traffic, times and grace period of a run, as JSON and as a table."""

import json
from dataclasses import asdict, fields
from typing import Any

from scalepeft.cluster.plan.gpus import GPUS, Options
from scalepeft.cluster.plan.planning import GIB, Plan, counts, plan
from scalepeft.cluster.plan.simulate import KINDS
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.core import text
from scalepeft.core.text import duration, gib

MOMENTS = {"start": "the first gather", "loss": "the loss", "step": "the optimizer's step"}
HINTS = (
    "less memory: engine.activation_checkpointing=true; train.micro_batch=1 or a shorter"
    " data.cutoff",
    "split the model: engine=fsdp2 on more GPUs",
    "a smaller base: model.quant=nf4",
)


def run(settings: list[str], options: Options, as_json: bool) -> None:
    """Print the plan of a ``train`` command's arguments; raises as ``planning.plan``."""
    planned = plan(config_files.load_partly(settings), options)
    print(json.dumps(as_dict(planned), indent=1) if as_json else table(planned))


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes and seconds."""
    step, options, target = plan.step, plan.options, plan.options.target
    same_name = ("need", "save_seconds", "compute_seconds", "exchange_seconds", "step_seconds")
    return {
        "config": cfg.to_dict(plan.config),
        "nodes": options.nodes,
        "gpus_per_node": options.gpus_per_node,
        "dimensions_from": plan.source.where,
        "base_parameters": step.parameters[0],
        "trained_parameters": step.parameters[1],
        "micro_steps": step.micro,
        **{name: getattr(step, name) for name in ("rows", "host", "flops", "checkpoint")},
        "resident": {"total": step.resident_bytes, **step.resident},
        "peak": {"total": step.peak_bytes, **step.peak},
        "peak_at": step.moment,
        "runtime_assumed": plan.runtime,
        "measured": options.found,
        "read_at_load": step.load,
        "read_at_restart": step.restart,
        "collectives": [
            {"name": name, "ranks": ranks, "nodes": nodes, "count": count, "bytes": size}
            for (name, ranks, nodes), (count, size) in sorted(step.exchanges.items())
        ],
        **{name: getattr(plan, name) for name in same_name},
        "grace_seconds": plan.grace,
        "gpu": asdict(target) if target else None,
        "fits": plan.fits,
        "fits_gpus": [g.name for g in GPUS.values() if plan.need <= g.gib * GIB],
        "smallest": plan.smallest if target else None,
        "tried": [nodes * gpus for nodes, gpus in counts(plan.config, options.gpus_per_node)],
        "hints": list(HINTS) if plan.fits is False else [],
    }


def table(plan: Plan) -> str:
    """The plan in lines of text."""
    step, c = plan.step, plan.config
    changed = [
        f"{f.name}={getattr(c.engine, f.name)}"
        for f in fields(c.engine)
        if f.name not in ("name", "device") and getattr(c.engine, f.name) != f.default
    ]
    memory: list[list[object]] = [["GiB a rank", "between steps", "at the peak"]]
    for kind, words in KINDS.items():
        sizes = [step.resident.get(kind, 0), step.peak.get(kind, 0)]
        if sizes[0] or sizes[1] > 2**10:
            memory.append([words, *(f"{size / GIB:.3f}" for size in sizes)])
    memory.append(["CUDA, NCCL, allocator*", "", f"{plan.runtime / GIB:.3f}"])
    memory.append(["sum", f"{step.resident_bytes / GIB:.3f}", f"{plan.need / GIB:.3f}"])
    quant = c.model.quant + (" twice" if c.model.double_quant else "")
    notes = ["* assumed, not measured on a GPU: docs/plan.md"]
    if found := plan.options.found:
        what = f"* CUDA, the allocator and the rate in bf16 as measured: {found['file']}"
        notes = [f"{what}; the rest is assumed: docs/plan.md"]
    if not step.shares.simulated:
        notes.append(f"engine {c.engine.name}: its own part by arithmetic (an upper bound)")
    return "\n".join([
        f"plan: {c.model.path} ({plan.source.where}), quant {quant}, {c.train.precision},"
        f" {c.adapter.name}",
        f"on {_gpus(plan.options.nodes, plan.options.gpus_per_node)}, engine"
        f" {', '.join([c.engine.name, *changed])},"
        f" {step.micro} micro-batch{'es' * (step.micro > 1)} of {step.rows}"
        f" row{'s' * (step.rows > 1)} of {c.data.cutoff:,} tokens a step and rank",
        "",
        *text.table(memory),
        "",
        *text.table(_facts(plan), left=2),
        "",
        *_verdict(plan),
        "",
        *notes,
    ])  # fmt: skip


def _facts(plan: Plan) -> list[list[str]]:
    step = plan.step
    way, _, block = step.moment.partition(" ")
    base, trained = step.parameters
    a_step = (
        f"{duration(plan.step_seconds)}*: {duration(plan.compute_seconds)} compute"
        f" ({step.flops / 1e12:,.2f} TFLOP), {duration(plan.exchange_seconds)} collectives"
    )
    if plan.options.step_seconds:
        a_step = f"{duration(plan.step_seconds)} (given)"
    return [
        ["peak at", f"{way} of block {block}" if block else MOMENTS[way]],
        ["trained parameters",
         f"{trained:,} of {base + trained:,} ({trained / (base + trained):.3%})"],
        *([["in host memory", f"{gib(step.host)} a rank"]] if step.host else []),
        ["read at load", f"{gib(step.load)} a rank"
         + f", {gib(step.restart)} from the quantized copy" * (step.restart < step.load)],
        *(
            [name, f"{count:,.0f} a step over {ranks} ranks"
             f"{f' on {nodes} nodes' if nodes > 1 else ''}, {gib(size)} in all"]
            for (name, ranks, nodes), (count, size) in sorted(step.exchanges.items())
        ),
        ["checkpoint", f"{gib(step.checkpoint)}, saved in {duration(plan.save_seconds)}*"],
        ["a step", a_step],
        ["grace period", f"{plan.grace} s: #SBATCH --signal=B:USR1@{plan.grace}"],
    ]  # fmt: skip


def _verdict(plan: Plan) -> list[str]:
    v, target = as_dict(plan), plan.options.target
    if target is None:
        others = [gpu.name for gpu in GPUS.values() if gpu.name not in v["fits_gpus"]]
        verdicts = {"fits": v["fits_gpus"], "does not fit": others}
        return [f"{word} {', '.join(names)}" for word, names in verdicts.items() if names]
    name = f"{target.name} ({target.gib:g} GiB)" if plan.options.gpu else f"GPUs of {target.name}"
    room = target.gib * GIB - plan.need
    lines = [f"fits {name}, {gib(room)} free"]
    if not plan.fits:
        lines = [f"does NOT fit {name}: {gib(-room)} too much"]
    if plan.smallest:
        lines.append(f"the smallest that fits: {_gpus(*plan.smallest)}")
    else:
        lines.append(
            f"engine {plan.config.engine.name} fits on no number of GPUs (tried"
            f" {', '.join(map(str, v['tried']))}; train.global_batch="
            f"{plan.config.train.global_batch} allows no more)"
        )
    return [*lines, *v["hints"]]


def _gpus(nodes: int, per_node: int) -> str:
    if nodes == 1:
        return f"{per_node} GPU{'s' * (per_node > 1)}"
    return f"{nodes * per_node} GPUs ({nodes} nodes of {per_node})"
