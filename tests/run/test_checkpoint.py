"""The checkpoint contract on a real file system: commit, damage, retention, fence, full disk, row
logs.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import damages
import pytest
import torch
from safetensors.torch import load_file, save_file

from scalepeft.core.errors import UserError
from scalepeft.models.tensors import Reader, write_tensors
from scalepeft.parallel.base import Part
from scalepeft.run.checkpoint import DamagedCheckpoint, RunFolder, steps_of, verify
from scalepeft.run.lease import Superseded
from scalepeft.run.logs import RowLog

STATE = {"base": {}, "data": "", "nonfinite_in_a_row": 0}


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
        shutil.rmtree(temporary)
        raise
    return folder.commit(temporary, files, {"step": step, **STATE}, keep)


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


def edit_manifest(folder: Path, *without: str, **values: object) -> None:
    """Writes other values into a manifest, without its digest (``without``) or as it was."""
    manifest = json.loads((folder / "manifest.json").read_text()) | values
    left = {key: value for key, value in manifest.items() if key not in without}
    (folder / "manifest.json").write_text(json.dumps(left))


def test_a_later_version_is_passed_over_while_an_older_whole_one_exists(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    edit_manifest(save(folder, 10), "digest", schema=99)
    with pytest.raises(UserError, match="step-000010: has schema 99, this version reads 2; update"):
        RunFolder(tmp_path).newest()
    save(folder, 20)
    edit_manifest(save(folder, 30, keep=3), "digest", schema=99)
    found, passed_over = RunFolder(tmp_path).newest()
    assert found is not None and found.step == 20
    assert passed_over == ["step-000030: has schema 99, this version reads 2"]
    for step in (40, 50):  # retention counts none of them, and raises nothing
        save(folder, step)
    assert steps_of(tmp_path) == [50, 40]


@pytest.mark.parametrize("key", ["schema", "step", "generation", "tensors", "files"])
def test_any_edit_of_a_manifest_is_seen(key: str, tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    save(folder, 10)
    path = save(folder, 20)
    manifest = json.loads((path / "manifest.json").read_text())
    files = {k: v for k, v in manifest["files"].items() if k != "optimizer.safetensors"}
    edit_manifest(path, **{key: files if key == "files" else (manifest[key] or 0) ^ 4})
    found, passed_over = RunFolder(tmp_path).newest()
    assert found is not None and found.step == 10
    assert "manifest.json: its digest differs" in passed_over[0]
    # One of an older version has no digest, and is read.
    edit_manifest(path, "digest", **manifest)
    found, passed_over = RunFolder(tmp_path).newest()
    assert found is not None and found.step == 20 and not passed_over


def test_a_checkpoint_of_the_first_version_is_read(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    path = save(folder, 20)
    manifest = json.loads((path / "manifest.json").read_text())
    # It was safetensors' own file under the same names.
    for kind in ("trained", "optimizer"):
        file = path / f"{kind}.safetensors"
        save_file(load_file(file), file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    edit_manifest(path, "digest", **{**manifest, "schema": 1})
    found, passed_over = RunFolder(tmp_path).newest()
    assert found is not None and not passed_over
    assert torch.equal(Reader(found.folder).whole("a.adapter.U"), torch.full((4, 2), 20.0))
    assert Reader(found.folder).whole("a.adapter.U/step") == 1


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
    assert steps_of(folder.path) == [3, 2]
    flip_a_bit(folder.checkpoints / "step-000003")
    again = claimed(tmp_path)
    assert again.newest()[0].step == 2  # type: ignore[union-attr]
    save(again, 4)
    assert steps_of(again.path) == [
        4,
        3,
        2,
    ], "the only good older one must stay while a damaged one is newer"
    save(again, 5)
    assert steps_of(again.path) == [5, 4]


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
    with pytest.raises(Superseded, match="start 2 of this run owns the folder, this is start 1"):
        save(old, 2)
    assert steps_of(new.path) == [1]
    save(new, 2)


TENSORS = {"a.adapter.U": (6, 50), "b.adapter.U": (40,), "c.adapter.s": ()}


def expected(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}


def test_a_lost_generation_file_does_not_let_an_older_start_write(tmp_path: Path) -> None:
    for _ in range(3):
        frozen = claimed(tmp_path)
    save(frozen, 1)
    (tmp_path / "holder-3.json").unlink()
    newer = claimed(tmp_path)
    assert newer.generation == 4, "the checkpoint knows that there were three"
    save(newer, 2)
    with pytest.raises(Superseded):
        save(frozen, 3)


def save_in_parts(folder: RunFolder, step: int, writers: int) -> Path:
    """A save as several ranks make it: each its elements of every tensor."""
    temporary = folder.begin(step)
    files = {}
    try:
        for rank in range(writers):
            pieces, shapes = {}, {}
            for name, tensor in expected(step).items():
                flat = tensor.reshape(-1)
                size = -(-flat.numel() // writers)
                start, stop = rank * size, min((rank + 1) * size, flat.numel())
                if start < stop:
                    pieces[f"{name}[{start}:{stop}]"] = flat[start:stop].clone()
                    shapes[name] = tuple(tensor.shape)
            file = temporary / f"trained-{rank:05d}-of-{writers:05d}.safetensors"
            files[file.name] = write_tensors(file, pieces, shapes)
    except OSError:
        shutil.rmtree(temporary)
        raise
    return folder.commit(temporary, files, {"step": step, **STATE}, 3)


def damage_at_random(newest: Path, rng: random.Random) -> str:
    """Does one thing that disks, crashes, copies and people do; returns what."""
    files = sorted(newest.iterdir())
    file = rng.choice(files)
    older = newest.parent / "step-000010"
    kinds = ["flip", "truncate", "zeros", "append", "delete", "swap", "of another", "stale", "half"]
    kind = rng.choice([*kinds, "folder", "mixed", "garbage"])
    data = bytearray(file.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif kind == "truncate":
        os.truncate(file, rng.randrange(len(data)))
    elif kind == "zeros":  # a block that never reached the disk
        first = rng.randrange(len(data))
        file.write_bytes(data[:first] + bytes(len(data) - first))
    elif kind == "append":
        file.write_bytes(data + bytes(rng.randint(1, 9)))
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = rng.choice([f for f in files if f != file])
        aside = newest / "aside"
        file.rename(aside)
        other.rename(file)
        aside.rename(other)
    elif kind == "of another":  # a file of an older checkpoint, of the same name and size
        shutil.copy(older / file.name, file)
    elif kind == "stale":
        shutil.copy(older / "manifest.json", newest / "manifest.json")
    elif kind == "half":  # copied by a tool that was killed
        for gone in rng.sample(files, rng.randint(1, len(files))):
            gone.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "mixed":  # the whole older folder under the newer name
        shutil.rmtree(newest)
        shutil.copytree(older, newest)
    else:
        file.write_bytes(rng.randbytes(rng.randint(0, 400)))
    return f"{kind} {file.name}"


@pytest.mark.parametrize("writers", [1, 3])
def test_no_damage_at_random_is_ever_loaded(writers: int, tmp_path: Path) -> None:
    """Each damaged checkpoint verifies with its own values, or is passed over with the reason."""
    rng = random.Random(writers)
    saved = tmp_path / "saved"
    folder = claimed(saved)
    for step in (10, 20, 30):
        save_in_parts(folder, step, writers)
    passed = 0
    for case in range(100):
        run = tmp_path / str(case)
        shutil.copytree(saved, run)
        damaged = [30] if rng.random() < 0.7 else [30, 20]
        what = [damage_at_random(run / f"checkpoints/step-{n:06d}", rng) for n in damaged]
        found, passed_over = RunFolder(run).newest()
        assert found is not None, what
        assert len(passed_over) == (30 - found.step) // 10
        assert found.step >= min(damaged) - 10, (what, passed_over)
        assert all(reason.partition(": ")[2] for reason in passed_over)
        passed += len(passed_over)
        reader = Reader(found.folder)
        for name, tensor in expected(found.step).items():
            assert torch.equal(reader.whole(name), tensor), (what, name)
        shutil.rmtree(run)
    assert passed > 95, "nearly every one of these is a damage"


@pytest.mark.parametrize("seed", [1, 2])
def test_no_kind_of_damage_is_silent_or_a_traceback(seed: int, tmp_path: Path) -> None:
    found = damages.campaign(tmp_path, seed, 2 * len(damages.KINDS))
    assert found["passed over"] > len(damages.KINDS), "the others hit an older one"


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    save(claimed(tmp_path), 1)
    (tmp_path / "stages").mkdir()
    host, dead = socket.gethostname(), subprocess.Popen(["true"])
    dead.wait()
    gone = [f".seen-by-all-nodes-x.{host}.{dead.pid}.tmp", f"stages/a.{host}.{dead.pid}.tmp",
            "generation.elsewhere.1.tmp", ".seen-by-all-nodes-old"]  # fmt: skip
    stay = [f"other.{host}.{os.getpid()}.tmp", "stages/b.elsewhere.1.tmp", "mine.tmp"]
    for name in (*gone, *stay):
        (tmp_path / name).write_text("")
    for name in gone[2:]:
        os.utime(tmp_path / name, (1, 1))
    claimed(tmp_path)
    assert [name for name in (*gone, *stay) if (tmp_path / name).exists()] == stay


def test_a_disk_that_fills_up_in_the_middle_of_any_file(small_disk: Path) -> None:
    rng = random.Random(0)
    folder = claimed(small_disk / "run")
    save_in_parts(folder, 1, 3)
    last = 1
    refused = 0
    for step in range(2, 42):
        filler = small_disk / "filler"
        fill_up(filler)
        os.truncate(filler, max(0, filler.stat().st_size - 4096 * rng.randint(0, 8)))
        try:
            save_in_parts(folder, step, 3)
            last = step
        except OSError:
            refused += 1
        filler.unlink()
        found, passed_over = RunFolder(small_disk / "run").newest()
        assert found is not None and found.step == last and not passed_over
        assert not list(folder.checkpoints.glob("*.tmp-*"))
    assert 5 < refused < 35


def test_a_file_system_without_folder_rename_keeps_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As some object stores are mounted: the guarantee that is lost is said, once."""
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.is_dir():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    folder = claimed(tmp_path)
    for step in (1, 2):
        save(folder, step)
    assert steps_of(folder.path) == [2, 1] and claimed(tmp_path).newest()[0].step == 2  # type: ignore[union-attr]
    text = capsys.readouterr()
    said = text.out + text.err
    assert said.count("cannot rename a folder") == 1 and "never an older one" in said
    # Killed in the middle of the move: the manifest is not there yet.
    (folder.checkpoints / "step-000002" / "manifest.json").unlink()
    assert claimed(tmp_path).newest()[0].step == 1  # type: ignore[union-attr]


def test_ranges_are_read_and_no_byte_more(tmp_path: Path) -> None:
    path = save_in_parts(claimed(tmp_path), 5, 3)
    reader = Reader(path)
    want = expected(5)["a.adapter.U"].reshape(-1)
    for start, stop in ((0, 300), (90, 210), (100, 101), (299, 300), (7, 7)):
        before = reader.bytes_read
        part = Part(torch.zeros(stop - start), start, (6, 50))
        reader.fill("a.adapter.U", part)
        assert torch.equal(part.data, want[start:stop])
        assert reader.bytes_read - before == 4 * (stop - start)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs root to mount a small tmpfs")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fill_up(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as f:
        while f.write(bytes(1 << 12)):
            continue


def test_full_disk_keeps_the_older_checkpoints(small_disk: Path) -> None:
    folder = claimed(small_disk)
    small = {"a": torch.zeros(10)}
    commit(folder, 1, small)
    with pytest.raises(OSError):
        commit(folder, 2, {"a": torch.zeros(200_000)})
    assert steps_of(folder.path) == [1] and not list(folder.checkpoints.glob("*.tmp-*"))
    commit(folder, 3, small)
    assert claimed(small_disk).newest()[0].step == 3  # type: ignore[union-attr]
    # metrics: the rows that do not fit wait and are written once there is room
    log = RowLog(small_disk / "metrics.jsonl", 0)
    filler = small_disk / "filler"
    fill_up(filler)
    log.keep({"step": 1, "text": "x" * 9000})
    assert log.flush() is not None
    with pytest.raises(OSError):
        log.sync()
    filler.unlink()
    log.keep({"step": 2})
    log.sync()
    assert [json.loads(line)["step"] for line in (small_disk / "metrics.jsonl").open()] == [1, 2]


def test_unwritable_run_folder_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*file/run: cannot be written.*choose another"):
        RunFolder(tmp_path / "file" / "run")


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}', "\x00\x00"])
def test_row_log_is_cut_back_to_the_resumed_step(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 6)) + torn)
    log = RowLog(path, 3)
    log.keep({"step": 4, "again": True})
    log.sync()
    assert [json.loads(line) for line in path.open()] == [
        {"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True},
    ]  # fmt: skip


def test_broken_rows_of_a_log_are_dropped_and_the_good_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\njunk\n{"step": 2}\n{"step": 2}\n{"step": 3}\n')
    log = RowLog(path, 3)
    assert log.last_step == 3
    log.keep({"step": 4})
    log.sync()
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4]
    assert len(list(tmp_path.glob("metrics.jsonl.damaged-*"))) == 1


@pytest.mark.parametrize("bad", ["junk\n", '{"step": 9}\n', '{"step": 3}\n', '{"step": 4}\n', "\n"])
def test_a_broken_row_before_the_cut_is_seen(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [f'{{"step": {i}}}\n' for i in range(1, 7)]
    path.write_text("".join([*rows[:3], bad, *rows[3:], "torn"]))
    log = RowLog(path, 5)
    assert log.last_step == 5 and path.read_text() == "".join(rows[:5])
    log.keep({"step": 6})
    log.sync()
    assert path.read_text() == "".join(rows)


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="no manifest"):
        verify(tmp_path)
