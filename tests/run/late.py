"""``scalepeft`` whose steps are read as on a GPU: each once the next one is on its way.

Prints the order of steps and readings at the end: ``s`` for a step, ``r`` for a reading.
"""

import sys
from typing import Any

from scalepeft.cli import main
from scalepeft.trainer import Outcome, Trainer

order: list[str] = []
step, read = Trainer.step, Outcome.read


def noted(letter: str, function: Any) -> Any:
    def call(*args: Any) -> Any:
        order.append(letter)
        return function(*args)

    return call


if __name__ == "__main__":
    Trainer.step = noted("s", step)  # type: ignore[method-assign]
    Outcome.read = noted("r", read)  # type: ignore[method-assign]
    Outcome.late = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]
    code = main(sys.argv[1:])
    print("order", "".join(order), flush=True)
    sys.exit(code)
