r"""Rows of math data sets in any of their formats -> question, solution, answer.

Rows are told apart by their keys, as the table of formats in docs/data.md has them. GSM8K's
calculator marks (<<48/2=24>>) are taken out: no protocol here has a calculator, and MetaMathQA is
without them.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from scalepeft.core.errors import UserError
from scalepeft.data.math import answers
from scalepeft.data.math.hendrycks import last_boxed
from scalepeft.data.rows import fill, text_field
from scalepeft.data.tasks.base import Split


@dataclass(frozen=True)
class Problem:
    """What a row of any format says.

    Attributes:
        answer: None where a training row does not tell.
        original: the question that this one was made from, where a row tells.
        guessed: the answer is the last number of a text without a mark.
    """

    question: str
    output: str
    answer: str | None
    kind: Literal["number", "math", "letter"]
    original: str = ""
    guessed: bool = False


def read(row: Any, split: Split, ending: str) -> Problem:
    """The problem of a row of any of the formats; ``ending`` is that of ``MathConfig``. Rows of
    ``test`` may lack a solution, and of LLM-Adapters have one of GPT's.

    Raises:
        UserError: none of the formats, or a broken row.
    """
    keys = set(row) if isinstance(row, dict) else {"question"}  # text_field names what it is
    if {"query", "response"} <= keys:
        return _metamath(row)
    if "problem" in keys and keys & {"solution", "answer"}:
        return _math(row, split, ending)
    if {"instruction", "answer"} <= keys:
        return _llm_adapters(row, split, ending)
    if {"instruction", "output"} <= keys:
        return _math({"problem": row["instruction"], "solution": row["output"]}, split, ending)
    if "question" in keys:
        return _gsm8k(row, ending)
    raise UserError(
        f"the row has {', '.join(map(str, row)) or 'no keys'}; expected those of GSM8K (question,"
        " answer), MetaMathQA (query, response), MATH (problem, solution) or LLM-Adapters"
        " (instruction, input, output, answer)"
    )


def _ended(solution: str, answer: str, ending: str) -> str:
    lines = [solution, fill(ending, {"answer": answer}, "data.ending")]
    return "\n".join(line for line in lines if line)


def _kind(answer: str | None) -> Literal["number", "math"]:
    return "number" if answer is not None and answers.plain(answer) is not None else "math"


def _metamath(row: dict[str, Any]) -> Problem:
    question, response = text_field(row, "query"), text_field(row, "response")
    _, mark, answer = response.rpartition(answers.METAMATH_MARK)
    answer = (answer if mark else response.partition("#### ")[2]).strip().removesuffix(".")
    of_math = text_field(row, "type", required=False).startswith("MATH_")
    original = text_field(row, "original_question", required=False)
    kind = "math" if of_math else _kind(answer)
    return Problem(question, response, answer or None, kind, original)


def _math(row: dict[str, Any], split: Split, ending: str) -> Problem:
    question = text_field(row, "problem")
    solution = text_field(row, "solution", required=split != "test" or not row.get("answer"))
    answer = _answer(row) if "answer" in row else (last_boxed(solution) or "").strip()
    if not answer:
        raise UserError("'solution' has no \\boxed{} answer")
    return Problem(question, _ended(solution, answer, ending), answer, "math")


def _llm_adapters(row: dict[str, Any], split: Split, ending: str) -> Problem:
    question, rest = text_field(row, "instruction"), text_field(row, "input", required=False)
    if rest.strip():
        question = f"{question}\n{rest}"
    answer = _answer(row)
    letter = re.fullmatch("[A-E]", answer) is not None
    if not letter and answers.plain(answer) is None:
        raise UserError(f"'answer' is {answer!r}; expected a number, or a letter from A to E")
    output = text_field(row, "output", required=split != "test")
    if split == "test":  # the outputs there are GPT's, many of them wrong
        output = _ended("", answer, ending)
    return Problem(question, output, answer, "letter" if letter else "number")


def _gsm8k(row: dict[str, Any], ending: str) -> Problem:
    question, solution = text_field(row, "question"), text_field(row, "answer")
    _, mark, answer = solution.rpartition("####")
    if not mark:  # Orca-Math: prose that tells its answer somewhere near the end
        found = answers.find(solution, "number")
        return Problem(question, solution, found, _kind(found), guessed=True)
    answer = answer.strip()
    if answers.plain(answer) is None:
        raise UserError(f"'answer' has {answer!r} after ####; expected a number")
    solution = re.sub(r"<<[^<>]*>>", "", solution)
    return Problem(question, _ended(solution, answer, ending), answer, "number")


def _answer(row: dict[str, Any]) -> str:
    """The answer of a row, also where it is a JSON number."""
    value = row["answer"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not re.fullmatch(r"-?\d+(\.\d+)?", str(value)):  # NaN, 1e999, 1e22
            raise UserError(f"'answer' is {value}; expected a plain number, or a text")
        return str(value)
    return text_field(row, "answer").strip()
