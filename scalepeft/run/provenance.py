"""With what something was made: versions, the commit of this code, the device, its memory."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from scalepeft import __version__
from scalepeft.core.slurm import output_of


def versions(*libraries: str) -> dict[str, str]:
    """Name -> version of scalepeft, of Python and of these libraries."""
    found = {"scalepeft": __version__, "python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit of this code, ``+changes`` after it where files differ; None if installed."""
    root = Path(__file__).resolve().parents[2]
    kept = root / "COMMIT"  # of the copy that launch/submit made
    if kept.is_file():
        words = kept.read_text().split(None, 1)
        return words[0] + ("+changes" if len(words) > 1 else "") if words else None
    if not (root / ".git").exists():  # else it would be that of whatever holds site-packages
        return None
    git = ("git", "--no-optional-locks", "-C", str(root))
    head = output_of(*git, "rev-parse", "HEAD").strip()
    changed = output_of(*git, "status", "--short", "-uno").strip()
    return head + ("+changes" if changed else "") if head else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peak_memory() -> dict[str, int | None]:
    """The most bytes that this process has held: ``peak_memory`` of CUDA's allocator, if it is
    used, and what that had ``peak_reserved``; ``peak_resident`` since its program began (``VmHWM``:
    what ``wait4`` tells counts the parent's too), where /proc says.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return {
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "peak_resident": None if kib is None else kib * 1024,
    }
