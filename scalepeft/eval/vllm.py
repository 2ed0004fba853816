"""vLLM generates (docs/integrations/vllm.md); beams are tested against a stand-in of its calls.

Its beam search ranks hypotheses by the same score as ``hf``, and ends by another rule. A signal
that also reaches vLLM's own processes (Slurm sends it to the whole step) ends the evaluation with
an error instead of 75; what is in predictions.jsonl counts all the same.
"""

import json
from pathlib import Path
from typing import Any

import torch

from scalepeft.config.schema import RunConfig, Subject
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_mapping
from scalepeft.core.log import say
from scalepeft.eval.generation import Backend
from scalepeft.eval.target import EvalTarget
from scalepeft.export import merge
from scalepeft.export import peft as export

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


class Generator(Backend):
    """vLLM's engine ``llm`` on every GPU of this process, with the exported adapter ``lora``."""

    def __init__(self, target: EvalTarget, prompts: list[str]) -> None:
        """Starts vLLM for ``prompts``, by whose length it plans memory; raises as ``exported``."""
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        config, base = target.config, target.base
        super().__init__(base.tokenizer, config.evaluate, base.positions)
        settings: dict[str, Any] = {
            "model": str(base.folder),
            "tokenizer": config.model.tokenizer or str(base.folder),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.train.precision],
            "max_model_len": max(map(len, self.encoded(prompts)[0])) + self.config.max_new_tokens,
            "tensor_parallel_size": max(1, torch.cuda.device_count()),
            "seed": 0,
        }
        self.lora = None
        if target.adapter is not None:
            path, rank = exported(config, target.fingerprint)
            settings |= {"enable_lora": True, "max_lora_rank": next(r for r in RANKS if r >= rank)}
            self.lora = LoRARequest("adapter", 1, str(path))
        if self.config.num_beams > 1:  # a beam step looks at so many tokens
            settings["max_logprobs"] = 2 * self.config.num_beams
        if target.kind == "merged" and merge.vllm_may_drop_biases(base.architecture):
            settings["model_impl"] = "transformers"
        self.llm = LLM(**settings)

    def generate(self, ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        """Greedy, or by vLLM's beam search."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import BeamSearchParams

        config = self.config
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in ids]
        if config.num_beams > 1:
            beams = BeamSearchParams(beam_width=config.num_beams, max_tokens=config.max_new_tokens)
            found = self.llm.beam_search(prompts, beams, lora_request=self.lora)
            best = [list(output.sequences[0].tokens) for output in found]
            begun = all(b[: len(i)] == i for b, i in zip(best, ids, strict=True))
            assert begun, "a hypothesis of vLLM begins with its prompt"
            return [b[len(i) :] for b, i in zip(best, ids, strict=True)]
        # So that it asks no file of its own what ends an answer.
        end = {"ignore_eos": True, "stop_token_ids": self.ends, "stop": config.stop or None}
        greedy = [SamplingParams(temperature=0.0, max_tokens=limit, **end) for limit in limits]
        found = self.llm.generate(prompts, greedy, use_tqdm=False, lora_request=self.lora)
        return [list(request.outputs[0].token_ids) for request in found]

    def close(self) -> None:
        """Ends the engine: at exit the group it leaves would be gone, by ``Ranks.finish``."""
        self.llm.llm_engine.engine_core.shutdown()


def check(config: RunConfig, kind: Subject, world_size: int) -> None:
    """Raise UserError before anything is loaded: several ranks, a quantized base, or no vLLM."""
    if world_size > 1:
        raise UserError(
            f"evaluate.backend=vllm in {world_size} processes: vLLM spreads over the GPUs by"
            " itself; start scalepeft evaluate once, without torchrun or srun's tasks"
        )
    if kind != "merged" and config.model.quant != "none":
        run = config.run_dir
        raise UserError(
            f"evaluate.backend=vllm: this run's base is held as {config.model.quant}, vLLM would"
            f" load another one; scalepeft merge {run} {run}/merged --base-weights dequantized and"
            " evaluate --merged, or evaluate.backend=hf"
        )
    try:
        import vllm.lora.request  # noqa: F401
    except ImportError as error:
        remedy = "pip install vllm in an environment with a GPU, or evaluate.backend=hf"
        raise UserError(f"evaluate.backend=vllm: {error}; {remedy}") from None


def exported(config: RunConfig, sha256: str) -> tuple[Path, int]:
    """The adapter as a LoRA under the ``sha256`` of its file, which may be trained further; made if
    it is not there; its rank. Raises UserError: no LoRA, or more rank than vLLM takes.
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
    remedy = f"remove {folder} to have it exported again"
    rank = int(read_mapping(folder / "adapter_config.json", json.loads, remedy)["r"])
    if rank > RANKS[-1]:
        raise UserError(
            f"evaluate.backend=vllm: as a LoRA the adapter has rank {rank}, vLLM takes"
            f" {RANKS[-1]} at most; merge it and evaluate --merged, or evaluate.backend=hf"
        )
    return folder, rank
