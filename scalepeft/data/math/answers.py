r"""Answers found in generated text: by published rules, to the letter, and by a flexible one.

Three kinds of right answers: ``number`` (GSM8K, SVAMP, ...: a plain number), ``math`` (MATH: latex)
and ``letter`` (AQuA: A to E).
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from scalepeft.data.math.hendrycks import is_equiv, last_boxed

METAMATH_MARK = "The answer is: "
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    # A minus after a word or bracket is a difference; before money or digits a sign.
    rf"(?:(?<![\w)\]}}])[-+−]\s?)?(?:\\?\$\s?)?(?:(?<![\w)\]}}])[-−])?"
    rf"(?:[0-9]+\s+[0-9]+/[0-9]+(?![0-9])|(?:{_DIGITS})(?:\s?/\s?[0-9]+(?![0-9.,]*[0-9/]))?)"
    r"(?:\s?\\?%)?"
)
_MARK = re.compile(r"\banswer\s+is\b:?|\banswer:", re.IGNORECASE)
_PLAIN = re.compile(
    r"([-+]?)\s?(-?)(?:([0-9]+)\s+(?=[0-9]+\s?/))?([0-9]*\.?[0-9]+)(?:\s?/\s?([0-9]+))?\s?"
)
_LETTER = re.compile(r"\(\s*([A-E])\s*\)|(?<![A-Za-z'’])([A-E])(?![A-Za-z'’])")
_ARTICLE = re.compile(r"(?<![A-Za-z'’(])A(?=\s[a-z])")
_UNITS = re.compile(r"\s+(?!and\b|sqrt\b)[A-Za-z]{3,}[A-Za-z .²³]*")


def plain(text: str) -> Fraction | None:
    """The value of a plain number (1,234.5, -3/4, 2 1/2, $18, 50%: the percent sign is dropped);
    None for anything else.
    """
    text = text.strip()
    if len(text) > 60 or not _NUMBER.fullmatch(text):
        return None
    found = _PLAIN.fullmatch(re.sub(r"[\\$,%]", "", text.replace("−", "-")))
    if found is None or (found[5] and not int(found[5])):
        return None
    value = int(found[3] or 0) + Fraction(found[4]) / int(found[5] or 1)
    return -value if "-" in (found[1], found[2]) else value


def agree(right: str, prediction: str) -> bool | None:
    """Compares without math-verify: None if only that can tell.

    Numbers are equal to 6 decimals, as math-verify rounds. A right answer with repeating decimals
    (0.6666666666666666) is a rounded fraction: within 0.001, as LLM-Adapters allows.
    """
    right, prediction = right.strip(), prediction.strip()
    if right == prediction:
        return True
    ours, theirs = plain(right), plain(prediction)
    if ours is not None and theirs is not None:
        within = Fraction(1, 1000 if re.search(r"\.[0-9]{10,}$", right) else 2 * 10**6)
        shares = [theirs, theirs / 100] if prediction.endswith("%") else [theirs]
        return any(abs(ours - value) <= within for value in shares)
    return True if is_equiv(right, prediction) else None


def find(prediction: str, kind: str) -> str | None:
    r"""The answer of a text: after the last "answer is", else the last \boxed{}, else after the
    last ####, else the last number (letter). None: nothing that looks like an answer.
    """
    for text in _places(prediction):
        if found := _tidy(text) if kind == "math" else _of_kind(_tidy(text), kind):
            return found
    if kind == "letter":
        letters = _LETTER.findall(_ARTICLE.sub("", prediction))
        return "".join(letters[-1]) if letters else None
    numbers = _NUMBER.findall(prediction)
    return numbers[-1].strip() if numbers else None


def _places(prediction: str) -> Iterator[str]:
    if marks := list(_MARK.finditer(prediction)):
        yield prediction[marks[-1].end() :]
    if (boxed := last_boxed(prediction)) is not None:
        yield boxed
    if "####" in prediction:
        yield prediction.rpartition("####")[2]


def _tidy(text: str) -> str:
    """The first sentence of a text without what is around an answer: markdown, dollars, a box."""
    first = text.strip().partition("\n")[0]
    first = re.split(r"\.(?:\s|$)", first)[0].lstrip(" *:`").rstrip(" *:,;.!?`")
    if (boxed := last_boxed(first)) is not None:
        return boxed.strip()
    if found := re.match(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", first):
        first = next(filter(None, found.groups())).strip()
    if (number := _NUMBER.match(first)) and _UNITS.fullmatch(first, number.end()):
        return number[0].strip()  # 18 dollars
    return first


def _of_kind(text: str, kind: str) -> str | None:
    if kind == "letter":
        found = _LETTER.search(text)
        return (found[1] or found[2]) if found else None
    if re.search(r"\\(?![$%])", text):
        return text  # latex is math-verify's
    number = _NUMBER.search(text.rpartition("=")[2])
    return number[0].strip() if number else None


def metamath(prediction: str, right: str, kind: str) -> bool:
    """MetaMath's rules: for numbers eval_gsm8k.py's, which rounds to whole numbers and reads
    1,234,567 as 1234, so that a right answer with decimals or two commas is never found; for the
    rest eval_math.py's, a comparison of texts. Without the marker an answer is wrong.
    """
    _, mark, text = prediction.rpartition(METAMATH_MARK)
    if not mark:
        return False
    if kind != "number":
        text = text.split(".\n")[0].strip()
        return is_equiv(text.removesuffix(".").strip(), right)
    found = re.search(r"[\-+]?\d*[\.,/]?\d+", text.strip())
    if not found:
        return False
    above, _, below = found[0].replace(",", "").partition("/")
    try:
        value = float(above) if below in ("", "0") else float(Fraction(above) / Fraction(below))
        return round(value) == float(right.replace(",", ""))
    except (ValueError, OverflowError, ZeroDivisionError):
        return False


_PEFT_MARKS = (
    METAMATH_MARK, "The answer is ", "The final answer is: ", "The final answer is ", "#### ",
)  # fmt: skip


def peft_benchmark(prediction: str, right: str, kind: str) -> bool:
    """The rules of PEFT's method_comparison/MetaMathQA: equal as decimals or fractions, else as
    texts; a thousands comma makes a text, so 1,000 is not 1000.
    """
    text = prediction.strip().rstrip(".!?")
    mark = next((mark for mark in _PEFT_MARKS if mark in text), None)
    if mark is None:
        return False
    text = text.rpartition(mark)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    return _decimal(text) == _decimal(right.strip().strip(" .!?$%"))


def _decimal(text: str) -> float | str:
    above, slash, below = text.partition("/")
    try:
        value = Decimal(above.strip())
        return float(value / Decimal(below.strip()) if slash else value)
    except (ArithmeticError, ValueError):
        return text


def llm_adapters(prediction: str, right: str, kind: str) -> bool:
    """LLM-Adapters' rules: the last number (the minus of "10-3" is its sign) within 0.001, of AQuA
    the first capital A to E of any word. A right answer that is neither is never found.
    """
    if kind == "letter":
        found = re.search("[A-E]", prediction)
        return found is not None and found[0] == right
    numbers = re.findall(r"-?\d+\.?\d*", prediction.replace(",", ""))
    try:
        return bool(numbers) and abs(float(numbers[-1]) - float(right.replace(",", ""))) <= 1e-3
    except ValueError:
        return False


RULES = {
    "metamath": metamath,
    "metamath-math": metamath,
    "peft-benchmark": peft_benchmark,
    "llm-adapters": llm_adapters,
}
"""Protocol -> whether its own script calls a prediction right."""
