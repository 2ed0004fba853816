"""Whole training steps on a fake accelerator: tensors there have a device and no values.

    python tests/support/fake_device.py FOLDER < cases.json    counts of each case's step, as JSON

FOLDER holds a base's config.json; a case is a list of settings. An operator over tensors of two
devices fails as it would on CUDA; what a step waits for on the host and what it launches is counted
under a dispatch mode. Tensors of the host alone are real. The device is registered for the whole
process, which is therefore one of its own.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.backend_registration as registration
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import masking_utils

from scalepeft.adapters import inject as injection
from scalepeft.build import Built, engine_class
from scalepeft.cluster.plan.simulate import empty_model
from scalepeft.config import files
from scalepeft.data.tokens import TokenSet
from scalepeft.models import attention, structure
from scalepeft.parallel.ranks import Ranks
from scalepeft.trainer import Trainer, batches

NAME = "npy"  # the one that torch has C++ hooks for
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
NO_LAUNCH = ("aten._unsafe_view", "aten.detach")
ROWS = [9, 5, 17, 3]  # lengths


class _Module(registration._DummyBackendModule):
    """What ``torch.npy`` has; autocast is asked for by torch.utils.checkpoint."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Counts(TorchDispatchMode):
    """Counts ``launches`` on the device, and ``syncs``: operators that the host waits for."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.launches, self.syncs = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        held = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = any(t.device.type == NAME for t in held)
        name = str(func).removesuffix(".default")
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(held[0], FakeTensor):
            self.syncs[name] += there
            return 1.0 if held[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default and there:
            self.syncs[name] += 1
            rows = torch.arange(held[0].numel(), device=held[0].device)
            return rows.expand(held[0].dim(), -1).T
        waits = any(tag in func.tags for tag in WAITS) or "check_errors" in name
        if waits and name != "aten.index.Tensor":  # which fails here where it does
            self.syncs[name] += there
        goes = torch.device(kwargs.get("device") or "cpu").type == NAME
        if not there and not goes and not any(isinstance(t, FakeTensor) for t in held):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        # Else it would try the device with what a real tensor holds.
        args, kwargs = tree_map_only(Tensor, self._without_values, (args, kwargs))
        out = func(*args, **kwargs)
        on_device = [t.device.type == NAME for t in tree_leaves(out) if isinstance(t, Tensor)]
        if "_to_copy" in name or "copy_" in name:
            crosses = len({t.device.type for t in (*held, out)} - {"meta"}) > 1
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self.syncs[name] += crosses and waits
        silent = func.is_view or func.namespace == "prim"
        if (there or any(on_device)) and not silent and name not in NO_LAUNCH:
            self.launches[name] += 1
        return out

    def _without_values(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def step(folder: Path, settings: list[str], device: torch.device) -> dict[str, Any]:
    """Syncs, launches and gradients of a step of two micro-batches and more."""
    config, _ = files.load(None, [f"model.path={folder}", "run_dir=unused", *settings])
    ranks = Ranks()
    ranks.device = device
    model = empty_model(config, folder)
    if config.train.batching == "packed":
        attention.read_rows_alone(model)
    engine = engine_class(config)(config.engine, ranks)
    engine.shard(model, structure.blocks_of(model))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Counts(fake) as counts:
        structure.materialize(model, ranks.device)
        trainer = Trainer(config, ranks, Built(engine, model, {}, 0), "")
        injection.train_mode(model)
        trainer.packed = config.train.batching == "packed"
        ends = torch.tensor([0, *ROWS]).cumsum(0)
        rows = TokenSet(torch.arange(5, 5 + sum(ROWS)).int(), ends, torch.full((len(ROWS),), 2))
        for batch in batches(trainer, rows, 0, 1):
            counts.launches.clear()
            counts.syncs.clear()
            trainer.step(batch.micro, batch.label_tokens, 0.1)
    return {
        "syncs": {k: n for k, n in counts.syncs.items() if n},
        "launches": counts.launches.total(),
        "updates": counts.launches["aten._fused_adamw_"],
        "devices": sorted({p.device.type for p in model.parameters()}),
    }


def main() -> None:
    registration._setup_privateuseone_for_python_backend(NAME, _Module())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is a copy from the host
    found, real = [], mock.patch.object(masking_utils, "is_tracing", return_value=False)
    with real, torch.autograd.set_multithreading_enabled(False):
        for settings in json.load(sys.stdin):
            try:
                found.append(step(Path(sys.argv[1]), settings, torch.device(NAME, 0)))
            except Exception as error:
                found.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(found), flush=True)
    os._exit(0)  # autograd's thread of such a device is never told to end


if __name__ == "__main__":
    main()
