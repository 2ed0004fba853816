r"""String equivalence of answers to the MATH data set, and the last \boxed{} of a solution.

The rules of its paper (arXiv 2103.03874), by which all published MATH numbers are made. They
compare texts, not values: 1/2 equals \frac12 and 0.5, but 2/4 or 0.50 does not.
"""

import re

# In this order, before units are looked for.
_REMOVED = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
    ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip


def is_equiv(one: str, other: str) -> bool:
    """True if both texts are the same after ``normalize``, or as they stand where that fails."""
    try:
        return normalize(one) == normalize(other)
    except (IndexError, ValueError):
        return one == other


def normalize(text: str) -> str:
    r"""The form that texts are compared in. Raises ValueError, IndexError: bad latex, two units."""
    for old, new in _REMOVED:
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")  # with the space: what follows is a unit
    if len(units) > 1:
        raise ValueError("units at several places")
    text = text.replace("\\%", "")  # alone: theirs leaves a plain % where it stands
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    before, *after = text.split("=")
    if len(after) == 1 and len(before) <= 2:  # "k = 5"
        text = after[0]
    text = _braced(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    if found := re.fullmatch("(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", text):
        return f"\\frac{{{found[1]}}}{{{found[2]}}}"
    return text


def _braced(text: str) -> str:
    r"""\sqrt3 -> \sqrt{3}, \frac12 -> \frac{1}{2}, \frac1{72} -> \frac{1}{72}."""
    if re.search(r"\\sqrt(?=\\sqrt|$)", text):
        raise ValueError("a root of nothing")
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    short = re.search(r"\\frac[^{]?(?=\\frac|$)", text)  # then theirs leaves all as they are
    if short and short[0] == "\\frac":
        raise ValueError("a fraction of nothing")
    text = text if short else re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    return text if short else re.sub(r"\\frac([^{])(?=\{)", r"\\frac{\1}", text)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} (or \fbox{}, or after "\boxed ") that ends; else None."""
    begin = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if begin < 0:
        return None
    rest = text[begin:].removeprefix("\\boxed").removeprefix("\\fbox")
    if not rest.lstrip().startswith("{"):
        return rest.split("$")[0].strip() or None if rest[:1] == " " else None
    depth = 0
    for end, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if letter == "}" and depth == 0:
            return rest[rest.index("{") + 1 : end]
    return None
