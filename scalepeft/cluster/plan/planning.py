"""From a simulated step to a plan: times, the grace period, fit; what is assumed stands here."""

import math
from contextlib import suppress
from dataclasses import replace
from functools import cached_property

from scalepeft.cluster.plan.gpus import GPUS, Options
from scalepeft.cluster.plan.memory import measure, resident
from scalepeft.cluster.plan.simulate import Step
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.models import dimensions
from scalepeft.models.dimensions import Source
from scalepeft.run.saver import GATHERED_BYTES

GIB = 2**30
# Assumed; ``Options.found`` has measured ones in place of the first, third and fourth.
CONTEXT_BYTES = 0.75 * GIB  # CUDA context, kernels, cuBLAS workspaces of a process
NCCL_BYTES = 0.75 * GIB  # buffers of the communicators, with more than one rank
FRAGMENTED = 0.05  # of what comes and goes in a step: holes in the caching allocator
MFU = 0.35  # of the dense bf16 peak
NODE_BYTES_PER_SECOND = 150e9  # of a rank's collective inside a node (NVLink)
NETWORK_BYTES_PER_SECOND = 20e9  # of a rank's collective between nodes
HASH_BYTES_PER_SECOND = 0.5e9  # sha256 of a checkpoint on one core
MARGIN_SECONDS = 30.0  # agreement, the end of the ranks, scontrol requeue
SAFETY = 2.0  # on step and save, both of which are estimates


class Plan:
    """What a run needs. Bytes and seconds; of one rank unless it says otherwise."""

    def __init__(self, config: RunConfig, options: Options, source: Source, step: Step) -> None:
        self.config, self.options, self.source, self.step = config, options, source, step
        target, world, saved = options.target, options.world, step.checkpoint
        comes_and_goes = max(0.0, step.peak_bytes - step.resident_bytes)
        found = options.found or {}
        context = found["CUDA GiB"] * GIB if found else CONTEXT_BYTES
        holes = found.get("holes", FRAGMENTED) * comes_and_goes
        self.runtime = context + NCCL_BYTES * (world > 1) + holes  # bytes
        self.need = step.peak_bytes + self.runtime
        self.fits = self.need <= target.gib * GIB if target else None
        rated = target if target and target.tflops else GPUS["a100-80"]  # the slowest one
        bf16 = config.train.precision == "bf16"
        rate = (rated.tflops if bf16 else rated.tflops_fp32) * MFU
        self.basis = f"assumed: {MFU:.0%} of a GPU's peak"
        if found and bf16:
            rate, self.basis = found["TFLOP/s of plan"], f"measured: {found['file']}"
        self.compute_seconds = step.flops / (rate * 1e12)
        self.exchange_seconds = sum(  # of a step, not overlapped with compute_seconds
            (2 if name == "all-reduce" else 1) * size * (ranks - 1) / ranks
            / (NODE_BYTES_PER_SECOND if nodes == 1 else NETWORK_BYTES_PER_SECOND)
            for (name, ranks, nodes), (_, size) in step.exchanges.items()
        )  # fmt: skip
        self.step_seconds = options.step_seconds or self.compute_seconds + self.exchange_seconds
        mode = config.train.save_mode
        if mode == "auto":
            mode = "async" if saved > GATHERED_BYTES else "gathered"
        hashed = saved / (1 if mode == "gathered" else world)
        self.save_seconds = saved / options.disk + hashed / HASH_BYTES_PER_SECOND
        self.stop_seconds = self.step_seconds + self.save_seconds  # without any safety
        # What an asynchronous save under way has written still goes to the disk.
        saves = 1 + (mode == "async")
        waits = SAFETY * (self.step_seconds + saves * self.save_seconds) + MARGIN_SECONDS
        self.grace = max(60, 30 * math.ceil(waits / 30))  # of --signal=B:USR1@SECONDS

    @cached_property
    def smallest(self) -> tuple[int, int] | None:
        """(nodes, GPUs a node) of the smallest number of GPUs that fits; None if none does."""
        config, source, options = self.config, self.source, self.options
        for nodes, per_node in counts(config, options.gpus_per_node):
            where = replace(options, nodes=nodes, gpus_per_node=per_node)
            if self.fits and where.world >= options.world:
                break
            with suppress(UserError):  # the engine cannot run on so many
                # What stays is cheap to know and often too much already.
                steps = (of(config, source, where.world, per_node) for of in (resident, measure))
                if all(Plan(config, where, source, step).fits for step in steps):
                    return nodes, per_node
        return (options.nodes, options.gpus_per_node) if self.fits else None


def plan(config: RunConfig, options: Options) -> Plan:
    """Plan a run. Raise UserError for a bad config, a number of ranks, an unknown base or GPU."""
    source = dimensions.find(config.model, options.network)
    step = measure(config, source, options.world, options.gpus_per_node)
    return Plan(config, options, source, step)


def counts(config: RunConfig, gpus_per_node: int) -> list[tuple[int, int]]:
    """(nodes, GPUs a node) to try, smallest first: 1, 2, 4, ... of a node, then whole nodes."""
    batch = config.train.global_batch
    powers = [2**i for i in range(batch.bit_length())]
    tried = [(1, n) for n in powers if n < gpus_per_node] + [(n, gpus_per_node) for n in powers]
    return [count for count in tried if batch % math.prod(count) == 0]
