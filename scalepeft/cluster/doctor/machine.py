"""What each rank finds on its node: versions, cache, devices, kernels."""

import contextlib
import hashlib
import importlib.metadata
import os
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scalepeft.cluster.doctor.check import Context, Values, Verdict, by_value, where
from scalepeft.cluster.doctor.storage import check_writable
from scalepeft.core.errors import UserError
from scalepeft.core.files import cache_folder
from scalepeft.core.text import size
from scalepeft.models import quant
from scalepeft.parallel import zero
from scalepeft.parallel.ranks import pick_device
from scalepeft.run import provenance

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
# Package -> the key that needs it, the value for which (None: any).
EXTRAS = {"bitsandbytes": ("model.quant", "nf4"), "tensorboard": ("train.tensorboard", True),
          "wandb": ("train.wandb", None)}  # fmt: skip
DRIVER = Path("/proc/driver/nvidia/version")
OTHERS_ON_GPU = 2 << 30  # bytes that are more than a CUDA context


def versions(context: Context) -> dict[str, str]:
    """Versions, and a digest of this source. Raises UserError: a package is missing or too old."""
    found, bounds = provenance.versions(*PACKAGES, *EXTRAS, "deepspeed"), {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a bare checkout
        lines = importlib.metadata.requires("scalepeft") or []
        bounds = {r.name: r.specifier for r in map(Requirement, lines)}
    needed = dict.fromkeys(PACKAGES, "scalepeft")
    for name, (key, needing) in EXTRAS.items() if context.config is not None else ():
        if (value := attrgetter(key)(context.config)) and needing in (None, value):
            needed[name] = f"{key}={value}"
    wrong = []
    for name, what in needed.items():
        version, bound = found[name], bounds.get(name, SpecifierSet())
        if version == "not installed" or not bound.contains(version, prereleases=True):
            wrong.append(f"{what} needs {name}{bound}, here {version}: pip install '{name}{bound}'")
    if wrong:
        raise UserError("; ".join(wrong))
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.distributed.is_nccl_available() and torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    digest, package = hashlib.sha256(), Path(__file__).parents[2]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return {**found, "source": digest.hexdigest()[:8]}


def environment(context: Context) -> tuple[str, str]:
    """Try to write in the cache folder, and look for ranks that were not started."""
    cache = cache_folder()
    check_writable(f"cache folder {cache}", cache)
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and context.ranks.world_size == 1:
        return "warn", f"a Slurm job of {tasks} tasks, but this is one process: start it with srun"
    return "info", f"cache {cache}"  # which may differ between nodes


def device(context: Context) -> dict[str, Any]:
    """Take this rank's device; return its type, name, memory in use and so on."""
    config, ranks = context.config, context.ranks
    ranks.device = pick_device(config.engine.device if config else "auto", ranks.local_rank)
    # Starts autograd's threads: torch 2.11 dies where a check that makes DTensors came before.
    torch.ones((), requires_grad=True).backward()
    if ranks.device.type == "cpu":
        return {"type": "cpu", "name": f"CPU, {len(os.sched_getaffinity(0))} cores"}
    torch.cuda.set_device(ranks.device)
    torch.zeros(1, device=ranks.device)
    gpu = torch.cuda.get_device_properties(ranks.device)
    free, total = torch.cuda.mem_get_info(ranks.device)
    name = f"{gpu.name} of {size(total)}, capability {gpu.major}.{gpu.minor}"
    return {"type": "cuda", "name": name, "uuid": str(gpu.uuid), "used": total - free,
            "bf16": gpu.major >= 8}  # fmt: skip


def check_devices(context: Context, values: Values) -> Verdict:
    """Yield devices that differ, are shared or in use, or lack bf16."""
    hosts, kinds = context.hosts, {rank: v["type"] for rank, v in values.items()}
    if len(set(kinds.values())) > 1:
        yield "fix", by_value(kinds, hosts), "give every rank a GPU, or set engine.device"
        return
    names = {rank: v["name"] for rank, v in values.items()}
    yield "ok", by_value(names, hosts)
    if kinds[0] == "cpu":
        if DRIVER.is_file():
            remedy = "install a torch built for CUDA, check CUDA_VISIBLE_DEVICES"
            yield "warn", "there is an NVIDIA driver, but training would run on the CPU", remedy
        return
    gpus = {rank: (hosts[rank], v["uuid"]) for rank, v in values.items()}
    for gpu in dict.fromkeys(gpus.values()):
        if len(shared := [rank for rank in gpus if gpus[rank] == gpu]) > 1:
            remedy = "start as many tasks a node as it has GPUs, one GPU each"
            yield "fix", f"{where(shared, hosts)} share one GPU", remedy
    used = {rank: f"{size(v['used'])} of the GPU in use" for rank, v in values.items()
            if v["used"] > OTHERS_ON_GPU}  # fmt: skip
    if used:
        yield "warn", by_value(used, hosts), "end what else runs there"
    old = [rank for rank, v in values.items() if not v["bf16"]]
    if old and context.config is not None and context.config.train.precision == "bf16":
        yield "fix", f"{where(old, hosts)}: no bf16", "train.precision=fp32"


def kernels(context: Context) -> Any:
    """Run the self-checks of quantized storage: the config's, or all that can be had."""
    model = context.config.model if context.config else None
    names = [model.quant] if model else ["int8"] + ["nf4"] * bool(find_spec("bitsandbytes"))
    formats = [quant.get_format(name, bool(model and model.double_quant)) for name in names]
    for fmt in filter(None, formats):
        quant.self_check(context.ranks.device, fmt)
    if names == ["none"]:
        return "info", "model.quant=none: nothing is quantized"
    return f"{' and '.join(names)}: known bytes, exact values, right products"


def deepspeed(context: Context) -> str:
    """Import DeepSpeed as the engine does: that fails too with GPUs and no CUDA compiler."""
    return f"{zero._deepspeed(context.ranks.device.type).__version__} can be imported"
