"""``scalepeft methods``: every shipped config on a model, with the figures that it really has."""

import json
from pathlib import Path

import pytest

from scalepeft.analysis import methods
from scalepeft.cli import main
from scalepeft.config import files as config_files


def test_every_shipped_config_is_listed_with_its_closed_formula(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods", "--model", "llama-2-7b", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert set(rows) == {file.stem for file in config_files.config_files("adapter")}
    wide, inner = 4096, 11008
    five = 3 * 2 * wide + 2 * (wide + inner)  # in + out of q, k, v, up, down
    expected = {
        "hoft": 32 * 16 * five,
        "shoft": 32 * (16 * five + 4 * wide + inner),
        "lora": 32 * 32 * five,
        "goft": 32 * 4 * (wide - 1),
        "qgoft": 32 * 4 * 4 * (wide - 1),
        "hadamard": 32 * 3 * wide,
        "hut": 32 * five,
        "ia3": 32 * (2 * wide + inner),
        "surm_adapter": 32 * (2 * (2 * wide) + 2 * wide),
    }
    assert {name: rows[name]["parameters"] for name in expected} == expected
    assert rows["hoft"]["exports"] == ["lora"]
    assert rows["lora"]["exports"] == ["peft", "lora"]
    # Circulant goes to PEFT's C3A; auto has Kronecker products on the rectangular layers.
    assert rows["surm"]["exports"] == rows["shoft"]["exports"] == []
    assert "not affine" in rows["surm_adapter"]["no_merge"]
    assert rows["hira"]["cost"] is None and not rows["hira"]["no_merge"]
    layers = 32 * 2 * (4 * wide * wide + 3 * wide * inner)
    assert rows["lora"]["cost"] == pytest.approx(32 * 2 * 32 * five / layers)


def test_table_and_a_config_that_the_model_cannot_take(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "models/stories260K/hf"
    methods.run(str(folder), as_json=False)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "boft" in lines and "172 inputs" in lines["boft"]  # blocks of 8 do not tile 172
    assert " yes " in lines["hoft"] and "lora" in lines["hoft"]
    assert " no " in lines["surm_adapter"]


def test_an_unknown_model_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--model", "llama-2-7"]) == 2
    assert "Did you mean 'llama-2-7b'" in capsys.readouterr().err
