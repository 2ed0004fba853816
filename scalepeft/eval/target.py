"""What an evaluation scores: the adapter, a merged checkpoint or the base."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalepeft.adapters import inject as injection
from scalepeft.build import Built, build
from scalepeft.config.schema import RunConfig, Subject
from scalepeft.core.errors import UserError
from scalepeft.core.files import digest
from scalepeft.core.log import say
from scalepeft.models.hub import Base, open_base
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.folder import check_base, older_adapter


@dataclass(frozen=True)
class Chosen:
    """What an evaluation scores.

    Attributes:
        config: loads it: for a merged checkpoint, with that in the place of the base.
        base: of that config.
        adapter: what ``injection.read_adapter`` found; None for a base or a merged checkpoint.
        fingerprint: of the adapter, or of the base's or merged weights.
        tokenizer: hash of the tokenizer.
        step: of the training that the adapter comes from.
    """

    config: RunConfig
    base: Base
    adapter: Any
    fingerprint: str
    tokenizer: str
    step: int | None = None

    @classmethod
    def of(cls, config: RunConfig, subject: Subject, ranks: Ranks) -> "Chosen":
        """Finds it; a collective. Raises UserError: there is none yet."""
        where = Path(config.run_dir) / "adapter"
        adapter = None
        if subject == "adapter" or (subject == "base" and where.is_dir()):
            adapter = ranks.together(lambda: injection.read_adapter(where))
        if subject == "merged":
            config = ranks.together(lambda: _with_merged(config))
        base = open_base(config.model, ranks)
        weights = ranks.together(lambda: base.fingerprint)
        tokenizer = ranks.together(lambda: base.tokenizer_hash)
        if adapter is None:
            return cls(config, base, None, weights, tokenizer)
        # Base and adapter are compared in reports: they must be of one base.
        trained_on = adapter[2].get("base_model", {})
        ranks.together(lambda: check_base(config, trained_on, weights))
        if subject == "base":
            return cls(config, base, None, weights, tokenizer)
        step = adapter[2].get("step")
        if ranks.is_main and (word := older_adapter(where.parent, step)):
            say(word)
        return cls(config, base, adapter, digest(where / "adapter.safetensors"), tokenizer, step)

    def load(self, ranks: Ranks, poll: Any) -> tuple[Built, Any]:
        """Builds the model on this rank, in evaluation mode; returns it with its tokenizer.

        Raises:
            UserError: the base is not that of the adapter, or what ``build`` refuses.
        """
        config, adapter = self.config, self.adapter
        built = build(config, self.base, ranks, poll, adapted=adapter is not None)
        if adapter is not None:
            injection.load_state(built.model, adapter[1], f"{config.run_dir}/adapter")
        built.engine.attach(built.model, None)
        built.model.eval()
        return built, self.base.tokenizer


def _with_merged(config: RunConfig) -> RunConfig:
    folder = Path(config.run_dir) / "merged"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no merged checkpoint there; scalepeft merge {config.run_dir} {folder}"
        )
    model = replace(config.model, path=str(folder), revision=None, quant="none", double_quant=False)
    return replace(config, model=model)
