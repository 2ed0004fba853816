"""JSON-lines files as a crash or an editor may leave them."""

import json
from pathlib import Path

from scalepeft.core.files import read_lines


def test_rows_are_whole_and_have_numbers_where_they_belong(tmp_path: Path) -> None:
    good = {"event": "x", "time": 1.0, "step": 2}
    rows = [good, {**good, "time": None}, {**good, "step": "2"}, {"event": "x"}, [1]]
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), '{"event": "x", "ti']))
    assert list(read_lines(file, "event", "time")) == [good]
    assert not list(read_lines(tmp_path / "absent.jsonl"))
