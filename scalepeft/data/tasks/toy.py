"""A commonsense-like toy task of a small world, for demo and tests: no download, real learning.

Training asks for the kinds of 40 of 64 things, the test and held-out rows for those of the other
24, which only the base knows, from its plain text. Rows have the format of ``commonsense``.
"""

import random
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT, Decides
from scalepeft.data.tasks.base import SPLITS, Example, Protocol, Split
from scalepeft.data.tasks.commonsense import Commonsense, CommonsenseConfig, original

LISTED = (
    "animal dog cat horse cow sheep goat lion tiger bear wolf fox deer rabbit mouse duck goose",
    "fruit apple pear plum peach cherry grape lemon orange mango melon fig kiwi banana berry lime"
    " date",
    "tool hammer saw drill wrench pliers axe shovel rake chisel file knife spade screwdriver ladder"
    " nail rope",
    "vehicle car bus train truck bicycle boat ship plane tram van wagon canoe taxi rocket ferry"
    " sled",
)
WORLD = {kind: things for kind, *things in map(str.split, LISTED)}
KINDS = sorted(WORLD)
LOOKS = "big small old new red blue green heavy plain fine".split()
VALID_LOOKS = "tiny broken yellow wet round".split()  # so that no held-out row is one of the test
QUESTIONS = (
    "What kind of thing is the {look} {thing}?",
    "The {look} {thing} is which of these?",
    "Which word fits the {look} {thing}?",
    "Where does the {look} {thing} belong?",
)
TRAINED = 10  # of the 16 things of a kind; the test asks about the others


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyConfig(CommonsenseConfig):
    """Settings of the toy task.

    Attributes:
        train_size: training rows made.
        test_size: test and held-out rows made, about things that training never asks about.
        rows_seed: seed of the rows.
    """

    PROTOCOLS: ClassVar[dict[str, Protocol]] = {}
    OWN_VALID: ClassVar[bool] = True

    name: Annotated[str, Decides.ROWS] = "toy"
    protocol: Annotated[str | None, Decides.SCORES] = None
    prompt: Annotated[str, Decides.ROWS] = "### Instruction:\n{instruction}\n\n### Response:\n"
    train_size: Annotated[int, Field(ge=1), Decides.ROWS] = 4000
    test_size: Annotated[int, Field(ge=1), Decides.ROWS] = 200
    rows_seed: Annotated[int, Decides.ROWS] = 0


def make_row(rng: random.Random, things: slice, looks: list[str] = LOOKS) -> dict[str, Any]:
    """Draws a question about one of these things of some kind, as ARC has them."""
    kind, asked, look = rng.choice(KINDS), rng.choice(QUESTIONS), rng.choice(looks)
    question = asked.format(look=look, thing=rng.choice(WORLD[kind][things]))
    return {"question": question, "choices": {"text": KINDS, "label": KINDS}, "answerKey": kind}


class Toy(Commonsense):
    """Rows made on the spot from ``rows_seed``; it reads no files, and refuses to be given any."""

    Config = ToyConfig
    config: ToyConfig
    version = 1
    reads_files = False

    def __init__(self, config: ToyConfig, tokenizer: Any = None) -> None:
        super().__init__(config, tokenizer)
        for split in SPLITS:
            if files := getattr(config, split):
                what = "data.name=toy makes its own rows; take data=commonsense to read files"
                raise UserError(f"data.{split}={','.join(files)}: {what}")

    def stream(self, split: Split) -> Iterator[Example]:
        """Makes the rows of a split."""
        size = self.config.train_size if split == "train" else self.config.test_size
        things = slice(TRAINED) if split == "train" else slice(TRAINED, None)
        looks = VALID_LOOKS if split == "valid" else LOOKS
        rng = random.Random(f"{self.config.rows_seed}/{split}")
        for i in range(1, size + 1):
            yield self.example(make_row(rng, things, looks), f"toy/{split}#{i}", split)


def corpus(rng: random.Random, lines: int) -> list[str]:
    """Plain text to pretrain the built-in model on: facts, and questions with random answers."""
    text = []
    for _ in range(lines):
        if rng.random() < 0.6:
            kind = rng.choice(KINDS)
            text.append(f"The {rng.choice(LOOKS)} {rng.choice(WORLD[kind])} is a kind of {kind}.")
        else:
            asked, _ = original(make_row(rng, slice(None)))
            answer = f"the correct answer is answer{rng.randint(1, len(KINDS))}"
            text.append(f"### Instruction:\n{asked}\n\n### Response:\n{answer}")
    return text
