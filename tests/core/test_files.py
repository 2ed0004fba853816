"""JSON-lines files as a crash or an editor may leave them."""

import json
from pathlib import Path

import pytest

from scalepeft.core.files import lines_of, read_lines


def test_rows_are_whole_and_have_numbers_where_they_belong(tmp_path: Path) -> None:
    good = {"event": "x", "time": 1.0, "step": 2}
    rows = [good, {**good, "time": None}, {**good, "step": "2"}, {"event": "x"}, [1]]
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), '{"event": "x", "ti']))
    assert list(read_lines(file, "event", "time")) == [good]
    assert not list(read_lines(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize("end", ["\n", "", "torn", "\n\n", "\x00" * 70_000])
@pytest.mark.parametrize("width", [1, 65_535, 65_536, 200_000])
def test_lines_from_the_end_are_the_lines(width: int, end: str, tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text("\n".join(["x" * width, "", "y", "z" * width, "1"]) + end)
    assert list(lines_of(file, newest_first=True))[::-1] == list(lines_of(file))
    file.write_text("")
    assert not list(lines_of(file, newest_first=True))
