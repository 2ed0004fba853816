"""Math rows, prompts, answers, contamination: against published rules, by hand, on real data."""

import base64
import gzip
import importlib.util
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from tokenized import prepare

from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.core.registry import available
from scalepeft.data.math import answers, contamination, equivalence, hendrycks, whole
from scalepeft.data.tasks.base import Example
from scalepeft.data.tasks.math import Math, MathConfig
from scalepeft.models import hub, tiny
from scalepeft.models import hub as models

GSM8K = {
    "question": "Tom buys 3 pens at $1,000 each. What does he pay?",
    "answer": "He pays 3*1,000=$<<3*1000=3000>>3,000.\n#### 3,000",
}


METAMATHQA = {
    "type": "GSM_Rephrased",
    "query": "What is the sum of 7 and 5?\nGive the number.",
    "original_question": "What is 7 plus 5?",
    "response": "It is 7 + 5 = 12.\n#### 12\nThe answer is: 12",
}


MATH = {
    "problem": "Find $x$ with $2x=1$.",
    "solution": "We have $x=\\boxed{\\frac{1}{2}}$.",
    "level": "Level 1",
    "type": "Algebra",
}


AQUA = {
    "instruction": "Which is even? Answer Choices: (A) 1 (B) 4",
    "input": "",
    "output": "A: Even are 2 and 4. The answer is (A).",
    "answer": "B",
}


MAWPS = {"instruction": " What is left ? ", "input": "", "output": "", "answer": "0.5"}


ORCA = {"question": "How many?", "answer": "There are 3 boxes of 4, so 12 in all."}


NATIVE = [
    ({"Body": "Mia has 9 shells and gives 4 to Jo.", "Question": "How many?", "Answer": 5.0,
      "Equation": "( 9.0 - 4.0 )"}, "5.0", "number", "The answer is: 5.0"),
    ({"question": "How fast?", "options": ["A)40 km/h", "B)60 km/h"], "rationale": "So B.",
      "correct": "B"}, "B", "letter", "So B.\nThe answer is: B"),
    ({"sQuestion": "How many?", "lSolutions": [7.0], "lEquations": ["X=3+4"]}, "7.0", "number",
     "The answer is: 7.0"),
    ({"question": "Wie viele?", "answer": None, "answer_number": 11}, "11", "number", "is: 11"),
    ({"body": "Ann has 4 and 6.", "question": "How many?", "answer": "10 (apples)"}, "10", "number",
     "The answer is: 10"),
    ({"instruction": "What is 30 + 12?", "input": "", "output": "30 + 12 = 42. The answer is 42"},
     "42", "number", "The answer is 42"),
    ({"question": "q", "answer": "So. The answer is: $[2,3)$"}, "$[2,3)$", "math", "$[2,3)$"),
    ({"question": "q", "answer": "The answer is: e^{-1}."}, "e^{-1}", "math", "e^{-1}."),
    ({"question": "q", "answer": "So the answer is 18 dollars."}, "18", "number", "dollars."),
    ({"question": "q", "answer": "The answer is: 1-i"}, "1-i", "math", "1-i"),
]  # fmt: skip


PROTOCOLS = list(MathConfig.PROTOCOLS)


def task(protocol: str = "metamath", **settings: Any) -> Math:
    values = {**MathConfig.PROTOCOLS[protocol].data, "protocol": protocol, **settings}
    return Math(MathConfig(**values))


@pytest.fixture(scope="module")
def equivalent() -> equivalence.EquivalenceServer:
    return equivalence.EquivalenceServer()


def example(answer: str, kind: str = "number") -> Example:
    return Example("x#1", "", "", {"source": "x", "question": "?", "answer": answer, "kind": kind})


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def shared(folder: Path, name: str) -> list[dict[str, Any]]:
    text = gzip.decompress((folder / name).read_bytes()).decode()
    return json.loads(text) if text[0] == "[" else [json.loads(t) for t in text.splitlines()]


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{}\n\n### Response:"
)


ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n{}"
    "\n\n### Input:\n{}\n\n### Response:"
)


def test_metamath_prompts_are_its_scripts() -> None:
    one, two = "What is the sum of 7 and 5?", "Give the number."
    made = task().example(METAMATHQA, "x#1", "train")
    assert made.prompt == ALPACA_INPUT.format(one, two), "its loader splits queries at the line"
    assert made.completion == METAMATHQA["response"]
    assert task(input_prompt=None).example(METAMATHQA, "x#1", "train").prompt == ALPACA.format(
        f"{one}\n{two}"
    )
    test = task().example(METAMATHQA, "x#1", "test")
    assert test.prompt == ALPACA.format(f"{one}\n{two}") + " Let's think step by step."
    made = task().example(GSM8K, "x#1", "train")
    assert made.prompt == ALPACA.format(GSM8K["question"])
    assert made.completion == "He pays 3*1,000=$3,000.\n#### 3,000\nThe answer is: 3,000"


def test_peft_benchmark_prompts_are_its_template() -> None:
    made = task("peft-benchmark").example(METAMATHQA, "x#1", "train")
    assert made.prompt == (
        "Question: What is the sum of 7 and 5?\nGive the number. Think step by step.\nAnswer:"
    )
    assert made.prompt == task("peft-benchmark").example(METAMATHQA, "x#1", "test").prompt
    assert made.completion == METAMATHQA["response"], "no space between"


def test_llm_adapters_prompts_are_its_two_templates() -> None:
    begin = ALPACA.split("\n\n", 1)[0]
    in_16 = " " * 16
    train = task("llm-adapters").example(AQUA, "x#1", "train")
    asked = f"{in_16}### Instruction:\n{in_16}{AQUA['instruction']}\n"
    assert train.prompt == f"{begin}  \n\n{asked}{in_16}\n{in_16}### Response:\n{in_16}"
    assert train.completion == AQUA["output"]
    test = task("llm-adapters").example(AQUA, "x#1", "test")
    assert test.prompt == f"{begin} \n\n{asked}\n{in_16}### Response:\n{in_16}"
    assert test.completion == "The answer is B.", "the outputs of its test files are GPT's"


def test_protocols_fill_the_config() -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "metamath": ("response", "together", 512, None, 1, 512, None),
        "metamath-math": ("response", "together", 512, None, 1, 2048, None),
        "peft-benchmark": ("all", "together", 768, 1300, 1, 300, 800),
        "llm-adapters": ("all", "together", 256, None, 4, 256, None),
    }
    assert set(wanted) == set(PROTOCOLS)
    for name, values in wanted.items():
        settings = ["run_dir=x", "train.max_steps=9", "data=math", f"data.protocol={name}"]
        made, _ = config_files.load(None, settings)
        d, e = made.data, made.evaluate
        assert isinstance(d, MathConfig)
        found = (d.train_on, d.tokenize, d.cutoff, d.max_chars)
        assert (*found, e.num_beams, e.max_new_tokens, e.max_tokens) == values
        assert config.deviations(made) == {}
        if name == "metamath":
            words = ["Question", "USER", "ASSISTANT", "Instruction", "Response"]
            assert sorted(e.stop) == sorted([*words, *(f"{w}:" for w in words)])


def test_helpers_are_no_tasks() -> None:
    assert "math" in available("data.tasks")
    helpers = {"answers", "equivalence", "hendrycks", "contamination", "problems"}
    assert not helpers & set(available("data.tasks"))


@pytest.mark.parametrize(
    ("row", "answer", "kind", "ends"),
    [
        (GSM8K, "3,000", "number", "=$3,000.\n#### 3,000\nThe answer is: 3,000"),
        (METAMATHQA, "12", "number", "The answer is: 12"),
        ({**METAMATHQA, "type": "MATH_SV"}, "12", "math", "The answer is: 12"),
        ({"query": "q", "response": "so\n#### 18"}, "18", "number", "#### 18"),
        (MATH, "\\frac{1}{2}", "math", "}}$.\nThe answer is: \\frac{1}{2}"),
        ({**MATH, "answer": "1/2"}, "1/2", "math", "}}$.\nThe answer is: 1/2"),
        ({"problem": "q", "answer": 7}, "7", "math", "The answer is: 7"),
        ({"instruction": "q", "output": "\\fbox{9}"}, "9", "math", "The answer is: 9"),
        (AQUA, "B", "letter", "The answer is: B"),
        (MAWPS, "0.5", "number", "The answer is: 0.5"),
        ({**MAWPS, "answer": -15.0}, "-15.0", "number", "The answer is: -15.0"),
        (ORCA, "12", "number", "in all."),
        *NATIVE,
    ],
)
def test_formats_are_told_apart_by_their_keys(
    row: dict[str, Any], answer: str, kind: str, ends: str
) -> None:
    made = task().example(row, "set/test.json#3", "test")
    assert made.completion.endswith(ends)
    assert {k: made.meta[k] for k in ("answer", "kind", "source")} == {
        "answer": answer,
        "kind": kind,
        "source": "set/test.json",
    }
    assert json.loads(json.dumps(made.meta)) == made.meta


@pytest.mark.parametrize(
    ("row", "split", "said"),
    [
        (MAWPS, "train", "'output' is empty"),
        ({**MAWPS, "answer": "many"}, "test", "'answer' is 'many'; expected a number, or a letter"),
        ({**MAWPS, "answer": True}, "test", "'answer' must be text, not bool"),
        ({**GSM8K, "answer": "so\n#### many"}, "test", "'many' after ####; expected a number"),
        ({**GSM8K, "answer": ""}, "train", "'answer' is empty"),
        ({**GSM8K, "question": None}, "train", "'question' must be text, not NoneType"),
        ({"question": "q"}, "train", "key 'answer' is missing"),
        ({**METAMATHQA, "response": " "}, "train", "'response' is empty"),
        ({"query": "q", "response": "no answer"}, "test", "tells no answer"),
        ({**MATH, "solution": "so it is 5"}, "test", "no \\boxed{} answer"),
        ({"problem": "q", "answer": "5"}, "train", "key 'solution' is missing"),
        ({**ORCA, "answer": "I do not know"}, "test", "tells no answer"),
        ({"text": "q"}, "train", "the row has text; expected those of GSM8K"),
        (["q"], "train", "a row must be an object with keys, not list"),
    ],
)
def test_a_broken_row_says_what_is_wrong(row: Any, split: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        task().example(row, "x#1", split)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is: 18", "18"),
        ("so 3+15=18. The answer is 18 dollars per day.\n\nQuestion: 7", "18 dollars per day"),
        ("The answer is: 12\nNo: the answer is: $1,234.50.", "$1,234.50"),
        ("The answer is: -7", "-7"),
        ("The answer is: .75", ".75"),
        ("The answer is: 2 1/2 cups", "2 1/2 cups"),
        ("The answer is: 50%", "50%"),
        ("The answer is: x = 5", "x = 5"),
        ("**The answer is: 18**", "18"),
        ("The answer is: $\\frac{3}{4}$.", "$\\frac{3}{4}$"),
        ("Answer: \\boxed{42}, of course", "42"),
        ("we get $\\boxed{\\$1,080}$ in 3 days", "\\$1,080"),
        ("in 3 steps\n#### 1,080\n", "1,080"),
        ("\\boxed{5} and\n#### 7", "5"),
        ("The answer is: ten, \\boxed{10}", "10"),
        ("10-3=7", "7"),
        ("she owes -$5", "-$5"),
        ("so it is 9 500 in all, or 2 million", "2 million"),
        ("so we get 2^3", "2^3"),
        ("so it takes $\\frac{1}{2}$ of it", "$\\frac{1}{2}$"),
        ("\\boxed{2} or \\boxed{3}", "2 or 3"),
        ("there are 1,234,567 of them", "1,234,567"),
        ("The answer is:", None),
        ("no idea", None),
        ("  \n", None),
        ("", None),
    ],
)
def test_an_answer_is_found_wherever_it_stands(text: str, found: str | None) -> None:
    assert answers.find(text, "number") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is (D).", "D"),
        ("The answer is: A because of B", "A"),
        ("A man walks 5 km, so C is right.", "C"),
        ("A man walks. Choose (B)", "B"),
        ("\\boxed{\\text{(E)}}", "E"),
        ("CADBE", None),
        ("a man", None),
        ("The answer is: A or B", "A or B"),
        ("The answer is: (A), (B)", "(A), (B)"),
        ("The answer is not B", "not B"),
        ("The answer is: Tom, so D", "D"),
    ],
)
def test_a_letter_is_found_wherever_it_stands(text: str, found: str | None) -> None:
    assert answers.find(text, "letter") == found


@pytest.mark.parametrize(
    ("right", "prediction", "same"),
    [
        ("1,234,567", "1234567", True),
        ("1234", "1,234.00", True),
        ("3000", "\\$3,000", True),
        ("-3", "−3", True),
        ("3", "-3", False),
        ("0.5", "1/2", True),
        ("2.5", "2 1/2", True),
        ("0.6666666666666666", "2/3", True),
        ("0.6666666666666666", "0.667", True),
        ("0.6666666666666666", "0.67", False),
        ("9.8", "9.8000001", True),
        ("9.8", "9.801", False),
        ("18", "18.001", False),
        ("50", "50\\%", True),
        ("0.5", "50%", True),
        ("5", "50%", False),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "0.51", False),
        ("10", "10\\text{ cm}", True),
        ("10^\\circ", "10", True),
        ("x = 5", "5", True),
        ("10", "ten", True),
        ("", "5", False),
    ],
)
def test_equal_answers(
    equivalent: equivalence.EquivalenceServer, right: str, prediction: str, same: bool
) -> None:
    assert whole.equal(right, prediction, equivalent) is same


def test_quick_comparisons_are_math_verifys() -> None:
    from math_verify import parse, verify

    rng = random.Random(0)
    forms = ["{}", "{}.0", "-{}", "{}/4", "{}.5", "{},000", "{}\\%", "\\${}", "0.{}", "{}.000001"]
    for _ in range(120):
        pair = [rng.choice(forms).format(rng.randint(1, 9)) for _ in range(2)]
        if "%" not in pair[0]:
            agreed = whole.equal(*pair, lambda right, prediction: pytest.fail("asked"))
            assert agreed == verify(*(parse(f"${text}$") for text in pair)), pair


@pytest.mark.parametrize(
    ("prediction", "right", "kind", "strict"),
    [
        # eval_gsm8k.py
        ("The answer is: 1,234", "1234", "number", True),
        ("The answer is: 1,234,567", "1234567", "number", False),  # 1234: its bug
        ("The answer is: 1234567", "1,234,567", "number", True),
        ("The answer is: 17.6", "18", "number", True),  # rounded
        ("The answer is: 9.8", "9.8", "number", False),  # rounded, and never right
        ("The answer is: 35/2", "18", "number", True),  # 17.5, to the even number
        ("The answer is: 18/0", "18", "number", True),
        ("The answer is: 5/00", "5", "number", False),
        ("The answer is: $18 a day", "18", "number", True),
        ("The answer is: about -18", "-18", "number", True),
        ("The answer is: 5\nThe answer is: 18", "18", "number", True),
        ("The answer is 18", "18", "number", False),  # no marker
        ("#### 18", "18", "number", False),
        ("The answer is: " + "9" * 400, "18", "number", False),
        ("", "18", "number", False),
        # eval_math.py
        ("The answer is: \\frac12.\nMore", "\\frac{1}{2}", "math", True),
        ("The answer is: $\\frac12$", "\\frac{1}{2}", "math", False),  # a text with dollars
        ("The answer is: 2/4", "\\frac{1}{2}", "math", False),  # not the same text
        ("The answer is: 5.", "5", "math", True),
        ("\\boxed{5}", "5", "math", False),
        ("The answer is: 9\\%", "9", "math", True),
        ("The answer is: 9%", "9", "math", False),  # util.py drops \% alone
        ("The answer is: 10%", "10\\%", "math", False),
        ("The answer is: B", "B", "letter", True),
    ],
)
def test_the_strict_rule_of_metamath(prediction: str, right: str, kind: str, strict: bool) -> None:
    assert answers.metamath(prediction, right, kind) is strict


@pytest.mark.parametrize(
    ("prediction", "right", "strict"),
    [
        ("The answer is: 18", "18", True),
        ("The answer is 18.\n\nThe question", "18", True),
        ("The final answer is 18%!", "18", True),
        ("text\n#### $18", "18", True),
        ("#### 7\nThe answer is: 18", "18", True),
        ("The answer is: 20/35", "0.5714285714285714", True),
        ("The answer is: 18.0", "18", True),
        ("The answer is: 1000", "1,000", False),  # a number is no text
        ("The answer is: 1,000", "1,000", True),
        ("The answer is: 1,000", "1000", False),
        ("The answer is: 18 dollars", "18", False),
        ("The answer is: 1/0", "1", False),
        ("The answer is: NaN", "18", False),
        ("The answer is: sNaN", "18", False),
        ("The answer is: 1e999999/1e-999999", "18", False),
        ("so 18", "18", False),
        ("", "18", False),
    ],
)
def test_the_strict_rule_of_peft_benchmark(prediction: str, right: str, strict: bool) -> None:
    assert answers.peft_benchmark(prediction, right, "number") is strict


@pytest.mark.parametrize(
    ("prediction", "right", "kind", "strict"),
    [
        ("The answer is 1,234,567.", "1234567.0", "number", True),
        ("so 8.0004", "8.0", "number", True),
        ("so 8.002", "8.0", "number", False),
        ("The answer is 8, in 3 days", "8", "number", False),  # the last number
        ("so 10-3", "-3", "number", True),  # a sign
        ("none", "8", "number", False),
        ("8", "\\frac{1}{2}", "number", False),
        ("The answer is (D), not (B)", "D", "letter", True),
        ("Because of (D)", "D", "letter", False),  # the B of Because
        ("", "D", "letter", False),
    ],
)
def test_the_strict_rule_of_llm_adapters(
    prediction: str, right: str, kind: str, strict: bool
) -> None:
    assert answers.llm_adapters(prediction, right, kind) is strict


def test_scores_hold_both_measures() -> None:
    scored = task().score("The answer is: 1,234,567", example("1,234,567"))
    assert (scored.extracted, scored.correct, scored.strict) == ("1,234,567", True, False)
    scored = task().score("so it is (B)", example("B", "letter"))
    assert (scored.extracted, scored.correct, scored.strict) == ("B", True, False)
    scored = task().score("", example("5"))
    assert (scored.extracted, scored.correct, scored.strict) == (None, False, False)
    assert Math(MathConfig(protocol=None)).score("5", example("5")).strict is None


def test_string_equivalence_is_hendrycks() -> None:
    theirs = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils")
    pieces = ["\\frac", "\\sqrt", "{", "}", "1", "23", "x", "=", "k = ", "\\text{ cm}", " ", ".5"]
    pieces += ["0.5", "\\left(", "\\right)", "\\tfrac", "^\\circ", "^{\\circ}", "\\$", "\\%", "%"]
    pieces += ["\\!", "\n", "\\\\", "-", ",", "\\pi", "{.", "\\text{even}", "\\dfrac"]
    rng = random.Random(0)
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(2500)]
    texts += ["1/2", "-3/4", "007/2"]  # without other slashes: lm-eval's raises on a/b
    for text in texts:
        try:
            wanted = theirs.strip_string(text)
        except (AssertionError, IndexError):
            wanted = None
        try:
            found = hendrycks.normalize(text)
        except (ValueError, IndexError):
            found = None
        assert found == wanted, text
    assert hendrycks.is_equiv("\\frac12", "0.5") and hendrycks.is_equiv("a/b", "a/b ")
    assert not hendrycks.is_equiv("2/4", "1/2")
    assert hendrycks.last_boxed("\\boxed{1} or \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert hendrycks.last_boxed("\\boxed 5$") == "5"
    assert hendrycks.last_boxed("\\boxed{5") is None and hendrycks.last_boxed("5") is None


# Answers in the styles of MATH-500 (text, matrices, intervals, sets, units, ...), each with another
# way to write it, and one that is wrong.
LATEX = [
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", "(3, \\pi)"),
    ("p - q", "-q+p", "q - p"),
    ("\\frac{14}{3}", "14/3", "3/14"),
    ("\\text{Evelyn}", "Evelyn", "Carla"),
    ("42", "42.0", "24"),
    ("27", "3^3", "28"),
    ("90^\\circ", "90", "60^\\circ"),
    ("3\\sqrt{13}", "\\sqrt{117}", "13\\sqrt{3}"),
    ("4", "\\frac{8}{2}", "-4"),
    ("2220", "2{,}220", "2202"),
    ("\\frac{3}{56}", "\\dfrac{3}{56}", "\\frac{5}{56}"),
    ("-50", "- 50", "50"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2)"),
    ("x^3 + 3x - 6", "3x + x^3 - 6", "x^3 - 3x - 6"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
     "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}",
     "\\begin{pmatrix} 1 & 2 \\\\ 4 & 3 \\end{pmatrix}"),
    ("\\$32,348", "32348", "32,347"),
    ("6 - 5i", "-5i+6", "6 + 5i"),
    ("\\text{(C)}", "C", "\\text{(D)}"),
    ("[-2,7]", "[-2, 7]", "[-2, 8]"),
    ("1,-2", "-2, 1", "1,2"),
    ("y = 2x + 3", "y=3+2x", "y = 2x - 3"),
    ("5.4 \\text{ cents}", "5.4", "4.5"),
    ("11\\sqrt2", "11\\sqrt{2}", "2\\sqrt{11}"),
    ("15\\%", "15", "16\\%"),
    ("2k+2", "2(k+1)", "2k+1"),
    ("\\{1,2,3\\}", "\\{3, 2, 1\\}", "\\{1,2\\}"),
    ("70 \\sqrt{2}", "70\\sqrt{2}", "70"),
    ("10101_2", "10101_{2}", "10110_2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def metamath() -> Math:
    return task()


@pytest.mark.parametrize(("gold", "other", "wrong"), LATEX)
def test_golds_like_those_of_math_500(metamath: Math, gold: str, other: str, wrong: str) -> None:
    row = {"problem": "q", "solution": f"so $\\boxed{{{gold}}}$.", "answer": gold}
    for protocol in PROTOCOLS:
        made = task(protocol)
        made.equivalent = metamath.equivalent
        ours = made.example(row, "x#1", "test")
        for text in (ours.completion, row["solution"]):
            assert made.score(text, ours).correct, (protocol, text)
        if protocol != "llm-adapters":  # it knows numbers alone
            assert made.score(ours.completion, ours).strict, protocol
    assert metamath.score(f"Thus $\\boxed{{{other}}}$ it is.", ours).correct
    assert metamath.score(f"The answer is: ${other}$.", ours).correct
    assert not metamath.score(f"The answer is: ${wrong}$.", ours).correct


def test_shuffled_latex_scores_nothing(metamath: Math) -> None:
    for i, (gold, _, _) in enumerate(LATEX):
        other = LATEX[(i + 1) % len(LATEX)][0]
        assert not metamath.score(f"The answer is: {other}", example(gold, "math")).correct, other


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "\\frac{" * 60, "\udc80", "\x00", "\\", "(" * 900, "$" * 9000, "- " * 5000],
)
def test_no_prediction_crashes_a_scoring(metamath: Math, text: str) -> None:
    for kind in ("number", "math", "letter"):
        for prediction in (f"The answer is: {text}", f"\\boxed{{{text}}}", f"#### {text}", text):
            assert metamath.score(prediction, example("1", kind)).correct is False


def test_a_prediction_that_hangs_is_given_up(
    equivalent: equivalence.EquivalenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert equivalent("6", "3!")
    monkeypatch.setattr(equivalence, "LIMIT", 0.2)  # math-verify's own alarm would ring after 3 s
    begin = time.monotonic()
    assert equivalent("1", "10^{10^{10}}") is False
    assert time.monotonic() - begin < 2
    monkeypatch.undo()
    assert equivalent("6", "3!"), "it answers the next question"


def test_a_server_that_dies_is_started_again() -> None:
    equivalent = equivalence.EquivalenceServer()
    assert equivalent("6", "3!")
    first = equivalent._process
    assert first is not None
    first.kill()
    first.wait()
    assert equivalent("6", "3!") and equivalent._process is not first


def test_a_missing_math_verify_is_said_before_any_generation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'scalepeft\[eval\]'"):
        task(test=[write(tmp_path / "test.json", [GSM8K])]).examples("test")


def test_rows_without_a_marked_answer_are_told_of(tmp_path: Path) -> None:
    made = task(test=[write(tmp_path / "test.json", [GSM8K, ORCA])])
    assert [e.meta["answer"] for e in made.examples("test")] == ["3,000", "12"]
    assert len(made.notes) == 1 and made.notes[0].startswith("1 rows mark no answer (####")


def test_long_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    at_limit = {"query": "q" * 600, "response": "r" * 699}  # 600 + a space + 699
    longer = {"query": "q" * 600, "response": "r" * 700}
    made = task("peft-benchmark", train=[write(tmp_path / "a.json", [at_limit, longer, longer])])
    assert [e.id.rsplit("#")[-1] for e in made.examples("train")] == ["1"]
    assert made.notes == ["2 rows longer than data.max_chars=1300 left out"]
    none = task("peft-benchmark", train=[write(tmp_path / "b.json", [longer])])
    with pytest.raises(UserError, match="leaves none of the 1 training rows"):
        none.examples("train")


TEST_SETS = ["SVAMP", "MultiArith", "SingleEq", "AddSub", "AQuA", "mawps"]


def test_fingerprints_are_those_of_the_public_test_sets(shared_data: Path) -> None:
    held = json.loads(contamination.FILE.read_text())
    rows = {"GSM8K": [r["question"] for r in shared(shared_data / "gsm8k", "test.jsonl.gz")]}
    for name in TEST_SETS:
        file = shared_data / "llm_adapters/dataset" / name
        rows["MAWPS" if name == "mawps" else name] = [
            r["instruction"] for r in shared(file, "test.json.gz")
        ]
    assert held == {name: packed(questions) for name, questions in rows.items()}


def packed(questions: list[str]) -> str:
    """What ``test_questions.json`` holds for the questions of a test set."""
    prints = sorted({contamination.fingerprint(q) for q in questions})
    return base64.b64encode(b"".join(prints)).decode()


@pytest.mark.parametrize(
    "around",
    ["Question: {}", "Q: {}\nA:", "{} Let's think step by step.", "Problem: {}\nSolution:",
     "Question: {} Think step by step.\nAnswer:"],
)  # fmt: skip
def test_what_prompts_put_around_a_question_hides_no_test_question(around: str) -> None:
    question = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts?"
    assert contamination.fingerprint(around.format(question)) == contamination.fingerprint(question)
    assert contamination.fingerprint("Q " + question) != contamination.fingerprint(question)


def test_the_contaminated_training_file_is_refused(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "llm_adapters/ft-training_set/math_data.json.gz"
    with pytest.raises(UserError) as caught:
        task(train=[str(file)]).examples("train")
    said = str(caught.value)  # and not that 3 of its GSM8K rows lack an output
    assert "3257 of 3257 rows are questions of test sets (1052 GSM8K, 800 SVAMP, " in said
    assert "480 MultiArith" in said and "203 AQuA" in said and "\n" not in said
    assert "data.test_rows=drop" in said and "data.test_rows=keep" in said
    kept = task(train=[str(file)], test_rows="keep")
    with pytest.raises(UserError, match="row 176: 'output' is empty"):
        kept.examples("train")
    kept = task(train=[str(file)], test_rows="keep", on_error="skip")
    assert len(kept.examples("train")) == 3257 and len(kept.skipped) == 3
    assert "mean nothing" in kept.notes[0]
    # One row of it, written otherwise, under another name, in another format, among good rows.
    row = shared(file.parent, file.name)[11]
    asked = row["instruction"].upper().replace(" ", "  ").replace("'", "’")
    good = shared(shared_data / "gsm8k", "train.jsonl.gz")[:50]
    hidden = write(tmp_path / "mine.jsonl", [*good, {"query": asked, "response": row["output"]}])
    with pytest.raises(UserError, match=r"1 of 51 rows .*the first is .*mine.jsonl#51"):
        task(train=[hidden]).examples("train")
    dropped = task(train=[hidden], test_rows="drop")
    assert len(dropped.examples("train")) == 50
    assert len(dropped.notes) == 1 and dropped.notes[0].endswith("left out")


def test_gsm8k_train_and_its_rephrasings_pass(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "gsm8k/train.jsonl.gz"
    test = shared_data / "gsm8k/test.jsonl.gz"
    made = task(train=[str(file)], test=[str(test)])
    assert len(made.examples("train")) == 7473 and made.notes == []
    rephrased = [
        {
            "query": f"Consider this: {row['question']} What is the result?",
            "response": "The answer is: 1",
            "original_question": row["question"],
        }
        for row in shared(file.parent, file.name)[:200]
    ]
    assert task(train=[write(tmp_path / "q.json", rephrased)]).examples("train")
    rephrased[7]["original_question"] = shared(file.parent, test.name)[0]["question"]
    with pytest.raises(UserError, match=r"1 of 200 rows .*\(1 GSM8K\), the first is .*#8:"):
        task(train=[write(tmp_path / "q.json", rephrased)]).examples("train")


def test_an_original_question_counts_in_every_form(tmp_path: Path, shared_data: Path) -> None:
    """MetaMath's GSM8K_Backward: {question, answer, original_question}."""
    original = shared(shared_data / "gsm8k", "test.jsonl.gz")[0]["question"]
    forms = [GSM8K, METAMATHQA, MATH, {**MAWPS, "output": "so 0.5"}, *(row for row, *_ in NATIVE)]
    for form in forms:
        row = {**form, "original_question": original}
        with pytest.raises(UserError, match=r"1 of 1 rows are questions of test sets \(1 GSM8K\)"):
            task(train=[write(tmp_path / "a.json", [row])]).examples("train")


def test_a_native_question_is_asked_as_llm_adapters_asks_it() -> None:
    asked = [task().example(row, "x#1", "test").meta["question"] for row, *_ in NATIVE[:2]]
    assert asked == ["Mia has 9 shells and gives 4 to Jo. How many?",
                     "How fast? Answer Choices: (A) 40 km/h (B) 60 km/h"]  # fmt: skip


def test_questions_of_data_test_are_refused_as_training_rows(tmp_path: Path) -> None:
    test = write(tmp_path / "test.json", [MATH, {**MATH, "problem": "Compute $1-2$."}])
    near = {**MATH, "problem": "Compute $1+2$."}
    train = write(tmp_path / "train.json", [near, {**MATH, "problem": "find $x$ with $2x=1$"}])
    with pytest.raises(UserError, match=r"1 of 2 rows are questions of test sets \(1 data.test\)"):
        task(train=[train], test=[test]).examples("train")
    left = task(train=[train], test=[test], test_rows="drop").examples("train")
    assert [e.meta["question"] for e in left] == [near["problem"]], "1-2 is not 1+2"
    with pytest.raises(UserError, match=r"data\.test: .*no such file"):
        task(train=[train], test=[str(tmp_path / "gone.json")]).examples("train")


def test_training_meets_the_gate_and_says_what_was_left_out(tmp_path: Path) -> None:
    leak = {"query": MATH["problem"], "response": "The answer is: 1"}
    good = [{"query": f"{i} + 1?", "response": f"The answer is: {i + 1}"} for i in range(20)]
    settings = [
        "run_dir=x", "train.max_steps=1", "data=math", f"data.cache={tmp_path}",
        f"data.train={write(tmp_path / 'train.json', [*good, leak])}",
        f"data.test={write(tmp_path / 'test.json', [MATH])}",
    ]  # fmt: skip
    tokenizer = models.load_tokenizer(hub.ModelConfig(), tiny.make(0))
    made, _ = config_files.load(None, settings)
    with pytest.raises(UserError, match=r"1 of 21 rows .* \(1 data.test\)"):
        prepare(Math(made.data), tokenizer, 1 << 30, 0)
    made, _ = config_files.load(None, [*settings, "data.test_rows=drop"])
    tokens, _, report = prepare(Math(made.data), tokenizer, 1 << 30, 0)
    assert len(tokens) == 20
    assert report[0] == (
        "data.train: 1 of 21 rows are questions of test sets (1 data.test): left out"
    )


def test_the_wheel_holds_the_fingerprints() -> None:
    # hatchling takes every file of the package that git does not ignore.
    assert (
        contamination.FILE.is_relative_to(ROOT / "scalepeft")
        and contamination.FILE.stat().st_size < 50_000
    )
    ignored = (ROOT / ".gitignore").read_text()
    assert "json" not in ignored


REAL = [
    "gsm8k/train.jsonl.gz", "gsm8k/test.jsonl.gz", "llm_adapters/dataset/gsm8k/test.json.gz",
    *(f"llm_adapters/dataset/{name}/test.json.gz" for name in TEST_SETS),
]  # fmt: skip


# Right answers that the rule of MetaMath cannot find: two commas (a million), decimals.
BEYOND_METAMATH = {
    "gsm8k/train.jsonl.gz": 5,
    "gsm8k/test.jsonl.gz": 1,
    "llm_adapters/dataset/SingleEq/test.json.gz": 134,
    "llm_adapters/dataset/AddSub/test.json.gz": 126,
    "llm_adapters/dataset/mawps/test.json.gz": 38,
}


@pytest.mark.parametrize("file", REAL)
def test_gold_answers_score_everything_and_shuffled_ones_chance(
    shared_data: Path, file: str
) -> None:
    for protocol in ("metamath", "peft-benchmark", "llm-adapters"):
        made = task(protocol, test=[str(shared_data / file)])
        rows = made.examples("test")
        ending = made.config.ending
        golds = [e.meta["answer"] for e in rows]
        said = [ending.replace("{answer}", gold) for gold in golds]
        scored = [made.score(text, e) for text, e in zip(said, rows, strict=True)]
        wrong = [e.id for e, s in zip(rows, scored, strict=True) if not s.correct]
        assert wrong == []
        missed = sum(not s.strict for s in scored)
        assert missed == (BEYOND_METAMATH.get(file, 0) if protocol == "metamath" else 0)
        if protocol == "metamath":
            assert all(made.score(e.completion, e).correct for e in rows)
            if file.startswith("gsm8k"):
                continue
        counts = Counter(round(float(g.replace(",", "")), 6) if g[-1].isdigit() else g
                         for g in golds)  # fmt: skip
        chance = sum((n / len(golds)) ** 2 for n in counts.values())
        random.Random(0).shuffle(said)
        hits = sum(bool(made.score(t, e).correct) for t, e in zip(said, rows, strict=True))
        deviation = (chance * (1 - chance) / len(golds)) ** 0.5
        assert abs(hits / len(golds) - chance) < 4 * deviation, (hits, chance)
