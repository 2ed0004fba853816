"""The scripts of examples/, on the built-in model."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from processes import ROOT
from safetensors.torch import load_file

from scalepeft.models import tiny

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Does what its first lines say; README and the docs name it."""
    text = script.read_text()
    assert text.count("\n") <= 60 and f"examples/{script.name} MODEL ROWS.json OUT\n" in text
    assert script.name in (ROOT / "README.md").read_text()
    keys = re.search(r'\{"(\w+)": \.\.\., "(\w+)": \.\.\.\}', text)
    assert keys
    rows = [{keys[1]: f"Is {i} even?", keys[2]: str(i % 2 == 0).lower()} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [str(tiny.make(0)), str(tmp_path / "rows.json"), str(tmp_path / "out"), "--steps", "3"]
    words += ["--cpu"] if '"--cpu"' in text else []
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss'?:? '?([0-9.]+)", capsys.readouterr().out)]
    assert len(losses) >= 3 and 0 < losses[2] < 10
    names = ("adapter_model.safetensors", "adapter/adapter_model.safetensors")
    (file,) = [path for name in names if (path := tmp_path / "out" / name).exists()]
    assert all(value.isfinite().all() for value in load_file(file).values())
