"""GPUs that a plan knows, by our names, nvidia-smi's and Slurm's; and what a plan is asked."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from scalepeft.core.errors import UserError, nearest
from scalepeft.core.files import parse_json, read_text

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
RESULTS = Path(__file__).resolve().parents[3] / "docs/benchmarks"  # of a checkout
COLUMNS = ("TFLOP/s of plan", "CUDA GiB", "holes")  # that bench gpu writes for a plan
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
        near, known = nearest(text.upper(), sizes or names), ", ".join(names)
        what = f"no GPU '{text}'.{near} Known: {known}, also as nvidia-smi writes them"
        raise UserError(f"{what}; for another one: scalepeft plan --memory GIB")
    return gpu


def measured(file: Path) -> dict[str, Any]:
    """Return ``file``, ``device`` and ``COLUMNS`` of a gpu.json: the median of a plan's FLOP over a
    step's time in bf16; the most GiB beside the allocator; the most holes over what comes and goes.
    Raises UserError: they are not there.
    """
    try:
        found = parse_json(read_text(file))
        device = found["env"]["device"] + " --tiny" * found["env"]["tiny"]  # which names no GPU
        rows = [found["training"][key] | row for key, row in found["plan"].items()]
        rates, *most = ([float(row[key]) for row in rows if key in row] for key in COLUMNS)
        figures = median(rates), *map(max, most)
        if not all(0 <= figure < math.inf for figure in figures) or not figures[0]:
            raise ValueError(f"{', '.join(COLUMNS)}: {figures}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{file}: {type(error).__name__}: {error}"
        raise UserError(f"{what}: expected gpu.json of a full `scalepeft bench gpu`") from None
    return {"file": str(file), "device": device, **dict(zip(COLUMNS, figures, strict=True))}


@dataclass(frozen=True)
class Options:
    """Where the run is to go.

    Attributes:
        nodes: of the job
        gpus_per_node: of each node; one rank each
        gpu: A100-40, A100-80, L40S, H100, H200, B200, or nvidia-smi's name of one
        memory: GIB: of a GPU, in place of its name
        measured: FILE: gpu.json of bench gpu on that GPU, in place of what is assumed
        disk: bytes a second of the run folder's file system
        step_seconds: S: measured, in place of the estimate
        network: whether the hub may be asked for ``config.json``
    """

    nodes: int = 1
    gpus_per_node: int = 1
    gpu: str | None = None
    memory: float | None = None
    measured: str | None = None
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
        _ = self.target, self.found  # a name that is not known is said here

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

    @cached_property
    def found(self) -> dict[str, Any] | None:
        """Of the file ``measured``, or of a checkout's newest of this GPU; None without one."""
        files = sorted(RESULTS.glob("*bench-gpu*.json"), reverse=True) if self.gpu else []
        for file in [Path(self.measured)] if self.measured is not None else files:
            found = measured(file)
            if self.target and named(found["device"]) == self.target:
                return found
            if self.measured is not None:
                what = f"--measured {file}: of '{found['device']}', which --gpu does not name"
                raise UserError(f"{what}; give both of the same GPU")
        return None
