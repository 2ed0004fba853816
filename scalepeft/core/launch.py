"""How a process starts: the launcher's variables, and imports. Needs no torch."""

import gc
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from scalepeft.core.errors import UserError

FOLDER = "SCALEPEFT_RENDEZVOUS"  # of one start, in which its ranks meet in place of at a port


@contextmanager
def importing() -> Iterator[None]:
    """Context or decorator in which imports look for no garbage, a fifth of their time."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


def rank() -> int:
    """This process's rank as the launcher says, known before the ranks meet."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def launch_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT as torchrun sets them, or of a
    plain ``srun`` with a task a rank. Raises UserError: a launcher set only some of them.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    launched = {name: env[name] for name in names if env.get(name)}
    if "RANK" in env or "WORLD_SIZE" in env:
        if alone := launched.get("WORLD_SIZE") == "1":
            launched.setdefault("LOCAL_RANK", launched.get("RANK", "0"))
        needed = names[: 3 if alone or env.get(FOLDER) else 5]
        if missing := [name for name in needed if name not in launched]:
            raise UserError(
                f"the launcher set {', '.join(sorted(launched))} but not {', '.join(missing)};"
                " start with torchrun, srun, accelerate launch or launch/local.sh"
            )
        return launched
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]
        job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
        # Below the ephemeral ones, and another for each job, step and restart.
        port = 10000 + (job + 101 * step + 1009 * int(env.get("SLURM_RESTART_COUNT", "0"))) % 22000
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_NTASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
            "MASTER_PORT": env.get("MASTER_PORT") or str(port),
        }
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def world_size() -> int:
    """Number of ranks that the launcher started, known before they meet."""
    return int(launch_variables(os.environ)["WORLD_SIZE"])


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: ``a[07-09,12],b3`` -> ``a07``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    assert match, nodelist
    return match[1] + (match[2] or "") + (match[3] or "")
