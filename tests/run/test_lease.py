"""One claim: of any starts at once one gets a run folder, and an older one harms no row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, TINY, Job, rows

from scalepeft.core.errors import UserError
from scalepeft.run import lease
from scalepeft.run.logs import RowLog

CONTENDER = """
import os, sys, time
from pathlib import Path
from scalepeft.core.errors import UserError
from scalepeft.run import lease
folder, go = Path(sys.argv[1]), Path(sys.argv[2])
lease.WATCH_SECONDS, lease.BEAT_SECONDS = 1.5, 0.2
print("ready", flush=True)
while not go.exists():
    pass
try:
    held = lease.Lease(folder, lease.claim(folder))
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
print("holds", flush=True)
sys.stdin.read()
"""


def contend(folder: Path, count: int) -> tuple[subprocess.Popen[str], list[str]]:
    """Claims at once; returns the one that holds the folder, and what the others said."""
    go = folder.with_name("go")
    go.unlink(missing_ok=True)
    words = [sys.executable, "-c", CONTENDER, str(folder), str(go)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    all_ = [subprocess.Popen(words, cwd=ROOT, **pipes) for _ in range(count)]
    for one in all_:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    go.touch()
    said = [one.stdout.readline().strip() for one in all_ if one.stdout]
    holding = [one for one, line in zip(all_, said, strict=True) if line == "holds"]
    others = [one for one in all_ if one not in holding]
    assert len(holding) == 1, said
    assert [one.wait(30) for one in others] == [2] * (count - 1)
    return holding[0], [line for line in said if line != "holds"]


def test_of_twenty_claims_at_once_one_holds_and_of_a_stale_one_one_takes_over(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(1, 4):
        held = lease._read(file) if (file := folder / f"holder-{number - 1}.json").exists() else {}
        if number == 3:  # of a machine where nobody can look for the process
            file.write_text(json.dumps({**held, "machine": "another"}))
        owner, said = contend(folder, 20)
        expected = f"is in use by start {number} on {os.uname().nodename}, pid {owner.pid}, which"
        assert all(expected in line for line in said), said
        (file,) = folder.glob("*holder-*")
        assert file.name == f"holder-{number}.json", "one file, and no stray one"
        owner.kill()
        owner.wait()


def test_a_claim_that_froze_for_a_whole_start_is_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = lease.check_free(tmp_path)
    assert [lease.claim(tmp_path) for _ in range(3)] == [1, 2, 3]
    frozen = iter([seen])
    check = lease.check_free
    monkeypatch.setattr(lease, "check_free", lambda folder: next(frozen, None) or check(folder))
    monkeypatch.setattr(lease, "_largest_generation", lambda folder: 0)
    assert lease.claim(tmp_path) == 4, "what it saw first is long over"
    assert [file.name for file in tmp_path.iterdir()] == ["holder-4.json"]


def test_who_takes_over_while_one_waits_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = {"start": 2, "host": "h", "pid": 1, "machine": "another"}
    (tmp_path / "holder-2.json").write_text(json.dumps(stale))

    def take_over(_: float) -> None:
        heir = {"start": 3, "host": "h", "pid": os.getppid(), "machine": lease._machine()}
        heir["began"] = lease._began(os.getppid())
        (tmp_path / "holder-3.json").write_text(json.dumps(heir))
        (tmp_path / "heartbeat").write_text("holder-3 1\n")

    monkeypatch.setattr(lease.time, "sleep", take_over)
    with pytest.raises(UserError, match=f"in use by start 3 on h, pid {os.getppid()}"):
        lease.claim(tmp_path)


def test_without_hard_links_the_name_alone_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert lease.claim(tmp_path) == 1
    assert not lease._make(tmp_path / "holder-1.json", "{}")
    assert json.loads((tmp_path / "holder-1.json").read_text())["pid"] == os.getpid()


def test_holders_of_an_older_version_and_strays(tmp_path: Path) -> None:
    parent = {"machine": lease._machine(), "pid": os.getppid(), "host": "h", "start": 7}
    parent["began"] = lease._began(os.getppid())
    (tmp_path / "holder.json").write_text(json.dumps(parent))
    with pytest.raises(UserError, match="in use by start 7 on h"):
        lease.claim(tmp_path)
    (tmp_path / "holder.json").write_text(json.dumps({**parent, "began": "1"}))
    (tmp_path / "events.jsonl").write_text('{"generation": 7}\n{"generation": ' + "9" * 5000)
    stray, fresh = tmp_path / "a.json.h.1.tmp", tmp_path / "b.json.h.1.tmp"
    for file in (stray, fresh):
        file.touch()
    os.utime(stray, (time.time() - 4000,) * 2)
    assert lease.claim(tmp_path) == 8
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [fresh.name, "events.jsonl", "holder-8.json"]


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_records_are_written_in_the_run_folder_alone(kind: str, tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "run"
    folder.mkdir()
    if kind != "dangling":
        precious.write_text("mine")
    for name in lease.RECORDS:
        file = folder / name
        file.symlink_to(precious) if kind != "fifo" else os.mkfifo(file)
        with pytest.raises(UserError, match=f"{name}: is a link, or no file"):
            lease.claim(folder)
        file.unlink()
    log = folder / "metrics.jsonl"
    log.symlink_to(precious) if kind != "fifo" else os.mkfifo(log)
    written = RowLog(log, 0)
    written.keep({"step": 1})
    assert written.flush() is None and log.read_text() == '{"step": 1}\n'
    assert (precious.exists() == (kind != "dangling") and kind == "dangling") or (
        precious.read_text() == "mine"
    )


FROZEN = """
import os, signal, sys
from functools import partial
from pathlib import Path
from scalepeft.run import lease
from scalepeft.run.logs import RowLog
folder, at = Path(sys.argv[1]), sys.argv[2]
def check(frozen):
    lease.check_fence(folder, generation)
    if frozen:
        os.kill(os.getpid(), signal.SIGSTOP)
generation = lease.claim(folder)
log = RowLog(folder / "metrics.jsonl", 0, partial(check, at == "start"))
for step in range(1, 7):
    log.keep({"step": step, "of": generation})
assert log.flush() is None
log.keep({"step": 7, "of": generation})
check(at == "row")
print(log.flush())
"""


@pytest.mark.parametrize("at", ["start", "row"])
def test_a_writer_that_froze_after_its_look_at_the_fence_harms_no_newer_row(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the write (``row``), and between it and its log's rename (``start``)."""
    words = [sys.executable, "-c", FROZEN, str(tmp_path), at]
    job = {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "0"}
    process = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **job}, stdout=-1, stderr=-1, text=True
    )
    os.waitpid(process.pid, os.WUNTRACED)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    resumed = 4 if at == "row" else 0
    assert lease.claim(tmp_path) == 2
    log = RowLog(tmp_path / "metrics.jsonl", resumed)
    for step in range(resumed + 1, 13):
        log.keep({"step": step, "of": 2})
        assert log.flush() is None
    before = (tmp_path / "metrics.jsonl").read_bytes()
    os.kill(process.pid, signal.SIGCONT)
    out, error = process.communicate(30)
    assert "None" not in out and ("Superseded" in error or "FileNotFoundError" in error), error
    log.keep({"step": 13, "of": 2})
    assert log.flush() is None
    assert (tmp_path / "metrics.jsonl").read_bytes() == before + b'{"step": 13, "of": 2}\n'
    assert [row["step"] for row in map(json.loads, before.splitlines())] == list(range(1, 13))


def test_a_log_that_is_removed_while_the_run_goes_comes_back_whole(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        log.keep({"step": step})
        assert log.flush() is None
        if step == 1:
            log.path.unlink()
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.slow
def test_of_four_launches_at_once_one_trains_and_three_leave_with_two(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [*TINY, "train.max_steps=4000", "train.save_every=1000", f"run_dir={folder}"]
    jobs = [Job(1, ["train", *settings]) for _ in range(4)]
    log, host = folder / "metrics.jsonl", os.uname().nodename
    while sum(job.ranks[0].poll() is None for job in jobs) > 1 or not (
        log.is_file() and log.stat().st_size
    ):
        time.sleep(0.05)
    (alive,) = (job for job in jobs if job.ranks[0].poll() is None)
    for job in jobs:
        if job is not alive:
            codes, text = job.wait()
            assert codes == [2] and "Traceback" not in text, text
            assert f"in use by start 1 on {host}, pid {alive.ranks[0].pid}" in text
    alive.kill(signal.SIGTERM)
    assert alive.wait()[0] == [75]
    assert [row["event"] for row in rows(folder, "events.jsonl")].count("start") == 1
    steps = [row["step"] for row in rows(folder)]
    assert steps == list(range(1, len(steps) + 1))
