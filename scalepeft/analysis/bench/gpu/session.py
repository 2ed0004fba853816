"""What the sections share: the device, the time that is left, what was found so far."""

import gc
import json
import subprocess
import sys
import time
import timeit
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import timer

from scalepeft.core.files import write_atomically
from scalepeft.core.launch import world_size
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single

SCALEPEFT = [sys.executable, "-m", "scalepeft"]
LEAST = 20.0  # seconds that a section, or a row of one, needs to begin


class Session:
    """One call of ``bench gpu``; ``results`` holds what each section found, by its name."""

    def __init__(self, out: Path, seconds: float, tiny: bool) -> None:
        self.out, self.tiny, self.results = out, tiny, dict[str, Any]()
        self.shape = "mini" if tiny else "llama-3.1-8b"
        self.end = time.monotonic() + seconds
        Single.check(world_size())
        self.ranks = Ranks.start("auto", False)  # with what a training sets before it allocates
        self.device = self.ranks.device
        self.cuda = self.device.type == "cuda"

    def keep(self, name: str, value: Any) -> None:
        """Writes ``gpu.json`` anew with this section in it; NaN as text, as JSON has no NaN."""
        self.results[name] = json.loads(json.dumps(value, default=str), parse_constant=str)
        write_atomically(self.out / "gpu.json", json.dumps(self.results, indent=1))

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
        # Without gc.enable timeit switches it off, and garbage would count as peak memory.
        times = timeit.repeat(work, gc.enable, timer, repeat=warm + rounds, number=1)
        return [1e3 * seconds for seconds in times[warm:]]

    def call(self, *words: str, expect: tuple[int, ...] = (0,)) -> str:
        """What ``scalepeft WORDS`` prints. Raises RuntimeError: another exit code, and why."""
        done = subprocess.run(
            [*SCALEPEFT, *words], capture_output=True, text=True, check=False,
            timeout=max(LEAST, self.end - time.monotonic()),
        )  # fmt: skip
        if done.returncode not in expect:
            said = done.stderr[-400:]
            raise RuntimeError(f"scalepeft {words[0]}: exit {done.returncode}: {said}")
        return done.stdout
