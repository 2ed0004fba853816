"""From prompts to continuations with the run's own model: left-padded batches, KV cache, beams."""

from dataclasses import dataclass
from typing import Any

import torch

from scalepeft.config import EvaluateConfig
from scalepeft.data import strip_eos
from scalepeft.lookup import UserError


@dataclass(frozen=True)
class Generator:
    """Continues prompts on this rank's device.

    Attributes:
        model: a causal LM.
        tokenizer: its tokenizer; prompts get its special tokens (BOS).
        config: length limits, beams, stop texts.
        device: of the model.
        synced: ranks must go through the same number of forwards (sharded parameters).
    """

    model: Any
    tokenizer: Any
    config: EvaluateConfig
    device: torch.device
    synced: bool

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[list[str], list[bool]]:
        """Returns the new text alone of each prompt, and which prompts lost their beginning.

        Raises:
            UserError: the answer alone would fill the model's positions.
        """
        ids = [
            strip_eos(i, self.tokenizer)
            for i in self.tokenizer(prompts, verbose=False)["input_ids"]
        ]
        room = prompt_room(self.config, self.model.config.max_position_embeddings)
        length = min(max(map(len, ids)), room)
        tokens = torch.zeros(len(ids), length, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(ids):
            kept = prompt[-length:]  # the end of a prompt asks the question
            tokens[row, length - len(kept) :] = torch.tensor(kept)
            mask[row, length - len(kept) :] = 1
        out = self.model.generate(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=self.config.max_new_tokens,
            do_sample=False,
            num_beams=self.config.num_beams,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            # Beams are cut afterwards: a search must see its hypotheses to their end.
            **(
                {"stop_strings": self.config.stop, "tokenizer": self.tokenizer}
                if self.config.stop and self.config.num_beams == 1
                else {}
            ),
            synced_gpus=self.synced,
        )[:, length:]
        if self.config.max_tokens is not None:
            # Rows of a batch have prompts of different lengths, and so have their answers.
            out = [row[: self.config.max_tokens - len(p)] for row, p in zip(out, ids, strict=True)]
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [cut_at(text, self.config.stop) for text in texts], [len(i) > room for i in ids]


def prompt_room(config: EvaluateConfig, positions: int) -> int:
    """Tokens a prompt may have; longer ones lose their beginning."""
    if positions <= config.max_new_tokens:
        raise UserError(
            f"evaluate.max_new_tokens={config.max_new_tokens} fills the model's {positions}"
            " positions"
        )
    room = positions - config.max_new_tokens
    if config.max_tokens is not None:
        room = min(room, config.max_tokens - 1)
    return room


def cut_at(text: str, stop: list[str]) -> str:
    """The text before the first of the stop texts in it."""
    return text[: min((i for i in map(text.find, stop) if i >= 0), default=len(text))]
