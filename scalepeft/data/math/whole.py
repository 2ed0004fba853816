r"""Answers read as wholes: what only contains the right answer is another answer.

A text is a ``number`` (1,234.5; 9{,}500; -$5; 50%; 2 1/2; 1.2e3; 2^3; 2 million; two dozen;
18 dollars a day), a ``list`` in any order (2 or 3; x=2, y=3; \{1, 2\}; \pm 3), a ``row`` whose
brackets and order count ((1, 2); [2, 3)), a ``union`` of rows, ``exact`` where only the same text
is equal (2:30; 10_2), a ``relation`` (x < 3; \neq 9), ``words`` (Tuesday) or other ``math``, which
math-verify compares. A text that is none of these, or that may mean several, equals nothing.
"""

import ast
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

Equivalent = Callable[[str, str], bool]
LONGEST = 400  # characters; a longer text is no answer


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
_GROUP = r"\{,\}|\\,|\\ |[~' ]"  # between three digits; a comma alone may part a list
# What is the same, in this order.
_SAME = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r",\\!", "{,}"),
        (r"(?<=\d)\s*[–—]\s*(?=\$?\d)", " to "),
        (r"(?<=\w)\s*—\s*", ", "),
        (r"[–—]", "-"),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|boxed|fbox)(?![A-Za-z])|\\!|\*\*|`", ""),
        (r"\\\$|\$|\\[()\[\]]", "  "),
        (rf"(?<![\d.,^_])(\d{{1,3}})({_GROUP})\d{{3}}(?:\2\d{{3}})*(?![\d/])",
         lambda m: re.sub(r"\D", "", m[0])),
        (r"\\(?:text\w*|math[a-z]+|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", " degrees "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:cdot|times)(?![A-Za-z])|(?<=\d)\s*x\s*(?=\d)", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\approx(?![A-Za-z])", "="),
        (r"\\%|\s*\bper\s?cent\b", "%"),
        (r"\\\{|\\lbrace(?![A-Za-z])", "⟦"),
        (r"\\\}|\\rbrace(?![A-Za-z])", "⟧"),
        (r"\\[,;: ]|\\q?quad|~", " "),
        (r"\b(?:minus|negative)\s+(?=\d)", "-"),
        (rf"(?<=\d)(?=(?:{_UNITS})\b)", " "),
        (r"\s+\([^()]*(?:(?<![A-Za-z\\])[A-Za-z]{3}|=)[^()]*\)$", ""),
        (r"\b([AaPp])\.?[Mm]\b\.?", r"\1m"),
        (r"\s+", " "),
    )
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
    r"twice|half|double|triple|third|quarter|without|unless|square|cube|root|base|mod|up|or)\b"
)
_BESIDES = re.compile(
    r"\b(?:in|for|per|an?|each|every|because|since|as|which|so|when|where|if|with|after|by|from|"
    r"at|on|during|until|while|is|are|was|were|of|that)\b|[(:\"]"
)
_DENIED = re.compile(
    r"\b(?:squared|cubed|factorial|base|out of|(?:is|are|was|were) (?:not|wrong|incorrect|false))\b"
)
_RELATION = re.compile(r"\\n(?:e|eq|ot)(?![a-z])|!=|[<>]|\\[lg](?:eq?|t)(?:slant)?(?![a-z])")

_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_SPELLED = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    "sixteen|seventeen|eighteen|nineteen"
).split("|")
_NUMERALS = {word: str(i) for i, word in enumerate(_SPELLED)} | {
    word: str(20 + 10 * i) for i, word in enumerate(_TENS.split("|"))
}
_SCALES: dict[str, int | float | str] = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "half": 1 / 2, "halves": 1 / 2, "third": "1/3", "thirds": "1/3", "fourths": 1 / 4,
    "fifths": "1/5", "sixths": "1/6", "eighths": 1 / 8, "tenths": "1/10", "hundredths": "1/100",
}  # fmt: skip  # without quarters, which are coins


def equal(right: str, prediction: str, equivalent: Equivalent) -> bool:
    """True if both texts say the same; ``equivalent`` decides where both are other math."""
    rounded = re.search(r"\.[0-9]{10,}$", right.strip()) is not None
    theirs = list(_readings(prediction))
    return right.strip() == prediction.strip() or any(
        _same(one, other, equivalent, rounded) for one in _readings(right) for other in theirs
    )


def _readings(text: str) -> Iterator[Value]:
    """The values a text may have: 1,234 is a number, or of a list."""
    grouped = _TIGHT.sub(lambda m: m[0].replace(",", ""), text)
    for reading in {grouped, text}:
        if (value := read(reading)) is not None:
            yield value


def _same(right: Value, other: Value, equivalent: Equivalent, rounded: bool) -> bool:
    """The order of the two counts: math-verify's relation is not symmetric."""
    kinds = {right.kind, other.kind}
    if kinds == {"number"}:
        shares = [(right.number, other.number)]
        if right.percent != other.percent:
            shares.append((right.number / (100 if right.percent else 1),
                           other.number / (100 if other.percent else 1)))  # fmt: skip
        # As math-verify rounds, but no two tiny numbers are equal. A right answer of many decimals
        # is a rounded fraction: within 0.001, as LLM-Adapters allows.
        one = Fraction(1)
        return any(
            abs(a - b)
            <= (Fraction(1, 1000) if rounded else min(max(abs(a), abs(b)), one) / 2000000)
            for a, b in shares
        )
    if len(kinds) == 1 and right.parts:
        if len(right.parts) != len(other.parts):
            return False
        if right.kind == "row":
            brackets = [value.text[0] + value.text[-1] for value in (right, other)]
            pairs = zip(right.parts, other.parts, strict=True)
            return len(set(brackets)) == 1 and all(
                _same(a, b, equivalent, rounded) for a, b in pairs
            )
        left = list(other.parts)
        for part in right.parts:
            found = next((b for b in left if _same(part, b, equivalent, rounded)), None)
            if found is None:
                return False
            left.remove(found)
        return True
    if len(kinds) == 1 and re.sub(r"[\s{}]", "", right.text) == re.sub(r"[\s{}]", "", other.text):
        return True
    decidable = {"math", "number", "row", "union"} if "math" in kinds else {"row", "union"}
    if "relation" in kinds and "math" not in kinds:
        decidable |= {"relation"}
    return (
        kinds <= decidable
        and bool(kinds & {"math", "relation"})
        and equivalent(right.text, other.text)
    )


def read(text: str) -> Value | None:
    """What a whole text says; None: nothing that could be equal, or too long."""
    if len(text) > LONGEST:
        return None
    if "\\begin" in text:
        return Value("math", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS))
    for pattern, new in _SAME:
        text = pattern.sub(new, text)
    if not re.search(r"[\d\\]", text):
        text = _with_digits(text.strip())
    text = re.sub(r"(?<=\d) and (?:a|one) half\b", " 1/2", text)
    return _listed(text.strip(" :;,").rstrip("."))


def _listed(text: str) -> Value | None:
    values: list[Value] = []
    for before, chunk in _split(text, r"[,;&]|\b(?:and|or)\b"):
        prefix = _PREFIX.match(chunk)
        if (
            values
            and prefix
            and not _FILLER.fullmatch(prefix[0])
            and ("=" not in chunk or _BESIDES.match(chunk))
        ):
            # Said besides the answer, unless it may be an answer of its own.
            if before == "or" or (re.search(r"\d", chunk) and not _BESIDES.match(chunk)):
                return None
            break
        if not chunk:
            continue
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
    for found in re.finditer(rf"([(\[{{⟦])|([)\]}}⟧])|{parting}", text):
        depth += (found[1] is not None) - (found[2] is not None)
        if depth == 0 and not found[1] and not found[2]:
            yield before, text[begin : found.start()].strip()
            begin, before = found.end(), found[0]
    yield before, text[begin:].strip()


def _item(chunk: str) -> Value | None:
    """One value: words, a name and "=" may stand before it, units and words behind it."""
    chunk = re.sub(r"^[^\d()]*\\in(?![a-z])", "", chunk).strip()
    if _RELATION.search(chunk):
        return Value("relation", chunk)
    *named, chunk = (part for _, part in _split(chunk, "="))
    for name in named:
        letters = re.sub(rf"_\{{?\w+\}}?|(?<=[a-zA-Z])\([\da-z, ]*\)|{_WORD}", "", name)
        if re.search(r"[A-Za-z\\]", letters) and re.search(r"[\d+*/^-]", letters):
            return Value("relation", "=".join([*named, chunk]))  # 2x = 10, not x = 5 or 2 + 3 = 5
    words = _PREFIX.match(chunk)
    assert words is not None
    if words.end() == len(chunk):
        return Value("words", chunk)
    if _CHANGING.search(words[0].lower()):
        return None
    rest = chunk[words.end() :]
    unit = re.search(_WORD, rest)
    core, suffix = (rest[: unit.start()], rest[unit.start() :]) if unit else (rest, "")
    core = core.strip(' :"/')
    if words[0] and re.match(r"[*/^=]|[+-]\s", core):
        return None
    value = _core(core)
    if value is None or not suffix:
        return value
    scale = Fraction(1)
    while (word := suffix.partition(" ")[0].lower()) in _SCALES:
        scale, suffix = scale * Fraction(_SCALES[word]), suffix.partition(" ")[2]
    if not _is_besides(suffix) or (scale != 1 and value.kind != "number"):
        return None
    return Value(value.kind, value.text, value.number * scale, value.percent, value.parts)


def _is_besides(text: str) -> bool:
    """Whether the words behind a number leave it as it is: 18 dollars in 3 days, not 18 to 20."""
    unit = re.sub(r"\^\{?[23]\}?", "", text[: m.start()] if (m := _BESIDES.search(text)) else text)
    return not re.search(r"[^A-Za-z\s/'.%!?-]", unit) and not _DENIED.search(text)


def _with_digits(text: str) -> str:
    """Twenty-two dozen -> 22 dozen; a half -> 1/2; a dozen -> 1 dozen."""
    text = re.sub(r"\bthree[ -]quarters?\b", "3/4", text, flags=re.I)
    text = re.sub(r"^(?:an? |one )?half\b(?! past)", "1/2", text, flags=re.I)
    text = re.sub(r"^(?:an? |one )?quarter\b(?! past)", "1/4", text, flags=re.I)
    dozen = rf"^(1/2 )?an? (?={'|'.join(_SCALES)})"
    text = re.sub(dozen, lambda m: m[1] or "1 ", text, flags=re.I)
    text = re.sub(
        rf"\b({_TENS})[ -]({'|'.join(_SPELLED[1:10])})\b",
        lambda m: str(int(_NUMERALS[m[1].lower()]) + int(_NUMERALS[m[2].lower()])),
        text, flags=re.I,
    )  # fmt: skip
    numeral = rf"\b(?:{'|'.join(_NUMERALS)})(?![a-z])"
    return re.sub(numeral, lambda m: _NUMERALS[m[0].lower()], text, flags=re.I)


def _core(core: str) -> Value | None:
    """The value of what has no words."""
    if re.fullmatch(r"\d+(?: ?: ?\d+)+|\d+ ?_ ?(?:\d+|\{\d+\})", core):
        return Value("exact", core)
    if len(rows := [part for _, part in _split(core, r"\\cup(?![a-z])")]) > 1:
        parts = [_core(row) for row in rows]
        return Value("union", core, parts=tuple(part for part in parts if part))
    if "\\pm" in core:
        both = [_core(core.replace("\\pm", sign)) for sign in "+-"]
        return Value("list", core, parts=tuple(value for value in both if value))
    if core[:1] in tuple("([⟦") and core[-1:] in tuple(")]⟧"):
        parts = [_item(part) for _, part in _split(core[1:-1], "[,;]")]
        if core[0] == "⟦" and len(parts) == 1:
            return parts[0]
        if len(parts) > 1:
            kind = "list" if core[0] == "⟦" else "row"
            known = tuple(part for part in parts if part is not None)
            latex = core.replace("⟦", "\\{").replace("⟧", "\\}")
            return Value(kind, latex, parts=known) if len(known) == len(parts) else None
    percent = core.endswith("%")
    number = _number(core.removesuffix("%"))
    if number is None:
        # Two numbers side by side, or signs that no expression has.
        odd = re.search(r"\d \d|[\"'%:?&]|_\{?\d|[+*/^=-]\s*$", core)
        return Value("math", core) if core and not odd else None
    return Value("number", core, number, percent)


def _number(core: str) -> Fraction | None:
    """The exact value of arithmetic with plain numbers; None for anything else."""
    if len(core) > 200:
        return None
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", core)
    text = re.sub(r"\b(\d+)\s*(?:\\frac\s*\{(\d+)\}\s*\{(\d+)\}|(?<=\s)(\d+)\s*/\s*(\d+))",
                  lambda m: f"({m[1]}+{m[2] or m[4]}/{m[3] or m[5]})", text)  # fmt: skip
    before = ""
    while text != before:
        before = text
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
        case ast.BinOp(left=left, op=op, right=right):
            one, other = _evaluated(left), _evaluated(right)
            if isinstance(op, ast.Pow):
                size = max(one.numerator.bit_length(), one.denominator.bit_length())
                if other.denominator == 1 and size * abs(other) <= 4000:
                    return Fraction(one**other.numerator)
            elif isinstance(op, ast.Add):
                return one + other
            elif isinstance(op, ast.Sub):
                return one - other
            elif isinstance(op, ast.Mult):
                return one * other
            elif isinstance(op, ast.Div):
                return one / other
    raise ValueError(ast.dump(node))
