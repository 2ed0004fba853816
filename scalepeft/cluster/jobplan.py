"""Does a job that is about to queue fit its GPUs, and does its warning leave time for a save?"""

from scalepeft.cluster import sbatch
from scalepeft.cluster.plan import gpus, planning
from scalepeft.config import changes
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides
from scalepeft.core.log import say
from scalepeft.models import dimensions as sources


def check(configs: list[RunConfig], header: dict[str, str], name: str | None) -> None:
    """Plan each kind of run once and say whether it fits.

    Args:
        configs: of the runs.
        header: sbatch options of the job.
        name: of a GPU; None to take it from ``header``.

    Raises:
        UserError: the tensors alone do not fit, or ``--signal`` leaves less than a step and a save.
    """
    gpu, by = (gpus.find(name), "--gpu") if name else sbatch.gpu_of(header)
    if gpu:
        say(f"plan: for GPU {gpu.name}, by {by}")
    else:
        say(
            f"plan: {by or 'the job file'} names no GPU that is known here: whether the run fits is"
            " not looked at; add --gpu NAME"
        )
    where = planning.Options(
        nodes=sbatch.nodes_of(header) or 1,
        gpus_per_node=sbatch.tasks_per_node(header),
        gpu=gpu.name if gpu else None,
        network=False,
        advise=False,
    )
    seen = set()
    for config in configs:
        kind = f"{config.model} {config.adapter} {changes.deciding(config, Decides.SPEED)}"
        if kind in seen:
            continue
        seen.add(kind)
        try:
            sources.find(config.model, network=False)
        except UserError as error:
            say(f"not planned: {error}")
            continue
        _check_one(planning.plan(config, where), header)


def _check_one(planned: planning.Plan, header: dict[str, str]) -> None:
    """Raise UserError for what fails whatever is assumed; what depends on that is only said."""
    need, gpu = planned.need / planning.GIB, planned.options.target
    warning = sbatch.warning_seconds(header)
    tensors, stop = planned.step.peak_bytes / planning.GIB, f"{planned.stop_seconds:.1f} s"
    rows = f"rows of data.cutoff={planned.config.data.cutoff} tokens"
    if gpu and tensors > gpu.gib:
        raise UserError(
            f"the run's tensors alone, with {rows}, need {tensors:.1f} GiB a GPU, {gpu.name} has"
            f" {gpu.gib:g}: see scalepeft plan ... --gpu {gpu.name} for what to change, or add"
            " --no-plan"
        )
    if warning is not None and warning < planned.stop_seconds:
        raise UserError(
            f"--signal={header['--signal']}: comes {warning} s before the time limit, a step and a"
            f" save alone take {stop} (assumed: {planning.MFU:.0%} of a GPU's peak, {rows});"
            f" write --signal=B:USR1@{planned.grace}, or add --no-plan"
        )
    say(
        f"plan: {planned.config.adapter.name}: {need:.1f} GiB a GPU at the peak, {stop} for a step"
        f" and a save, grace period {planned.grace} s (assumed rates: scalepeft plan)"
    )
    if gpu and not planned.fits:
        say(
            f"plan: tight: {tensors:.1f} GiB of tensors fit {gpu.name} ({gpu.gib:g} GiB), with what"
            f" is assumed for CUDA, NCCL and the allocator {need:.1f} GiB do not"
        )
    if warning is not None and warning < planned.grace:
        say(
            f"plan: --signal={header['--signal']} comes {warning} s before the time limit;"
            f" --signal=B:USR1@{planned.grace} leaves {planning.SAFETY:g} times what is assumed"
        )
