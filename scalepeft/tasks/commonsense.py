"""Commonsense multiple choice in the LLM-Adapters row format (arXiv 2304.01933).

A row is ``{instruction, input, output, answer}``: ``output`` reads "the correct answer is answer2",
``answer`` is the label. The instruction names its labels ("Answer format:
answer1/answer2/answer3").
"""

import re
from typing import Any

from pydantic.dataclasses import dataclass

from scalepeft.lookup import STRICT, UserError
from scalepeft.tasks.base import Example, Score, Task, TaskConfig, text_field

# Answer words of the eight tasks; a prediction's first one counts, as in the LLM-Adapters
# evaluation.
ANSWERS = re.compile(r"true|false|solution[12]|answer[1-5]|ending[1-4]|option[12]")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CommonsenseConfig(TaskConfig):
    """Settings of the commonsense tasks: those of every task."""

    name: str = "commonsense"


class Commonsense(Task):
    """BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC and OpenBookQA rows of LLM-Adapters."""

    Config = CommonsenseConfig
    version = 1

    def example(self, row: Any, row_id: str) -> Example:
        """Fills the templates; the answer must be one of the answer words."""
        instruction = text_field(row, "instruction")
        values = {
            "instruction": instruction,
            "input": text_field(row, "input", required=False),
            "output": text_field(row, "output"),
        }
        if values["input"].strip() and "{input}" not in self.config.prompt:
            raise UserError("'input' is not empty, but data.prompt has no {input} to hold it")
        answer = text_field(row, "answer")
        if not ANSWERS.fullmatch(answer):
            raise UserError(
                f"'answer' is {answer!r}; allowed: true, false, answer1, solution1, ending1,"
                " option1, ..."
            )
        return Example(
            row_id,
            fill(self.config.prompt, values, "data.prompt"),
            fill(self.config.completion, values, "data.completion"),
            {"answer": answer, "source": row_id.rsplit("#", 1)[0]},
        )

    def score(self, prediction: str, example: Example) -> Score:
        """Takes the first answer word of the prediction; the comparison is exact."""
        found = ANSWERS.search(prediction)
        extracted = found[0] if found else None
        return Score(extracted, extracted == example.meta["answer"])


def fill(template: str, values: dict[str, str], key: str) -> str:
    """Replaces ``{name}`` for the given names only, so that braces in the data or template stay as
    they are.

    Raises:
        UserError: the template names a field that rows do not have.
    """
    for name in re.findall(r"\{([a-z_]+)\}", template):
        if name not in values:
            raise UserError(
                f"{key} uses {{{name}}}; rows have {', '.join('{' + v + '}' for v in values)}"
            )
    return re.sub(r"\{([a-z_]+)\}", lambda m: values[m[1]], template)
