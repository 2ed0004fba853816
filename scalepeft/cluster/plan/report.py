"""A plan as a person wants to see it: a table, JSON, and a picture of memory by kind."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalepeft.cluster.plan import planning
from scalepeft.cluster.plan.gpus import GPUS
from scalepeft.cluster.plan.memory import Step
from scalepeft.cluster.plan.planning import GIB, Plan
from scalepeft.cluster.plan.simulate import SIMULATED
from scalepeft.cluster.plan.tracker import KINDS
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.text import duration, gib

WORDS = {
    "base": "base (frozen)",
    "adapter": "adapter",
    "optimizer": "optimiser",
    "gradients": "gradients",
    "gathered": "gathered parameters",
    "dequantised": "dequantised weight",
    "activations": "activations",
    "loss": "logits and loss",
    "runtime": "CUDA, NCCL, allocator*",
}
COLOURS = dict(zip(WORDS, (
    "#4c72b0", "#55a868", "#2f6f4f", "#8c8c8c", "#dd8452", "#937860", "#c44e52", "#da8bc3",
    "#cccccc",
), strict=True))  # fmt: skip


def gpus(nodes: int, each: int) -> str:
    """A number of GPUs in words."""
    if nodes == 1:
        return f"{each} GPU{'s' * (each > 1)}"
    return f"{nodes * each} GPUs ({nodes} nodes of {each})"


def table(plan: Plan) -> str:
    """The plan in lines of text."""
    c, o, step = plan.config, plan.options, plan.step
    quant = c.model.quant + (" twice" if c.model.double_quant else "")
    engine: Any = c.engine
    notes = [f"stage {engine.stage}"] if engine.name == "zero" else []
    if engine.name == "fsdp2" and engine.shard_over != "world":
        notes.append(f"shards over {engine.shard_over}")
    notes += ["activation checkpointing"] if engine.activation_checkpointing else []
    base, trained = step.parameters
    rows = f"{step.rows} row{'s' * (step.rows > 1)} of {c.data.cutoff:,} tokens"
    lines = [
        f"plan: {c.model.path} ({plan.source}), quant {quant}, {c.train.precision},"
        f" {c.adapter.name}",
        f"on {gpus(o.nodes, o.gpus_per_node)}, engine {', '.join([engine.name, *notes])},"
        f" {step.micro} micro-batch{'es' * (step.micro > 1)} of {rows} a step and rank",
        "",
        f"  trained parameters  {trained:,} of {base + trained:,}"
        f" ({trained / (base + trained):.3%})",
        "",
        f"  {'GiB a rank':<26}{'between steps':>14}{'at the peak':>14}",
    ]
    for kind in KINDS:
        held, peak = step.resident.get(kind, 0.0), step.peak.get(kind, 0.0)
        if held or peak > 2**10:
            lines.append(f"  {WORDS[kind]:<26}{held / GIB:>14.3f}{peak / GIB:>14.3f}")
    lines += [
        f"  {WORDS['runtime']:<26}{'':>14}{plan.runtime / GIB:>14.3f}",
        f"  {'sum':<26}{step.held / GIB:>14.3f}{plan.need / GIB:>14.3f}   peak: {_moment(step)}",
        "",
    ]
    if step.host:
        lines.append(f"  in host memory      {gib(step.host)} a rank")
    lines.append(f"  read at load        {gib(step.load)} a rank")
    for (name, ranks, nodes), (count, size) in sorted(step.exchanges.items()):
        where = f"{ranks} ranks" + (f" on {nodes} nodes" if nodes > 1 else "")
        lines.append(f"  {name:<18}  {count:,.0f} a step over {where}, {gib(size)} in all")
    lines += [
        f"  checkpoint          {gib(step.checkpoint)}, saved in {duration(plan.save_seconds)}*",
        f"  a step              {_times(plan)}",
        f"  grace period        {plan.grace} s: #SBATCH --signal=B:USR1@{plan.grace}",
        "",
        *_verdict(plan),
        "",
        *(f"* {line}" for line in assumptions(plan)),
    ]
    return "\n".join(lines)


def _moment(step: Step) -> str:
    way, _, block = step.moment.partition(" ")
    named = {"start": "the first gather", "loss": "the loss", "step": "the optimiser's step"}
    return f"{way} of block {block}" if block else named[way]


def _times(plan: Plan) -> str:
    if plan.options.step_seconds:
        return f"{duration(plan.step_seconds)} (given)"
    return (
        f"{duration(plan.step_seconds)}*: {duration(plan.compute_seconds)} compute"
        f" ({plan.step.flops / 1e12:,.2f} TFLOP), {duration(plan.exchange_seconds)} collectives"
    )


def _verdict(plan: Plan) -> list[str]:
    c, o = plan.config, plan.options
    target = o.target
    if target is None:
        fit = {g.name: plan.need <= g.gib * GIB for g in GPUS.values()}
        names = [", ".join(name for name in fit if fit[name] is answer) for answer in (True, False)]
        return [f"{word} {n}" for word, n in zip(("fits", "does not fit"), names, strict=True) if n]
    room = target.gib * GIB - plan.need
    name = f"{target.name} ({target.gib:g} GiB)" if o.gpu else f"GPUs of {target.name}"
    lines = [
        f"fits {name}, {gib(room)} free"
        if plan.fits
        else f"does NOT fit {name}: {gib(-room)} too much"
    ]
    if plan.smallest:
        lines.append(f"the smallest that fits: {gpus(*plan.smallest)}")
    elif o.advise:
        lines.append(
            f"engine {c.engine.name} fits on no number of GPUs (tried"
            f" {', '.join(str(n * each) for n, each in planning.counts(c, o.gpus_per_node))};"
            f" train.global_batch={c.train.global_batch} allows no more)"
        )
    if plan.sharded:
        lines.append(f"with engine.name=fsdp2 the smallest that fits: {gpus(*plan.sharded)}")
    for i, change in enumerate(plan.changes):
        last = i == len(plan.changes) - 1 and len(change.settings) > 1
        lines.append(
            f"  {'all of these' if last else change.settings[0]:<40} saves {gib(change.saves):>11},"
            f" needs {gib(change.need):>11}: {'fits' if change.fits else 'does not fit'}"
        )
    return lines


def assumptions(plan: Plan) -> list[str]:
    """What is assumed, not computed; said in the table and in the JSON."""
    p, o = planning, plan.options
    tflops = p.peak_tflops(o.target, plan.config.train.precision)
    found = [
        f"assumed, not measured on a GPU: {p.CONTEXT_BYTES / GIB:g} GiB CUDA context"
        + (f" and {p.NCCL_BYTES / GIB:g} GiB NCCL" if plan.world > 1 else "")
        + f", {p.FRAGMENTED:.0%} allocator holes over what comes and goes",
        f"assumed: disk {o.disk / 1e9:g} GB/s, sha256 {p.HASH_BYTES_PER_SECOND / 1e9:g} GB/s;"
        f" grace {p.SAFETY:g} x (step + save, and a save under way)"
        f" + {p.MARGIN_SECONDS:g} s",
    ]
    if o.step_seconds is None:
        found.append(
            f"assumed: {p.MFU:.0%} of {tflops:g} TFLOP/s, collectives at"
            f" {p.NODE_BYTES_PER_SECOND / 1e9:g} GB/s in a node (NVLink) and"
            f" {p.NETWORK_BYTES_PER_SECOND / 1e9:g} GB/s between nodes, not overlapped"
        )
    found.append(
        f"every row has data.cutoff={plan.config.data.cutoff} tokens, all of them labels; training"
        " alone: scalepeft evaluate is another load"
    )
    if plan.config.train.precision == "fp32":
        found.append("fp32: an attention kernel that keeps (length, length) scores is not counted")
    if plan.config.engine.name not in SIMULATED:
        found.append(
            "zero: one process simulated, what DeepSpeed adds by arithmetic; gathered parameters"
            " are an upper bound"
        )
    return found


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes and seconds."""
    step = plan.step
    target = plan.options.target
    base, trained = step.parameters
    return {
        "config": cfg.to_dict(plan.config),
        "nodes": plan.options.nodes,
        "gpus_per_node": plan.options.gpus_per_node,
        "dimensions_from": plan.source,
        "base_parameters": base,
        "trained_parameters": trained,
        "rows": step.rows,
        "micro_steps": step.micro,
        "resident": {"total": step.held, **step.resident},
        "peak": {"total": step.most, **step.peak},
        "peak_at": step.moment,
        "runtime_assumed": plan.runtime,
        "need": plan.need,
        "host": step.host,
        "read_at_load": step.load,
        "collectives": [
            {"name": name, "ranks": ranks, "nodes": nodes, "count": count, "bytes": size}
            for (name, ranks, nodes), (count, size) in sorted(step.exchanges.items())
        ],
        "flops": step.flops,
        "checkpoint": step.checkpoint,
        "save_seconds": plan.save_seconds,
        "step_seconds": plan.step_seconds,
        "grace_seconds": plan.grace,
        "gpu": asdict(target) if target else None,
        "fits": plan.fits,
        "smallest": list(plan.smallest) if plan.smallest else None,
        "smallest_with_fsdp2": list(plan.sharded) if plan.sharded else None,
        "changes": [asdict(change) for change in plan.changes],
        "assumptions": assumptions(plan),
        "simulated_layers": list(step.simulated),
    }


def plot(plan: Plan, target: Path) -> None:
    """Draws two bars, between steps and at the peak, by kind, and the GPU's memory as a line.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    step, gpu = plan.step, plan.options.target
    bars = {
        "at the peak": {**step.peak, "runtime": plan.runtime},
        "between steps": step.resident,
    }
    limit = max(plan.need, gpu.gib * GIB if gpu and gpu.gib * GIB < 3 * plan.need else 0)
    unit, scale = ("GiB", GIB) if plan.need >= GIB else ("MiB", 2**20)
    figure, axis = plt.subplots(figsize=(9, 3.4), dpi=120)
    shown = [k for k in WORDS if any(b.get(k, 0) > 0.002 * plan.need for b in bars.values())]
    left = dict.fromkeys(bars, 0.0)
    for kind in shown:
        sizes = [bars[name].get(kind, 0.0) / scale for name in bars]
        axis.barh(
            list(bars), sizes, left=[left[n] / scale for n in bars], label=WORDS[kind].rstrip("*"),
            color=COLOURS[kind], edgecolor="white", linewidth=0.6, height=0.55,
        )  # fmt: skip
        for place, (name, size) in enumerate(zip(bars, sizes, strict=True)):
            if size * scale > 0.06 * limit:
                middle = left[name] / scale + size / 2
                axis.text(
                    middle, place, f"{size:.1f}", ha="center", va="center", fontsize=8,
                    color="black" if kind == "runtime" else "white",
                )  # fmt: skip
            left[name] += size * scale
    for place, total in enumerate((plan.need, step.held)):
        end = left[list(bars)[place]] / scale
        axis.text(end, place, f"  {total / scale:.1f} {unit}", va="center")
    if gpu and gpu.gib * GIB <= 1.02 * limit:
        axis.axvline(gpu.gib * GIB / scale, color="black", ls="--", lw=1)
        axis.text(gpu.gib * GIB / scale, 1.62, f"{gpu.name} ", ha="right", va="center", fontsize=8)
    axis.set_xlim(0, 1.12 * limit / scale)
    axis.set_ylim(-0.5, 1.75)
    axis.set_xlabel(f"{unit} a rank (CUDA, NCCL and allocator are assumed)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        ncols=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.26)
    )
    c, o = plan.config, plan.options
    axis.set_title(
        f"{c.model.path}, quant {c.model.quant}, {c.adapter.name},"
        f" {step.rows} x {c.data.cutoff:,} tokens\n{gpus(o.nodes, o.gpus_per_node)},"
        f" {c.engine.name}",
        fontsize=10,
    )
    figure.tight_layout()
    try:
        figure.savefig(target)
    except OSError as error:
        raise UserError(f"--plot {target}: cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)
