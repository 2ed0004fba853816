"""What ``scalepeft bench`` was asked for."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        what: methods on a model, or (see below) a machine with a GPU, or a whole training
        shape: a shape by name, or a model folder
        methods: names by comma; 'all' for every one
        rank: of LoRA; the others follow its size
        tokens: a step, in rows of 512 at most
        precision: of base and activations
        quant: how the base is stored
        device: where
        repeats: timed steps of every method, or (train) rounds
        out: FOLDER: for bench.json, or gpu.json and gpu.md, or train.json and train.md
    """

    what: Literal["model", "gpu", "train"]
    shape: str = "small"
    methods: str = "all"
    rank: int = 16
    tokens: int = 2048
    precision: Literal["fp32", "bf16"] = "fp32"
    quant: Literal["none", "nf4", "int8"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    repeats: int = 5
    out: str | None = None
