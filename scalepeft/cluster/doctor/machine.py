"""What each rank finds on its node: versions, cache and variables, devices, kernels."""

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from scalepeft.cluster.doctor.check import Check, Context, Verdict
from scalepeft.cluster.doctor.findings import Hosts, Values, by_value, where
from scalepeft.cluster.doctor.run_folder import existing
from scalepeft.config.schema import RunConfig
from scalepeft.core.files import try_to_write
from scalepeft.core.text import size
from scalepeft.models import quant
from scalepeft.parallel import zero
from scalepeft.parallel.ranks import pick_device

EXTRAS = {"bitsandbytes": "scalepeft[quant]", "deepspeed": "scalepeft[deepspeed]",
          "tensorboard": "scalepeft[track]", "wandb": "wandb"}  # fmt: skip
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "scalepeft", *EXTRAS)
BOUND = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)")
VARIABLES = re.compile(
    r"(NCCL|GLOO|TORCH_NCCL)_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|HF_HUB_OFFLINE|HF_HOME"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|NTASKS_PER_NODE|RESTART_COUNT|STEP_NODELIST)"
)
OTHERS_ON_GPU = 2 << 30  # bytes that are more than a CUDA context


def versions(context: Context | None = None) -> dict[str, str]:
    """Return the versions of Python, packages and driver, and a digest of this source."""
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
    file = Path("/proc/driver/nvidia/version")
    if file.is_file() and (driver := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())):
        found["driver"] = driver[0]
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return {**found, "source": digest.hexdigest()[:8]}


def check_versions(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield packages that differ between ranks, are missing, or too old."""
    needed, bounds = needs(context.config), lower_bounds()
    optional = {*EXTRAS, "driver"} - {*needed}
    for name in sorted({name for of_rank in values.values() for name in of_rank} | {*needed}):
        state = "warn" if name in optional else "fix"
        of_ranks = {rank: of_rank.get(name) for rank, of_rank in values.items()}
        version = of_ranks[0]
        if len(set(of_ranks.values())) > 1:
            shown = {rank: f"{name} {v or 'is missing'}" for rank, v in of_ranks.items()}
            same = "start all ranks from one checkout" if name == "source" else None
            yield state, by_value(shown, hosts), same or "give every node the same environment"
        elif version is None:
            text = f"{needed[name]} needs {name}, which is not installed"
            yield state, text, f"pip install '{EXTRAS[name]}'"
        elif name in bounds and numbers(version) < numbers(bounds[name]):
            text = f"{name} {version} is older than {bounds[name]}"
            yield state, text, f"pip install '{name}>={bounds[name]}'"
    equal = f", equal on {len(values)} ranks" if len(values) > 1 else ""
    yield "ok", ", ".join(f"{name} {version}" for name, version in values[0].items()) + equal


def needs(config: RunConfig | None) -> dict[str, str]:
    """Return optional package -> the setting that needs it."""
    if config is None:
        return {}
    settings = {
        "bitsandbytes": ("model.quant=nf4", config.model.quant == "nf4"),
        "deepspeed": (f"engine.name={config.engine.name}", config.engine.name == "zero"),
        "tensorboard": ("train.tensorboard=true", config.train.tensorboard),
        "wandb": (f"train.wandb={config.train.wandb}", config.train.wandb),
    }
    return {package: setting for package, (setting, needed) in settings.items() if needed}


def lower_bounds() -> dict[str, str]:
    """Return package -> lowest version; nothing in a checkout that is not installed."""
    try:
        lines = importlib.metadata.requires("scalepeft") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    matches = (BOUND.match(line) for line in lines)
    return {m[1]: m[2].rstrip(".") for m in matches if m}


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def environment(context: Context) -> tuple[str, str]:
    """Try to write in the cache folder; return it and the variables that launchers look at."""
    cache = Path(os.environ.get("SCALEPEFT_CACHE") or Path.home() / ".cache" / "scalepeft")
    try:
        try_to_write(existing(cache))
    except OSError as error:
        raise OSError(f"cache folder {cache}: {error.strerror or error}") from None
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and context.ranks.world_size == 1:
        return "warn", f"a Slurm job of {tasks} tasks, but this is one process: start it with srun"
    variables = (f", {k}={v}" for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k))
    return "info", f"{torch.get_num_threads()} threads, cache {cache}{''.join(variables)}"


def device(context: Context) -> dict[str, Any]:
    """Take this rank's device; return its type, name, memory and so on."""
    config, ranks = context.config, context.ranks
    ranks.device = pick_device(config.engine.device if config else "auto", ranks.local_rank)
    if ranks.device.type == "cpu":
        return {"type": "cpu", "cores": len(os.sched_getaffinity(0))}
    torch.cuda.set_device(ranks.device)
    torch.zeros(1, device=ranks.device)
    properties = torch.cuda.get_device_properties(ranks.device)
    free, total = torch.cuda.mem_get_info(ranks.device)
    return {
        "type": "cuda",
        "name": f"{properties.name} of {size(total)}, capability {properties.major}."
        f"{properties.minor}",
        "uuid": str(properties.uuid),
        "used": total - free,
        "bf16": properties.major >= 8,
    }


def check_devices(context: Context, values: Values, hosts: Hosts) -> Verdict:
    """Yield devices that differ, are shared or in use, or lack bf16."""
    kinds = {rank: v["type"] for rank, v in values.items()}
    if len(set(kinds.values())) > 1:
        yield "fix", by_value(kinds, hosts), "give every rank a GPU, or set engine.device"
        return
    if kinds[0] == "cpu":
        yield "ok", f"CPU, {values[0]['cores']} cores for rank 0"
        if Path("/proc/driver/nvidia/version").is_file():
            remedy = "install a torch built for CUDA, check CUDA_VISIBLE_DEVICES"
            yield "warn", "there is an NVIDIA driver, but training would run on the CPU", remedy
        return
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank, v in values.items():
        ranks_of.setdefault((hosts[rank], v["uuid"]), []).append(rank)
    for shared in (ranks for ranks in ranks_of.values() if len(ranks) > 1):
        remedy = "start as many tasks a node as it has GPUs, one GPU each"
        yield "fix", f"{where(shared, hosts)} share one GPU", remedy
    names = {rank: v["name"] for rank, v in values.items()}
    if len(set(names.values())) > 1:
        remedy = "all wait for the slowest, and the smallest memory counts"
        yield "warn", by_value(names, hosts), remedy
    used = {r: f"{size(v['used'])} of the GPU in use" for r, v in values.items()
            if v["used"] > OTHERS_ON_GPU}  # fmt: skip
    if used:
        yield "warn", by_value(used, hosts), "end what else runs there"
    old = [rank for rank, v in values.items() if not v["bf16"]]
    if old and context.config is not None and context.config.train.precision == "bf16":
        yield "fix", f"{where(old, hosts)}: no bf16", "train.precision=fp32"
    yield "ok", by_value(names, hosts)


def kernels(context: Context) -> Any:
    """Run the self-checks of quantized storage: the config's, or all that can be had."""
    if context.config is not None:
        model = context.config.model
        formats = [quant.get_format(model.quant, model.double_quant)]
    else:
        names = ["int8", *(["nf4"] if "bitsandbytes" in versions() else [])]
        formats = [quant.get_format(name) for name in names]
    checked = [fmt for fmt in formats if fmt is not None]
    for fmt in checked:
        quant.self_check(context.ranks.device, fmt)
    if not checked:
        return "info", "model.quant=none: nothing is quantized"
    return f"{' and '.join(fmt.name for fmt in checked)}: known bytes, exact values, right products"


def deepspeed(context: Context) -> Any:
    """Import DeepSpeed as the engine does; that it is missing is for ``check_versions``."""
    version = versions().get("deepspeed")
    if version is None:
        return "info", "not installed"
    try:
        zero._deepspeed(context.ranks.device.type)
    except Exception as error:  # as where it finds GPUs and no CUDA compiler
        raise RuntimeError(f"cannot be used: {error}") from error
    return f"{version} can be imported"


VERSIONS = Check("versions", versions, check_versions)
ENVIRONMENT = Check(
    "environment", environment, on="nodes",
    remedy="set SCALEPEFT_CACHE to a folder that can be written",
)  # fmt: skip
DEVICES = Check("devices", device, check_devices)
KERNELS = Check("kernels", kernels)
DEEPSPEED = Check("deepspeed", deepspeed, on="nodes", remedy="repair it, or take engine.name=fsdp2")
