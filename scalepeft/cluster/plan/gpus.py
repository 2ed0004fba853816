"""GPUs that a plan knows, by our names, nvidia-smi's and Slurm's; and what a plan is asked."""

import math
import re
from dataclasses import dataclass

from scalepeft.core.errors import UserError, nearest

# Words that say nothing of memory or rate; any other (NVL, a MIG slice) makes it another GPU.
FILLER = re.compile(r"nvidia|tesla|[hd]gx|sxm\d?|pcie|hbm\d?e?")


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory as torch sees it, dense bf16 peak, fp32 peak without tensor cores."""

    name: str
    gib: float
    tflops: float
    tflops_fp32: float


# Name with the maker's GB -> the GPU. Where a model has one size its name alone is enough.
KNOWN = {
    "a100-40": Gpu("A100-40", 39.4, 312, 19.5),
    "l40s-48": Gpu("L40S", 44.4, 362, 91.6),
    "a100-80": Gpu("A100-80", 79.1, 312, 19.5),
    "h100-80": Gpu("H100", 79.1, 989, 67),
    "h200-141": Gpu("H200", 139.7, 989, 67),
    "b200-180": Gpu("B200", 178.3, 2250, 80),
}
GPUS = {gpu.name.lower(): gpu for gpu in KNOWN.values()}


def named(text: str) -> Gpu | None:
    """Return the GPU that ``NVIDIA A100-SXM4-80GB`` or ``a100_80g`` names, or None."""
    words = [w for w in re.split(r"[\s_-]+", text.strip().lower()) if not FILLER.fullmatch(w)]
    key = "-".join(re.sub(r"^(\d+)(g|gb|gib)$", r"\1", word) for word in words)
    return {**KNOWN, **GPUS}.get(key)


def find(text: str) -> Gpu:
    """Return ``named(text)``. Raise UserError if it is None."""
    if (gpu := named(text)) is None:
        names = [gpu.name for gpu in GPUS.values()]
        sizes = [name for name in names if name.startswith(f"{text.upper()}-")]
        raise UserError(
            f"no GPU '{text}'.{nearest(text.upper(), sizes or names)} Known:"
            f" {', '.join(names)}, also as nvidia-smi writes them; for another"
            " one: scalepeft plan --memory GIB"
        )
    return gpu


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
    """

    nodes: int = 1
    gpus_per_node: int = 1
    gpu: str | None = None
    memory: float | None = None
    disk: float = 1e9
    step_seconds: float | None = None
    network: bool = True

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "memory", "disk", "step_seconds"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                flag = "--disk-gbps" if name == "disk" else f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value:g}: expected a number above 0")
        if self.gpu is not None and self.memory is not None:
            raise UserError("give one of --gpu and --memory, not both")
        _ = self.target  # a name that is not known is said here

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def target(self) -> Gpu | None:
        """The GPU that is asked about."""
        if self.memory is not None:
            return Gpu(f"{self.memory:g} GiB", self.memory, 0, 0)
        return find(self.gpu) if self.gpu is not None else None
