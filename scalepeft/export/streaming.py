"""A finished run and its base without a whole model in memory: one layer, one tensor at a time."""

import glob
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.config import changes
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.files import damage, fsync, read_sealed, sealed, write_atomically
from scalepeft.core.text import one_line
from scalepeft.models import structure
from scalepeft.models.hub import Base, ModelConfig, open_base
from scalepeft.models.weights import Weights, fill
from scalepeft.parallel.ranks import Ranks, pick_device
from scalepeft.run.checkpoint import steps_of
from scalepeft.run.folder import (
    adapter_folder,
    check_base,
    load_run,
    older_adapter,
    read_run_adapter,
)
from scalepeft.run.stage import facts, sha256

MADE_FROM = "made_from.json"  # in a folder that was filled with a key: that key
MANIFEST = "manifest.json"
"""In each folder that was filled: ``bytes`` and ``sha256`` of its other files."""


class Streamed:
    """A model on the meta device; a module's own base parameters become real where asked for,
    adapters and tables (rotary frequencies) are real all the time.
    """

    stored: Callable[..., bool] = staticmethod(lambda *of: False)  # as ``fill`` takes it

    def __init__(self, model: nn.Module, weights: Weights, device: torch.device) -> None:
        structure.compute_tables(model, device)
        self.model, self.weights, self.device = model.eval(), weights, device
        self.modules = dict(model.named_modules())
        self.names = {id(p): name for name, p in model.named_parameters()}
        """Of tied parameters the first name."""
        state = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in state:
                buffer.copy_(weights.layout.sources[name].whole().view_as(buffer))

    @contextmanager
    def held(self, module: nn.Module) -> Iterator[None]:
        """Inside, the parameters that are the module's own are real; quantized where it is."""
        own = {key: p for key, p in module._parameters.items() if p is not None and p.is_meta}
        try:
            for key, p in own.items():
                real = torch.empty_like(p, device=self.device)
                module._parameters[key] = nn.Parameter(real, requires_grad=False)
            for key, p in own.items():
                if key != "weight_scale":  # comes with its weight
                    fill(module, self.names[id(p)], getattr(module, key), self.weights, self.stored)
            yield
        finally:
            module._parameters.update(own)

    @torch.no_grad()
    def logits(
        self, ids: Tensor, visit: Callable[[str, nn.Module], None] = lambda *of: None
    ) -> Tensor:
        """ids (rows, tokens) -> logits (rows, tokens, vocabulary), on the CPU; ``visit(name,
        module)`` is called with real parameters before they are used.
        """
        names = {module: name for name, module in self.modules.items()}
        held = {module: ExitStack() for module in self.modules.values()}

        def before(module: nn.Module, _args: Any) -> None:
            held[module].enter_context(self.held(module))
            visit(names[module], module)

        def after(module: nn.Module, _args: Any, _out: Any) -> None:
            held[module].close()

        with ExitStack() as hooks:
            for module in self.modules.values():
                if all(p is None or p.dim() < 2 for p in module._parameters.values()):
                    # Vectors, which a block may use past the forward of the module that has them.
                    hooks.enter_context(self.held(module))
                    visit(names[module], module)
                elif any(p.is_meta for p in module.parameters(recurse=False)):
                    hooks.enter_context(module.register_forward_pre_hook(before))
                    hooks.enter_context(module.register_forward_hook(after))
            out: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        return out.float().cpu()


@dataclass(frozen=True)
class FinishedRun:
    """A run's config, its adapter and the files of its base, checked to belong together."""

    config: cfg.RunConfig
    base: Base
    state: dict[str, Tensor]
    device: torch.device

    @classmethod
    def open(cls, run_dir: str, settings: list[str], what: str) -> "FinishedRun":
        """Reads and compares them. Raises UserError: no adapter, one of other settings or another
        base, unreadable files, a setting that cannot be changed for ``what``.
        """
        config = load_run(run_dir, settings, changes.for_export(), what)
        where = adapter_folder(run_dir)
        if not where.is_dir() and (steps := steps_of(Path(run_dir))):
            what = f"{run_dir} has not finished: it is at step {max(steps)} and has no adapter/ yet"
            raise UserError(f"{what}; run its train command again to continue")
        adapter, state, description = read_run_adapter(run_dir)
        if word := older_adapter(Path(run_dir), description.get("step")):
            raise UserError(f"{run_dir}: {word}; let it finish (its train command continues it)")
        trained_on = description.get("base_model") or {}
        storage = ("quant", "double_quant")
        held = cfg.to_dict(adapter) | {key: trained_on.get(key) for key in storage}
        wanted = cfg.to_dict(config.adapter) | {key: getattr(config.model, key) for key in storage}
        for key in sorted(held.keys() | wanted.keys()) if where != Path(run_dir) else ():
            if held.get(key) != wanted.get(key):
                raise UserError(
                    f"{where} is not this run's adapter: {key} is {held.get(key)} there and"
                    f" {wanted.get(key)} in {run_dir}/config.yaml; put the adapter back"
                )
        device = pick_device(config.engine.device, 0)
        base = open_base(config.model, Ranks())
        _ = base.architecture  # a config.json that is missing is named first
        check_base(base, run_dir, description, Ranks())
        return cls(config, base, state, device)

    def structure(self, quantized: bool) -> Streamed:
        """The base in fp32 with the adapter, quantized as in training or as in the files. Raises
        UserError: the adapter's tensors do not fit, or are not finite.
        """
        config = self.config.model
        if not quantized:
            config = replace(config, quant="none", double_quant=False)
        weights = self.base.weights
        model = structure.build(config, self.base.folder, "fp32", weights)
        injection.inject(model, self.config.adapter)
        where = str(adapter_folder(self.config.run_dir))
        injection.check_state(model, injection.shapes(self.state), where)
        for _, adapter in injection.adapters(model):
            adapter.to_empty(device=self.device)
        injection.load_state(model, self.state, where)
        return Streamed(model, weights, self.device)


def plain(folder: Path, device: torch.device, config: ModelConfig) -> Streamed:
    """The model of a folder alone, in fp32; the rest as ``config`` of the run has it."""
    weights = Weights(folder)
    config = replace(config, path=str(folder), quant="none", double_quant=False)
    return Streamed(structure.build(config, folder, "fp32", weights), weights, device)


def refuse_existing(out: Path) -> None:
    """Raises UserError if there is anything at ``out``."""
    if os.path.lexists(out):
        raise UserError(f"OUT={out}: is there already; name a folder that does not exist yet")


def changed(folder: Path, hashed: Callable[[Path], str] = sha256) -> str | None:
    """Why a folder is not as ``whole_folder`` made it; None also of one without a manifest."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return damage(folder, read_sealed(folder / MANIFEST)["files"], hashed)
    except (OSError, ValueError, LookupError) as error:
        return one_line(error)


@contextmanager
def whole_folder(out: Path, key: str | None = None) -> Iterator[Path]:
    """Yields a folder to fill; it appears as ``out`` once all is on the disk, or nothing does.

    Without a ``key`` it is this process's own, and nothing is left behind; with one it stays when
    broken off, for who comes next with the same key, one at a time as the caller sees to. Raises
    UserError: ``out`` exists, or the disk refuses.
    """
    refuse_existing(out)
    begin = f"{out.name}.partial-{socket.gethostname()}-"
    partial = out.with_name(f"{begin}{os.getpid()}" if key is None else f"{out.name}.partial")
    made_from = partial / MADE_FROM
    try:
        for left in out.parent.glob(f"{glob.escape(begin)}*"):  # of processes that were killed here
            if not Path("/proc", left.name.removeprefix(begin)).exists():
                shutil.rmtree(left, ignore_errors=True)
        if key is None:
            partial.mkdir(parents=True)
        elif not made_from.is_file() or made_from.read_text() != key:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_atomically(made_from, key)
        yield partial
        files = [file for file in sorted(partial.iterdir()) if file.name != MANIFEST]
        with ThreadPoolExecutor() as pool:
            known = dict(zip((f.name for f in files), pool.map(facts, files), strict=True))
        write_atomically(partial / MANIFEST, json.dumps(sealed({"files": known}), indent=1))
        for file in partial.iterdir():
            fsync(file)
        fsync(partial)
        refuse_existing(out)
        partial.rename(out)
        fsync(out.parent)
    except BaseException as error:
        if key is None:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = getattr(error, "strerror", None) or error
        state = "nothing of it is left" if key is None else f"{partial} is continued next time"
        fix = f"{state}: make room, or name another folder"
        raise UserError(f"OUT={out}: not written: {reason}; {fix}") from None
