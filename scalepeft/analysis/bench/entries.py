"""The competitors of a benchmark: put on copies of one base, checked, counted, timed in turn."""

import gc
import timeit
import warnings
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from scalepeft.adapters import inject
from scalepeft.adapters.factors import Factors
from scalepeft.analysis.bench.cases import Case, inject_peft, output, shared_copy
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.parallel.base import EngineConfig
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single

REFERENCE = "peft-lora"
SLOW, SLOW_ROUNDS = 5.0, 3  # an entry over 5 x peft-lora's time stops after 3 rounds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of a first output


@dataclass
class Entry:
    """One method on a copy of the base that shares its weights, and what was measured of it."""

    label: str
    family: str  # base, scalepeft or peft
    settings: dict[str, Any] = field(default_factory=dict)
    autocast: bool = False  # step as HF's Trainer does, with an adapter in fp32 under bf16
    reason: str = ""  # why it is not measured; empty where it is
    parameters: int = 0
    times: list[float] = field(default_factory=list)  # seconds of each step

    def build(self, case: Case) -> None:
        """Adapt a copy, check that it equals the base, warm up in two steps.

        What PEFT cannot do becomes ``reason``, and so does what a method of ours refuses. Raises
        RuntimeError: one of our own methods differs from its base: a bug.
        """
        try:
            with warnings.catch_warnings(action="ignore"):
                self._adapt(case)
                for _ in range(2):
                    self.step(case)
        except Exception as error:
            if self.family != "peft" and not isinstance(error, UserError):
                raise RuntimeError(f"bench: {self.label}: {error}") from error
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.reason = " ".join(f"{kind}{error}".split())[:300]

    def _adapt(self, case: Case) -> None:
        self.module = shared_copy(case.peft_base if self.family == "peft" else case.base)
        if self.family == "peft":
            inject_peft(self.module, self.settings, low=self.label.endswith("bf16"))
        elif self.settings:
            inject.inject(self.module, self.settings)
        with torch.no_grad():
            want = output(case.base, case.x[:1])
            error = (self._output(case.x[:1]) - want).abs().max() / want.abs().max()
        if not error <= TOLERANCE[case.x.dtype]:  # not a number is too large as well
            raise RuntimeError(f"differs from the base at the start by {error:.1e}")
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        self.factors = Factors(self.module, Single(EngineConfig(name="single"), Ranks()))
        # AdamW takes no empty list, as the base alone has.
        self.optimizer = torch.optim.AdamW(trained or [torch.zeros(0)], lr=1e-4)

    def _output(self, x: Tensor) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return output(self.module, x)

    def step(self, case: Case) -> None:
        """Forward, backward and optimizer."""
        with self.factors.of_step():
            y, penalty = self._output(case.x), inject.penalty(self.module)
            outputs = [y] if penalty is None else [y, penalty]
            torch.autograd.backward(outputs, [case.gradient, None][: len(outputs)])
        self.optimizer.step()
        self.optimizer.zero_grad()
        case.x.grad = None

    def seconds(self, case: Case) -> float:
        """Return the time of a step, the device having finished."""
        return timeit.timeit(partial(self.step, case), gc.enable, timer, number=1)

    def ratio(self, other: "Entry | None") -> float | None:
        """Return the median of this entry's time over the other's in the rounds that both ran."""
        times = zip(self.times, other.times if other else [], strict=False)
        ratios = [mine / its for mine, its in times]
        return median(ratios) if ratios else None


def measure(case: Case, entries: list[Entry], rounds: int) -> None:
    """Build every entry, then time them in turn, in every round in another order."""
    for entry in entries:
        entry.build(case)
        state = f"left out: {entry.reason}" if entry.reason else "ready"
        say(f"{case.title}: {entry.label} {state}")
    gc.collect()
    running = [entry for entry in entries if not entry.reason]
    lora = next((e for e in running if e.label == REFERENCE), None)
    for turn in range(rounds):
        first = turn % len(running)
        for entry in [*running[first:], *running[:first]]:
            entry.times.append(entry.seconds(case))
        if turn + 1 == SLOW_ROUNDS:
            running = [e for e in running if (e.ratio(lora) or 0) <= SLOW]
        say(f"{case.title}: round {turn + 1} of {rounds}")
