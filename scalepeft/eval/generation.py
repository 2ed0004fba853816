"""From prompts to continuations with the run's own model: slots, or left-padded batches; beams."""

import sys
import time
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch

from scalepeft.config.schema import EvaluateConfig
from scalepeft.core.errors import UserError
from scalepeft.core.log import LINE_SECONDS, say
from scalepeft.core.preemption import StopFlag
from scalepeft.core.text import duration, visible
from scalepeft.data import tokens
from scalepeft.data.tasks.base import Example
from scalepeft.eval.scores import cut_at
from scalepeft.eval.slots import Row, Slots, left_padded, obstacle
from scalepeft.models.hub import positions


class Progress:
    """Lines with rows a second and the time left; the first lot, which warms up, does not count."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.first = total, 0, 0
        self.begin = self.last_line = time.monotonic()

    def add(self, rows: int) -> None:
        """Counts a batch or a lot; prints a line, but not too often."""
        if not rows:
            return
        now = time.monotonic()
        self.done += rows
        if not self.first:
            self.first, self.begin = rows, now
        elif now - self.last_line > LINE_SECONDS and self.done < self.total:
            self.last_line = now
            rate = (self.done - self.first) / (now - self.begin)
            left = duration((self.total - self.done) / rate)
            say(f"{self.done}/{self.total} rows, {rate:.2f} rows/s, about {left} left")


class Backend:
    """Continues prompts, as ``config`` alone says; ``generate`` is the backend's own."""

    def __init__(self, tokenizer: Any, config: EvaluateConfig, positions: int | None) -> None:
        self.tokenizer, self.config, self.positions = tokenizer, config, positions or sys.maxsize
        # Tokens that end an answer; ``Base.ends`` has those of a base.
        self.ends: list[int] = [tokenizer.eos_token_id]

    def stream(self, prompts: list[str]) -> Iterator[list[tuple[int, str, bool]]]:
        """Some answers at once: number of the prompt, new text alone, whether it was cut."""
        ids, limits, cut = self.encoded(prompts)
        pairs = zip(self.generate(ids, limits), limits, strict=True)
        texts = self.texts([answer[:n] for answer, n in pairs])
        yield [*zip(range(len(texts)), texts, cut, strict=True)]

    def encoded(self, prompts: list[str]) -> tuple[list[list[int]], list[int], list[bool]]:
        """Prompts' tokens, answers' limits, what was cut. Raises UserError: no token, no room."""
        new, all_ = self.config.max_new_tokens, self.config.max_tokens or self.positions
        if self.positions <= new:
            what = f"fills the model's {self.positions} positions"
            raise UserError(f"evaluate.max_new_tokens={new} {what}")
        room = min(self.positions - new, all_ - 1)
        found, cut = [], []
        for ids, _ in tokens.encode(prompts, self.tokenizer):
            if not ids:
                raise UserError(
                    "a prompt of data.test is empty, and the tokenizer puts no BOS before it: there"
                    " is nothing to continue; set data.prompt, or repair the row"
                )
            cut.append(len(ids) > room)
            if cut[-1]:  # the end of a prompt asks the question
                kept = ids[:1] if ids[0] == self.tokenizer.bos_token_id and room > 1 else []
                ids = kept + ids[len(ids) - room + len(kept) :]
            found.append(ids)
        return found, [min(new, all_ - len(ids)) for ids in found], cut

    def texts(self, answers: list[list[int]]) -> list[str]:
        """The text of each answer, up to its end token or stop text."""
        new = [list(takewhile(lambda token: token not in self.ends, a)) for a in answers]
        return [cut_at(text, self.config.stop) for text in self._decoded(new)]

    def stopped(self, answers: list[list[int]]) -> list[bool]:
        """Which of the answers have a stop text in what a last token may have ended: it only saves
        forwards. (transformers' own criterion goes through the whole vocabulary for every batch.)
        """
        if not self.config.stop:
            return [False] * len(answers)
        # A token is at least a byte of the text; one more, as the first may lose its space.
        window = 1 + max(len(text.encode()) for text in self.config.stop)

        def inside(some: list[list[int]]) -> list[bool]:
            return [any(s in text for s in self.config.stop) for text in self._decoded(some)]

        ends = inside([answer[-window:] for answer in answers])
        return [end and inside([answer])[0] for answer, end in zip(answers, ends, strict=True)]

    def _decoded(self, answers: list[list[int]]) -> list[str]:
        if not answers:  # of which transformers makes an answer
            return []
        # Some tokenizers' settings would "clean up" spaces: French " ?" would become "?".
        return self.tokenizer.batch_decode(
            answers, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def generate(self, ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        """The new tokens of each prompt; those past its limit, or a stop text, do not count."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees what goes on without this object."""


class Generator(Backend):
    """``evaluate.backend=hf``: the run's own causal LM. ``synced``: ranks go through as many
    forwards (sharded parameters). ``whole``: why not in ``Slots`` but by ``model.generate``, or
    empty.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: EvaluateConfig, device: torch.device, synced: bool
    ) -> None:
        super().__init__(tokenizer, config, positions(model.config))
        self.model, self.device, self.synced = model, device, synced
        longest = min(config.max_tokens or self.positions, self.positions)
        self.whole = "a beam search" if config.num_beams > 1 else obstacle(model, longest)

    def stream(self, prompts: list[str]) -> Iterator[list[tuple[int, str, bool]]]:
        """In slots some seconds' answers at once; the prompts enter in their order."""
        if self.whole:
            yield from super().stream(prompts)
            return
        each = (zip(*self.encoded([prompt]), strict=True) for prompt in prompts)
        for done in self.slots().run(Row(i, *row) for i, (row,) in enumerate(each)):
            texts = self.texts([row.new for row in done])
            yield [(row.index, text, row.cut) for row, text in zip(done, texts, strict=True)]

    def slots(self) -> Slots:
        """Slots for ``batch_size`` greedy rows at once."""
        size = self.config.batch_size
        return Slots(self.model, self.device, size, self.ends, self.stopped, self.synced)

    @torch.no_grad()
    def generate(self, ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        """As a whole: left-padded, with a KV cache."""
        from transformers import GenerationConfig

        padded, mask = left_padded(ids, self.device)
        begin = padded.shape[1]

        def ended(found: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.tensor(self.stopped(found[:, begin:].tolist()), device=found.device)

        # What is not set in the call is taken from here, which is filled from the model's files.
        self.model.generation_config = GenerationConfig()
        return self.model.generate(
            input_ids=padded,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max(limits),
                num_beams=self.config.num_beams,
                do_sample=False,
                use_cache=True,
                eos_token_id=self.ends,
                pad_token_id=self.ends[0],
            ),
            # Beams are cut afterwards: a search must see its hypotheses to their end.
            stopping_criteria=[ended] if self.config.num_beams == 1 else None,
            synced_gpus=self.synced,
        )[:, begin:].tolist()


class Streaming(Generator):
    """Writes an answer to stdout while it is made: the text that an evaluation keeps."""

    def answer(self, name: str, prompt: str) -> int | None:
        """Writes the answer, up to a signal, which it returns; the second one ends the process."""
        if name:
            say(name)
        self.shown, self.stop, self.full = "", StopFlag().install(), False
        for lot in self.stream([prompt]):
            for _, text, _ in lot:
                self.shown *= text.startswith(self.shown)  # else a decoder took words back
                self._show(f"{text}\n")
        self.stop.give_back()
        if self.full:
            say(f"the answer ended at evaluate.max_new_tokens={self.config.max_new_tokens}")
        return self.stop.signal

    def stopped(self, answers: list[list[int]]) -> list[bool]:
        """Shows what stays of the text, whatever comes: no part of a character or stop text."""
        for answer in answers:
            self.full = len(answer) >= self.config.max_new_tokens and answer[-1] not in self.ends
            while str(self.tokenizer.convert_ids_to_tokens(answer[-1:])).startswith("['<0x"):
                answer = answer[:-1]  # bytes, which are read together
            text = self.texts([answer])[0].rstrip("\ufffd")
            begins = (stop[:n] for stop in self.config.stop for n in range(len(stop), 0, -1))
            self._show(text.removesuffix(next(filter(text.endswith, begins), "")))
        return [bool(self.stop.signal or stop) for stop in super().stopped(answers)]

    def _show(self, text: str) -> None:
        if text.startswith(self.shown):
            new, self.shown = text[len(self.shown) :], text
            print(visible(new) if sys.stdout.isatty() else new, end="", flush=True)


def check(config: EvaluateConfig) -> None:
    """Raise UserError for an empty stop text, or a length without room or beside beams."""
    if "" in config.stop:
        raise UserError("evaluate.stop: an empty text would end every answer before it begins")
    if config.max_tokens == 1:
        raise UserError("evaluate.max_tokens=1 leaves no room for a prompt and an answer")
    if config.max_tokens is not None and config.num_beams > 1:
        what = f"evaluate.max_tokens={config.max_tokens} with evaluate.num_beams={config.num_beams}"
        fix = "set evaluate.max_new_tokens alone, or evaluate.num_beams=1"
        raise UserError(f"{what}: a beam search has one length for its whole batch; {fix}")


def batches(examples: list[Example], lengths: list[int], size: int) -> list[list[Example]]:
    """Rows of like length together, the longest first: a lack of memory shows at once. They depend
    on the rows alone, as an undisturbed evaluation's: in bf16 a row's neighbours may decide between
    tokens.
    """
    pairs = sorted(zip(lengths, examples, strict=True), key=lambda pair: (-pair[0], pair[1].id))
    rows = [example for _, example in pairs]
    return [rows[i : i + size] for i in range(0, len(rows), size)]
