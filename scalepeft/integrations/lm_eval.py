"""lm-eval (EleutherAI's harness) on a run folder, as the model ``scalepeft``; it looks for no
plug-ins, so a plain ``lm-eval`` does not know the model: docs/integrations/lm-eval.md.
"""

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist

from scalepeft.build import start_ranks
from scalepeft.config import changes
from scalepeft.core.errors import UserError, nearest
from scalepeft.core.preemption import USER_ERROR
from scalepeft.eval import evaluate
from scalepeft.eval.target import EvalTarget
from scalepeft.run.folder import load_run

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as missing:
    if __name__ == "__main__":
        sys.exit(f"scalepeft: error: {missing}; pip install 'scalepeft[lm-eval]'")
    raise

HARNESS = (
    "batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "add_bos_token",
    "prefix_token_id", "softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
"""Arguments of lm-eval's own Hugging Face model that have a meaning for a model that is loaded."""


@register_model("scalepeft")
class ScalepeftLM(HFLM):
    """A run's adapter, its merged checkpoint or its base, loaded as ``scalepeft evaluate`` does;
    ``device`` in place of ``engine.device``, but for lm-eval's default, which leaves that; ``more``
    settings of the run and of lm-eval's own model. Raises UserError: not loaded, or not known.
    """

    def __init__(
        self, run_dir: str, subject: Any = "adapter", device: str | None = None, **more: Any
    ) -> None:
        from transformers import GenerationConfig

        if subject not in evaluate.FOLDERS:
            raise UserError(f"subject={subject}: allowed are {', '.join(evaluate.FOLDERS)}")
        settings = [f"{k}={v}" for k, v in more.items() if "." in k or k == "engine"]
        harness = {k: v for k, v in more.items() if "." not in k and k != "engine"}
        allowed = ("run_dir", "subject", *HARNESS)
        for key in harness.keys() - set(allowed):
            raise UserError(
                f"--model_args {key}: not known.{nearest(key, allowed)} Allowed:"
                f" {', '.join(allowed)}, and settings of the run with a dot"
            )
        if device not in (None, "cuda:0"):  # lm-eval's default
            settings.append(f"engine.device={device}")
        config = load_run(str(run_dir), settings, changes.for_evaluation(), "an evaluation")
        if config.engine.name not in ("single", "ddp"):
            raise UserError(
                f"engine.name={config.engine.name}: under lm-eval each process must hold the whole"
                " model, since its ranks go through different numbers of forwards; take engine=ddp,"
                " or engine=single for one process"
            )
        self.ranks = start_ranks(config)
        self.target = EvalTarget.find(config, subject, self.ranks)
        self.about = {"run_dir": str(run_dir), "subject": subject}
        tokenizer = self.target.base.tokenizer
        model: Any = self.target.load(self.ranks, lambda: None).model
        # The task decides, and the tokenizer's end of text; what the model's files say does not.
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **harness)
        self._rank, self._world_size = self.ranks.rank, self.ranks.world_size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's number, in rank order."""
        parts = self.ranks.gather(tensor.reshape(-1).tolist())
        return torch.tensor([number for part in parts for number in part], dtype=tensor.dtype)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every rank's object, in rank order, on rank ``dst``."""
        found = [_decoded(value) for value in self.ranks.gather(_encoded(obj))]
        return found if self.ranks.rank == dst else None

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.ranks.any(False)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results: which run, and which weights of it."""
        model = self.target.config.model
        return {
            **self.about,
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": self.model.dtype,
            "model_path": model.path,
            "model_quant": model.quant,
            "fingerprint": self.target.fingerprint,
            "step": self.target.step,
        }


def _encoded(value: Any) -> Any:
    """``value`` in JSON's types: of lm-eval's dicts some keys are tuples."""
    if isinstance(value, dict):
        return {"dict": [[_encoded(k), _encoded(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v) for v in value]}
    if isinstance(value, list):
        return [_encoded(v) for v in value]
    value = value.item() if hasattr(value, "item") else value  # numpy's and torch's numbers
    return value if value is None or type(value) in (str, int, float, bool) else str(value)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_decoded(v) for v in value["tuple"])
        return {_decoded(k): _decoded(v) for k, v in value["dict"]}
    return [_decoded(v) for v in value] if isinstance(value, list) else value


def main() -> int:
    """lm-eval's command line, with the model ``scalepeft`` known to it."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
        return 0
    except UserError as error:
        print(f"scalepeft: error: {error}", file=sys.stderr)
        return USER_ERROR
    finally:
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
