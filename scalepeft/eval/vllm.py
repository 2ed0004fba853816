"""vLLM generates (``evaluate.backend=vllm``): merged checkpoints, bases, adapters that are a LoRA.

Written against the interface of vLLM 0.33 (``LLM.generate``, ``LLM.beam_search``, ``LoRARequest``)
as its source shows it, and tested against a stand-in of the same calls: it has NOT been run with
vLLM itself. Compare some predictions with ``evaluate.backend=hf`` before numbers are reported.

Greedy answers are those of ``hf`` up to ties that other kernels decide otherwise. The beam search
is vLLM's own: it ranks hypotheses by the same score, and ends its search by another rule.

A signal that also reaches vLLM's own processes (Slurm sends it to the whole step) ends the
evaluation with an error instead of 75; predictions.jsonl is kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.config.schema import EvaluateConfig, RunConfig, Subject
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping
from scalepeft.core.log import say
from scalepeft.eval.generation import answer_limits, encode, lengths, texts_of
from scalepeft.export import peft as export
from scalepeft.models import hub as models

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
INSTALL = "pip install vllm in an environment with a GPU, or evaluate.backend=hf"


@dataclass(frozen=True)
class Generator:
    """Continues prompts; called as ``scalepeft.eval.generation.Generator`` is.

    Attributes:
        llm: vLLM's engine.
        tokenizer: makes the prompts' ids and the answers' texts, as for the other backend.
        config: length limits, beams, stop texts.
        positions: of the model.
        lora: the exported adapter, as vLLM takes it.
    """

    llm: Any
    tokenizer: Any
    config: EvaluateConfig
    positions: int
    lora: Any = None

    @classmethod
    def load(
        cls, config: RunConfig, folder: Path, adapter: str | None, prompts: list[str]
    ) -> "Generator":
        """Start vLLM on every GPU that this process sees.

        Args:
            config: of the run; ``model`` is the merged checkpoint's where that is evaluated.
            folder: of the model.
            adapter: sha256 of the run's adapter file; None to leave the adapter out.
            prompts: all that are to come: their length is what vLLM plans its memory for.

        Raises:
            UserError: vLLM is missing, the adapter is no LoRA or of too large a rank, or the heads
                do not divide among the GPUs.
        """
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(f"evaluate.backend=vllm: {error}; {INSTALL}") from None
        architecture = models.architecture(folder)
        tokenizer = models.load_tokenizer(config.model, folder)
        positions = architecture.max_position_embeddings
        ids, _ = encode(prompts, tokenizer, config.evaluate, positions)
        settings: dict[str, Any] = {
            "model": str(folder),
            "tokenizer": config.model.tokenizer or str(folder),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.train.precision],
            "max_model_len": max(map(len, ids)) + config.evaluate.max_new_tokens,
            "tensor_parallel_size": _gpus(architecture.num_attention_heads),
            "seed": 0,
        }
        lora = None
        if adapter is not None:
            path, rank = exported(config, adapter)
            settings |= {"enable_lora": True, "max_lora_rank": next(r for r in RANKS if r >= rank)}
            lora = LoRARequest("adapter", 1, str(path))
        if config.evaluate.num_beams > 1:  # a beam step looks at so many tokens
            settings["max_logprobs"] = 2 * config.evaluate.num_beams
        return cls(LLM(**settings), tokenizer, config.evaluate, positions, lora)

    def __call__(self, prompts: list[str]) -> tuple[list[str], list[bool]]:
        """Return the new text alone of each prompt, and which prompts lost their beginning."""
        if not prompts:
            return [], []
        ids, cut = encode(prompts, self.tokenizer, self.config, self.positions)
        answers = self._beams(ids) if self.config.num_beams > 1 else self._greedy(ids)
        limits = answer_limits(ids, self.config)
        answers = [row[:limit] for row, limit in zip(answers, limits, strict=True)]
        return texts_of(answers, self.tokenizer, self.config), cut

    def lengths(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt, before any of it is cut."""
        return lengths(prompts, self.tokenizer)

    def _greedy(self, ids: list[list[int]]) -> list[list[int]]:
        from vllm import SamplingParams, TokensPrompt

        requests = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in ids],
            [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=limit,
                    stop=self.config.stop or None,
                    # Else it would end at what generation_config.json calls EOS as well.
                    ignore_eos=True,
                    stop_token_ids=[self.tokenizer.eos_token_id],
                )
                for limit in answer_limits(ids, self.config)
            ],
            use_tqdm=False,
            lora_request=self.lora,
        )
        return [list(request.outputs[0].token_ids) for request in requests]

    def _beams(self, ids: list[list[int]]) -> list[list[int]]:
        from vllm import TokensPrompt
        from vllm.sampling_params import BeamSearchParams

        outputs = self.llm.beam_search(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in ids],
            BeamSearchParams(
                beam_width=self.config.num_beams, max_tokens=self.config.max_new_tokens
            ),
            lora_request=self.lora,
        )
        best = [list(output.sequences[0].tokens) for output in outputs]
        answers = []
        for tokens, prompt in zip(best, ids, strict=True):
            assert tokens[: len(prompt)] == prompt, "a hypothesis of vLLM begins with its prompt"
            answers.append(tokens[len(prompt) :])
        return answers


def check(config: RunConfig, subject: Subject, world_size: int) -> None:
    """Refuse what vLLM cannot evaluate as the run has it, before anything is loaded.

    Raises:
        UserError: several ranks, or a base that is stored in fewer bits.
    """
    if world_size > 1:
        raise UserError(
            f"evaluate.backend=vllm in {world_size} processes: vLLM spreads over the GPUs by"
            " itself; start scalepeft evaluate once, without torchrun or srun's tasks"
        )
    if subject != "merged" and config.model.quant != "none":
        run = config.run_dir
        raise UserError(
            f"evaluate.backend=vllm: this run's base is held as {config.model.quant}, vLLM would"
            f" load another one; scalepeft merge {run} {run}/merged --base dequantized and evaluate"
            " --merged, or evaluate.backend=hf"
        )


def exported(config: RunConfig, sha256: str) -> tuple[Path, int]:
    """Return the adapter as a LoRA in ``RUN_DIR/exported-lora``, exported if need be; and its rank.

    Args:
        config: of the run.
        sha256: of its adapter file. The export lies under this name: an adapter that was trained
            further must not be measured by the export of an earlier one.

    Raises:
        UserError: the method is no LoRA, or the rank is more than vLLM takes.
    """
    folder = Path(config.run_dir) / "exported-lora" / sha256[:16]
    if not folder.is_dir():
        say(f"exporting the adapter to {folder}")
        settings = [f"model.path={config.model.path}"]
        folder.parent.mkdir(exist_ok=True)
        try:
            export.run(config.run_dir, str(folder), settings, "lora")
        except UserError as error:
            raise UserError(f"evaluate.backend=vllm needs the adapter as a LoRA: {error}") from None
    description = read_mapping(
        folder / "adapter_config.json", json.loads, f"remove {folder} to have it exported again"
    )
    rank = int(description["r"])
    if rank > RANKS[-1]:
        raise UserError(
            f"evaluate.backend=vllm: as a LoRA the adapter has rank {rank}, vLLM takes"
            f" {RANKS[-1]} at most; merge it and evaluate --merged, or evaluate.backend=hf"
        )
    return folder, rank


def _gpus(heads: int) -> int:
    import torch

    count = max(1, torch.cuda.device_count())
    if heads % count:
        raise UserError(
            f"evaluate.backend=vllm: {heads} attention heads do not divide among {count} GPUs; show"
            " vLLM fewer of them with CUDA_VISIBLE_DEVICES"
        )
    return count
