"""The competitors of a benchmark on copies of one base, checked, counted and timed in turn."""

import copy
import gc
import timeit
import warnings
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from scalepeft.adapters import inject
from scalepeft.adapters.factors import Factors
from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.models import quant, shapes, structure
from scalepeft.parallel.base import EngineConfig
from scalepeft.parallel.ranks import Ranks
from scalepeft.parallel.single import Single

Layer = tuple[str, int, int]
"""(last part of the name, in, out) of a linear layer."""
ROW = 512  # tokens of a model's row, at most
REFERENCE = "peft-lora"
SLOW, SLOW_ROUNDS = 5.0, 3  # an entry over 5 x peft-lora's time stops after 3 rounds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of a first output


@dataclass
class Case:
    """What all entries share; the gradient is Gaussian, as a loss would cost all the same."""

    title: str
    base: nn.Module  # a causal LM
    peft_base: nn.Module  # the same weights as PEFT can read them
    x: Tensor  # input embeddings (rows, length, hidden); takes a gradient
    gradient: Tensor  # of the logits (rows, length, vocabulary)


def output(module: nn.Module, x: Tensor) -> Any:
    """Return the model's logits."""
    return module(inputs_embeds=x, use_cache=False).logits


def layers_of(shape: str) -> list[Layer]:
    """Linear layers of a model's blocks. Raises UserError: no such shape, not supported."""
    return [
        (name.rsplit(".", 1)[-1], m.in_features, m.out_features)
        for block in structure.blocks_of(shapes.meta_model(shape))
        for name, m in block.named_modules() if isinstance(m, nn.Linear)
    ]  # fmt: skip


@torch.no_grad()
def random_weights(model: Any, storage: quant.Format | None, device: torch.device) -> Any:
    """Make a meta model real and frozen, blocks in ``storage``: N(0, 0.02^2), norms 1, biases 0."""
    blocks = structure.blocks_of(model)
    for name, layer in [pair for block in blocks for pair in block.named_modules()]:
        if storage is not None and isinstance(layer, nn.Linear):
            if reason := storage.refuses(layer.in_features):
                say(f"{name} stays unquantized: {reason}")
            else:
                quant.quantize(layer, storage)
    structure.materialize(model, device)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, quant.QuantLinear):
            rows = 0.02 * torch.randn(module.out_features, module.in_features, device=device)
            module.weight.data, module.weight_scale.data = module.fmt.encode(rows)
        for name, p in module.named_parameters(recurse=False):
            if p.is_floating_point():
                p.normal_(std=0.02) if p.dim() > 1 else p.fill_(name == "weight")
    return model.requires_grad_(False)


def make_case(
    shape: str, tokens: int, dtype: torch.dtype, device: torch.device, storage: str
) -> Case:
    """Return the case of a causal LM with rows of at most 512 tokens."""
    model: Any = shapes.meta_model(shape).train()
    length = min(ROW, tokens)
    title = f"{len(structure.blocks_of(model))} blocks, rows of {length}"
    size = (tokens // length, length, model.config.hidden_size)
    base = peft_base = random_weights(model.to(dtype), quant.get_format(storage), device)
    if storage == "nf4":
        peft_base = on_bitsandbytes(shared_copy(base), dtype)
    x = torch.randn(size, dtype=dtype, device=device)
    with torch.no_grad():
        gradient = torch.randn_like(output(base, x))
    return Case(title, base, peft_base, x.requires_grad_(), gradient)


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy with modules of its own over the same parameters and buffers."""
    shared: list[object] = [*model.parameters(), *model.buffers()]
    # bitsandbytes keeps its scales there.
    shared += [m.quant_state for m in model.modules() if hasattr(m, "quant_state")]
    return copy.deepcopy(model, {id(s): s for s in shared if s is not None})


def on_bitsandbytes(model: Any, dtype: torch.dtype) -> Any:
    """Put bitsandbytes' own layers, which PEFT knows, in place of NF4 ones; return the model."""
    model.is_loaded_in_4bit = True  # PEFT asks for it
    for name, layer in list(model.named_modules()):
        if isinstance(layer, quant.QuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
            plain.weight = nn.Parameter(quant.Frozen(layer).weight(dtype), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, quant.bnb_linear(plain))
    return model


def inject_peft(model: nn.Module, fields: dict[str, Any], low: bool = False) -> None:
    """Put a method of PEFT on a model, in fp32 as it does unless told, or in its precision."""
    import peft

    # What it returns wraps the model, which it has changed.
    peft.get_peft_model(model, peft.get_peft_config(dict(fields)), autocast_adapter_dtype=not low)


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
        """Adapt a copy, check that it equals the base, warm up in two steps. What PEFT cannot do,
        or ours refuses, becomes ``reason``. Raises RuntimeError: one of ours differs from its base.
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
