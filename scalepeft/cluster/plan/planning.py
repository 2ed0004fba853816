"""From a simulated step to a plan: times, the grace period, whether it fits.

What is assumed and not computed stands here by name.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scalepeft.cluster.plan import gpus
from scalepeft.cluster.plan.gpus import GPUS, Gpu
from scalepeft.cluster.plan.memory import Step, measure, resident
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.models import dimensions
from scalepeft.models.dimensions import Source
from scalepeft.run.saver import GATHERED_BYTES

GIB = 2**30
# Assumed: never measured by this project on a GPU.
CONTEXT_BYTES = 0.75 * GIB  # CUDA context, kernels, cuBLAS workspaces of a process
NCCL_BYTES = 0.75 * GIB  # buffers of the communicators, with more than one rank
FRAGMENTED = 0.05  # of what comes and goes in a step: holes in the caching allocator
MFU = 0.35  # of the dense bf16 peak
NODE_BYTES_PER_SECOND = 150e9  # of a rank's collective inside a node (NVLink)
NETWORK_BYTES_PER_SECOND = 20e9  # of a rank's collective between nodes
HASH_BYTES_PER_SECOND = 0.5e9  # sha256 of a checkpoint on one core
MARGIN_SECONDS = 30.0  # agreement, the end of the ranks, scontrol requeue
SAFETY = 2.0  # on step and save, both of which are estimates


@dataclass(frozen=True)
class Options:
    """Where the run is to go.

    Attributes:
        nodes: of the job
        gpus_per_node: of each node; one rank each
        gpu: A100-40, A100-80, L40S, H100, H200, B200, or nvidia-smi's name of one
        memory: GIB: of a GPU, in place of its name
        disk: bytes a second of the run folder's file system
        step_seconds: S: measured, in place of the estimate
        network: whether the hub may be asked for ``config.json``
        advise: search for the smallest number of GPUs
    """

    nodes: int = 1
    gpus_per_node: int = 1
    gpu: str | None = None
    memory: float | None = None
    disk: float = 1e9
    step_seconds: float | None = None
    network: bool = True
    advise: bool = True

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "memory", "disk", "step_seconds"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                flag = "--disk-gbps" if name == "disk" else f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value:g}: expected a number above 0")
        if self.gpu is not None and self.memory is not None:
            raise UserError("give one of --gpu and --memory, not both")
        if self.gpu is not None:
            gpus.find(self.gpu)

    @property
    def target(self) -> Gpu | None:
        """The GPU that is asked about."""
        if self.memory is not None:
            return Gpu(f"{self.memory:g} GiB", self.memory, 0, 0)
        return gpus.find(self.gpu) if self.gpu is not None else None


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes and seconds; of one rank unless it says otherwise.

    Attributes:
        config: of the run.
        options: where it is to go.
        source: where the base's dimensions came from.
        step: memory and work of a rank.
        runtime: bytes of CUDA, NCCL and the allocator (assumed).
        compute_seconds: of a step (assumed rate).
        exchange_seconds: of a step (assumed rates), not overlapped.
        save_seconds: of a checkpoint (assumed rates).
        grace: seconds that ``--signal=B:USR1@SECONDS`` needs.
        fits: whether it fits ``options.target``; None without one.
        smallest: (nodes, GPUs a node) of the smallest number of GPUs that fits; None if none does.
    """

    config: RunConfig
    options: Options
    source: str
    step: Step
    runtime: float
    compute_seconds: float
    exchange_seconds: float
    save_seconds: float
    grace: int
    fits: bool | None
    smallest: tuple[int, int] | None

    @property
    def need(self) -> float:
        """Bytes of a GPU: the peak and the runtime's part."""
        return self.step.peak_bytes + self.runtime

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step."""
        return self.options.step_seconds or self.compute_seconds + self.exchange_seconds

    @property
    def stop_seconds(self) -> float:
        """Of a step and a save: what a stop takes at the assumed rates, without any safety."""
        return self.step_seconds + self.save_seconds


def plan(config: RunConfig, options: Options) -> Plan:
    """Plan a run.

    Raises:
        UserError: a mistake in the config, or a number of ranks that it cannot take; a base whose
            dimensions cannot be had; a GPU that is not known.
    """
    source = dimensions.find(config.model, options.network)
    world, target = options.nodes * options.gpus_per_node, options.target
    step = measure(config, source, world, options.gpus_per_node)
    fits = _fits(step, world, target) if target else None
    compute = step.flops / (peak_tflops(target, config.train.precision) * MFU * 1e12)
    exchange = sum(_seconds(key, size) for key, (_, size) in step.exchanges.items())
    save, saves = _save_seconds(config, step, world, options.disk)
    step_seconds = options.step_seconds or compute + exchange
    waits = SAFETY * (step_seconds + saves * save) + MARGIN_SECONDS
    smallest = None
    if target and options.advise:
        smallest = _smallest(config, source, options, target, bool(fits))
    return Plan(
        config, options, source.where, step, _runtime(step, world), compute, exchange, save,
        max(60, 30 * math.ceil(waits / 30)), fits, smallest,
    )  # fmt: skip


def _save_seconds(config: RunConfig, step: Step, world: int, disk: float) -> tuple[float, int]:
    """(seconds of a save, saves to leave time for): what an asynchronous one under way has written
    when a stop gives it up still goes to the disk.
    """
    mode = config.train.save_mode
    if mode == "auto":
        mode = "async" if step.checkpoint > GATHERED_BYTES else "gathered"
    hashed = step.checkpoint / (1 if mode == "gathered" else world)
    return step.checkpoint / disk + hashed / HASH_BYTES_PER_SECOND, 1 + (mode == "async")


def peak_tflops(target: Gpu | None, precision: str) -> float:
    """Peak rate of a GPU; of the slowest one where it is not named."""
    gpu = target if target and target.tflops else GPUS["a100-80"]
    return gpu.tflops if precision == "bf16" else gpu.tflops_fp32


def _runtime(step: Step, world: int) -> float:
    comes_and_goes = max(0.0, step.peak_bytes - step.resident_bytes)
    return CONTEXT_BYTES + NCCL_BYTES * (world > 1) + FRAGMENTED * comes_and_goes


def _fits(step: Step, world: int, target: Gpu) -> bool:
    return step.peak_bytes + _runtime(step, world) <= target.gib * GIB


def _seconds(key: tuple[str, int, int], size: float) -> float:
    name, ranks, nodes = key
    rate = NODE_BYTES_PER_SECOND if nodes == 1 else NETWORK_BYTES_PER_SECOND
    return (2 if name == "all-reduce" else 1) * size * (ranks - 1) / ranks / rate


def counts(config: RunConfig, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    """(nodes, GPUs a node) to try, smallest first: 1, 2, 4, ... of a node, then whole nodes."""
    batch = config.train.global_batch
    per_node = 1
    while per_node < gpus_per_node:
        if batch % per_node == 0:
            yield 1, per_node
        per_node *= 2
    nodes = 1
    while nodes * gpus_per_node <= batch:
        if batch % (nodes * gpus_per_node) == 0:
            yield nodes, gpus_per_node
        nodes *= 2


def _smallest(
    config: RunConfig, source: Source, options: Options, target: Gpu, fits: bool
) -> tuple[int, int] | None:
    """The first of ``counts`` that fits; whether the asked count does is known."""
    asked = options.nodes, options.gpus_per_node
    for nodes, per_node in counts(config, options.gpus_per_node):
        world = nodes * per_node
        if fits and world >= math.prod(asked):
            break
        if (nodes, per_node) == asked:
            continue
        try:
            step, _ = resident(config, source, world, per_node)
            step.peak = step.resident
            # What stays is cheap to know and often too much already.
            if _fits(step, world, target) and _fits(
                measure(config, source, world, per_node), world, target
            ):
                return nodes, per_node
        except UserError:  # the engine cannot run on so many
            continue
    return asked if fits else None
