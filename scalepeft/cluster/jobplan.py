"""Does a job that is about to queue fit its GPUs, and does its warning leave time for a save?"""

from scalepeft.cluster import sbatch
from scalepeft.cluster.plan import gpus, planning
from scalepeft.config import changes
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides
from scalepeft.core.log import say
from scalepeft.models import dimensions


def check(configs: list[RunConfig], header: dict[str, str], name: str | None) -> None:
    """Plan each kind of run once and say whether it fits the GPU ``name``, or that of ``header``.
    Raises UserError: the tensors alone do not fit, ``--signal`` leaves less than a step and a save.
    """
    gpu, by = (gpus.find(name), "--gpu") if name else sbatch.gpu_of(header)
    fix = "whether the run fits is not looked at; add --gpu NAME"
    absent = f"{by or 'the job file'} names no GPU that is known here: {fix}"
    say(f"plan: for GPU {gpu.name}, by {by}" if gpu else f"plan: {absent}")
    nodes, gpu_name = sbatch.nodes_of(header) or 1, gpu.name if gpu else None
    per_node = max(1, (sbatch.ranks_of(header) or 1) // nodes)
    where = gpus.Options(nodes, per_node, gpu_name, network=False)
    kinds = {f"{c.model} {c.adapter} {changes.deciding(c, Decides.SPEED)}": c for c in configs}
    for config in kinds.values():
        try:
            dimensions.find(config.model, network=False)
        except UserError as error:
            say(f"not planned: {error}")
            continue
        _check_one(planning.plan(config, where), header)


def _check_one(plan: planning.Plan, header: dict[str, str]) -> None:
    """Raise UserError for what fails whatever is assumed; what depends on that is only said."""
    gpu, warning = plan.options.target, sbatch.warning_seconds(header)
    tensors, need = plan.step.peak_bytes / planning.GIB, plan.need / planning.GIB
    stop, signal = f"{plan.stop_seconds:.1f} s", f"--signal=B:USR1@{plan.grace}"
    rows = f"rows of data.cutoff={plan.config.data.cutoff} tokens"
    if gpu and tensors > gpu.gib:
        raise UserError(
            f"the run's tensors alone, with {rows}, need {tensors:.1f} GiB a GPU, {gpu.name} has"
            f" {gpu.gib:g}: see scalepeft plan ... --gpu {gpu.name} for what to change, or add"
            " --no-plan"
        )
    late = f"--signal={header.get('--signal')} comes {warning} s before the time limit"
    if warning is not None and warning < plan.stop_seconds:
        what = f"{late}, a step and a save alone take {stop} ({plan.basis}, {rows})"
        raise UserError(f"{what}; write {signal}, or add --no-plan")
    times = f"{stop} for a step and a save, grace period {plan.grace} s"
    room = f"{plan.config.adapter.name}: {need:.1f} GiB a GPU at the peak"
    say(f"plan: {room}, {times} ({plan.basis}; see scalepeft plan)")
    if gpu and not plan.fits:
        say(
            f"plan: tight: {tensors:.1f} GiB of tensors fit {gpu.name} ({gpu.gib:g} GiB), with"
            f" CUDA, NCCL and the allocator {need:.1f} GiB do not (scalepeft plan)"
        )
    if warning is not None and warning < plan.grace:
        say(f"plan: {late}; {signal} leaves {planning.SAFETY:g} times what is assumed")
