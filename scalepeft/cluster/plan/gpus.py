"""GPUs that a plan knows, and the one that a text names: in our words, nvidia-smi's or Slurm's."""

import re
from dataclasses import dataclass

from scalepeft.core.errors import UserError, nearest

# Words of a name that say nothing of memory or rate as a plan sees them. Any other (NVL, a MIG
# slice) makes it another GPU.
MAKE = re.compile(r"nvidia|tesla|[hd]gx|sxm\d?|pcie|hbm\d?e?")
SIZE = re.compile(r"(\d+)(?:g|gb|gib)?")


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory as torch sees it, dense bf16 peak, fp32 peak without tensor cores."""

    name: str
    gib: float
    tflops: float
    tflops_fp32: float


# (maker's GB as names have it; the GPU). A model that stands here twice is named with its size.
KNOWN = (
    (40, Gpu("A100-40", 39.4, 312, 19.5)),
    (48, Gpu("L40S", 44.4, 362, 91.6)),
    (80, Gpu("A100-80", 79.1, 312, 19.5)),
    (80, Gpu("H100", 79.1, 989, 67)),
    (141, Gpu("H200", 139.7, 989, 67)),
    (180, Gpu("B200", 178.3, 2250, 80)),
)
GPUS = {gpu.name.lower(): gpu for _, gpu in KNOWN}


def named(text: str) -> Gpu | None:
    """The one GPU that ``text`` names, word by word; None where it is another, or may be two."""
    words = [w for w in re.split(r"[\s_-]+", text.strip().lower()) if not MAKE.fullmatch(w)]
    sizes = {int(size[1]) for word in words[1:] if (size := SIZE.fullmatch(word))}
    if not words or len(words) - 1 != len(sizes):
        return None
    found = [
        gpu
        for size, gpu in KNOWN
        if gpu.name.lower().partition("-")[0] == words[0] and sizes <= {size}
    ]
    return found[0] if len(found) == 1 else None


def find(text: str) -> Gpu:
    """As ``named``. Raises UserError: none, or more than one."""
    if (gpu := named(text)) is None:
        known = [g.name for g in GPUS.values()]
        sizes = [name for name in known if name.startswith(f"{text.upper()}-")]
        raise UserError(
            f"no GPU '{text}'.{nearest(text, sizes or known)} Known: {', '.join(known)}, also"
            " as nvidia-smi writes them; for another one: scalepeft plan --memory GIB"
        )
    return gpu
