"""The stage form: done once for its inputs, begun, done again, old results kept."""

import json
import time
from pathlib import Path

import pytest

from scalepeft.run.stage import Stage, differing, facts, set_aside

INPUTS = {"config": {"lr": 0.1, "layers": (1, 2)}, "files": {"a": {"bytes": 3, "sha256": "x"}}}


def finished(tmp_path: Path) -> tuple[Stage, Path]:
    stage, made = Stage(tmp_path / "stages", "train"), tmp_path / "out" / "a.txt"
    made.parent.mkdir()
    stage.begin(INPUTS, forced=False)
    made.write_text("abc")
    manifest = stage.finish(INPUTS, [made], time.time())
    assert manifest["outputs"] == {"out/a.txt": facts(made)} == stage.outputs()
    return stage, made


def test_done_once_for_its_inputs(tmp_path: Path) -> None:
    stage, _ = finished(tmp_path)
    assert stage.is_done(INPUTS) and not stage.begun() and stage.changes(INPUTS) == ""
    other = {**INPUTS, "config": {"lr": 0.2, "layers": [1, 2]}}
    assert not stage.is_done(other)
    assert stage.changes(other) == "config.lr: 0.1 -> 0.2"
    stage.begin(other)
    assert not stage.done() and stage.is_begun(other) and not stage.is_begun(INPUTS)
    stage.note(splits=3)
    assert stage.begun()["splits"] == 3 and stage.is_begun(other)


@pytest.mark.parametrize("damage", ["changed", "gone", "torn", "of another kind", "edited"])
def test_an_output_that_is_not_as_it_was_written_counts_as_none(
    tmp_path: Path, damage: str
) -> None:
    stage, made = finished(tmp_path)
    if damage == "changed":
        made.write_text("abd")
    elif damage == "gone":
        made.unlink()
    elif damage == "edited":
        text = stage.done_file.read_text()
        stage.done_file.write_text(text.replace('"seconds": ', '"seconds": 1'))
    else:
        stage.done_file.write_text("{" if damage == "torn" else "[1]")
    assert not stage.is_done(INPUTS) and stage.damage()


def test_merged_weights_of_older_manifests_have_no_sha256(tmp_path: Path) -> None:
    stage, made = finished(tmp_path)
    manifest = {**stage.done(), "outputs": {"out/a.txt": {"bytes": 3}}}
    stage.done_file.write_text(json.dumps({k: v for k, v in manifest.items() if k != "digest"}))
    assert stage.is_done(INPUTS)
    made.write_text("abcd")
    assert not stage.is_done(INPUTS)


def test_differences_name_four_keys_and_files_without_their_digests() -> None:
    old = {"f": {"a": {"bytes": 3, "sha256": "x"}}, **{f"k{i}": 0 for i in range(5)}}
    new = {"f": {"a": {"bytes": 4, "sha256": "y"}}, **{f"k{i}": "z" * 50 for i in range(5)}}
    long = f"0 -> {'z' * 12}..."
    assert differing(old, new) == f"f.a; k0: {long}; k1: {long}; k2: {long} and 2 more"


def test_results_set_aside_keep_their_names_and_every_earlier_folder(tmp_path: Path) -> None:
    assert set_aside(tmp_path, ["adapter"]) is None
    (tmp_path / "replaced-7").mkdir()
    for i in (8, 9):
        (tmp_path / "eval/toy").mkdir(parents=True)
        (tmp_path / "eval/toy/scores.json").write_text(json.dumps(i))
        (tmp_path / "log").write_text("x")
        target = set_aside(tmp_path, ["eval/toy", "log", "absent"])
        assert target == tmp_path / f"replaced-{i}"
        assert sorted(p.name for p in target.iterdir()) == ["eval", "log"]
        assert json.loads((target / "eval/toy/scores.json").read_text()) == i
    assert not (tmp_path / "eval/toy").exists()


def test_settings_that_count_no_more_and_former_spellings_are_no_change(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stages", "train")
    old = {"config": {"data.tokenise": "apart", "data.test_prompt": None}, "rows": {"a": 1}}
    stage.begin({**old, "data": {"tokenise": "apart", "workers": 2}})
    stage.finish({**old, "data": {"tokenise": "apart", "workers": 2}}, [], time.time())
    new = {"config": {"data.tokenize": "apart"}, "rows": {"a": 1}, "data": {"tokenize": "apart"}}
    assert stage.is_done(new) and stage.changes(new) == ""
    assert not stage.is_done({**new, "rows": {}}), "of what is no setting nothing is passed over"
    assert not stage.is_done({**new, "data": {"tokenize": "together"}})
