"""A commonsense-like toy task with its own small world, for the demo and the tests: no download, real learning.

Things have a kind and a colour. A question names a kind and offers things of different kinds; the answer is
the place of the one that fits. The rows have the LLM-Adapters format of ``commonsense``.
"""

import random
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.lookup import STRICT
from scalepeft.tasks.base import Example, Split
from scalepeft.tasks.commonsense import Commonsense, CommonsenseConfig

WORLD = {
    "animal": "dog cat horse cow sheep goat lion tiger bear wolf fox deer rabbit mouse duck goose".split(),
    "fruit": "apple pear plum peach cherry grape lemon orange mango melon fig kiwi banana berry lime date".split(),
    "tool": "hammer saw drill wrench pliers axe shovel rake chisel file knife spade screwdriver ladder nail rope".split(),
    "vehicle": "car bus train truck bicycle boat ship plane tram van wagon canoe taxi rocket ferry sled".split(),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyConfig(CommonsenseConfig):
    """Settings of the toy task.

    Attributes:
        train_size: training rows made.
        test_size: test rows made; other rows than the training ones.
        options: answers to choose from.
        rows_seed: seed of the rows.
    """

    name: str = "toy"
    prompt: str = "### Instruction:\n{instruction}\n\n### Response:\n"
    train_size: Annotated[int, Field(ge=1)] = 4000
    test_size: Annotated[int, Field(ge=1)] = 200
    options: Annotated[int, Field(ge=2, le=4)] = 3
    rows_seed: int = 0


def make_row(rng: random.Random, options: int) -> dict[str, str]:
    """Draws a question."""
    kinds = rng.sample(sorted(WORLD), options)
    wanted = rng.choice(kinds)
    things = [rng.choice(WORLD[kind]) for kind in kinds]
    label = f"answer{kinds.index(wanted) + 1}"
    listed = " ".join(f"Answer{i}: {thing}" for i, thing in enumerate(things, 1))
    form = "/".join(f"answer{i}" for i in range(1, options + 1))
    return {
        "instruction": f"Please choose the correct answer to the question: Which of these is a kind of {wanted}?\n\n"
        f"{listed}\n\nAnswer format: {form}",
        "input": "",
        "output": f"the correct answer is {label}",
        "answer": label,
    }


class Toy(Commonsense):
    """Rows made on the spot from ``rows_seed``; ``data.train`` and the like are not read."""

    Config = ToyConfig
    config: ToyConfig  # type: ignore[assignment]
    version = 1

    def examples(self, split: Split) -> list[Example]:
        """Makes the rows of a split; no test row is a training row."""
        sizes = {"train": self.config.train_size, "valid": self.config.test_size, "test": self.config.test_size}
        taken: set[str] = set()
        found: list[Example] = []
        for name in ("test", "valid", "train"):
            rng = random.Random(f"{self.config.rows_seed}/{name}")
            rows = []
            while len(rows) < sizes[name]:
                row = make_row(rng, self.config.options)
                if name == "train" and row["instruction"] in taken:
                    continue
                rows.append(row)
            if name == split:
                found = [self.example(row, f"toy/{name}#{i}") for i, row in enumerate(rows, 1)]
            taken |= {row["instruction"] for row in rows} if name != "train" else set()
        return found


def corpus(rng: random.Random, lines: int) -> list[str]:
    """Plain text of the toy world to pretrain the built-in model on: facts, lists, and questions answered at random.

    The random answers teach the form of an answer and nothing about which one is right: the base scores chance.
    """
    text = []
    for _ in range(lines):
        form = rng.random()
        kind = rng.choice(sorted(WORLD))
        thing = rng.choice(WORLD[kind])
        if form < 0.35:
            text.append(f"A {thing} is a kind of {kind}.")
        elif form < 0.7:
            kinds = rng.sample(sorted(WORLD), 3)
            things = [rng.choice(WORLD[k]) for k in kinds]
            listed = " ".join(f"Answer{i}: {t}" for i, t in enumerate(things, 1))
            i = rng.randrange(3)
            text.append(f"{listed} The {kinds[i]} is answer{i + 1}, the {things[i]}.")
        else:
            row = make_row(rng, 3)
            answer = f"the correct answer is answer{rng.randint(1, 3)}"
            text.append(f"### Instruction:\n{row['instruction']}\n\n### Response:\n{answer}")
    return text
