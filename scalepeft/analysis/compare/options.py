"""What ``scalepeft compare`` was asked for."""

from typing import Any, Literal

from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import NameList, NotNegative, Positive


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        settings: as for train, without an adapter
        out: FOLDER: for runs and results
        methods: A,B,C: files of configs/adapters by name, or YAML files
        reference: that others are held against
        rank: of the reference, whose size is the budget (16)
        budget: what is equal: steps, or parameters too (each method at the size nearest to these)
        lrs: rates for all (1e-4,3e-4), or factors on each method's usual one
        seeds: reported runs of each method
        evaluate: score data.test too, in the reported runs
        cell: N: run this one cell of OUT alone
        table: run nothing; print what there is
        league: FOLDER: run nothing; write league.md, of all comparisons in FOLDER/*, into OUT
    """

    settings: list[str]
    out: str
    methods: NameList | None = None
    reference: str = "lora"
    rank: Positive | None = None
    budget: Literal["parameters", "steps"] = "parameters"
    lrs: str = "x0.3,x1,x3"
    seeds: Positive = 3
    evaluate: bool = False
    cell: NotNegative | None = None
    table: bool = False
    league: str | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Options":
        """Check the options. Raise UserError if one cannot be used or has no effect."""
        try:
            options = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from None
        if options.rank and options.budget == "steps":
            raise UserError("--rank has no effect with --budget steps; remove it")
        if options.cell is not None and options.table:
            raise UserError("give one of --cell and --table, not both")
        if "=" in options.out:
            raise UserError(f"--out {options.out}: a folder whose name has '=' reads as a setting")
        return options

    @classmethod
    def parse(cls, words: list[str], settings: list[str], out: str) -> "Options":
        """Read ``seeds=3``, ``evaluate``, ... for ``launch/submit --compare``; raises as ``of``."""
        values: dict[str, Any] = {"settings": settings, "out": out}
        names = ("methods", "reference", "rank", "budget", "lrs", "seeds")
        for word in words:
            key, _, value = word.partition("=")
            if word != "evaluate" and (key not in names or not value):
                listed = ", ".join(f"{name}=..." for name in names)
                raise UserError(f"--compare {word}: expected {listed} or evaluate")
            values[key] = value or True
        return cls.of(values)
