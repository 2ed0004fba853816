"""What one process sees of its node: versions, device, limits, the base model."""

import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import socket
from pathlib import Path
from typing import Any

import torch

from scalepeft.build import task_of
from scalepeft.cluster.doctor.filesystem import existing
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.files import try_to_write
from scalepeft.data.rows import expand, paths_of
from scalepeft.data.tasks.base import Split
from scalepeft.models import hub as models
from scalepeft.models import quant
from scalepeft.models.hub import BUILTIN
from scalepeft.models.weights import Weights
from scalepeft.parallel import zero
from scalepeft.parallel.ranks import pick_device

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "deepspeed",
            "tensorboard", "wandb", "scalepeft")  # fmt: skip
BOUND = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)")
VARIABLES = re.compile(
    r"(NCCL|GLOO|TORCH_NCCL)_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|HF_HUB_OFFLINE|HF_HOME"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|NTASKS_PER_NODE|RESTART_COUNT|STEP_NODELIST)"
)


def versions() -> dict[str, str]:
    """Of Python, of the packages that are installed, and of this very source."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.distributed.is_nccl_available() and torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    found["source"] = digest.hexdigest()[:8]
    return found


def lower_bounds() -> dict[str, str]:
    """Package -> the version from which scalepeft takes it; empty in a checkout that is not
    installed.
    """
    try:
        lines = importlib.metadata.requires("scalepeft") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (BOUND.match(line) for line in lines)
    return {m[1]: m[2].rstrip(".") for m in found if m}


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def device(wanted: str, local_rank: int) -> dict[str, Any]:
    """The device that this rank takes.

    Raises:
        UserError: there is none for it.
    """
    chosen = pick_device(wanted, local_rank)
    driver = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", driver.read_text()) if driver.is_file() else None
    found: dict[str, Any] = {"type": str(chosen), "driver": version[0] if version else None}
    if chosen.type == "cpu":
        return {**found, "name": "CPU", "cores": len(os.sched_getaffinity(0))}
    torch.cuda.set_device(chosen)
    torch.zeros(1, device=chosen)
    properties = torch.cuda.get_device_properties(chosen)
    free, total = torch.cuda.mem_get_info(chosen)
    return {
        **found,
        "name": properties.name,
        "uuid": str(properties.uuid),
        "memory": total,
        "free": free,
        "capability": [properties.major, properties.minor],
        "bf16": properties.major >= 8,
    }


def kernels(config: RunConfig | None, place: torch.device) -> str | None:
    """Runs the self-check of the config's storage; of all that can be had, without a config.

    Returns:
        What was checked; None if nothing is quantised.

    Raises:
        UserError: bitsandbytes is missing.
        RuntimeError: a kernel gives wrong bytes.
    """
    if config is not None:
        formats = [quant.get_format(config.model.quant, config.model.double_quant)]
    else:
        formats = [quant.get_format("int8")]
        if "bitsandbytes" in versions():
            formats.append(quant.get_format("nf4"))
    checked = [fmt for fmt in formats if fmt is not None]
    for fmt in checked:
        quant.self_check(place, fmt)
    return " and ".join(fmt.name for fmt in checked) or None


def deepspeed(device_type: str) -> str | None:
    """Imports DeepSpeed as the engine does.

    Returns:
        Its version; None where it is not installed, which ``versions`` tells.

    Raises:
        Exception: whatever the import raises, as where it finds GPUs and no CUDA compiler.
    """
    version = versions().get("deepspeed")
    if version is not None:
        zero._deepspeed(device_type)
    return version


def limits() -> dict[str, Any]:
    """Threads, cores, resource limits, shared memory, variables, the cache folder."""
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    cache = Path(os.environ.get("SCALEPEFT_CACHE") or Path.home() / ".cache" / "scalepeft")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked": None if locked == resource.RLIM_INFINITY else locked,
        "shm": shm.f_bavail * shm.f_frsize if shm else 0,
        "variables": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k)},
        "cache": str(cache),
        "cache_error": _complaint(cache),
        "address": _address(),
    }


def _complaint(folder: Path) -> str | None:
    try:
        try_to_write(existing(folder))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _address() -> str | None:
    """What this host's name means to itself; gloo listens there."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def model(config: RunConfig) -> dict[str, str]:
    """Looks for base and tokenizer without a network.

    Returns:
        ``state`` (``here``, ``made``: in the cache when it is needed, ``absent``: from the hub
        when it is needed), ``folder`` and ``fingerprint`` where it is here.

    Raises:
        UserError: it is here and cannot be used, or it is not and there is no hub.
    """
    name = config.model.path
    if name == BUILTIN:
        return {"state": "made"}
    models.check_place(name)
    folder = Path(name) if Path(name).is_dir() else cached(name, config.model.revision)
    if folder is None:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise UserError(
                f"model.path={name}: not in the hub's cache, and HF_HUB_OFFLINE is set; download it"
                " where there is a network, or name its folder"
            )
        return {"state": "absent"}
    try:
        models.architecture(folder)
        weights = Weights(folder)
    except UserError:
        if str(folder) == name:
            raise
        return {"state": "absent"}  # a download that was broken off goes on
    models.load_tokenizer(config.model, folder)
    return {"state": "here", "folder": str(folder), "fingerprint": weights.fingerprint()}


def data(config: RunConfig) -> dict[str, list[Any]]:
    """Looks for the files of ``data.train``, ``valid`` and ``test``, not into them.

    Returns:
        Split -> [number of files, bytes of those that are no data sets of the hub].

    Raises:
        UserError: one is missing.
    """
    found: dict[str, list[Any]] = {}
    for split in ("train", "valid", "test"):
        if sources := getattr(config.data, split):
            files = expand(sources, f"data.{split}")
            local = [path for source in files for path in paths_of(source)]
            found[split] = [len(files), sum(f.stat().st_size for f in local)]
    return found


def rows(config: RunConfig) -> dict[str, list[int]]:
    """Reads the rows that training reads, as it does; data sets of the hub are left to it.

    Returns:
        Split -> [number of usable rows, number of broken ones].

    Raises:
        UserError: no rows, an unreadable file, a broken row.
    """
    task, found = task_of(config), dict[str, list[int]]()
    splits: tuple[Split, ...] = ("train", "valid") if config.data.valid else ("train",)
    for split in splits:
        if not any(s.startswith("hf://") for s in getattr(config.data, split)):
            found[split] = [len(task.examples(split)), len(task.skipped)]
    return found


def cached(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model in this node's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
