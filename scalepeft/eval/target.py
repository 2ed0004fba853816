"""What an evaluation scores: the adapter over its base, a merged checkpoint, or the base alone."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from scalepeft.adapters import inject as injection
from scalepeft.adapters.factors import Factors
from scalepeft.adapters.layout import weights_file
from scalepeft.build import Built, build
from scalepeft.config.schema import RunConfig, Subject
from scalepeft.core.errors import UserError
from scalepeft.core.files import digest
from scalepeft.core.log import say
from scalepeft.export.streaming import changed
from scalepeft.models.hub import Base, open_base
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.folder import adapter_folder, check_base, older_adapter, read_run_adapter


@dataclass(frozen=True)
class EvalTarget:
    """What an evaluation scores."""

    kind: Subject
    config: RunConfig  # loads it: for a merged checkpoint, with that in the place of the base
    base: Base
    fingerprint: str  # of the adapter, or of the base's or merged weights
    adapter: Any = None  # of ``injection.read_adapter``; None for a base or a merged checkpoint
    step: int | None = None  # of the training that the adapter comes from

    @classmethod
    def find(cls, config: RunConfig, kind: Subject, ranks: Ranks) -> "EvalTarget":
        """Finds it; a collective. Raises UserError: there is none yet."""
        run_dir = Path(config.run_dir)
        adapter: Any = None
        if kind == "adapter" or (kind == "base" and adapter_folder(run_dir).is_dir()):
            adapter = ranks.all_or_raise(lambda: read_run_adapter(run_dir))
        if kind == "merged":
            config = ranks.all_or_raise(lambda: _with_merged(config))
        base = open_base(config.model, ranks)
        if adapter is not None:  # base and adapter are compared: they must be of one base
            check_base(base, run_dir, adapter[2], ranks)
        # Both read where ranks agree on a failure.
        weights, _ = ranks.all_or_raise(lambda: (base.fingerprint, base.tokenizer_hash))
        if kind != "adapter":
            return cls(kind, config, base, weights)
        step = adapter[2].get("step")
        if ranks.is_main and (outdated := older_adapter(run_dir, step)):
            say(outdated)
        fingerprint = digest(weights_file(adapter_folder(run_dir)))
        return cls(kind, config, base, fingerprint, adapter, step)

    def load(self, ranks: Ranks, poll: Any) -> Built:
        """Builds the model, in evaluation mode. Raises UserError: another base, or as ``build``."""
        where, state = str(adapter_folder(self.config.run_dir)), self.adapter and self.adapter[1]
        check = partial(injection.check_state, shapes=injection.shapes(state or {}), where=where)
        built = build(self.config, self.base, ranks, poll, state is not None, check)
        if state is not None:
            injection.load_state(built.model, state, where)
        built.engine.attach(built.model, None)
        Factors(built.model, built.engine).make()
        built.model.eval()
        return built


def _with_merged(config: RunConfig) -> RunConfig:
    folder = Path(config.run_dir) / "merged"
    if not (folder / "config.json").is_file():
        fix = f"scalepeft merge {config.run_dir} {folder}"
        raise UserError(f"{folder}: no merged checkpoint there; {fix}")
    if reason := changed(folder):
        fix = "merge again, or remove its manifest.json to take it as it is"
        raise UserError(f"{folder}: {reason}; {fix}")
    here: dict[str, Any] = {"path": str(folder), "revision": None, "stage": False}
    model = replace(config.model, **here, quant="none", double_quant=False)
    return replace(config, model=model)
