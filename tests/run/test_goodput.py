"""Goodput and launch/status, from records written by hand and by real runs."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, Job, rows, train

from scalepeft.analysis.report import command as report
from scalepeft.analysis.report import load
from scalepeft.cluster import status
from scalepeft.core import text as text_
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag, tell_job
from scalepeft.run import goodput
from scalepeft.run import status as run_status
from scalepeft.run.logs import RowLog


def write(folder: Path, **files: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(launched: float, **more: Any) -> dict[str, Any]:
    event = {"event": "start", "time": launched + 15, "step": 0, "world_size": 2}
    return {**event, "launched": launched, "startup": 5.0, "load": 10.0, "steps": 6, **more}


def step(number: int, at: float, seconds: float = 2.0) -> dict[str, Any]:
    row = {"step": number, "time": at, "seconds": seconds, "tokens_per_second": 100.0}
    return {**row, "loss": 1.0, "sample_index": number * 4}


@pytest.fixture
def disturbed(tmp_path: Path) -> Path:
    """Four steps, the last of them lost with a node; 30 s in the queue; then three to the end."""
    again = {"waited": 30.0, "recomputed": 2.0, "recomputed_steps": 1}
    write(
        tmp_path / "run",
        events=[
            start(1000.0),
            {"event": "saved", "time": 1022.0, "step": 3, "seconds": 1.0},
            start(1054.0, **again),
            {"event": "finished", "time": 1080.0, "step": 6},
        ],
        metrics=[step(i, 1015.0 + 2 * i) for i in (1, 2, 3)] + [step(i, 1070.0) for i in (4, 5, 6)],
        validation=[{"step": 6, "loss": 1.0, "rows": 3, "seconds": 0.5}],
    )
    return tmp_path / "run"


def test_a_start_later_than_all_that_followed_it(tmp_path: Path) -> None:
    write(tmp_path, events=[{**start(1000.0), "launched": 9e9}], metrics=[step(1, 1015.0)])
    assert goodput.goodput(tmp_path) is None


def test_every_second_of_the_wall_time_is_named_once(disturbed: Path) -> None:
    spent = goodput.goodput(disturbed)
    assert spent is not None
    assert (spent.wall, spent.steps, spent.startup, spent.load) == (80.0, 12.0, 10.0, 20.0)
    assert (spent.save, spent.held_out, spent.recomputed, spent.waiting) == (1.0, 0.5, 2.0, 30.0)
    assert spent.other == pytest.approx(4.5) and spent.share == pytest.approx(12 / 80)
    assert spent.losses().startswith("waiting 30.0 s, load 20.0 s, start-up 10.0 s, other 4.5 s")


def test_time_after_a_planned_end_is_nobodys_loss(disturbed: Path) -> None:
    with (disturbed / "events.jsonl").open("a") as f:
        f.write(json.dumps(start(100_000.0, idle=100_000.0 - 1080.0)) + "\n")
    spent = goodput.goodput(disturbed)
    assert spent is not None and spent.wall == pytest.approx(80 + 15)


def test_runs_older_than_the_figures_have_none(disturbed: Path) -> None:
    old = [{"event": "start", "time": 1.0, "step": 0, "world_size": 1}]
    write(disturbed, events=old)
    assert goodput.goodput(disturbed) is None
    assert "goodput" not in report.table(load.read(disturbed, "run"))


def bytes_read(call: Callable[[], Any]) -> int:
    """What the kernel has read for this process meanwhile."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    call()
    return count() - before


def test_a_long_run_is_read_from_its_end_or_a_row_at_a_time(tmp_path: Path) -> None:
    saved = [{"event": "saved", "time": 1015.0 + i, "step": i} for i in (10_000, 20_000)]
    rows = [step(i, 1015.0 + i) for i in range(1, 20_051)]
    write(tmp_path, events=[start(1000.0), *saved], metrics=rows)
    metrics = tmp_path / "metrics.jsonl"
    assert metrics.stat().st_size > 2e6
    assert bytes_read(lambda: run_status.status(tmp_path)) < 100_000
    assert run_status.status(tmp_path)["step"] == 20_050
    assert bytes_read(lambda: goodput.lost_since(tmp_path, 20_000, 1.0)) < 100_000
    lost = {"waited": 985.0, "recomputed_steps": 50, "recomputed": 100.0}
    assert goodput.lost_since(tmp_path, 20_000, 22_050.0) == lost
    tracemalloc.start()
    spent = goodput.goodput(tmp_path)
    assert spent is not None and spent.steps == 2.0 * len(rows)
    columns = load.read(tmp_path, "run").columns
    assert columns["step"].tolist() == [row["step"] for row in rows]
    assert tracemalloc.get_traced_memory()[1] < 3e6, "five columns of 8 bytes, no rows"
    tracemalloc.stop()
    size = metrics.stat().st_size  # it is copied as well
    assert bytes_read(lambda: RowLog(metrics, 20_000)) < 1.3e6 + size
    assert metrics.read_bytes().splitlines() == [json.dumps(row).encode() for row in rows[:-50]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (600, "10 min"), (3600 * 3 + 300, "3 h 05 min"), (200_000, "2 d 07 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert text_.duration(seconds) == text


def test_status_without_slurm(disturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_status.status(disturbed)
    assert found["state"].startswith("finished") and found["eta_seconds"] is None
    assert found["restarts"] == 1 and found["lost_seconds"] == 30 + 15 + 2
    events = rows(disturbed, "events.jsonl")[:-1]
    write(disturbed, events=events, metrics=[step(i, 1070.0) for i in (1, 2, 3, 4)])
    found = run_status.status(disturbed)
    assert found["state"].startswith("no sign of life for") and found["eta_seconds"] is None
    write(disturbed, events=events, metrics=[step(4, time.time())])
    assert run_status.status(disturbed)["eta_seconds"] == 4.0
    status.run([str(disturbed)], as_json=False)
    text = capsys.readouterr().out
    assert "running, last sign of life" in text and "4 of 6 (66.7%)" in text and "ETA" in text
    status.run([str(disturbed.parent)], as_json=True)  # as of a sweep
    assert [one["run"] for one in json.loads(capsys.readouterr().out)] == [str(disturbed)]
    with pytest.raises(UserError, match="no submission"):
        status.run([str(disturbed.parent.parent / "nothing")], as_json=False)


def test_the_job_script_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SCALEPEFT_JOB_STATE", raising=False)
    tell_job("progress", "step 3")
    monkeypatch.setenv("SCALEPEFT_JOB_STATE", str(tmp_path))
    tell_job("progress", "step 3")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"progress": "step 3\n"}
    monkeypatch.setenv("SCALEPEFT_JOB_STATE", str(tmp_path / "gone"))
    tell_job("stopped", "step 4")
    said = capsys.readouterr().err
    assert "No such file or directory" in said and "will not come back by itself" in said


@pytest.mark.parametrize("job", [None, "7"])
def test_under_slurm_only_ctrl_c_is_a_second_signal(
    job: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    left: list[int] = []
    flag = StopFlag()
    monkeypatch.setattr(flag, "_leave", left.append)
    monkeypatch.setattr("scalepeft.core.preemption.SAME_EVENT_SECONDS", 0.0)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        flag.request(number)
    assert flag.signal == signal.SIGUSR1
    assert left == ([signal.SIGINT] if job else [signal.SIGTERM, signal.SIGINT])


@pytest.mark.slow
def test_real_runs_leave_what_the_report_needs(tmp_path: Path) -> None:
    run, state = tmp_path / "run", tmp_path / "state"
    state.mkdir()
    env = {"SCALEPEFT_JOB_STATE": str(state), "SLURM_JOB_ID": "7"}
    job = Job(1, [*command(run), "train.stop_at=3"], env=env)
    assert job.wait()[0] == [75]
    left = {p.name: p.read_text() for p in state.iterdir()}
    assert left == {"progress": "step 3\n", "planned": "step 3\n"}, "it asks for no restart"
    train(1, run, "train.max_steps=6")
    first, second = (e for e in rows(run, "events.jsonl") if e["event"] == "start")
    assert first["job"] == "7" and "idle" in second and "waited" not in second
    job = Job(1, command(tmp_path / "killed", "train.max_steps=500", "train.save_every=100"))
    log = tmp_path / "killed/metrics.jsonl"
    while not log.exists() or not log.stat().st_size:
        time.sleep(0.05)
    time.sleep(0.5)
    job.kill()
    job.wait()
    lost = len((tmp_path / "killed/metrics.jsonl").read_bytes().splitlines())
    train(
        1,
        tmp_path / "killed",
        "train.max_steps=500",
        "train.save_every=100",
        "train.stop_at=2",
        expect=75,
    )
    second = [e for e in rows(tmp_path / "killed", "events.jsonl") if e["event"] == "start"][1]
    assert second["recomputed_steps"] in (lost, lost - 1) and second["recomputed"] > 0
    assert second["waited"] > 0 and second["startup"] > 0 and second["load"] > 0
    spent = goodput.goodput(run)
    assert spent is not None and 0 < spent.share < 1 and spent.other < spent.wall / 2


def command(run: Path, *settings: str) -> list[str]:
    from processes import TINY

    return ["train", *TINY, f"run_dir={run}", "train.max_steps=6", *settings]


@pytest.mark.slow
def test_launch_status_is_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "launch/status"), str(tmp_path)],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "no submission in it" in done.stderr
