"""What the sections share: the device, the time that is left, what was found so far."""

import gc
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalepeft.core.files import write_atomically

LEAST = 20.0  # seconds that a section, or a row of one, needs to begin


class Session:
    """One call of ``bench gpu``; ``results`` holds what each section found, by its name."""

    def __init__(self, out: Path, seconds: float, tiny: bool) -> None:
        self.out, self.tiny, self.results = out, tiny, dict[str, Any]()
        self.end = time.monotonic() + seconds
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def keep(self, name: str, value: Any) -> None:
        """Writes ``gpu.json`` anew with this section in it."""
        self.results[name] = value
        text = json.dumps(_strict(self.results), indent=1, default=str, allow_nan=False)
        write_atomically(self.out / "gpu.json", text)

    def attempt(self, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work(self, *args)`` returns, or why there is nothing: no time, or a fault."""
        if time.monotonic() + LEAST > self.end:
            return {"skipped": "no time left"}
        try:
            return work(self, *args)
        except Exception as error:
            where = traceback.format_exc()[-1500:]
            return {"fault": f"{type(error).__name__}: {error}"[:500], "where": where}
        finally:
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()

    def milliseconds(self, work: Callable[[], Any], rounds: int, warm: int) -> list[float]:
        """Of each round after ``warm`` ones, the device having finished."""
        wait = torch.cuda.synchronize if self.cuda else lambda: None
        times = []
        for _ in range(warm + rounds):
            wait()
            start = time.perf_counter()
            work()
            wait()
            times.append(1e3 * (time.perf_counter() - start))
        return times[warm:]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts ``scalepeft WORDS``."""
        command, pipe = [sys.executable, "-m", "scalepeft", *words], subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def call(self, *words: str, expect: tuple[int, ...] = (0,)) -> str:
        """What ``scalepeft WORDS`` prints. Raises RuntimeError: another exit code, and why."""
        with self.start(*words) as process:
            try:
                out, said = process.communicate(timeout=max(LEAST, self.end - time.monotonic()))
            finally:
                process.kill()
        if process.returncode not in expect:
            raise RuntimeError(f"scalepeft {words[0]}: exit {process.returncode}: {said[-400:]}")
        return out


def _strict(value: Any) -> Any:
    """NaN and infinity as texts: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
