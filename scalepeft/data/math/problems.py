"""Rows of math data sets in any of the formats of docs/data.md -> question, solution, answer.
GSM8K's calculator marks (<<48/2=24>>) are taken out: MetaMathQA is without them.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from scalepeft.core.errors import UserError
from scalepeft.data.math import answers, whole
from scalepeft.data.math.hendrycks import last_boxed
from scalepeft.data.rows import fill, text_field
from scalepeft.data.tasks.base import Split


@dataclass(frozen=True)
class Problem:
    """What a row of any format says."""

    question: str
    output: str
    answer: str | None  # None where a training row does not tell
    kind: Literal["number", "math", "letter"]
    guessed: bool = False  # the answer is the last number of a text without a mark


def read(row: Any, split: Split, ending: str) -> Problem:
    """The problem of a row of any format; of ``test`` also without solution. Raises UserError."""
    keys = set(row) if isinstance(row, dict) else {"question"}  # text_field names what it is
    if (native := _native(row, keys)) is not None:
        question, solution, answer = native
        kind: Any = "letter" if re.fullmatch("[A-E]", answer) else _kind(answer)
        return Problem(question, _ended(solution, answer, ending), answer, kind)
    if {"query", "response"} <= keys:
        return _metamath(row)
    if "problem" in keys and keys & {"solution", "answer"}:
        return _math(row, split, ending)
    if {"instruction", "answer"} <= keys:
        return _llm_adapters(row, split, ending)
    if {"instruction", "output"} <= keys:
        asked, solution = _asked(row).strip(), text_field(row, "output")
        if last_boxed(solution) is None:
            return _prose(asked, solution)
        return _math({"problem": asked, "solution": solution}, split, ending)
    if "question" in keys:
        return _gsm8k(row, ending)
    raise UserError(
        f"the row has {', '.join(map(str, row)) or 'no keys'}; expected those of GSM8K (question,"
        " answer), MetaMathQA (query, response), MATH (problem, solution), LLM-Adapters"
        " (instruction, input, output, answer), or others of docs/data.md"
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
    return Problem(question, response, answer or None, "math" if of_math else _kind(answer))


def _math(row: dict[str, Any], split: Split, ending: str) -> Problem:
    question = text_field(row, "problem")
    solution = text_field(row, "solution", required=split != "test" or not row.get("answer"))
    answer = _answer(row["answer"]) if "answer" in row else (last_boxed(solution) or "").strip()
    if not answer:
        raise UserError("'solution' has no \\boxed{} answer")
    return Problem(question, _ended(solution, answer, ending), answer, "math")


def _llm_adapters(row: dict[str, Any], split: Split, ending: str) -> Problem:
    answer = _answer(row["answer"])
    letter = re.fullmatch("[A-E]", answer) is not None
    if not letter and answers.plain(answer) is None:
        raise UserError(f"'answer' is {answer!r}; expected a number, or a letter from A to E")
    output = text_field(row, "output", required=split != "test")
    if split == "test":  # the outputs there are GPT's, many of them wrong
        output = _ended("", answer, ending)
    return Problem(_asked(row), output, answer, "letter" if letter else "number")


def _asked(row: dict[str, Any]) -> str:
    question, rest = text_field(row, "instruction"), text_field(row, "input", required=False)
    return f"{question}\n{rest}" if rest.strip() else question


def _gsm8k(row: dict[str, Any], ending: str) -> Problem:
    question, solution = text_field(row, "question"), text_field(row, "answer")
    _, mark, answer = solution.rpartition("####")
    if not mark:
        return _prose(question, solution)
    answer = answer.strip()
    if answers.plain(answer) is None:
        raise UserError(f"'answer' has {answer!r} after ####; expected a number")
    solution = re.sub(r"<<[^<>]*>>", "", solution)
    return Problem(question, _ended(solution, answer, ending), answer, "number")


def _prose(question: str, solution: str) -> Problem:
    """A solution without ####: the answer is marked or in a box (GAOKAO), else the last number."""
    marked = answers.marked(solution)
    found = marked or answers.find(solution, "number")
    value = whole.read(found) if found else None
    if value and value.kind == "number" and answers.plain(value.text) == value.number:
        found = value.text  # without its unit
    return Problem(question, solution, found, _kind(found), guessed=marked is None)


def _native(row: Any, keys: set[str]) -> tuple[str, str, str] | None:
    """Question, solution, answer of a set's own rows (docs/data.md); None for other rows."""
    if {"question", "options", "correct"} <= keys:  # AQuA, asked as LLM-Adapters does
        options = row["options"] if isinstance(row["options"], list) else [row["options"]]
        choices = " ".join(re.sub(r"^\(?([A-E])\s*[).:]\s*", r"(\1) ", str(o)) for o in options)
        asked = f"{text_field(row, 'question')} Answer Choices: {choices}"
        letter = text_field(row, "correct").strip()
        return asked, text_field(row, "rationale", required=False), letter
    if {"question", "answer_number"} <= keys:  # MGSM
        solution = text_field(row, "answer", required=False)
        return text_field(row, "question"), solution, _answer(row["answer_number"])
    if {"sQuestion", "lSolutions"} <= keys:  # MAWPS and its parts
        found = row["lSolutions"] if isinstance(row["lSolutions"], list) else [row["lSolutions"]]
        return text_field(row, "sQuestion"), "", ", ".join(map(_answer, found))
    for body, question, answer in (("Body", "Question", "Answer"), ("body", "question", "answer")):
        if {body, question, answer} <= keys:  # SVAMP; ASDiv, whose answers are "10 (apples)"
            asked = f"{text_field(row, body).strip()} {text_field(row, question).strip()}"
            return asked, "", re.sub(r"\s+\([^()]*\)$", "", _answer(row[answer]))
    return None


def _answer(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not re.fullmatch(r"-?\d+(\.\d+)?", str(value)):  # NaN, 1e999, 1e22
            raise UserError(f"'answer' is {value}; expected a plain number, or a text")
        return str(value)
    return text_field({"answer": value}, "answer").strip()
