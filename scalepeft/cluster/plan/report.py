"""A plan as one dictionary (the JSON), and the table and the picture that are made of it."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from scalepeft.cluster.plan import planning
from scalepeft.cluster.plan.gpus import GPUS
from scalepeft.cluster.plan.planning import GIB, Plan
from scalepeft.config import schema as cfg
from scalepeft.core import text
from scalepeft.core.errors import UserError
from scalepeft.core.text import duration, gib

WORDS = {
    "base": "base (frozen)",
    "adapter": "adapter",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "gathered": "gathered parameters",
    "dequantized": "dequantized weight",
    "activations": "activations",
    "loss": "logits and loss",
}
MOMENTS = {"start": "the first gather", "loss": "the loss", "step": "the optimizer's step"}
HINTS = (
    "less memory: engine.activation_checkpointing=true; train.micro_batch=1 or a shorter"
    " data.cutoff",
    "split the model: engine=fsdp2 on more GPUs",
    "a smaller base: model.quant=nf4",
)


def gpus(nodes: int, per_node: int) -> str:
    """A number of GPUs in words."""
    if nodes == 1:
        return f"{per_node} GPU{'s' * (per_node > 1)}"
    return f"{nodes * per_node} GPUs ({nodes} nodes of {per_node})"


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes and seconds."""
    step, options, target = plan.step, plan.options, plan.options.target
    tried = list(planning.counts(plan.config, options.gpus_per_node))
    return {
        "config": cfg.to_dict(plan.config),
        "nodes": options.nodes,
        "gpus_per_node": options.gpus_per_node,
        "dimensions_from": plan.source,
        "base_parameters": step.parameters[0],
        "trained_parameters": step.parameters[1],
        "rows": step.rows,
        "micro_steps": step.micro,
        "resident": {"total": step.resident_bytes, **step.resident},
        "peak": {"total": step.peak_bytes, **step.peak},
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
        "compute_seconds": plan.compute_seconds,
        "exchange_seconds": plan.exchange_seconds,
        "step_seconds": plan.step_seconds,
        "grace_seconds": plan.grace,
        "gpu": asdict(target) if target else None,
        "fits": plan.fits,
        "fits_gpus": [g.name for g in GPUS.values() if plan.need <= g.gib * GIB],
        "smallest": list(plan.smallest) if plan.smallest else None,
        "tried": [nodes * per_node for nodes, per_node in tried],
        "hints": list(HINTS) if plan.fits is False else [],
        "assumptions": _assumptions(plan),
        "simulated_layers": list(step.simulated),
    }


def _assumptions(plan: Plan) -> list[str]:
    p, options, precision = planning, plan.options, plan.config.train.precision
    rate = f"{p.MFU:.0%} of {p.peak_tflops(options.target, precision):g} TFLOP/s"
    lines = [
        f"assumed, not measured on a GPU: {p.CONTEXT_BYTES / GIB:g} GiB CUDA context,"
        f" {p.NCCL_BYTES / GIB:g} GiB NCCL (several ranks), {p.FRAGMENTED:.0%} allocator holes;"
        f" {rate}; collectives {p.NODE_BYTES_PER_SECOND / 1e9:g} GB/s in a node and"
        f" {p.NETWORK_BYTES_PER_SECOND / 1e9:g} GB/s between nodes, not overlapped; disk"
        f" {options.disk / 1e9:g} GB/s, sha256 {p.HASH_BYTES_PER_SECOND / 1e9:g} GB/s; grace"
        f" {p.SAFETY:g} x (step + saves) + {p.MARGIN_SECONDS:g} s",
        f"every row has data.cutoff={plan.config.data.cutoff} tokens, all of them labels;"
        " evaluation is another load",
    ]
    if precision == "fp32":
        lines.append("fp32: an attention kernel that keeps (length, length) scores is not counted")
    if not plan.step.shares.simulated:
        lines.append(
            f"engine {plan.config.engine.name}: one process simulated, what the engine adds by"
            " arithmetic (gathered parameters: an upper bound)"
        )
    return lines


def table(plan: Plan) -> str:
    """The plan in lines of text."""
    v = as_dict(plan)
    c = plan.config
    changed = [
        f"{f.name}={getattr(c.engine, f.name)}"
        for f in fields(c.engine)
        if f.name not in ("name", "device") and getattr(c.engine, f.name) != f.default
    ]
    trained, total = v["trained_parameters"], v["trained_parameters"] + v["base_parameters"]
    memory: list[list[object]] = [["GiB a rank", "between steps", "at the peak"]]
    for kind, words in WORDS.items():
        resident, peak = v["resident"].get(kind, 0), v["peak"].get(kind, 0)
        if resident or peak > 2**10:
            memory.append([words, f"{resident / GIB:.3f}", f"{peak / GIB:.3f}"])
    memory.append(["CUDA, NCCL, allocator*", "", f"{v['runtime_assumed'] / GIB:.3f}"])
    memory.append(["sum", f"{v['resident']['total'] / GIB:.3f}", f"{v['need'] / GIB:.3f}"])
    way, _, block = v["peak_at"].partition(" ")
    facts = [
        ["peak at", f"{way} of block {block}" if block else MOMENTS[way]],
        ["trained parameters", f"{trained:,} of {total:,} ({trained / total:.3%})"],
        ["in host memory", f"{gib(v['host'])} a rank"],
        ["read at load", f"{gib(v['read_at_load'])} a rank"],
        *(
            [e["name"], f"{e['count']:,.0f} a step over {e['ranks']} ranks"
             f"{f' on {n} nodes' if (n := e['nodes']) > 1 else ''}, {gib(e['bytes'])} in all"]
            for e in v["collectives"]
        ),
        ["checkpoint", f"{gib(v['checkpoint'])}, saved in {duration(v['save_seconds'])}*"],
        ["a step", f"{duration(v['step_seconds'])}*: {duration(v['compute_seconds'])} compute"
         f" ({v['flops'] / 1e12:,.2f} TFLOP), {duration(v['exchange_seconds'])} collectives"],
        ["grace period", f"{v['grace_seconds']} s: #SBATCH --signal=B:USR1@{v['grace_seconds']}"],
    ]  # fmt: skip
    if plan.options.step_seconds:
        facts[-2][1] = f"{duration(v['step_seconds'])} (given)"
    quant = c.model.quant + (" twice" if c.model.double_quant else "")
    micro, rows = v["micro_steps"], v["rows"]
    return "\n".join([
        f"plan: {c.model.path} ({plan.source}), quant {quant}, {c.train.precision},"
        f" {c.adapter.name}",
        f"on {gpus(v['nodes'], v['gpus_per_node'])}, engine {', '.join([c.engine.name, *changed])},"
        f" {micro} micro-batch{'es' * (micro > 1)} of {rows} row{'s' * (rows > 1)} of"
        f" {c.data.cutoff:,} tokens a step and rank",
        "",
        *text.table(memory),
        "",
        *text.table([fact for fact in facts if v["host"] or fact[0] != "in host memory"], left=2),
        "",
        *_verdict(plan, v),
        "",
        *(f"* {line}" for line in v["assumptions"]),
    ])  # fmt: skip


def _verdict(plan: Plan, v: dict[str, Any]) -> list[str]:
    target = plan.options.target
    if target is None:
        others = [gpu.name for gpu in GPUS.values() if gpu.name not in v["fits_gpus"]]
        verdicts = {"fits": v["fits_gpus"], "does not fit": others}
        return [f"{word} {', '.join(names)}" for word, names in verdicts.items() if names]
    name = f"{target.name} ({target.gib:g} GiB)" if plan.options.gpu else f"GPUs of {target.name}"
    room = target.gib * GIB - v["need"]
    lines = [
        f"fits {name}, {gib(room)} free" if v["fits"] else
        f"does NOT fit {name}: {gib(-room)} too much"
    ]  # fmt: skip
    if v["smallest"]:
        lines.append(f"the smallest that fits: {gpus(*v['smallest'])}")
    elif plan.options.advise:
        lines.append(
            f"engine {plan.config.engine.name} fits on no number of GPUs (tried"
            f" {', '.join(map(str, v['tried']))}; train.global_batch="
            f"{plan.config.train.global_batch} allows no more)"
        )
    return [*lines, *v["hints"]]


def plot(plan: Plan, target: Path) -> None:
    """Draw memory by kind as two bars. Raise UserError if the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    left = [0.0, 0.0]
    for kind, words in WORDS.items():
        sizes = [k.get(kind, 0.0) / GIB for k in (plan.step.peak, plan.step.resident)]
        if any(sizes):
            axis.barh(["at the peak", "between steps"], sizes, left=left, label=words)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if plan.options.target and plan.options.target.gib < 3 * left[0]:
        axis.axvline(plan.options.target.gib, color="black", linestyle="--")
    axis.set_xlabel("GiB a rank")
    axis.legend(ncols=4, fontsize=8)
    try:
        figure.savefig(target)
    except OSError as error:
        raise UserError(f"--plot {target}: cannot be written: {error.strerror}") from None
