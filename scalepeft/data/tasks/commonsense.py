"""Commonsense multiple choice: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA.

Rows are those of LLM-Adapters (arXiv 2304.01933), or of the original sets (``ORIGINALS``, BoolQ's),
of which the same text is made.
"""

import re
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides
from scalepeft.data.rows import fill, text_field
from scalepeft.data.tasks.base import Example, Protocol, Score, Split, Task, TaskConfig, protocols

# The words that each kind of question is answered with. A prediction's first one of its own kind
# counts, with the case as it stands, as in the evaluation script of LLM-Adapters.
KINDS = (
    re.compile(r"true|false"),
    re.compile(r"solution1|solution2"),
    re.compile(r"answer1|answer2|answer3|answer4|answer5"),
    re.compile(r"ending1|ending2|ending3|ending4"),
    re.compile(r"option1|option2"),
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CommonsenseConfig(TaskConfig):
    """Settings of the commonsense tasks.

    Attributes:
        passage: puts BoolQ's passage before its question; rows of LLM-Adapters have none.
    """

    PROTOCOLS: ClassVar[dict[str, Protocol]] = protocols("commonsense")

    name: Annotated[str, Decides.ROWS] = "commonsense"
    protocol: Annotated[str | None, Decides.SCORES] = "clean"
    passage: Annotated[bool, Decides.ROWS, Decides.SCORES] = True


class Commonsense(Task):
    """The eight commonsense tasks; one file or hub set is one task, and they weigh the same."""

    Config: ClassVar[type[TaskConfig]] = CommonsenseConfig
    config: CommonsenseConfig
    version = 2
    macro_average = True
    asking: ClassVar[dict[str, str]] = {"instruction": "", "output": "true", "answer": "true"}

    def example(self, row: Any, row_id: str, split: Split) -> Example:
        """Fills the templates; the answer must be one of the answer words."""
        if isinstance(row, dict) and "instruction" not in row:
            asked, answer = original(row)
            if row.get("passage") and self.config.passage:
                asked = f"{text_field(row, 'passage')}\n\n{asked}"
            said = f"the correct answer is {answer}"
            row = {"instruction": asked, "output": said, "answer": answer}
        instruction = text_field(row, "instruction")
        values = {
            "instruction": instruction,
            "input": text_field(row, "input", required=False),
            "output": text_field(row, "output"),
        }
        if values["input"].strip() and "{input}" not in self.config.prompt:
            raise UserError("'input' is not empty, but data.prompt has no {input} to hold it")
        answer = text_field(row, "answer")
        kind = next((kind for kind in KINDS if kind.fullmatch(answer)), None)
        if kind is None:
            allowed = "true, false, answer1, solution1, ending1, option1, ..."
            raise UserError(f"'answer' is {answer!r}; allowed: {allowed}")
        found = kind.search(values["output"])
        if (said := found[0] if found else "none of the answers") != answer:
            raise UserError(f"'output' says {said}, 'answer' {answer}")
        meta = {"answer": answer, "question": instruction}
        return self.filled(row_id, self.template(split), values, {}, **meta)

    def score(self, prediction: str, example: Example) -> Score:
        """Takes the first answer word of the question's kind; the comparison is exact."""
        answer = example.meta["answer"]
        kind = next(kind for kind in KINDS if kind.fullmatch(answer))
        found = kind.search(prediction)
        extracted = found[0] if found else None
        return Score(extracted, extracted == answer)


class Original(NamedTuple):
    """A multiple choice as its own data set has it."""

    asked: str  # what is to be chosen, and for what, in the words of LLM-Adapters
    word: str  # what a choice is called: ``answer`` gives Answer1, answer1, ...
    choices: str  # keys of the choices, or of a list of them
    label: str  # key of the right one
    labels: str = ""  # of the choices, in their order; of ``choices`` they are in the row
    between: str = " "  # stands between the choices
    form: str = "\n\n"  # stands before the answer's format


ORIGINALS = (
    Original("solution to the question: {goal}", "solution", "sol1 sol2", "label", "0 1", "\n\n"),
    Original(
        "answer to the question: {context} {question}", "answer", "answerA answerB answerC",
        "label", "1 2 3",
    ),
    Original(
        "ending to complete the given sentence: {activity_label}: {ctx}", "ending", "endings",
        "label", "0 1 2 3",
    ),
    Original(
        "answer to fill in the blank to complete the given sentence: {sentence}", "option",
        "option1 option2", "answer", "1 2", form=" ",
    ),
    Original("answer to the question: {question_stem}", "answer", "choices", "answerKey"),
    Original("answer to the question: {question}", "answer", "choices", "answerKey"),
)  # fmt: skip
"""The first whose keys a row has: PIQA, SIQA, HellaSwag, WinoGrande, OpenBookQA, ARC."""


def original(row: dict[str, Any]) -> tuple[str, str]:
    """(instruction, answer) of a row of an original data set, in the words of LLM-Adapters."""
    for form in ORIGINALS:
        fields = re.findall(r"{(\w+)}", form.asked)
        if row.keys() >= {*fields, *form.choices.split(), form.label}:
            break
    else:
        return _boolq(row)
    asked = fill(form.asked, {key: text_field(row, key) for key in fields}, "")
    texts, labels = _choices(row, form)
    answers = [f"{form.word}{i}" for i in range(1, len(texts) + 1)]
    pairs = zip(answers, texts, strict=True)
    listed = form.between.join(f"{answer.title()}: {text}" for answer, text in pairs)
    said = f"Please choose the correct {asked}\n\n{listed}{form.form}Answer format: "
    return said + "/".join(answers), answers[_label(row, form.label, labels)]


def _choices(row: dict[str, Any], form: Original) -> tuple[list[str], list[str]]:
    key, *others = form.choices.split()
    labels: Any = form.labels.split()
    if others:
        return [text_field(row, k) for k in (key, *others)], labels
    texts, expected = row[key], f"a list of {len(labels)} texts"
    if not labels:
        expected = "{text: [...], label: [...]} with 2 to 5 of each"
        texts, labels = (texts.get(k) if isinstance(texts, dict) else 0 for k in ("text", "label"))
    lists = isinstance(texts, list) and isinstance(labels, list)
    if not lists or len(texts) != len(labels) or not 2 <= len(texts) <= 5:
        raise UserError(f"'{key}' must be {expected}")
    return [text_field({key: text}, key) for text in texts], [str(label) for label in labels]


def _boolq(row: dict[str, Any]) -> tuple[str, str]:
    key = "label" if "label" in row else "answer"
    if not row.keys() >= {"question", "passage", key}:
        raise UserError(
            f"key 'instruction' is missing; the row has {', '.join(map(str, row)) or 'no keys'}:"
            " neither a row of LLM-Adapters, nor of BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC"
            " or OpenBookQA"
        )
    right = _label(row, key, ["0", "1"] if key == "label" else ["False", "True"])
    return (
        "Please answer the following question with true or false, question:"
        f" {text_field(row, 'question')}?\n\nAnswer format: true/false",
        ("false", "true")[right],
    )


def _label(row: dict[str, Any], key: str, allowed: list[str]) -> int:
    value = str(row[key])
    if value not in allowed:
        raise UserError(
            f"'{key}' is {row[key]!r}, allowed: {', '.join(allowed)}; the public test splits of"
            " some of these sets hide the answer: take the validation split"
        )
    return allowed.index(value)
