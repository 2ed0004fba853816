r"""Answers read as wholes: what only contains the right answer is another answer.

A text is a ``number`` (1,234.5; 9{,}500; -$5; 50%; 2 1/2; 1.2e3; 2^3; 2 million; two dozen;
18 dollars a day), a ``list`` in any order (2 or 3; x=2, y=3; \{1, 2\}; \pm 3), a ``row`` whose
brackets and order count ((1, 2); [2, 3)), a ``union`` of rows, ``exact`` where only the same text
is equal (2:30; 10_2), a ``relation`` (x < 3; \neq 9), ``words`` (Tuesday) or other ``math``, which
math-verify compares. A text that is none of these, or that may mean several, equals nothing.
"""

import ast
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

Equivalent = Callable[[str, str], bool]
LONGEST = 400  # characters; a longer text is no answer
# Kind -> kinds that math-verify compares it with.
_ASKED = {"math": {"math", "number", "row", "union"}, "relation": {"relation", "row", "union"}}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """What a text says; ``text`` as latex, for math-verify."""

    kind: str
    text: str
    number: Fraction = Fraction(0)
    percent: bool = False
    parts: tuple["Value", ...] = ()


_CHARACTERS = str.maketrans(
    dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{i}" for i in range(10)), strict=True))
    | {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅛": " 1/8"}
    | {"π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty ", "°": " degrees ", "≠": "\\neq ", "≤": "\\le "}
    | {"≥": "\\ge ", "∈": "\\in ", "≈": "=", "×": "*", "·": "*", "⋅": "*", "÷": "/", "±": "\\pm "}
    | {"−": "-", "‐": "-", "‑": "-", "﹣": "-", "’": "'", "∪": "\\cup ", "€": "$", "£": "$"}
    | dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f", "\\,")
)  # fmt: skip
_UNITS = "st|nd|rd|th|[cmk]m|[mk]g|m[lL]|ft|in|hrs?|mins?|secs?|[AaPp]m|mph|lbs?|oz"
_COMMANDS = {"cdot": "*", "times": "*", "div": "/", "approx": "=", "lbrace": "⟦", "rbrace": "⟧"}
_GROUP = r"\{,\}|\\,|\\ |[~' ]"  # between three digits; a comma alone may part a list
# What is the same, in this order.
_SAME: list[tuple[str, Any]] = [
    (r",\\!", "{,}"),
    (r"(?<=\d)\s*[–—]\s*(?=\$?\d)", " to "),
    (r"(?<=\w)\s*—\s*", ", "),
    (r"[–—]", "-"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|boxed|fbox)(?![A-Za-z])|\\!|\*\*|`", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\\$|\$|\\[()\[\]]", "  "),
    (rf"(?<![\d.,^_])(\d{{1,3}})({_GROUP})\d{{3}}(?:\2\d{{3}})*(?![\d/])",
     lambda m: re.sub(r"\D", "", m[0])),
    (r"\\(?:text\w*|math[a-z]+|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", " degrees "),
    (rf"\\({'|'.join(_COMMANDS)})(?![A-Za-z])", lambda m: _COMMANDS[m[1]]),
    (r"(?<=\d)\s*x\s*(?=\d)", "*"),
    (r"\\%|\s*\bper\s?cent\b", "%"),
    (r"\\\{", "⟦"),
    (r"\\\}", "⟧"),
    (r"\\[,;: ]|\\q?quad|~", " "),
    (r"\b(?:minus|negative)\s+(?=\d)", "-"),
    (rf"(?<=\d)(?=(?:{_UNITS})\b)", " "),
    (r"\s+\([^()]*(?:(?<![A-Za-z\\])[A-Za-z]{3}|=)[^()]*\)$|,?\s\(?i\.\s?e\b.*", ""),
    (r"\b([AaPp])\.?[Mm]\b\.?", r"\1m"),
    (r"\s+", " "),
]  # fmt: skip
_TIGHT = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)")

_FUNCTIONS = "sin|cos|tan|cot|sec|csc|log|exp|max|min|gcd|lcm|mod|arcsin|arccos|arctan|det|lim"
_WORD = (
    rf"(?<![A-Za-z\\\d}})_^])(?!(?:{_FUNCTIONS})\b)(?:[A-Za-z]{{3,}}|{_UNITS}|"
    r"(?i:is|of|to|on|at|by|or|if|so|as|we|it|he|an|up|be|no)|[aI](?= [a-z]{2})|"
    r"(?<=[\d})] )[mshgLlNJWVCFK](?=\s*$|[/ ]|\^\{?[23]))(?:['-][A-Za-z]+)*(?![A-Za-z])"
)
_PREFIX = re.compile(rf"(?:{_WORD}[\s:\"]*)*")
_FILLER = re.compile(r"(?:(?:about|around|roughly|approximately|exactly|either|both|only|just) )*")
# Before a number they make another of it; after one they begin what is said besides.
_CHANGING = re.compile(
    r"\b(?:not?|never|nor|neither|\w+n't|than|least|most|between|except|but|over|under|above|below|"
    r"twice|half|double|triple|third|quarter|without|unless|square|cube|root|base|mod|up to|or)\b"
)
_BESIDES = re.compile(
    r"\b(?:in|for|per|an?|each|every|because|since|as|which|so|when|where|if|with|after|by|from|"
    r"at|on|during|until|while|is|are|was|were|of|that)\b|[(:\"]"
)
_DENIED = re.compile(
    r"\b(?:squared|cubed|factorial|base|out of|(?:is|are|was|were) (?:not|wrong|incorrect|false))\b"
)
_NAME = rf"_\{{?\w+\}}?|(?<=[a-zA-Z])\([\da-z, ]*\)|{_WORD}"  # x, f(1), the total
_EQUATION = re.compile(r"(?=.*[A-Za-z\\]).*[\d+*/^-]")
_RELATION = re.compile(r"\\n(?:e|eq|ot)(?![a-z])|!=|[<>]|\\[lg](?:eq?|t)(?:slant)?(?![a-z])")

_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMERALS = dict(zip(["zero", *_ONES, *_TENS], [*range(20), *range(20, 100, 10)], strict=True))
_SCALES: dict[str, int | float | str] = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "half": 1 / 2, "halves": 1 / 2, "third": "1/3", "thirds": "1/3", "fourths": 1 / 4,
    "fifths": "1/5", "sixths": "1/6", "eighths": 1 / 8, "tenths": "1/10", "hundredths": "1/100",
}  # fmt: skip  # without quarters, which are coins
# Of a text without digits, in this order: twenty-two dozen is 22 dozen, a half 1/2.
_SPELLED: list[tuple[str, Any]] = [
    (r"\bthree[ -]quarters?\b", "3/4"),
    (r"^(?:an? |one )?half\b(?! past)", "1/2"),
    (r"^(?:an? |one )?quarter\b(?! past)", "1/4"),
    (rf"^(1/2 )?an? (?={'|'.join(_SCALES)})", lambda m: m[1] or "1 "),
    (rf"\b(?:(?:{'|'.join(_TENS)})[ -](?:{'|'.join(_ONES[:9])})|{'|'.join(_NUMERALS)})(?![a-z])",
     lambda m: str(sum(_NUMERALS[word] for word in re.split("[ -]", m[0].lower())))),
]  # fmt: skip


def equal(right: str, prediction: str, equivalent: Equivalent) -> bool:
    """True if both texts say the same; ``equivalent`` decides where both are other math."""
    return right.strip() == prediction.strip() or any(
        _same(one, other, equivalent) for one in _readings(right) for other in _readings(prediction)
    )


def _readings(text: str) -> list[Value]:
    """The values a text may have: 1,234 is a number, or of a list."""
    texts = {text, _TIGHT.sub(lambda m: m[0].replace(",", ""), text)}
    return [value for value in map(read, texts) if value is not None]


def _same(right: Value, other: Value, equivalent: Equivalent) -> bool:
    """The order of the two counts: math-verify's relation is not symmetric."""
    kinds = {right.kind, other.kind}
    if kinds == {"number"}:
        return _near(right, other)
    if len(kinds) == 1 and right.parts:
        left = list(other.parts)
        for part in right.parts:
            some = left[:1] if right.kind == "row" else left
            found = next((b for b in some if _same(part, b, equivalent)), None)
            if found is None:
                return False
            left.remove(found)
        return not left
    one, two = (re.sub(r"[\s{}]", "", value.text) for value in (right, other))
    return (len(kinds) == 1 and one == two) or (
        any(kind in kinds and kinds <= others for kind, others in _ASKED.items())
        and equivalent(right.text, other.text)
    )


def _near(right: Value, other: Value) -> bool:
    a, b = right.number, other.number
    scales = {Fraction(1)}
    if right.percent != other.percent:
        share, scale = (a, Fraction(100)) if right.percent else (b, Fraction(1, 100))
        scales = scales | {scale} if abs(share) >= 1 else {scale}  # 50% is 0.5, or a bare 50
    # As math-verify rounds, but no two tiny numbers are equal. A right answer of many decimals is a
    # rounded fraction: within 0.001, as LLM-Adapters allows.
    rounded = re.search(r"\.[0-9]{10,}$", right.text)
    limit = Fraction(1, 1000) if rounded else min(abs(a), Fraction(1)) / 2000000
    return any(abs(a - b * scale) <= limit for scale in scales)


def read(text: str) -> Value | None:
    """What a whole text says; None: nothing that could be equal, or too long."""
    if len(text) > LONGEST:
        return None
    if "\\begin" in text:
        return Value("math", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS))
    for pattern, new in _SAME:
        text = re.sub(pattern, new, text)
    if not re.search(r"[\d\\]", text):
        text = text.strip()
        for spelled, digits in _SPELLED:
            text = re.sub(spelled, digits, text, flags=re.I)
    text = re.sub(r"(?<=\d) and (?:a|one) half\b", " 1/2", text)
    return _listed(text.strip(" :;,").rstrip("."))


def _listed(text: str) -> Value | None:
    values: list[Value] = []
    for before, chunk in _split(text, r"[,;&]|\b(?:and|or)\b"):
        besides = _BESIDES.match(chunk)
        filler = _FILLER.fullmatch(chunk.removesuffix(_PREFIX.sub("", chunk, count=1)))
        if values and not filler and (besides or "=" not in chunk):
            # Said besides the answer, unless it may be an answer of its own.
            if before == "or" or (re.search(r"\d", chunk) and not besides):
                return None
            break
        if (value := _item(chunk)) is None:
            return None
        if value.kind != "words":
            values.append(value)
    if not values:
        return Value("words", text.casefold().strip("()\"' ")) if text else None
    return values[0] if len(values) == 1 else Value("list", text, parts=tuple(values))


def _split(text: str, parting: str) -> Iterator[tuple[str, str]]:
    """What stands between matches outside of all brackets, each with the match before it."""
    depth, begin, before = 0, 0, ""
    for found in re.finditer(rf"[(\[{{⟦)\]}}⟧]|{parting}", text):
        depth += (found[0] in "([{⟦") - (found[0] in ")]}⟧")
        if depth == 0 and found[0] not in "([{⟦)]}⟧":
            yield before, text[begin : found.start()].strip()
            begin, before = found.end(), found[0]
    yield before, text[begin:].strip()


def _item(chunk: str) -> Value | None:
    """One value: words, a name and "=" may stand before it, units and words behind it."""
    chunk = re.sub(r"^[^\d()]*\\in(?![a-z])", "", chunk).strip()
    *named, last = (part for _, part in _split(chunk, "="))
    names = (re.sub(_NAME, "", name) for name in named)
    # 2x = 10, not x = 5 or 2 + 3 = 5
    if _RELATION.search(chunk) or any(map(_EQUATION.match, names)):
        return Value("relation", chunk)
    rest = _PREFIX.sub("", last, count=1)
    words = last.removesuffix(rest)
    if not rest:
        return Value("words", last)
    core, *units = re.split(rf"(?={_WORD})", rest, maxsplit=1)
    core, suffix = core.strip(' :"/'), "".join(units)
    if _CHANGING.search(words.lower()) or (words and re.match(r"[*/^=]|[+-]\s", core)):
        return None
    value = _core(core)
    if value is None or not suffix:
        return value
    scale = Fraction(1)
    while (word := suffix.partition(" ")[0].lower()) in _SCALES:
        scale, suffix = scale * Fraction(_SCALES[word]), suffix.partition(" ")[2]
    # The words behind a number leave it as it is: 18 dollars in 3 days, not 18 to 20.
    unit = re.sub(r"\^\{?[23]\}?", "", _BESIDES.split(suffix, maxsplit=1)[0])
    odd = re.search(r"[^A-Za-z\s/'.%!?-]", unit) or _DENIED.search(suffix)
    if odd or (scale != 1 and value.kind != "number"):
        return None
    return replace(value, number=value.number * scale)


def _core(core: str) -> Value | None:
    """The value of what has no words."""
    if re.fullmatch(r"\d+(?: ?: ?\d+)+|\d+ ?_ ?(?:\d+|\{\d+\})", core):
        return Value("exact", core)
    if len(rows := [part for _, part in _split(core, r"\\cup(?![a-z])")]) > 1:
        return _parted("union", core, map(_core, rows))
    if "\\pm" in core:
        return _parted("list", core, (_core(core.replace("\\pm", sign)) for sign in "+-"))
    if core[:1] in tuple("([⟦") and core[-1:] in tuple(")]⟧"):
        parts = [_item(part) for _, part in _split(core[1:-1], "[,;]")]
        if core[0] == "⟦" and len(parts) == 1:
            return parts[0]
        if len(parts) > 1:
            latex = core.replace("⟦", "\\{").replace("⟧", "\\}")
            brackets = [] if core[0] == "⟦" else [Value("exact", core[0] + core[-1])]
            return _parted("row" if brackets else "list", latex, [*brackets, *parts])
    percent = core.endswith("%")
    number = _number(core.removesuffix("%"))
    if number is None:
        # Two numbers side by side, or signs that no expression has.
        odd = re.search(r"\d \d|[\"'%:?&]|_\{?\d|[+*/^=-]\s*$", core)
        return Value("math", core) if core and not odd else None
    return Value("number", core, number, percent)


def _parted(kind: str, text: str, parts: Iterable[Value | None]) -> Value | None:
    held = list(parts)
    known = tuple(part for part in held if part is not None)
    return Value(kind, text, parts=known) if len(known) == len(held) else None


def _number(core: str) -> Fraction | None:
    """The exact value of arithmetic with plain numbers; None for anything else."""
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", core)
    text = re.sub(r"\b(\d+)\s*(?:\\frac\s*\{(\d+)\}\s*\{(\d+)\}|(?<=\s)(\d+)\s*/\s*(\d+))",
                  lambda m: f"({m[1]}+{m[2] or m[4]}/{m[3] or m[5]})", text)  # fmt: skip
    for _ in range(9):  # one within another
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"**(\1)", text)
        text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text.replace("^", "**")).strip()
    if re.search(r"[^\d.+\-*/() eE]", text):
        return None
    try:
        return _evaluated(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    """Raises ValueError for what is no arithmetic, or of a size no answer has."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            return _evaluated(operand) * (-1 if isinstance(op, ast.USub) else 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            one, other = _evaluated(left), _evaluated(right)
            size = abs(other) * max(map(int.bit_length, one.as_integer_ratio()))
            if not isinstance(op, ast.Pow) or (other.denominator == 1 and size <= 4000):
                return Fraction(_OPERATORS[type(op)](one, other))
    raise ValueError(ast.dump(node))
