"""Commonsense multiple choice: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA.

A row is that of LLM-Adapters (arXiv 2304.01933), ``{instruction, input, output, answer}`` with
``output`` "the correct answer is answer2" and ``answer`` the label, or a row of one of the original
data sets, from which the same instruction is made:

    aps/super_glue:boolq     question, passage, label
    baber/piqa               goal, sol1, sol2, label
    lighteval/siqa           context, question, answerA, answerB, answerC, label (1 to 3)
    Rowan/hellaswag          activity_label, ctx, endings, label
    allenai/winogrande       sentence, option1, option2, answer (1 or 2)
    allenai/ai2_arc          question, choices {text, label}, answerKey
    allenai/openbookqa       question_stem, choices {text, label}, answerKey
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT
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

    name: str = "commonsense"
    protocol: str | None = "clean"
    passage: bool = True


class Commonsense(Task):
    """The eight commonsense tasks; one file or hub set is one task, and they weigh the same."""

    Config: ClassVar[type[TaskConfig]] = CommonsenseConfig
    config: CommonsenseConfig
    version = 2
    macro_average = True

    def example(self, row: Any, row_id: str, split: Split) -> Example:
        """Fills the templates; the answer must be one of the answer words."""
        if isinstance(row, dict) and "instruction" not in row:
            row = self._asked(row)
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
            raise UserError(
                f"'answer' is {answer!r}; allowed: true, false, answer1, solution1, ending1,"
                " option1, ..."
            )
        found = kind.search(values["output"])
        if found is None or found[0] != answer:
            raise UserError(
                f"'output' says {found[0] if found else 'none of the answers'}, 'answer' {answer}"
            )
        return Example(
            row_id,
            fill(self.template(split), values, "data.prompt"),
            fill(self.config.completion, values, "data.completion"),
            {
                "answer": answer,
                "source": row_id.rsplit("#", 1)[0],
                "question": instruction,
            },
        )

    def _asked(self, row: dict[str, Any]) -> dict[str, Any]:
        """The LLM-Adapters row of an original one."""
        for keys, ask in ORIGINALS:
            if row.keys() >= keys:
                instruction, answer = ask(row)
                passage = row.get("passage")
                if passage and self.config.passage:
                    instruction = f"{text_field(row, 'passage')}\n\n{instruction}"
                return {
                    "instruction": instruction,
                    "output": f"the correct answer is {answer}",
                    "answer": answer,
                }
        raise UserError(
            f"key 'instruction' is missing; the row has {', '.join(map(str, row)) or 'no keys'}:"
            " neither a row of LLM-Adapters, nor of BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC"
            " or OpenBookQA"
        )

    def score(self, prediction: str, example: Example) -> Score:
        """Takes the first answer word of the question's kind; the comparison is exact."""
        answer = example.meta["answer"]
        kind = next(kind for kind in KINDS if kind.fullmatch(answer))
        found = kind.search(prediction)
        extracted = found[0] if found else None
        return Score(extracted, extracted == answer)


def _label(row: dict[str, Any], key: str, allowed: list[str]) -> int:
    """Position of the right answer; hub sets hide it in their test splits."""
    value = str(row[key])
    if value not in allowed:
        raise UserError(
            f"'{key}' is {row[key]!r}, allowed: {', '.join(allowed)}; the public test splits of"
            " some of these sets hide the answer: take the validation split"
        )
    return allowed.index(value)


def _listed(word: str, texts: list[str], between: str = " ") -> str:
    return between.join(f"{word.title()}{i}: {text}" for i, text in enumerate(texts, 1))


def _form(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{i}" for i in range(1, count + 1))


def _boolq(row: dict[str, Any]) -> tuple[str, str]:
    key = "label" if "label" in row else "answer"
    right = _label(row, key, ["0", "1"] if key == "label" else ["False", "True"])
    question = text_field(row, "question")
    return (
        f"Please answer the following question with true or false, question: {question}?\n\n"
        "Answer format: true/false",
        ("false", "true")[right],
    )


def _piqa(row: dict[str, Any]) -> tuple[str, str]:
    solutions = [text_field(row, "sol1"), text_field(row, "sol2")]
    return (
        f"Please choose the correct solution to the question: {text_field(row, 'goal')}\n\n"
        f"{_listed('solution', solutions, chr(10) * 2)}\n\n{_form('solution', 2)}",
        f"solution{_label(row, 'label', ['0', '1']) + 1}",
    )


def _choice(question: str, texts: list[str], right: int) -> tuple[str, str]:
    return (
        f"Please choose the correct answer to the question: {question}\n\n"
        f"{_listed('answer', texts)}\n\n{_form('answer', len(texts))}",
        f"answer{right + 1}",
    )


def _siqa(row: dict[str, Any]) -> tuple[str, str]:
    texts = [text_field(row, f"answer{letter}") for letter in "ABC"]
    question = f"{text_field(row, 'context')} {text_field(row, 'question')}"
    return _choice(question, texts, _label(row, "label", ["1", "2", "3"]))


def _exam(row: dict[str, Any]) -> tuple[str, str]:
    choices = row["choices"]
    if not isinstance(choices, dict) or not all(
        isinstance(choices.get(key), list) for key in ("text", "label")
    ):
        raise UserError("'choices' must be {text: [...], label: [...]}")
    texts, labels = choices["text"], [str(label) for label in choices["label"]]
    if len(texts) != len(labels) or not 2 <= len(texts) <= 5:
        raise UserError(f"'choices' has {len(texts)} texts and {len(labels)} labels; 2 to 5 each")
    texts = [text_field({"choices.text": text}, "choices.text") for text in texts]
    question = text_field(row, "question_stem" if "question_stem" in row else "question")
    return _choice(question, texts, _label(row, "answerKey", labels))


def _hellaswag(row: dict[str, Any]) -> tuple[str, str]:
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != 4:
        raise UserError("'endings' must be a list of 4 texts")
    endings = [text_field({"endings": text}, "endings") for text in endings]
    begun = f"{text_field(row, 'activity_label')}: {text_field(row, 'ctx')}"
    return (
        f"Please choose the correct ending to complete the given sentence: {begun}\n\n"
        f"{_listed('ending', endings)}\n\n{_form('ending', 4)}",
        f"ending{_label(row, 'label', ['0', '1', '2', '3']) + 1}",
    )


def _winogrande(row: dict[str, Any]) -> tuple[str, str]:
    options = [text_field(row, "option1"), text_field(row, "option2")]
    return (
        "Please choose the correct answer to fill in the blank to complete the given sentence:"
        f" {text_field(row, 'sentence')}\n\n{_listed('option', options)} {_form('option', 2)}",
        f"option{_label(row, 'answer', ['1', '2']) + 1}",
    )


ORIGINALS: list[tuple[set[str], Callable[[dict[str, Any]], tuple[str, str]]]] = [
    ({"goal", "sol1", "sol2", "label"}, _piqa),
    ({"context", "question", "answerA", "answerB", "answerC", "label"}, _siqa),
    ({"activity_label", "ctx", "endings", "label"}, _hellaswag),
    ({"sentence", "option1", "option2", "answer"}, _winogrande),
    ({"question_stem", "choices", "answerKey"}, _exam),
    ({"question", "choices", "answerKey"}, _exam),
    ({"question", "passage", "label"}, _boolq),
    ({"question", "passage", "answer"}, _boolq),
]
"""Keys of an original row, and what makes (instruction, answer) of it; the first that fits."""
