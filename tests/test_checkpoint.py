"""The checkpoint contract on a real file system: commit, damage, retention, fence, full disk, row
logs.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scalepeft.checkpoint import (
    DamagedCheckpoint,
    Fenced,
    Reader,
    RunFolder,
    verify,
    write_tensors,
)
from scalepeft.lookup import UserError
from scalepeft.records import RowLog


def claimed(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.claim()
    return folder


def commit(folder: RunFolder, step: int, trained: dict[str, torch.Tensor], keep: int = 2) -> Path:
    """A save as rank 0 makes it of gathered state."""
    temporary = folder.begin(step)
    moments = {f"{name}/step": torch.tensor(1.0) for name in trained}
    try:
        files = {
            f"{kind}.safetensors": write_tensors(temporary / f"{kind}.safetensors", tensors)
            for kind, tensors in (("trained", trained), ("optimizer", moments))
        }
    except OSError:
        folder.abandon(temporary)
        raise
    return folder.commit(temporary, files, {"step": step}, keep)


def save(folder: RunFolder, step: int, keep: int = 2) -> Path:
    return commit(folder, step, {"a.adapter.U": torch.full((4, 2), float(step))}, keep)


def test_saved_state_comes_back_and_holds_no_pickle(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    path = save(folder, 3)
    found, passed_over = claimed(tmp_path).newest()
    assert found is not None and not passed_over
    reader = Reader(found.folder)
    assert found.step == 3 == found.state["step"]
    assert torch.equal(reader.whole("a.adapter.U"), torch.full((4, 2), 3.0))
    assert reader.whole("a.adapter.U/step") == 1 and reader.bytes_read == 4 * 8 + 4
    # Plain safetensors, for anybody's reader.
    assert torch.equal(
        load_file(path / "trained.safetensors")["a.adapter.U"], torch.full((4, 2), 3.0)
    )
    assert sorted(p.suffix for p in path.iterdir()) == [
        ".json",
        ".json",
        ".safetensors",
        ".safetensors",
    ]


def truncate(folder: Path) -> None:
    file = folder / "trained.safetensors"
    os.truncate(file, file.stat().st_size - 5)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "optimizer.safetensors").read_bytes())
    data[-1] ^= 4
    (folder / "optimizer.safetensors").write_bytes(data)


def delete_a_file(folder: Path) -> None:
    (folder / "state.json").unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def take_the_manifest_of_another(folder: Path) -> None:
    shutil.copy(folder.parent / "step-000010" / "manifest.json", folder / "manifest.json")


def break_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 1, "files": {')


def manifest_of_wrong_types(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 1, "step": 20, "files": {"state.json": 3}}')


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "trained.safetensors has"),
    (flip_a_bit, "optimizer.safetensors has changed: sha256"),
    (delete_a_file, "state.json is missing"),
    (empty, "no manifest.json"),
    (take_the_manifest_of_another, "manifest.json is that of step 10"),
    (break_the_manifest, "unreadable"),
    (manifest_of_wrong_types, "manifest.json is that of step 20"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=lambda v: getattr(v, "__name__", ""))
def test_damage_is_passed_over_with_the_reason(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    folder = claimed(tmp_path)
    save(folder, 10)
    damage(save(folder, 20))
    again = claimed(tmp_path)
    found, passed_over = again.newest()
    assert found is not None and found.step == 10
    assert (
        len(passed_over) == 1
        and passed_over[0].startswith("step-000020: ")
        and reason in passed_over[0]
    )
    # The damaged folder is in nobody's way: the step is saved again, the damaged one kept aside.
    save(again, 20)
    assert claimed(tmp_path).newest()[0].step == 20  # type: ignore[union-attr]
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.damaged-*")] == [
        "step-000020.damaged-2"
    ]


def test_nothing_verifies_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    flip_a_bit(save(claimed(tmp_path), 10))
    with pytest.raises(UserError, match=r"no checkpoint verifies \(step-000010: .*to start over"):
        RunFolder(tmp_path).newest()


def test_a_checkpoint_of_a_later_version_is_not_passed_over(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    save(folder, 10)
    path = save(folder, 20)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(UserError, match="step-000020 has schema 99, this version reads 2; update"):
        RunFolder(tmp_path).newest()


def test_looking_at_a_run_changes_nothing(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    save(folder, 1)
    (folder.checkpoints / "step-000002.tmp-1").mkdir()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    RunFolder(tmp_path).newest()
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    save(folder, 2)


def test_retention_counts_verified_ones_only(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    for step in (1, 2, 3):
        save(folder, step)
    assert folder.steps() == [3, 2]
    flip_a_bit(folder.checkpoints / "step-000003")
    again = claimed(tmp_path)
    assert again.newest()[0].step == 2  # type: ignore[union-attr]
    save(again, 4)
    assert again.steps() == [
        4,
        3,
        2,
    ], "the only good older one must stay while a damaged one is newer"
    save(again, 5)
    assert again.steps() == [5, 4]


def test_a_killed_save_leaves_nothing_that_resume_would_take(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    whole = save(folder, 1)
    for files in range(1, 5):  # killed after so many files
        torn = folder.checkpoints / "step-000002.tmp-1"
        torn.mkdir()
        for name in ["trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"][
            :files
        ]:
            shutil.copy(whole / name, torn / name)
        again = claimed(tmp_path)
        assert again.newest()[0].step == 1  # type: ignore[union-attr]
        assert not torn.exists()


def test_an_older_start_cannot_write(tmp_path: Path) -> None:
    old = claimed(tmp_path)
    save(old, 1)
    new = claimed(tmp_path)
    with pytest.raises(Fenced, match="start 2 of this run owns the folder, this is start 1"):
        save(old, 2)
    assert new.steps() == [1]
    save(new, 2)


def fill_up(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as f:
        while f.write(bytes(1 << 12)):
            continue


def test_full_disk_keeps_the_older_checkpoints(tmp_path: Path) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], check=False
        ).returncode
    ):
        pytest.skip("needs root to mount a small tmpfs")
    try:
        folder = claimed(tmp_path)
        small = {"a": torch.zeros(10)}
        commit(folder, 1, small)
        with pytest.raises(OSError):
            commit(folder, 2, {"a": torch.zeros(200_000)})
        assert folder.steps() == [1] and not list(folder.checkpoints.glob("*.tmp-*"))
        commit(folder, 3, small)
        assert claimed(tmp_path).newest()[0].step == 3  # type: ignore[union-attr]
        # metrics: the rows that do not fit wait and are written once there is room
        log = RowLog(tmp_path / "metrics.jsonl", 0)
        filler = tmp_path / "filler"
        fill_up(filler)
        assert log.append({"step": 1, "text": "x" * 9000}) is not None
        with pytest.raises(OSError):
            log.sync()
        filler.unlink()
        assert log.append({"step": 2}) is None
        log.sync()
        assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_unwritable_run_folder_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*file/run: cannot be written.*choose another"):
        RunFolder(tmp_path / "file" / "run")


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}', "\x00\x00"])
def test_row_log_is_cut_back_to_the_resumed_step(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 6)) + torn)
    log = RowLog(path, 3)
    log.append({"step": 4, "again": True})
    assert [json.loads(line) for line in path.open()] == [
        {"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True},
    ]  # fmt: skip


def test_broken_rows_of_a_log_are_dropped_and_the_good_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\njunk\n{"step": 2}\n{"step": 2}\n{"step": 3}\n')
    log = RowLog(path, 3)
    assert log.last_step == 3
    log.append({"step": 4})
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4]
    assert len(list(tmp_path.glob("metrics.jsonl.damaged-*"))) == 1


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="no manifest"):
        verify(tmp_path)
