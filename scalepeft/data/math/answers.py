"""Answers found in generated text: by published rules, to the letter, and by a flexible one.

Kinds: ``number`` (GSM8K, SVAMP: a plain one), ``math`` (MATH: latex), ``letter`` (AQuA: A to E).
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from scalepeft.data.math import whole
from scalepeft.data.math.hendrycks import is_equiv, last_boxed

METAMATH_MARK = "The answer is: "
_MARK = re.compile(r"\banswer\s+is\b:?|\banswer:", re.IGNORECASE)
# A number with all that is written together with it. Each piece is atomic: what repeats in a text
# that went astray must not be tried in all ways.
_SIGN = r"[-+*/=^×·−]"
_RUN = re.compile(
    r"(?>[-+−–(\[{]\s?|\\?\$\s?){0,4}+"
    rf"(?>\\[a-zA-Z]+|[^\sA-Za-z]|(?<=[\d\\{{(*^_])[a-z]\b|\s(?=\d{{3}}\b|\d+/\d|{_SIGN})|"
    rf"(?<={_SIGN})\s|(?<=[\d$}}])\s(?:and|or)\s(?=[\d$\\]))*\d"
    r"(?>[^\sA-Za-z]|\\[a-zA-Z]+)*(?>\s(?:hundred|thousand|[mbtr]+illion|dozen|percent)\b)*"
)
_NEAR = 200  # characters around the last digit that its number is looked for in
_LETTER = re.compile(r"\(\s*([A-E])\s*\)|(?<![A-Za-z'’])([A-E])(?![A-Za-z'’])")
_SEVERAL = re.compile(r"\W*(?:or|and|[,/&])\W*[A-E]\b")
_ARTICLE = re.compile(r"(?<![A-Za-z'’(])A(?=\s[a-z])")


def plain(text: str) -> Fraction | None:
    """The value of a plain number (1,234.5, -3/4, 2 1/2, $18, 50% without its sign), else None."""
    if not re.fullmatch(r"[-+−\s\\$%0-9.,/]{1,60}", text):
        return None
    value = whole.read(text.replace(",", ""))
    return value.number if value is not None and value.kind == "number" else None


def find(prediction: str, kind: str) -> str | None:
    r"""The answer of a text: after the last "answer is", else the last \boxed{}, else after the
    last ####, else the last number (letter). None: nothing that looks like an answer.
    """
    for text in _places(prediction):
        found = _tidy(text)
        if kind == "letter":
            found = _letters(found)
        elif kind == "number" and not re.search(r"\d|\\[a-z]", found):
            value = whole.read(found)  # a number in words
            found = found if value is not None and value.kind == "number" else ""
        if found:
            return found
    if kind == "letter":
        letters = _LETTER.findall(_ARTICLE.sub("", prediction))
        return "".join(letters[-1]) if letters else None
    last = max(map(prediction.rfind, "0123456789"))
    runs = _RUN.findall(prediction[max(0, last - _NEAR) : last + _NEAR]) if last >= 0 else []
    return _tidy(runs[-1].rpartition("=")[2]) if runs else None


def marked(text: str) -> str | None:
    """The whole answer where a text marks one; None: it does not."""
    return next(filter(None, map(_tidy, _places(text))), None)


def _places(prediction: str) -> Iterator[str]:
    if marks := list(_MARK.finditer(prediction)):
        yield prediction[marks[-1].end() :]
    if (boxed := _boxed(prediction)) is not None:
        yield boxed
    if "####" in prediction:
        yield prediction.rpartition("####")[2]


def _boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{}, with those before it that it is told together with."""
    if (last := last_boxed(text)) is None:
        return None
    before = text[: max(text.rfind("\\boxed"), text.rfind("\\fbox"))]
    joined = re.search(r"\}[\s$]*(,|and|or|, and|, or)[\s$]*$", before)
    first = _boxed(before[: joined.start() + 1]) if joined else None
    return f"{first} {joined[1]} {last}" if joined and first else last.strip()


def _tidy(text: str) -> str:
    """The first sentence of a text without the markdown, or the box, around an answer."""
    first = text.strip().partition("\n")[0]
    first = re.split(r"\.(?:\s|$)", first)[0].lstrip(" *:`").rstrip(" *:,;.!?`")
    return first if (boxed := _boxed(first)) is None else boxed


def _letters(text: str) -> str:
    """The letter chosen; more than that letter where several are, or one is denied."""
    found = _LETTER.search(text)
    if not found:
        return ""
    denied = re.search(r"\b(?:not|n't|neither)\b", text[: found.start()])
    return text if denied or _SEVERAL.match(text, found.end()) else found[1] or found[2]


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
