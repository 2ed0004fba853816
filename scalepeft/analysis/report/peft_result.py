"""A run as a result file of HF PEFT's method_comparison/MetaMathQA; templates/peft_result.j2."""

import json
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from scalepeft.adapters import layout
from scalepeft.analysis.report.load import Run
from scalepeft.core.errors import UserError
from scalepeft.core.files import read_json, read_lines


def result(runs: list[Run]) -> bytes:
    """The file of one run; null where it has no number. Raises UserError: none or several."""
    if len(runs) > 1 or not runs[0].newest:
        what = f"not of {len(runs)}" if len(runs) > 1 else f"{runs[0].folder} has no step yet"
        raise UserError(f"--peft-result is of one run that has trained, {what}")
    run, adapter = runs[0], runs[0].folder / "adapter"
    held = read_lines(run.folder / "validation.jsonl", "step", "seconds")
    templates = Environment(loader=PackageLoader("scalepeft.analysis.report"))
    templates.filters["json"] = _json
    text = templates.get_template("peft_result.j2").render(
        run=run,
        held={row["step"]: row["seconds"] for row in held},
        config=read_json(adapter / layout.CONFIG) if (adapter / layout.ABOUT).is_file() else None,
        size=next((f.stat().st_size for f in adapter.glob(layout.WEIGHTS)), None),
        finite=lambda values: values[np.isfinite(values)],
        np=np,
    )
    return json.dumps(json.loads(text), indent=2).encode()


def _json(value: Any, whole: bool = False) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "null"
    return json.dumps(round(value) if whole else value)
