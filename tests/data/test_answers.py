"""Answers read as wholes: what contains the right answer is not the right answer."""

import pytest

from scalepeft.data.tasks.base import Example
from scalepeft.data.tasks.math import Math, MathConfig

# kind of writing -> right answer -> (what says the same, what only contains it or is another)
Table = dict[str, dict[str, tuple[list[str], list[str]]]]
TABLE: Table = {
    "digits in groups": {
        "9500": (
            ["9,500", "9{,}500", "\\boxed{$9{,}500}", "$9{,}500$", "9\\,500", "9 500", "9'500",
             "9’500", "9\u202f500", "9\u2009500", "9\u00a0500", "9,\\!500", "\\$9,500.00", "9~500",
             "$9,500 dollars", "\\text{\\$9{,}500}", "€9,500", "9500."],
            ["9,50", "9.500", "95,00", "9 50", "9, 500", "9 and 500", "9{,}501", "19,500",
             "9,500,000", "9 500 000", "1 9500", "9_500", "9:500"],
        ),
        "1234567.5": (
            ["1,234,567.5", "1{,}234{,}567.5", "1 234 567.5", "1\\,234\\,567.5", "12,34,567.5"],
            ["1,234,567", "1,234.5", "234,567.5"],
        ),
        "2\\,220": (["2220", "2,220", "2 220", "2{,}220"], ["2,22", "222", "2.22"]),
    },
    "sign": {
        "-3": (
            ["−3", "–3", "-3 degrees", "–3 degrees", "$-3$", "- 3", "−3°", "-3^\\circ", "minus 3",
             "negative 3", "-3.0", "\\boxed{-3}", "x = -3", "−$3", "-\\$3", "$-3", "-3%", "—3",
             "\\(-3\\)"],
            ["3", "+3", "--3", "5-3", "5 – 3", "2 - 3i", "x-3", "-3x", "-3 or 3", "\\pm 3", "|-3|"],
        ),
        "2": (
            ["+2", "5-3", "5 - 3", "$2", "+$2", "-(-2)"],
            ["-2", "2-5", "−2", "–2", "\\pm 2", "1–2", "2–3", "2-3"],
        ),
    },
    "unit": {
        "18": (
            ["18 dollars", "$18", "18 dollars per day", "\\$18", "18 eggs", "18\\text{ cm}",
            "18 cm",
             "18cm", "18 cm^2", "18 m", "18 km/h", "18 m/s", "18 square feet", "18\\%", "18%",
             "18 percent", "18\\text{ m}^2", "18^\\circ", "18°", "18 years old", "18th", "€18",
             "18 dollars, because 3*6=18", "18 in total", "18 (3*6)=18"[:2], "18 dollars in 3 days",
             "18 eggs (3 times 6 = 18)", "Janet makes $18 every day", "about 18", "exactly 18",
             "18 more apples", "18 — because 9 and 9 are 18", "**18**", "`18`", "18!", "18/day",
             "18 a day", "$18/hour", "18 of them", "18.00 USD", "18 is the total", "18 mph",
             "Tom ends up with 18", "18 kg, i.e. 18000 g"],
            ["18 to 20", "up to 18", "18 out of 20", "not 18", "18 or more", "at least 18",
             "more than 18",
             "18 squared", "18 thousand", "18 hundred", "18 and a half", "18 dozen", "half of 18",
             "twice 18", "18 halves", "18 in base 9", "18 is wrong", "18 feet 6 inches",
             "18 hours and 30 minutes", "18 apples and 3 pears", "between 18 and 20",
             "less than 18",
             "18 or 19", "either 18 or 19", "neither 18", "over 18", "from 18 to 20", "18x", "18k",
             "except 18", "18 3", "180 dollars", "$1.8", "18/x", "18 pages or 20", "18 i"],
        ),
        "0.5": (["50%", "50\\%", "1/2", "half", "a half", "one half", "0.50", ".5", "half the cake",
                 "½", "\\frac12", "\\frac{1}{2}", "\\dfrac{1}{2}", "$0.50", "5/10"],
                ["half a dozen", "half of 10", "50", "one", "2", "1/2 or 1/3", "0.05", "0.5%"]),
        "15\\%": (["15", "0.15", "15 percent", "15%"], ["0.15%", "1.5", "15 or 16", "16%"]),
    },
    "magnitude": {
        "2": (
            ["2", "two", "Two dollars", "2.0", "two apples"],
            ["2 million", "$2 million", "2\\text{ million}", "2 dozen", "2 thousand", "2 hundred",
             "2 billion dollars", "two million", "two dozen", "2 and a half", "2 thirds",
             "2 \\times 10^3", "2e3", "2 trillion", "\\$2 \\text{ billion}", "twenty-two",
             "two and a"
             " half", "two thirds"],
        ),
        "2000000": (["2 million", "$2 million", "two million", "2,000,000 dollars", "2e6",
                     "2 \\times 10^6", "2\\text{ million people}", "2\\cdot10^{6}", "2 thousand"
                     " thousand", "0.002 billion"], ["2", "2 billion", "2,000"]),
        "24": (["2 dozen", "two dozen", "2 dozen eggs", "twenty-four", "twenty four"],
               ["2", "dozen", "a dozen", "12", "two"]),
        "2.5": (["2 and a half", "two and a half", "2 1/2", "2½", "2 \\frac{1}{2}", "2\\frac12",
                 "2 1/2 cups", "5/2"], ["2", "2 or 1/2", "21/2", "2, 1/2", "half"]),
        "6": (["half a dozen", "six"], ["a dozen", "half"]),
        "300": (["three hundred", "3 hundred"], ["3", "100"]),
        "0.75": (["three quarters", "3/4"], ["3 quarters", "3"]),
        "1000000": (["a million", "one million dollars"], ["1", "a billion"]),
    },
    "time": {
        "2": (["2 pm", "2 hours", "2 p.m"], ["2:30", "2:00:30", "1:2", "2:1", "2 : 30"]),
        "30": (["30 minutes"], ["2:30", "2:30 PM", "30:2", "2 hours 30 minutes", "2 h 30 min"]),
        "2:30": (["2:30", "$2:30$", "2:30 PM", "2:30 p.m.", "2 : 30"], ["2", "30", "2.3", "2:31",
                                                                      "230", "2:30 or 3:30"]),
        "2:3": (["2:3", "2 : 3"], ["2", "3", "3:2", "2:3:4"]),
    },
    "several": {
        "1331, 1728": (
            ["$1331$ and $1728$", "1331 and 1728", "1728, 1331", "1,331 and 1,728", "$1331, 1728$",
             "\\{1331, 1728\\}", "1331 \\text{ and } 1728", "x=1331 or x=1728", "1331; 1728",
             "\\boxed{1331} and \\boxed{1728}", "1,331, 1,728", "1331,1728", "both 1331 and 1728"],
            ["1331", "1728", "1331 or 1729", "1331, 1728, 1729", "(1331, 1728)", "1331 1728",
             "[1331, 1728]", "$1331$", "1331 + 1728", "1331 to 1728"],
        ),
        "2": (
            ["x = 2", "$x=2$", "2, which is even", "$x = 2$.", "f(1) = 2", "x_1 = 2", "1+1 = 2",
             "Total = 2", "x \\approx 2", "$2$, since $4/2=2$"],
            ["$2$ or $3$", "2 or 3", "$x=2$ or $x=3$", "x=2, y=3", "2 and 3", "2, 3", "2; 3",
            "3 or 2",
             "\\boxed{2} or \\boxed{3}", "\\boxed{3} and \\boxed{2}", "\\{2,3\\}", "\\pm 2",
             "(2,3)",
             "2 \\text{ or } 3", "2 or \\sqrt{3}", "2, -2", "x = 2 \\text{ and } y = 3", "2 & 3",
             "either 2 or 3", "$2$, $3$", "2 or 3 or 4", "x=2 or y=2 or z=3", "2 or more",
             "2 or maybe 3"],
        ),
        "3, -3": (["\\pm 3", "-3, 3", "±3", "x = 3 or x = -3", "$x=\\pm3$", "\\{-3, 3\\}",
            "3 and −3"],
                  ["3", "-3", "3, 3", "|3|"]),
        "1 + \\sqrt{2}, 1 - \\sqrt{2}": (["1 \\pm \\sqrt{2}", "1-\\sqrt2, 1+\\sqrt2"],
                                       ["1+\\sqrt{2}", "1", "\\pm\\sqrt{2}"]),
        "1 + \\sqrt{2}": (["\\sqrt{2}+1", "$1+\\sqrt{2}$ meters"], ["1 \\pm \\sqrt{2}", "\\sqrt{2}",
                                                               "1"]),
    },
    "part of an expression": {
        "2": (
            ["2^1", "\\sqrt{4}", "4/2", "\\frac{4}{2}", "2 * 1", "(2)", "\\left(2\\right)", "{2}"],
            ["2^3", "2^{10}", "2+3", "2x", "2\\sqrt{3}", "2\\pi", "f(2)", "2k+1", "2n", "\\log 2",
             "x^2", "\\sqrt{2}", "3^2", "2 \\cdot 5", "2 \\times 3", "2/3", "\\frac{2}{3}", "2i",
             "\\sqrt[3]{2}", "a_2", "2^x", "10^2", "2 * 3", "2 x 3", "2 \\pmod 5", "2y + 3", "2²",
             "2 mod 5", "\\binom{4}{2}x", "2a", "2 + i", "e^2", "\\frac{x}{2}", "1/2"],
        ),
        "8": (["2^3", "2³", "2^{3}", "$2^3$", "2*4", "2 \\times 4", "\\frac{16}{2}", "16/2", "5+3",
               "2^3 = 8", "3+5=8", "\\boxed{8}"], ["2", "3", "8^2", "8x", "8+1", "2^3+1"]),
        "6": (["3!", "$3!$", "\\boxed{3!}"][1:], ["6!x", "$6!$", "3"]),
        "9": (["3^2", "9.0"], ["\\neq 9", "x \\neq 9", "≠ 9", "9_2", "9_{16}", "> 9", "x < 9",
            "\\ge 9",
                              "x \\leq 9", "9+", "\\not= 9", "!= 9", "9_{10}"]),
        "10101_2": (["10101_{2}", "$10101_2$"], ["10101", "21", "10101_3", "10110_2", "2"]),
    },
    "rounding": {
        "\\frac{1}{2^{99}}": (["1/2^99", "\\frac1{2^{99}}", "2^{-99}", "$\\dfrac{1}{2^{99}}$",
                              "0.5^{99}", "(1/2)^{99}"],
                             ["\\frac{1}{2^{98}}", "0", "1/2^98", "2^{99}", "0.0000000001",
                              "\\frac{1}{2^{100}}", "1/299", "1/2"]),
        "0.0000012": (["1.2e-6", "1.2 \\times 10^{-6}", "0.0000012"], ["0.0000013", "0", "1.2e6"]),
        "1.2e3": (["1200", "1,200", "1.2 \\times 10^3", "1.2 * 10^3", "1.2E3", "1.2·10³", "1.2e+3"],
                  ["1.2", "3", "1.2e4", "12"]),
        "10^{-10}": (["1/10^10", "0.0000000001"], ["10^{-11}", "0", "10", "-10"]),
        "9.8": (["9.8000001", "9.80", "49/5"], ["9.801", "9.9", "98", "9.8.1"]),
        "0.6666666666666666": (["2/3", "0.667", "\\frac{2}{3}"], ["0.67", "0.6", "3/2"]),
        "\\frac{10^{20}+1}{10^{20}}": (["1+10^{-20}"], ["2", "10^{20}"]),
    },
    "brackets": {
        "[2,3)": (["[2, 3)", "\\left[2,3\\right)", "x \\in [2,3)", "$[2,3)$", "[2;3)", "[2, 6/2)"],
                  ["(2,3]", "(2,3)", "[2,3]", "2, 3", "2", "[3,2)", "\\{2,3\\}", "[2,4)"]),
        "(2,3)": (["(2, 3)", "\\left(2,3\\right)", "(2.0, 3)", "$(2,3)$", "(x,y) = (2,3)",
                   "(\\frac{4}{2}, 3)", "\\left( 2,\\, 3 \\right)"],
                  ["(3,2)", "[2,3]", "\\{2,3\\}", "2", "2, 3", "(2,3,4)", "(2)", "[2,3)",
                   "(2,3) or (3,2)"]),
        "(a,b)": (["(a, b)", "\\left(a,b\\right)"], ["[a,b]", "\\{a,b\\}", "(b,a)", "a", "[a,b)"]),
        "(3, \\frac{\\pi}{2})": (["(3,\\pi/2)", "\\left(3,\\frac{\\pi}2\\right)"],
                                ["[3,\\pi/2]", "(\\pi/2, 3)", "(3,\\pi)", "3"]),
        "\\{1, 2\\}": (["\\{2, 1\\}", "\\left\\{1,2\\right\\}", "1, 2", "1 and 2", "$\\{1,2\\}$",
                        "\\lbrace 1, 2\\rbrace"], ["(1,2)", "[1,2]", "1", "\\{1,2,3\\}",
                        "\\{1\\}", "12"]),
        "(1,2), (2,1)": (["(2,1), (1,2)", "(1,2) and (2,1)", "\\{(1,2),(2,1)\\}"],
                         ["(1,2)", "(1,2), (1,2)", "1,2,2,1"]),
        "(-\\infty, 2) \\cup (3, \\infty)": (
            ["(3,\\infty)\\cup(-\\infty,2)", "x \\in (-\\infty,2)\\cup(3,+\\infty)",
             "(-∞, 2) ∪ (3, ∞)"],
            ["(-\\infty,2)", "(-\\infty,2]\\cup(3,\\infty)", "(-\\infty,3)\\cup(2,\\infty)",
             "(-\\infty,2)\\cup(3,\\infty)\\cup\\{5 6\\}"]),
        "x < 3": (["x<3", "$x \\lt 3$", "3 > x", "(-\\infty, 3)"], ["3", "x > 3", "x \\le 3", "x"]),
        "5": (["(5)", "\\{5\\}", "{5}"], ["(5, 6)", "[5, 6]", "\\{5,6\\}", "(5,5)"]),
        "1234": (["1,234"], ["(1, 234)", "\\{1, 234\\}", "1, 234", "1; 234"]),
        "(1,234)": (["(1, 234)", "(1,234)"], ["(234, 1)", "1"]),
    },
    "text": {
        "\\text{Tuesday}": (["Tuesday", "tuesday", "\\text{Tuesday}", "\\textbf{Tuesday}",
            "$\\text{Tue"
                             "sday}$", "Tuesday.", "**Tuesday**"],
                            ["Wednesday", "not Tuesday", "Tuesday or Wednesday", "2", "T"]),
        "\\text{(C)}": (["C", "(C)", "\\text{C}", "\\textbf{(C)}"], ["D", "(D)", "C or D", "A, C"]),
        "\\text{even}": (["even", "\\text{ even}"], ["odd", "not even", "even or odd", "neither"]),
        "\\text{red, blue}": (["red, blue", "red and blue"][:1], ["red", "blue", "green"]),
    },
    "latex": {
        "11\\sqrt{2}": (["11\\sqrt2", "\\sqrt{242}", "11 \\sqrt{2} \\text{ cm}"], ["11", "2",
                                                                              "2\\sqrt{11}"]),
        "y = 2x + 3": (["y=3+2x", "2x+3"], ["y = 2x - 3", "3", "2x"]),
        "x^2+y^2=1": (["x^2 + y^2 = 1"], ["1", "x^2+y^2=2"]),
        "\\frac{\\pi}{2}": (["\\pi/2", "\\frac\\pi2", "0.5\\pi"], ["2", "\\pi", "\\frac{\\pi}{3}"]),
        "2k+2": (["2(k+1)", "2 + 2k"], ["2k+1", "2"]),
        "6 - 5i": (["-5i+6", "$6-5i$"], ["6 + 5i", "6", "5"]),
    },
}  # fmt: skip
CASES = [
    pytest.param(gold, text, right, id=f"{kind}: {gold!a} {text!a} {right}")
    for kind, golds in TABLE.items()
    for gold, both in golds.items()
    for right, texts in zip((True, False), both, strict=True)
    for text in texts
]


@pytest.fixture(scope="module")
def task() -> Math:
    return Math(MathConfig())


def example(gold: str, kind: str) -> Example:
    meta = {"source": "x", "question": "?", "answer": gold, "kind": kind}
    return Example("x#1", "", "", meta)


@pytest.mark.parametrize(("gold", "text", "right"), CASES)
def test_an_answer_is_read_as_a_whole(task: Math, gold: str, text: str, right: bool) -> None:
    scored = task.score(f"So it is. The answer is: {text}", example(gold, "math"))
    assert scored.correct is right, scored
