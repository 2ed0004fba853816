"""Benchmark: every method beside HF PEFT's and the frozen base alone, taking turns in one process.

An entry is one method on a copy of the base that shares the base's weights. A step is forward,
backward and AdamW. Inputs need a gradient everywhere (as they do in every block of a model but the
first), so that all entries push the same gradient through the frozen layers.

With bf16 all adapters are trained in fp32; PEFT's run under autocast, as HF's Trainer does it.
``peft-lora-bf16`` has its adapter in bf16 and no autocast: PEFT's cheapest form. With nf4 PEFT's
stand on bitsandbytes' ``Linear4bit``; with int8 on our storage, because bitsandbytes' int8 rounds
activations too and so computes something else.
"""

import argparse
import copy
import dataclasses
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft import bench_report, config, injection, lookup, models, quant, shapes
from scalepeft.adapters.base import Adapter
from scalepeft.bench_memory import peak_bytes, saved_bytes
from scalepeft.lookup import UserError
from scalepeft.progress import say

ROW = 512  # tokens of a row in `model`
SLOW, SLOW_ROUNDS = 5.0, 3  # an entry over 5 x peft-lora's time stops after 3 rounds
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # of an entry's first output against the base's
STRUCTURES = ("circulant", "toeplitz", "kronecker", "ldr")  # of surm
NEIGHBOURS = {
    "hoft": ("hra",),
    "shoft": ("hra",),
    "goft": ("boft", "oft"),
    "qgoft": ("boft", "oft"),
    "circulant": ("c3a",),
    "hut-r1": ("ia3", "hira"),
    "hadamard": ("ia3",),
}


@dataclass(frozen=True)
class Options:
    """What to measure; see ``scalepeft bench --help``."""

    what: str
    shape: str = "small"
    methods: str = "all"
    rank: int = 16
    tokens: int = 2048
    precision: str = "fp32"
    quant: str = "none"
    device: str = "auto"
    repeats: int = 10
    out: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Options":
        """Takes the fields from the command line."""
        return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})

    def check(self) -> None:
        """Refuses numbers, devices and folders that cannot be used.

        Raises:
            UserError: names the option, what is allowed and what to do.
        """
        for name in ("rank", "tokens", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be 1 or more")
        if self.what == "model" and (self.tokens < 2 or self.tokens % min(ROW, self.tokens)):
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
class Case:
    """A frozen base, its input and what the entries adapt.

    Attributes:
        title: for tables.
        base: an ``nn.ModuleDict`` of one layer, or a causal LM.
        layers: (last part of the name, in, out) of every adapted layer.
        x: (tokens, in), or input embeddings (rows, length, hidden).
        target: gradient of the output (tokens, out), or labels (rows, length).
        peft_base: the same weights in bitsandbytes' storage, under nf4.
    """

    title: str
    base: nn.Module
    layers: list[tuple[str, int, int]]
    x: Tensor
    target: Tensor
    peft_base: nn.Module

    @property
    def names(self) -> list[str]:
        """Names of the adapted layers, each once."""
        return list(dict.fromkeys(name for name, _, _ in self.layers))

    def output(self, module: nn.Module) -> Tensor:
        """The layer's output, or logits."""
        if isinstance(module, nn.ModuleDict):
            y: Tensor = module[self.names[0]](self.x)
            return y
        logits: Tensor = module(inputs_embeds=self.x, use_cache=False).logits
        return logits

    def losses(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
        """What to call backward on: (tensors, their gradients); a method's penalty included."""
        if isinstance(module, nn.ModuleDict):
            tensors, grads = [self.output(module)], [self.target]
        else:
            out = module(inputs_embeds=self.x, labels=self.target, use_cache=False)
            tensors, grads = [out.loss], [None]
        if (penalty := injection.penalty(module)) is not None:
            tensors, grads = [*tensors, penalty], [*grads, None]
        return tensors, grads


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

    def context(self, x: Tensor) -> Any:
        """Autocast for PEFT's fp32 adapters over a bf16 base."""
        return torch.autocast(x.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def build(self, case: Case, precision: str) -> None:
        """Adapts a copy and checks that it equals the base at the start; sets ``reason`` if not.

        Raises:
            RuntimeError: one of our own methods differs from its base: a bug.
        """
        module = shared_copy(case.peft_base if self.family == "peft" else case.base)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.adapt is not None:
                    self.adapt(module)
                with torch.no_grad(), self.context(case.x):
                    error = difference(case.output(module), case.output(case.base))
                self.module = module
                trained = [p for p in module.parameters() if p.requires_grad]
                self.parameters = sum(p.numel() for p in trained)
                self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
                if not error <= TOLERANCE[precision]:  # not a number is too large as well
                    raise RuntimeError(f"differs from the base at the start by {error:.1e}")
                self.step(case)
        except Exception as error:
            if self.family != "peft" and not isinstance(error, UserError):
                raise RuntimeError(f"bench: {self.label}: {error}") from error
            self.reason = " ".join(f"{error or type(error).__name__}".split())[:300]
            self.module = self.optimizer = None

    def forward(self, case: Case) -> tuple[list[Tensor], list[Tensor | None]]:
        """The first half of a step."""
        assert self.module is not None
        with self.context(case.x):
            return case.losses(self.module)

    def step(self, case: Case) -> None:
        """Forward, backward, optimiser."""
        torch.autograd.backward(*self.forward(case))
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        case.x.grad = None

    def held(self, case: Case) -> list[Tensor]:
        """Every tensor that is there between two steps."""
        assert self.module is not None
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        state = [t for s in states for t in s.values() if isinstance(t, Tensor)]
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return [*tensors, *state, case.x, case.target]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own over the same parameters and buffers: no more memory."""
    shared = [*model.parameters(), *model.buffers()]
    shared += [m.quant_state for m in model.modules() if hasattr(m, "quant_state")]
    return copy.deepcopy(model, {id(s): s for s in shared if s is not None})


def difference(y: Tensor, base: Tensor) -> float:
    """Largest deviation over the largest entry."""
    return ((y.float() - base.float()).abs().max() / base.float().abs().max()).item()


def cases(options: Options) -> Iterator[Case]:
    """Yields the whole model, or each distinct linear layer of its first block in turn.

    Raises:
        UserError: no such shape, or an architecture without linear layers in blocks.
    """
    device, dtype = options.torch_device(), models.PRECISIONS[options.precision]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if options.what == "model":
            yield _model_case(options, device, dtype)
            return
        for (width, out), name in _distinct(options.shape).items():
            with device:
                base = nn.ModuleDict({name: nn.Linear(width, out, bias=False, dtype=dtype)})
                x = torch.randn(options.tokens, width, dtype=dtype)
                target = torch.randn(options.tokens, out, dtype=dtype)
            peft_base = _store(base, [base], options.quant)
            title = f"{name} {out} x {width}"
            yield Case(title, base, [(name, width, out)], x.requires_grad_(), target, peft_base)


def _distinct(shape: str) -> dict[tuple[int, int], str]:
    """(in, out) of the first block's linear layers -> the first name."""
    found: dict[tuple[int, int], str] = {}
    for name, width, out in _linear(models.blocks_of(shapes.meta_model(shape))[:1]):
        found.setdefault((width, out), name)
    return found


def _linear(blocks: list[nn.Module]) -> list[tuple[str, int, int]]:
    return [
        (name.rsplit(".", 1)[-1], m.in_features, m.out_features)
        for block in blocks
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear)
    ]


def _model_case(options: Options, device: torch.device, dtype: torch.dtype) -> Case:
    from transformers import AutoModelForCausalLM

    architecture = shapes.architecture(options.shape)
    with device:
        base = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, attn_implementation="sdpa"
        ).requires_grad_(False)
        length = min(ROW, options.tokens)
        rows = (options.tokens // length, length)
        x = torch.randn(*rows, architecture.hidden_size, dtype=dtype)
        labels = torch.randint(architecture.vocab_size, rows)
    blocks = models.blocks_of(base)
    peft_base = _store(base, blocks, options.quant)
    layers = _linear(blocks)
    title = f"{len(blocks)} blocks, rows of {length}"
    return Case(title, base.train(), layers, x.requires_grad_(), labels, peft_base.train())


def _store(base: nn.Module, parts: list[nn.Module], name: str) -> nn.Module:
    """Quantises the linear layers of ``parts`` in place; returns the base for PEFT."""
    base.requires_grad_(False)
    fmt = quant.get_format(name)
    if fmt is None:
        return base
    peft_base = shared_copy(base) if fmt.name == "nf4" else base
    inside = {id(m) for part in parts for m in part.modules()}
    for path, layer in list(base.named_modules()):
        if not isinstance(layer, nn.Linear) or id(layer) not in inside:
            continue
        if reason := fmt.refuses(layer.in_features):
            say(f"{path} stays unquantised: {reason}")
            continue
        if peft_base is not base:
            parent, _, last = path.rpartition(".")
            setattr(peft_base.get_submodule(parent), last, quant.bnb_linear(layer))
            setattr(peft_base, "is_loaded_in_4bit", True)  # noqa: B010  # PEFT asks for it
        quant.quantise(layer, fmt)
    return peft_base


def entries(case: Case, options: Options) -> list[Entry]:
    """The base, PEFT's LoRA, the chosen methods and PEFT's neighbours of them.

    Raises:
        UserError: an unknown method, or an odd rank where reflections come in pairs.
    """
    ours = _our_settings(case, options)
    theirs = _peft_settings(case, options)
    if options.methods == "all":
        chosen = [*ours, *theirs]
    else:
        chosen = [name.strip() for name in options.methods.split(",") if name.strip()]
        for name in chosen:
            if name not in ours and name not in theirs:
                raise lookup.unknown("method (--methods)", name, [*ours, *theirs])
        chosen += [near for name in chosen for near in neighbours(name)]
    if options.rank % 2 and {"hoft", "shoft"} & set(chosen):
        raise UserError(
            f"--rank {options.rank}: HOFT and SHOFT pair their reflections, so it must be even;"
            f" take {options.rank + 1}, or leave them out of --methods"
        )
    autocast = options.precision == "bf16"
    found = [Entry("base", "base")]
    for name, settings in ours.items():
        if name in chosen:
            adapt = _injector(settings)
            found.append(Entry(name, "scalepeft", settings, adapt))
    references = {"peft-lora", "peft-lora-bf16"} if autocast else {"peft-lora"}
    for name, settings in theirs.items():
        if name in {*chosen, *references}:
            low = name == "peft-lora-bf16"
            adapt = _peft_injector(settings, case.names, low)
            found.append(Entry(name, "peft", settings, adapt, autocast and not low))
    return found


def neighbours(name: str) -> list[str]:
    """PEFT's methods that one of ours is held against."""
    if name.startswith("peft-"):
        return []
    near = ("hira",) if name.startswith("hut-") else (name,)
    near = NEIGHBOURS.get(name, near)
    return [f"peft-{n}" for n in near if n in PEFT]


def _block_size(case: Case, rank: int, factors: int, scaled: bool) -> int:
    """The even block that divides every width and makes the count nearest to LoRA's."""
    target = sum(rank * (width + out) for _, width, out in case.layers)
    common = math.gcd(*(width for _, width, _ in case.layers))

    def distance(b: int) -> float:
        rotations = (factors * width * (b - 1) / 2 for _, width, _ in case.layers)
        return abs(sum(rotations) + scaled * sum(out for _, _, out in case.layers) - target)

    fits = [b for b in range(2, common + 1, 2) if common % (b << (factors - 1)) == 0]
    return min(fits, key=distance, default=2)


def _our_settings(case: Case, options: Options) -> dict[str, dict[str, Any]]:
    """label -> settings for ``inject``; new methods come in by their file."""
    rank, names = options.rank, case.names
    layer = options.what == "layer"
    found: dict[str, dict[str, Any]] = {}
    for name in lookup.available("adapters"):
        fields = {
            f.name
            for f in dataclasses.fields(
                lookup.find_class("adapters", name, "adapter", Adapter).Config
            )
        }
        settings: dict[str, Any] = {"name": name, "target_modules": names}
        if "rank" in fields:
            settings["rank"] = 2 * rank if name == "hra" else rank  # reflections of one side
        if "block_size" in fields:
            factors = 2 if name == "boft" else 1
            settings["block_size"] = _block_size(case, rank, factors, name == "boft")
        if name == "hadamard":
            settings |= {"train_norm": False} if layer else {"target_modules": ["o_proj"]}
        found[name] = settings
    if surm := found.pop("surm", None):
        found |= {s: {**surm, "structure": s} for s in STRUCTURES}
    if hut := found.pop("hut", None):
        common = math.gcd(*(size for _, *sizes in case.layers for size in sizes))
        largest = max(r for r in range(1, rank + 1) if common % r == 0)
        found |= {f"hut-r{r}": {**hut, "rank": r} for r in sorted({1, largest})}
    return found


# Of PEFT's BOFT the single-factor form: more factors need its CUDA extension, and cost more.
PEFT = ("lora", "lora-bf16", "dora", "oft", "oftv2", "boft", "hra", "ia3", "hira", "c3a")


def _peft_settings(case: Case, options: Options) -> dict[str, dict[str, Any]]:
    """label -> name of PEFT's config class and its fields."""
    r = options.rank
    oft = {"config": "OFTConfig", "r": 0, "oft_block_size": _block_size(case, r, 1, False)}
    lora = {"config": "LoraConfig", "r": r, "lora_alpha": 2 * r}
    blocks = {name: math.gcd(width, out) for name, width, out in case.layers}
    boft = {"boft_block_size": _block_size(case, r, 1, True), "boft_n_butterfly_factor": 1}
    feedforward = [name for name in case.names if name == "down_proj"]
    found: dict[str, dict[str, Any]] = {
        "lora": lora,
        "lora-bf16": lora,
        "dora": {**lora, "use_dora": True},
        "oft": {**oft, "use_cayley_neumann": False},
        "oftv2": {**oft, "use_cayley_neumann": True},
        "boft": {"config": "BOFTConfig", **boft},
        "hra": {"config": "HRAConfig", "r": 2 * r},
        "ia3": {"config": "IA3Config", "feedforward_modules": feedforward},
        "hira": {"config": "HiraConfig", "r": r},
        "c3a": {"config": "C3AConfig", "block_size_pattern": blocks, "init_weights": True},
    }
    return {f"peft-{name}": found[name] for name in PEFT}


def _injector(settings: dict[str, Any]) -> Callable[[nn.Module], None]:
    def adapt(module: nn.Module) -> None:
        injection.inject(module, config.adapter_config(settings))

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
    """Builds every entry, counts its memory, then times them in turn, each round in another order."""
    for entry in found:
        entry.build(case, options.precision)
        if entry.module is not None:
            entry.step(case)
            entry.saved = saved_bytes(lambda e=entry: e.forward(case), entry.held(case)[:-2])
            entry.peak = peak_bytes(lambda e=entry: e.step(case), entry.held(case))
            gc.collect()
        say(
            f"{case.title}: {entry.label} {'left out: ' + entry.reason if entry.reason else 'ready'}"
        )
    running = [entry for entry in found if not entry.reason]
    reference = next((e for e in running if e.label == "peft-lora"), None)
    for turn in range(options.repeats):
        first = turn % len(running)
        for entry in [*running[first:], *running[:first]]:
            entry.times.append(_seconds(entry, case))
        if turn + 1 == SLOW_ROUNDS and reference is not None:
            running = [e for e in running if bench_report.ratio(e.times, reference.times) <= SLOW]
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


def run(options: Options) -> dict[str, Any]:
    """Measures, prints a table for each case, writes ``bench.json`` and ``bench.png`` into ``out``.

    Returns:
        What ``bench.json`` holds.

    Raises:
        UserError: an option that makes no sense, an unknown shape or method, PEFT missing.
    """
    options.check()
    result = bench_report.header(options.torch_device(), dataclasses.asdict(options))
    print(bench_report.headline(result))
    result["cases"] = []
    for case in cases(options):
        found = entries(case, options)
        measure(case, found, options)
        result["cases"].append(bench_report.summary(case.title, found, neighbours))
        print(bench_report.table(result["cases"][-1]), flush=True)
        del case, found
        gc.collect()
    if options.out is not None:
        print(bench_report.write(result, Path(options.out)))
    return result
