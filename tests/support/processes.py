"""Real ranks as real processes, tiny runs and what they leave."""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from zygote import Forked, Zygote, read_at_import

ROOT = Path(__file__).resolve().parents[2]


FULL = "--full" in sys.argv or "SCALEPEFT_TEST_FULL" in os.environ  # by xdist's workers
if FULL:
    os.environ["SCALEPEFT_TEST_FULL"] = "1"
SHARED = ROOT.parent / "shared" / "data"


TINY = [
    "model=tiny",
    "data=toy",
    "adapter.name=hoft",
    "adapter.rank=4",
    "data.train_size=300",
    "train.precision=fp32",
    "train.lr=3e-3",
    "train.global_batch=12",
    "train.micro_batch=4",
]


@cache
def zygote() -> Zygote:
    """The session's warm process, started by the first test that needs one."""
    return Zygote()


def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m scalepeft`` alone."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return zygote().run(("-m", "scalepeft"), list(arguments), variables, timeout=120)


class Job:
    """Ranks of one run as processes, with the variables launch/local.sh sets.

    ``fresh``: each starts its own Python, for what happens before anything is imported.
    """

    def __init__(
        self,
        ranks: int,
        arguments: list[str],
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "scalepeft"),
        fresh: bool = False,
    ) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.ranks: list[subprocess.Popen[str] | Forked] = []
        for rank in range(ranks):
            variables = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "SCALEPEFT_RENDEZVOUS": self.folder,
                "OMP_NUM_THREADS": "1",
                **(env or {}),
            }
            if not fresh and read_at_import(variables) == zygote().env:
                self.ranks.append(zygote().start(program, arguments, variables))
                continue
            command = [sys.executable, *program, *arguments]
            paths = [str(Path(__file__).parent), variables.get("PYTHONPATH")]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            self.ranks.append(
                subprocess.Popen(
                    command,
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=ROOT,
                )
            )

    def wait(self, timeout: float = 120) -> tuple[list[int], str]:
        """Exit codes in rank order and everything printed; a hang fails the test with what was
        printed.
        """
        texts = []
        deadline = time.monotonic() + timeout
        try:
            for p in self.ranks:
                texts.append(p.communicate(timeout=max(1, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            self.kill()
            printed = "\n".join(
                p.communicate()[0] or "" for p in self.ranks if p.stdout and not p.stdout.closed
            )
            pytest.fail(
                f"ranks hang after {timeout} s: {[p.returncode for p in self.ranks]}\n{printed}"
            )
        return [p.returncode for p in self.ranks], "\n".join(texts)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to every rank."""
        for p in self.ranks:
            if p.poll() is None:
                p.send_signal(number)

    def wait_for_handlers(self) -> None:
        """Returns once every rank has taken over SIGUSR1: before, the signal would just kill it."""
        for p in self.ranks:
            while p.poll() is None:
                status = Path(f"/proc/{p.pid}/status").read_text()
                caught = int(status.split("SigCgt:")[1].split()[0], 16)
                if caught >> (signal.SIGUSR1 - 1) & 1:
                    break
                time.sleep(0.005)


def train(ranks: int, run_dir: Path, *settings: str, timeout: float = 120, expect: int = 0) -> str:
    """Runs ``scalepeft train`` on the tiny model and returns what it printed."""
    codes, text = Job(ranks, ["train", *TINY, f"run_dir={run_dir}", *settings]).wait(timeout)
    assert codes == [expect] * ranks, f"exit codes {codes}\n{text}"
    return text


def flip(file: Path, at: int) -> None:
    """Flips one bit and sets mtime back."""
    stat = file.stat()
    with file.open("r+b") as f:
        f.seek(at)
        (byte,) = f.read(1)
        f.seek(at)
        f.write(bytes([byte ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    found = rows(run_dir)
    assert [r["step"] for r in found] == list(range(1, len(found) + 1)), (
        "a step is missing or doubled"
    )
    return [r["loss"] for r in found]


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
