"""The model card of an adapter's folder, README.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scalepeft.adapters.base import find_method
from scalepeft.core.text import one_line


def card(
    settings: dict[str, Any],
    config: dict[str, Any],
    rows: dict[str, str] | None = None,
    scores: Sequence[Sequence[str]] = (),
    license: str | None = None,
    place: str = "FOLDER",
) -> str:
    """Markdown under YAML; ``config``: PEFT's, ``scores``: in the columns of the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    method = find_method(settings["name"])
    base = str(config["base_model_name_or_path"] or "BASE")
    online = base.count("/") == 1 and not Path(base).exists()
    head: dict[str, Any] = {"base_model": base} if online else {}
    head |= {"license": license} if license else {}
    head |= {"library_name": "peft", "tags": ["scalepeft", settings["name"]]}
    environment = Environment(
        loader=PackageLoader("scalepeft.adapters"), undefined=StrictUndefined,
        trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda value: one_line(value).replace("|", "\\|")
    return environment.get_template("card.j2").render(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        method=method.__name__, paper=method.paper, targets=config["target_modules"],
        settings={k: v for k, v in settings.items() if k not in ("name", "target_modules")},
        base=base if online else Path(base).name,  # no paths of the machine it was made on
        rows=rows or {}, scores=scores, place=place, plugged=":" in config["peft_type"],
    )  # fmt: skip
