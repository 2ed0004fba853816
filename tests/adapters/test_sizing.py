"""A method's size, fitted to a number of parameters."""

import math
from typing import Any

import pytest

from scalepeft.adapters import sizing
from scalepeft.config.files import named_file
from scalepeft.core.errors import UserError
from scalepeft.models import shapes

LAYERS = [(256, 256), (256, 128), (256, 128), (256, 704), (704, 256)]  # (in, out) in mini, twice


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("lora", "rank", lambda r: sum(2 * r * (i + o) for i, o in LAYERS)),
        ("hoft", "rank", lambda r: sum(2 * r * (i + o) for i, o in LAYERS) if r % 2 == 0 else None),
        (
            "shoft",
            "rank",
            lambda r: sum(2 * (r * (i + o) + o) for i, o in LAYERS) if r % 2 == 0 else None,
        ),
        ("hut", "rank", lambda r: sum(2 * r * (i + o) for i, o in LAYERS) if 64 % r == 0 else None),
        (
            "oft",
            "block_size",
            lambda b: sum(i * (b - 1) for i, _ in LAYERS) if 64 % b == 0 else None,
        ),
    ],
)
@pytest.mark.parametrize("target", [9_000, 25_600, 200_000])
def test_a_size_is_the_nearest_there_is(name: str, key: str, count: Any, target: int) -> None:
    base = shapes.meta_model("mini")
    adapter = named_file("adapter", name)["adapter"]
    found = sizing.fit(adapter, key, sizing.adapted_shapes(base, adapter), target)
    sizes = {r: n for r in range(1 if key == "rank" else 2, 65) if (n := count(r)) is not None}
    best = min(sizes, key=lambda r: (abs(sizes[r] - target), r))
    assert found[key] == best and sizing.count_parameters(base, found) == sizes[best]


def test_a_new_rank_keeps_what_the_update_is_scaled_by() -> None:
    assert sizing.resize({"name": "lora", "rank": 32, "alpha": 64}, "rank", 4)["alpha"] == 8
    scaled = sizing.resize({"name": "lora", "rank": 64, "alpha": 64, "rslora": True}, "rank", 16)
    assert scaled["alpha"] / math.sqrt(16) == 64 / math.sqrt(64)


def test_blocks_fit_every_width_and_boft_too() -> None:
    shapes = {(256, 256): 1, (704, 256): 2}
    # two factors of width (b - 1) / 2 and a scale for each output: 1664 (b - 1) + 768; blocks of 32
    # are the widest of which two tile both widths
    for target, block in ((40_000, 32), (13_000, 8), (10**9, 32)):
        found = sizing.fit({"name": "boft"}, "block_size", shapes, target)
        assert found["block_size"] == block


def test_no_size_that_fits_is_the_methods_own_refusal() -> None:
    with pytest.raises(UserError, match="block_size"):
        sizing.fit({"name": "boft"}, "block_size", {(63, 8): 1}, 100)
