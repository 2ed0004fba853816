"""Test-set contamination: training rows that are questions of public test sets.

``test_questions.json``: base64 of 6 bytes a question of GSM8K, SVAMP, MultiArith, SingleEq, AddSub,
AQuA and MAWPS (as in LLM-Adapters), of 70 billion others one is taken for it; without MATH-500.
"""

import base64
import hashlib
import json
import re
import unicodedata
from functools import cache
from pathlib import Path

BYTES = 6
FILE = Path(__file__).with_name("test_questions.json")
# Signs of arithmetic stay: in short questions they are the difference.
_MARKS = re.compile(r"[.,;:!?]+(?![0-9])")
# What prompts put around a question.
_AROUND = re.compile(
    r"^\s*(?:question|problem|q)\s*:\s*|"
    r"\s*(?:(?:let.s )?think step by step\W*)?(?:\b(?:answer|solution|a)\s*:)?\s*$"
)
_DROPPED = str.maketrans("", "", "\"'`´‘’“”$\\")


def fingerprint(question: str) -> bytes:
    """A hash of a question, whatever its case, spacing, marks and order of answer choices."""
    text = unicodedata.normalize("NFKC", question) if not question.isascii() else question
    text = _AROUND.sub("", text.casefold())
    stem = text.partition("answer choices")[0]
    text = _MARKS.sub("", stem if len(stem) >= 40 else text).translate(_DROPPED)
    text = "".join(text.split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=BYTES).digest()


@cache
def known() -> dict[bytes, str]:
    """Fingerprint -> name of the public test set; the first one where sets share a question."""
    found: dict[bytes, str] = {}
    for name, text in json.loads(FILE.read_text()).items():
        packed = base64.b64decode(text)
        for i in range(0, len(packed), BYTES):
            found.setdefault(packed[i : i + BYTES], name)
    return found
