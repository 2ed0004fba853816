"""Math word problems and MATH: GSM8K, MetaMathQA, MATH-500, AQuA, SVAMP, MAWPS and their like."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides
from scalepeft.data.math import answers, equivalence, whole
from scalepeft.data.math.contamination import fingerprint, known
from scalepeft.data.math.problems import read
from scalepeft.data.rows import text_field
from scalepeft.data.tasks.base import Example, Protocol, Score, Split, Task, TaskConfig, protocols


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MathConfig(TaskConfig):
    """Settings of the math tasks.

    Attributes:
        input_prompt: prompt of training questions of several lines: the first is {instruction},
            the others are {input}; null: ``prompt`` for all.
        ending: put after the solutions of GSM8K and MATH rows, in a line of its own, so that the
            answer is found; ``{answer}`` is filled in. Empty: nothing.
        max_chars: training rows longer than this in question and response are left out; null: none.
        test_rows: training rows that are questions of a public test set (GSM8K, SVAMP, MultiArith,
            SingleEq, AddSub, AQuA, MAWPS), or rephrase one (``original_question``), or are in
            ``data.test``, stop the run (``refuse``), are left out and counted (``drop``), or are
            trained on (``keep``).
    """

    PROTOCOLS: ClassVar[dict[str, Protocol]] = protocols("math")

    name: Annotated[str, Decides.ROWS] = "math"
    protocol: Annotated[str | None, Decides.SCORES] = "metamath"
    input_prompt: Annotated[str | None, Decides.ROWS] = None
    ending: Annotated[str, Decides.ROWS, Decides.SCORES] = "The answer is: {answer}"
    max_chars: Annotated[Annotated[int, Field(ge=1)] | None, Decides.ROWS] = None
    test_rows: Annotated[Literal["refuse", "drop", "keep"], Decides.ROWS] = "refuse"


class Contamination(UserError):
    """Training rows are test questions."""


class Math(Task):
    """Questions with a number, a latex expression or a letter as the answer."""

    Config: ClassVar[type[TaskConfig]] = MathConfig
    config: MathConfig
    version = 2
    asking: ClassVar[dict[str, str]] = {"question": "", "answer": "#### 0"}

    def __init__(self, config: TaskConfig, tokenizer: Any = None) -> None:
        super().__init__(config, tokenizer)
        self.equivalent = equivalence.EquivalenceServer()

    def reads(self, split: Split) -> tuple[Split, ...]:
        """Training rows that are in ``data.test`` are found."""
        return ("train", "test") if split == "train" else (split,)

    def stream(self, split: Split) -> Iterator[Example]:
        """Training rows go through ``max_chars`` and ``test_rows``, which raise UserError too."""
        if split == "test":
            equivalence.check_installed()  # now, and not after hours of generation
        rows = super().stream(split)
        if split == "train":
            try:
                yield from self._without_test_rows(self._short(rows))
            except UserError as error:
                # Nobody should repair the broken rows of a file that must not be trained on.
                if self.config.on_error == "stop" and not isinstance(error, Contamination):
                    deque(Math(replace(self.config, on_error="skip")).stream(split), maxlen=0)
                raise
            return
        guessed = 0
        for example in rows:
            guessed += "guessed" in example.meta
            yield example
        if split == "test" and guessed:
            self.notes.append(
                f'{guessed} rows mark no answer (####, "The answer is", \\boxed): the last number'
                " of their text is taken for it"
            )

    def _short(self, rows: Iterator[Example]) -> Iterator[Example]:
        limit, kept, left = self.config.max_chars, 0, 0
        for e in rows:
            long = limit is not None and len(f"{e.meta['question']} {e.completion}") > limit
            kept, left = kept + (not long), left + long
            if not long:
                yield e
        if left and not kept:
            raise UserError(f"data.max_chars={limit} leaves none of the {left} training rows")
        if left:
            self.notes.append(f"{left} rows longer than data.max_chars={limit} left out")

    def _without_test_rows(self, rows: Iterator[Example]) -> Iterator[Example]:
        sets, mode = known(), self.config.test_rows
        if self.config.test:
            tested = Math(self.config).stream("test")
            sets = {fingerprint(e.meta["question"]): "data.test" for e in tested} | sets
        first, count, hits = "", 0, self.leaks
        for e in rows:
            count += 1
            name = sets.get(fingerprint(e.meta["question"])) or e.meta.get("rephrases")
            if name:
                first = first or e.id
                hits[name] += 1
            if not name or mode == "keep":
                yield e
        if not hits:
            return
        listed = ", ".join(f"{n} {name}" for name, n in hits.most_common())
        found = hits.total()
        finding = f"{found} of {count} rows are questions of test sets ({listed})"
        if mode == "refuse":
            raise Contamination(
                f"data.train: {finding}, the first is {first}: a model trained on them"
                " scores what it has seen; data.test_rows=drop leaves them out, data.test_rows=keep"
                " trains on them all the same"
            )
        if mode == "drop" and found == count:
            raise Contamination(f"data.train: {finding}: data.test_rows=drop leaves nothing")
        then = "its scores on these sets mean nothing" if mode == "keep" else "left out"
        self.notes.append(f"{finding}: {then}")

    def example(self, row: Any, row_id: str, split: Split) -> Example:
        """Fills the templates; a test row must tell its answer."""
        problem = read(row, split, self.config.ending)
        if split == "test" and problem.answer is None:
            raise UserError("tells no answer to score with")
        template = self.template(split)
        asked, _, rest = problem.question.partition("\n")
        if self.config.input_prompt and split != "test" and rest:
            template = self.config.input_prompt
        if "{input}" not in template:
            asked, rest = problem.question, ""
        meta: dict[str, Any] = {k: getattr(problem, k) for k in ("question", "answer", "kind")}
        if problem.guessed:
            meta["guessed"] = True
        original = text_field(row, "original_question", required=False)
        if seen := known().get(fingerprint(original)):
            meta["rephrases"] = seen
        values = {"instruction": asked, "input": rest}
        told = {"output": problem.output, "answer": problem.answer or ""}
        return self.filled(row_id, template, values, told, **meta)

    def score(self, prediction: str, example: Example) -> Score:
        """``correct``: the whole answer equals the right one; ``strict``: the protocol's script."""
        right, kind = example.meta["answer"], example.meta["kind"]
        found = answers.find(prediction, kind)
        correct = found is not None and found == right
        if found is not None and kind != "letter":
            correct = whole.equal(right, found, self.equivalent)
        rule = answers.RULES.get(self.config.protocol or "")
        return Score(found, correct, rule(prediction, right, kind) if rule else None)
