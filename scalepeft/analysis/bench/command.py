"""Benchmark: every method beside HF PEFT's and the frozen base alone, taking turns in one process.

An entry is one method on a copy of the base that shares the base's weights. A step is forward,
backward and AdamW. Inputs need a gradient everywhere (as they do in every block of a model but the
first), so that all entries push the same gradient through the frozen layers.

With bf16 all adapters are trained in fp32; PEFT's run under autocast, as HF's Trainer does it.
``peft-lora-bf16`` has its adapter in bf16 and no autocast: PEFT's cheapest form. With nf4 PEFT's
stand on bitsandbytes' ``Linear4bit``; with int8 on our storage, because bitsandbytes' int8 rounds
activations too and so computes something else.
"""

import dataclasses
import gc
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalepeft.adapters import inject
from scalepeft.adapters import inject as injection
from scalepeft.analysis.bench import report
from scalepeft.analysis.bench.cases import (
    ROW,
    Case,
    freeze,
    layer_case,
    layer_sets,
    model_case,
    shared_copy,
)
from scalepeft.analysis.bench.memory import SavedBytes, peak_bytes
from scalepeft.analysis.bench.methods import Layer, choose, names_of, neighbours
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.models import hub as models

SLOW, SLOW_ROUNDS = 5.0, 3  # an entry over 5 x peft-lora's time stops after 3 rounds
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # of an entry's first output against the base's


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        what: layers alone, a model, or (see below) a machine with a GPU
        shape: a shape by name, or a model folder
        methods: names by comma; 'all' for every one
        rank: of LoRA; the others follow its size
        tokens: a step, in rows of 512 at most
        precision: of base and activations
        quant: how the base is stored
        device: where
        repeats: timed steps of every method
        out: FOLDER: for bench.json and bench.png, or gpu.json and gpu.md
    """

    what: Literal["layer", "model", "gpu"]
    shape: str = "small"
    methods: str = "all"
    rank: int = 16
    tokens: int = 2048
    precision: Literal["fp32", "bf16"] = "fp32"
    quant: Literal["none", "nf4", "int8"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    repeats: int = 5
    out: str | None = None

    def check(self) -> None:
        """Refuses numbers, devices and folders that cannot be used.

        Raises:
            UserError: names the option, what is allowed and what to do.
        """
        for name in ("rank", "tokens", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be 1 or more")
        if self.what == "model" and self.tokens == 1:
            raise UserError("--tokens 1: a model's loss takes 2 or more")
        if self.what == "model" and (self.tokens % min(ROW, self.tokens)):
            near = max(ROW, self.tokens // ROW * ROW)
            raise UserError(
                f"--tokens {self.tokens}: is cut into rows of {ROW}; take {near}, or 2 to {ROW}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device here; take --device cpu")
        if self.out is not None:
            try:
                Path(self.out).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--out {self.out}: {error.strerror}; name a folder that can be written"
                ) from None

    def torch_device(self) -> torch.device:
        """The device; ``auto`` is CUDA where there is one."""
        cuda = torch.cuda.is_available() and self.device != "cpu"
        return torch.device("cuda" if cuda else "cpu")


@dataclass
class Entry:
    """One method: how it is put on a copy of the base, and what was measured.

    Attributes:
        adapt: adapts the copy in place; None for the base alone.
        reason: why it is not measured; empty where it is.
        times: seconds of each step.
    """

    label: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[nn.Module], None] | None = None
    autocast: bool = False
    reason: str = ""
    module: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    parameters: int = 0
    times: list[float] = field(default_factory=list)
    saved: int = 0
    peak: int = 0

    def build(self, case: Case, reference: Tensor, precision: str) -> None:
        """Adapts a copy, checks that it equals the base, warms up in two steps that count memory.

        What PEFT cannot do becomes ``reason``, and so does what a method of ours refuses.

        Raises:
            RuntimeError: one of our own methods differs from its base: a bug.
        """
        module = shared_copy(case.peft_base if self.family == "peft" else case.base)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.adapt is not None:
                    self.adapt(module)
                with self._autocast(case):
                    error = (case.probe(module) - reference).abs().max() / reference.abs().max()
                if not error <= TOLERANCE[precision]:  # not a number is too large as well
                    raise RuntimeError(f"differs from the base at the start by {error:.1e}")
                self.module = module
                trained = [p for p in module.parameters() if p.requires_grad]
                self.parameters = sum(p.numel() for p in trained)
                self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
                saved = SavedBytes([*module.parameters(), *module.buffers()])
                with saved:
                    out = self._forward(case)
                self._finish(case, out)
                self.saved = saved.total
                self.peak = peak_bytes(partial(self.step, case), self._held(case))
        except Exception as error:
            if self.family != "peft" and not isinstance(error, UserError):
                raise RuntimeError(f"bench: {self.label}: {error}") from error
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.reason = " ".join(f"{kind}{error}".split())[:300]
            self.module = self.optimizer = None

    def _autocast(self, case: Case) -> AbstractContextManager[Any]:
        kind = case.x.device.type
        return torch.autocast(kind, torch.bfloat16) if self.autocast else nullcontext()

    def _forward(self, case: Case) -> tuple[list[Tensor], list[Tensor | None]]:
        assert self.module is not None
        with self._autocast(case):
            return case.forward(self.module)

    def _finish(self, case: Case, out: tuple[list[Tensor], list[Tensor | None]]) -> None:
        torch.autograd.backward(*out)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        case.x.grad = None

    def step(self, case: Case) -> None:
        """Forward, backward, optimiser."""
        self._finish(case, self._forward(case))

    def _held(self, case: Case) -> list[Tensor]:
        """What is there between two steps: weights, adapter, the optimiser's state, the input."""
        assert self.module is not None
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        state = [t for s in states for t in s.values() if isinstance(t, Tensor)]
        return [*self.module.parameters(), *self.module.buffers(), *state, case.x, case.target]


def entries(layers: list[Layer], options: Options) -> list[Entry]:
    """The base, PEFT's LoRA, the chosen methods and PEFT's neighbours of them.

    Raises:
        UserError: an unknown method, or an odd rank where reflections come in pairs.
    """
    bf16 = options.precision == "bf16"
    ours, theirs = choose(options.methods, layers, options.rank, options.what, bf16)
    found = [Entry("base", "base")]
    for name, settings in ours.items():
        found.append(Entry(name, "scalepeft", settings, _injector(settings)))
    for name, settings in theirs.items():
        low = name == "peft-lora-bf16"
        adapt = _peft_injector(settings, names_of(layers), low)
        found.append(Entry(name, "peft", settings, adapt, autocast=bf16 and not low))
    return found


def _injector(settings: dict[str, Any]) -> Callable[[nn.Module], None]:
    def adapt(module: nn.Module) -> None:
        injection.inject(module, inject.adapter_config(settings))

    return adapt


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(
            "scalepeft bench compares with HF PEFT, which is not installed: pip install"
            " 'scalepeft[dev]'"
        ) from None
    return peft


def _peft_injector(
    settings: dict[str, Any], names: list[str], low: bool
) -> Callable[[nn.Module], None]:
    peft = _peft()
    fields = dict(settings)
    kind = getattr(peft, fields.pop("config"))

    def adapt(module: nn.Module) -> None:
        peft.inject_adapter_in_model(kind(target_modules=names, **fields), module)
        for parameter in module.parameters():
            if parameter.requires_grad and not low:
                parameter.data = parameter.data.float()  # as get_peft_model does

    return adapt


def measure(case: Case, found: list[Entry], options: Options) -> None:
    """Builds every entry, then times them in turn, in every round in another order."""
    reference = case.probe(case.base)
    for entry in found:
        entry.build(case, reference, options.precision)
        state = f"left out: {entry.reason}" if entry.reason else "ready"
        say(f"{case.title}: {entry.label} {state}")
    gc.collect()
    running = [entry for entry in found if not entry.reason]
    lora = next((e for e in running if e.label == report.REFERENCE), None)
    for turn in range(options.repeats):
        first = turn % len(running)
        for entry in [*running[first:], *running[:first]]:
            entry.times.append(_seconds(entry, case))
        if turn + 1 == SLOW_ROUNDS and lora is not None:
            running = [e for e in running if report.ratio(e.times, lora.times) <= SLOW]
        say(f"{case.title}: round {turn + 1} of {options.repeats}")


def _seconds(entry: Entry, case: Case) -> float:
    cuda = case.x.is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    entry.step(case)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _case(layers: list[Layer], options: Options) -> Case:
    where = options.tokens, models.PRECISIONS[options.precision], options.torch_device()
    if options.what == "layer":
        case = layer_case(layers[0], *where)
    else:
        case = model_case(options.shape, *where)
    freeze(case, options.quant)
    return case


def run(options: Options) -> dict[str, Any]:
    """Measures, prints a table for each case, writes ``bench.json`` and ``bench.png`` into ``out``.

    Returns:
        What ``bench.json`` holds.

    Raises:
        UserError: an option that makes no sense, an unknown shape or method, PEFT missing.
    """
    options.check()
    plans = [
        (layers, entries(layers, options)) for layers in layer_sets(options.what, options.shape)
    ]
    result = report.header(options.torch_device(), dataclasses.asdict(options))
    print(report.headline(result))
    result["cases"] = []
    while plans:
        layers, found = plans.pop(0)  # so that a case is freed before the next one is made
        case = _case(layers, options)
        measure(case, found, options)
        result["cases"].append(report.summary(case.title, found, neighbours))
        print(report.table(result["cases"][-1]), flush=True)
        del case, found
    if options.out is not None:
        print(report.write(result, Path(options.out)))
    return result
