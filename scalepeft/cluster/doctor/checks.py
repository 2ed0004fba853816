"""What the facts of all ranks mean together; functions of plain values."""

from typing import Any

from scalepeft.cluster.doctor.findings import Finding, by_value, fix, warn, where
from scalepeft.cluster.doctor.node import numbers
from scalepeft.cluster.doctor.rendezvous import Outcome
from scalepeft.config.schema import RunConfig
from scalepeft.core.text import size
from scalepeft.parallel.fsdp2 import UINT8_SHARDS_SINCE
from scalepeft.parallel.zero import ZeroConfig

Facts = dict[int, dict[str, Any]]
Hosts = dict[int, str]
SHOWN = ("python", "torch", "CUDA", "NCCL", "transformers", "bitsandbytes", "deepspeed",
         "scalepeft", "source")  # fmt: skip
OPTIONAL = {"bitsandbytes", "deepspeed", "tensorboard", "wandb"}
OPEN_FILES = 1024
SHARED_MEMORY = 256 << 20  # bytes: NCCL takes some of it for each pair of GPUs of a node
OTHERS_ON_GPU = 2 << 30  # bytes that are more than a CUDA context


def needs(config: RunConfig | None) -> dict[str, str]:
    """Optional package -> the setting that needs it."""
    if config is None:
        return {}
    found = {}
    if config.model.quant == "nf4":
        found["bitsandbytes"] = "model.quant=nf4"
    if config.engine.name.startswith("zero"):
        found["deepspeed"] = f"engine.name={config.engine.name}"
    if config.train.tensorboard:
        found["tensorboard"] = "train.tensorboard=true"
    if config.train.wandb:
        found["wandb"] = f"train.wandb={config.train.wandb}"
    return found


def shards_bytes(config: RunConfig | None) -> bool:
    """True if a run of this config shards a quantised base."""
    if config is None or config.model.quant == "none":
        return False
    engine = config.engine
    return engine.name == "fsdp2" or (isinstance(engine, ZeroConfig) and engine.stage == 3)


def versions(
    found: dict[int, dict[str, str]], hosts: Hosts, bounds: dict[str, str], config: RunConfig | None
) -> list[Finding]:
    """Present where needed, not too old, the same everywhere.

    Args:
        found: rank -> package -> version.
        hosts: of all ranks.
        bounds: package -> lowest version.
        config: of the run, if there is one.
    """
    listed = []
    needed = needs(config)
    for name in sorted({name for of_rank in found.values() for name in of_rank} | needed.keys()):
        held = {rank: of_rank.get(name) for rank, of_rank in found.items()}
        if len(set(held.values())) > 1:
            shown = {rank: f"{name} {version or 'is missing'}" for rank, version in held.items()}
            remedy = "give every node the same environment"
            if name == "source":
                remedy = "start all ranks from one checkout"
            optional = name in OPTIONAL and name not in needed
            listed.append((warn if optional else fix)("versions", by_value(shown, hosts), remedy))
            continue
        version = next(iter(held.values()))
        if version is None:
            extra = {
                "bitsandbytes": "'scalepeft[quant]'",
                "deepspeed": "'scalepeft[deepspeed]'",
                "tensorboard": "'scalepeft[track]'",
            }
            listed.append(
                fix("versions", f"{needed[name]} needs {name}, which is not installed",
                    f"pip install {extra.get(name, name)}")
            )  # fmt: skip
        elif name in bounds and numbers(version) < numbers(bounds[name]):
            optional = name in OPTIONAL and name not in needed
            listed.append(
                (warn if optional else fix)(
                    "versions", f"{name} {version} is older than {bounds[name]}",
                    f"pip install '{name}>={bounds[name]}'")
            )  # fmt: skip
    first = found[min(found)]
    fsdp2 = config is not None and config.engine.name == "fsdp2"
    if fsdp2 and shards_bytes(config) and numbers(first["torch"]) < UINT8_SHARDS_SINCE:
        listed.append(
            fix("versions", f"torch {first['torch']} cannot shard a quantised base",
                f"update torch to {'.'.join(map(str, UINT8_SHARDS_SINCE))}, take engine.name=ddp,"
                " or model.quant=none")
        )  # fmt: skip
    if not [f for f in listed if f.state == "fix"]:
        shown_first = ", ".join(f"{name} {first[name]}" for name in SHOWN if name in first)
        equal = f", equal on {len(found)} ranks" if len(found) > 1 else ""
        known = "" if bounds else "; not installed, so lower bounds are not known"
        listed.insert(0, Finding("versions", "ok", shown_first + equal + known))
    return listed


def devices(outcomes: list[Outcome], hosts: Hosts, config: RunConfig | None) -> list[Finding]:
    """One device a rank, all alike, free, and able to do what the config asks."""
    failed = {r: o.error for r, o in enumerate(outcomes) if o.error is not None}
    if failed:
        return [fix("devices", by_value(failed, hosts))]
    found: Facts = {r: o.value for r, o in enumerate(outcomes)}
    kinds = {r: f["type"].split(":")[0] for r, f in found.items()}
    if len(set(kinds.values())) > 1:
        return [
            fix("devices", by_value(kinds, hosts), "give every rank a GPU, or set engine.device")
        ]
    if kinds[0] == "cpu":
        return _on_cpu(found, hosts)
    listed = []
    taken: dict[tuple[str, str], list[int]] = {}
    for r, f in found.items():
        taken.setdefault((hosts[r], f["uuid"]), []).append(r)
    for ranks in (ranks for ranks in taken.values() if len(ranks) > 1):
        listed.append(
            fix("devices", f"{where(ranks, hosts)} share one GPU",
                "start as many tasks a node as it has GPUs, one GPU each")
        )  # fmt: skip
    names = {r: f"{f['name']} of {size(f['memory'])}" for r, f in found.items()}
    if len(set(names.values())) > 1:
        listed.append(
            warn("devices", by_value(names, hosts), "all wait for the slowest, and the smallest"
                 " memory counts")
        )  # fmt: skip
    if used := {
        r: f"{size(f['memory'] - f['free'])} of the GPU in use"
        for r, f in found.items()
        if f["memory"] - f["free"] > OTHERS_ON_GPU
    }:
        listed.append(warn("devices", by_value(used, hosts), "end what else runs there"))
    old = [r for r, f in found.items() if not f["bf16"]]
    if old and config is not None and config.train.precision == "bf16":
        listed.append(fix("devices", f"{where(old, hosts)}: no bf16", "train.precision=fp32"))
    drivers = {r: f"driver {f['driver']}" for r, f in found.items()}
    if len(set(drivers.values())) > 1:
        listed.append(warn("devices", by_value(drivers, hosts), "install one driver everywhere"))
    if not [f for f in listed if f.state == "fix"]:
        f = found[0]
        capability = ".".join(map(str, f["capability"]))
        listed.insert(0, Finding("devices", "ok", f"{by_value(names, hosts)}; capability"
                                 f" {capability}, driver {f['driver']}"))  # fmt: skip
    return listed


def _on_cpu(found: Facts, hosts: Hosts) -> list[Finding]:
    listed = [Finding("devices", "ok", f"CPU, {found[0]['cores']} cores for rank 0")]
    if unused := [r for r, f in found.items() if f["driver"]]:
        listed.append(
            warn("devices", f"{where(unused, hosts)}: there is an NVIDIA driver"
                 f" ({found[unused[0]]['driver']}), but training would run on the CPU",
                 "unless engine.device=cpu is meant: install a torch built for CUDA, check"
                 " CUDA_VISIBLE_DEVICES and the driver's age")
        )  # fmt: skip
    return listed


def kernels(outcomes: list[Outcome], hosts: Hosts) -> Finding:
    """The self-checks of quantised storage."""
    failed = {r: o.error for r, o in enumerate(outcomes) if o.error is not None}
    if failed:
        return fix("kernels", by_value(failed, hosts))
    if outcomes[0].value is None:
        return Finding("kernels", "info", "model.quant=none: nothing is quantised")
    return Finding(
        "kernels", "ok", f"{outcomes[0].value}: known bytes, exact values, right products"
    )


def deepspeed(outcomes: list[Outcome], hosts: Hosts) -> list[Finding]:
    """Whether every node can import DeepSpeed; nothing where it is not installed."""
    if failed := {r: o.error for r, o in enumerate(outcomes) if o.error is not None}:
        return [fix("deepspeed", f"cannot be used: {by_value(failed, hosts)}",
                    "repair it, or take engine.name=fsdp2")]  # fmt: skip
    if outcomes[0].value is None:
        return []
    return [Finding("deepspeed", "ok", f"{outcomes[0].value} can be imported")]


def environment(found: Facts, hosts: Hosts, cuda: bool) -> list[Finding]:
    """Threads, limits, shared memory, addresses, the cache folder, Slurm."""
    listed: list[Finding] = []
    ranks_on = {h: [r for r in found if hosts[r] == h] for h in (hosts[r] for r in found)}
    several_hosts = len(ranks_on) > 1
    crowded = []
    for host, ranks in ranks_on.items():
        threads, cores = (found[ranks[0]][key] for key in ("threads", "cores"))
        if len(ranks) > 1 and len(ranks) * threads > cores:
            crowded.append(f"{host}: {len(ranks)} ranks of {threads} threads on {cores} cores")
    if crowded:
        listed.append(warn("environment", "; ".join(crowded), "set OMP_NUM_THREADS lower,"
                           " start fewer ranks a node, or ask for more cores"))  # fmt: skip
    if few := {r: f["open_files"] for r, f in found.items() if 0 < f["open_files"] < OPEN_FILES}:
        listed.append(warn("environment", f"open files: {by_value(few, hosts)}", "ulimit -n 65536"))
    small = {
        r: f"{size(f['shm'])} free in /dev/shm"
        for r, f in found.items()
        if f["shm"] < SHARED_MEMORY and len(ranks_on[hosts[r]]) > 1
    }
    if small and cuda:
        listed.append(
            warn("environment", by_value(small, hosts),
                 "NCCL needs more between the GPUs of a node: docker run --shm-size=8g, or"
                 " --ipc=host")
        )  # fmt: skip
    if several_hosts and (
        lost := {
            r: f["address"] or "nothing"
            for r, f in found.items()
            if not f["address"] or f["address"].startswith("127.")
        }
    ):
        listed.append(
            warn("environment", f"the host's name means {by_value(lost, hosts)}: other nodes may"
                 " not reach gloo there", "set GLOO_SOCKET_IFNAME, or correct /etc/hosts")
        )  # fmt: skip
    if bad := {r: f["cache_error"] for r, f in found.items() if f["cache_error"]}:
        listed.append(
            fix("environment", f"cache folder {found[min(bad)]['cache']}: {by_value(bad, hosts)}",
                "set SCALEPEFT_CACHE to a folder that can be written")
        )  # fmt: skip
    variables = found[0]["variables"]
    tasks = variables.get("SLURM_NTASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1 and len(found) == 1:
        listed.append(
            warn("environment", f"a Slurm job of {tasks} tasks, but this is one process",
                 "start doctor with srun, to see all nodes")
        )  # fmt: skip
    locked = found[0]["locked"]
    listed.append(
        Finding("environment", "info", f"{found[0]['threads']} threads a rank, open files"
                f" {found[0]['open_files']}, locked memory"
                f" {'unlimited' if locked is None else size(locked)}, /dev/shm"
                f" {size(found[0]['shm'])} free, cache {found[0]['cache']}"
                + "".join(f", {k}={v}" for k, v in variables.items()))
    )  # fmt: skip
    return listed


def base(outcomes: list[Outcome], hosts: Hosts, name: str) -> Finding:
    """Whether every node can load the base, and the same one."""
    failed = {r: o.error for r, o in enumerate(outcomes) if o.error is not None}
    if failed:
        return fix(
            "base", by_value(failed, hosts), "" if "model." in str(failed) else f"model.path={name}"
        )
    looked = {r: o.value for r, o in enumerate(outcomes) if o.value is not None}
    prints = {r: v["fingerprint"][:12] for r, v in looked.items() if "fingerprint" in v}
    if len(set(prints.values())) > 1:
        return fix("base", f"files differ: {by_value(prints, hosts)}", "give every node one copy")
    if absent := [r for r, v in looked.items() if v["state"] == "absent"]:
        return Finding(
            "base", "info", f"{name} is not on the nodes of {where(absent, hosts)}: each will"
            " download it at the start (HF_HOME on a shared file system: once)",
        )  # fmt: skip
    if not prints:
        return Finding("base", "ok", f"{name} is made in the cache when it is needed")
    nodes = len(prints)
    return Finding(
        "base", "ok", f"{name}: whole shards and a tokenizer, seen by {nodes}"
        f" node{'s' * (nodes != 1)}; fingerprint {next(iter(prints.values()))}",
    )  # fmt: skip


def data(outcomes: list[Outcome], hosts: Hosts) -> Finding:
    """Whether every node has the files of the rows, and the same ones."""
    if failed := {r: o.error for r, o in enumerate(outcomes) if o.error is not None}:
        return fix("data", by_value(failed, hosts))
    seen = {
        r: ", ".join(f"data.{split} {n} files of {b} bytes" for split, (n, b) in o.value.items())
        for r, o in enumerate(outcomes)
        if o.value is not None
    }
    if len(set(seen.values())) > 1:
        return fix("data", by_value(seen, hosts), "give every node the same files")
    return Finding("data", "ok", seen[0]) if seen[0] else Finding("data", "info", "no files")


def rows(outcomes: list[Outcome], hosts: Hosts) -> Finding:
    """What rank 0 made of the rows."""
    if outcomes[0].error is not None:
        return fix("rows", outcomes[0].error)
    read = outcomes[0].value.items()
    if not read:
        return Finding("rows", "info", "of the hub: read when training starts")
    text = ", ".join(f"{n} of data.{split}" for split, (n, _) in read)
    if broken := sum(n for _, (_, n) in read):
        return warn("rows", f"{text}; {broken} broken ones are left out (data.on_error=skip)")
    return Finding("rows", "ok", text)


def start(check: str, well: str, outcomes: list[Outcome], _: Hosts) -> Finding:
    """What rank 0 would be told when it begins to train."""
    if (error := outcomes[0].error) is not None:
        return fix(check, error)
    return Finding(check, "ok", well)
