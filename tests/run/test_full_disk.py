"""Nothing that a run prints ends it, and a full disk ends it in order."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import fill_up, small_disk
from processes import ROOT, TINY, Job, adapter_bytes, call, losses, train, zygote

from scalepeft.config.schema import from_dict
from scalepeft.core.log import _Stream
from scalepeft.core.preemption import tell_job
from scalepeft.parallel.ranks import fix_order
from scalepeft.run.checkpoint import steps_of
from scalepeft.run.progress import Progress
from scalepeft.run.room import Room

SETTINGS = [*TINY, "train.max_steps=40", "train.save_every=5"]
USR1 = str(int(signal.SIGUSR1))
FILLING = (str(Path(__file__).with_name("filling.py")),)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(1, folder, *SETTINGS)
    return folder


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", f"size={request.param}") as folder:
        yield folder


@pytest.mark.parametrize("trouble", ["2>/dev/full", "2>&1 | head -1", ">&- 2>&-"])
def test_what_is_printed_ends_no_run(trouble: str, undisturbed: Path, tmp_path: Path) -> None:
    words = ["train", *SETTINGS, f"run_dir={tmp_path}/run"]
    if trouble.startswith(">&-"):
        command = ["bash", "-c", f'exec "$@" {trouble}', "_", sys.executable, "-m", "scalepeft"]
        assert subprocess.run([*command, *words], cwd=ROOT, check=False).returncode == 0
    else:
        full = os.open("/dev/full", os.O_WRONLY) if "full" in trouble else None
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = zygote().start(("-m", "scalepeft"), words, env, full)
        if full is None:
            assert "300 training rows" in job.stdout.readline()
            job.stdout.close()
        assert job.wait(60) == 0
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(undisturbed)
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_lost_lines_are_said_once_there_is_room(tmp_path: Path) -> None:
    fd, log = os.open("/dev/full", os.O_WRONLY), tmp_path / "log"
    stream = _Stream(fd, result=False)
    assert [stream.write(b"one\n"), stream.write(b"two\nthree\n")] == [4, 10]
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), fd)
    stream.write(b"four\n")
    stream.write(b"five\n")
    lost = "scalepeft: 3 lines are missing here: No space left on device"
    assert log.read_text().split("\n") == ["", lost, "four", "five", ""]


def test_other_commands_end_as_unix_tools_do(undisturbed: Path) -> None:
    """status RUN | true; status RUN > /dev/full"""
    command = f"{sys.executable} -m scalepeft status {undisturbed}"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}} >&2; {command} > /dev/full; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    error = "scalepeft: error: standard output: No space left on device; what it got is not all"
    assert done.stderr.splitlines() == ["1", error, "2"]


@pytest.mark.parametrize("fails", ["opening", "writing", "closing"])
def test_a_tracker_that_fails_is_left_out(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wandb.py").write_text(
        f"def do(what):\n    if what == {fails!r}:\n        raise RuntimeError('no network')\n"
        "class Run:\n    def log(self, *_, **__):\n        do('writing')\n"
        "    def finish(self):\n        do('closing')\n"
        "def init(**_):\n    do('opening')\n    return Run()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    values = {"run_dir": str(tmp_path), "train": {"max_steps": 1, "wandb": "p"}}
    progress = Progress(from_dict(values), 0, 9)
    for step in (1, 2):
        progress.held_out({"step": step, "loss": 1.0})
    progress.close()
    said = capsys.readouterr().err
    assert said.count("train.wandb: no network: it gets no more of this start") == 1


def filled(ranks: int, disk: Path, *settings: str, at: int, **env: str) -> tuple[list[int], str]:
    """Exit codes and output of a run in ``disk``/run, which is full after step ``at``."""
    words = ["train", *SETTINGS, f"run_dir={disk}/run", *settings]
    env |= {"FILL": f"{disk}/others", "FILL_AT": str(at)}
    codes, text = Job(ranks, words, env, FILLING).wait()
    assert "Traceback" not in text, text
    return codes, text


@pytest.mark.parametrize("disk", ["2m"], indirect=True)
def test_saves_have_their_room_on_a_disk_that_others_fill(disk: Path, undisturbed: Path) -> None:
    codes, text = filled(1, disk, at=12)  # as many are there as are kept
    assert codes == [0] and "could not be saved" not in text, text
    assert text.count("the rows wait in memory") < 8, "a line for each save at most"
    assert losses(disk / "run") == losses(undisturbed)
    assert adapter_bytes(disk / "run") == adapter_bytes(undisturbed)
    assert not (disk / "run" / "checkpoints" / ".room").exists()


@pytest.mark.parametrize("disk", ["2m"], indirect=True)
@pytest.mark.parametrize(("ranks", "mode"), [(2, "gathered"), (1, "async")])
def test_a_disk_that_stays_full_stops_the_run_in_order(
    disk: Path, ranks: int, mode: str, undisturbed: Path
) -> None:
    settings = [f"train.save_mode={mode}", *["engine.name=ddp"] * (ranks - 1)]
    codes, text = filled(ranks, disk, *settings, at=12, FILL_ROOM="")
    assert codes == [75] * ranks, text
    assert text.count("could not be saved") == 2 and "step 30" not in text, text
    saved = max(steps_of(disk / "run"))
    end = f"stopped by a disk that refuses to save, saved at step {saved}; the same command"
    assert end in text and saved in (5, 10), text
    (disk / "others").unlink()
    train(ranks, disk / "run", *SETTINGS, *settings)
    if ranks == 1:
        assert adapter_bytes(disk / "run") == adapter_bytes(undisturbed)


@pytest.mark.parametrize("disk", ["2m"], indirect=True)
@pytest.mark.parametrize(("at", "code"), [(3, 2), (12, 75)])
def test_a_signal_while_the_disk_is_full(disk: Path, at: int, code: int) -> None:
    codes, text = filled(1, disk, at=at, FILL_ROOM="", FILL_SIGNAL=USR1)
    assert codes == [code], text
    assert ("there is no older: make room" if at < 5 else "stopped by a disk") in text


@pytest.mark.parametrize("disk", ["64k"], indirect=True)
def test_the_word_for_the_job_script_needs_no_room(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / ".writable").write_text("written by node1\n")
    fill_up(disk / "others")
    monkeypatch.setenv("SCALEPEFT_JOB_STATE", str(disk))
    tell_job("progress", "step 3")
    tell_job("stopped", "step 3")
    assert sorted(f.name for f in disk.iterdir()) == ["others", "stopped"]


@pytest.mark.parametrize("disk", ["512k"], indirect=True)
def test_room_is_taken_as_far_as_there_is(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room = Room(disk / ".room")
    room.keep(300_000)
    assert (disk / ".room").stat().st_size == 300_000 + (64 << 10)
    room.give()
    (disk / "others").write_bytes(bytes(200_000))
    room.keep()
    assert (disk / ".room").stat().st_size == 300_000, "without the log's rows"
    room.give()
    fill_up(disk / "others")
    room.keep()
    room.keep()
    assert not (disk / ".room").exists()
    said = capsys.readouterr().err
    assert said.count("no room can be kept for the next save: No space left on device") == 1


def test_a_limit_on_file_sizes_and_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    words = " ".join(["train", *SETTINGS, f"run_dir={tmp_path}/run"])
    script = f"ulimit -f 40; exec {sys.executable} {FILLING[0]} {words}"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "could not be saved: rank 0: File too large; there is no older" in done.stderr
    done = call("train", *SETTINGS, f"run_dir={tmp_path}/other", SCALEPEFT_CACHE="/proc/none")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cache /proc/none/models: cannot be written" in done.stderr


@pytest.fixture
def _order() -> Iterator[None]:
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_order")
@pytest.mark.parametrize("setting", ["auto", "on", "off"])
def test_deterministic_sets_what_it_says(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fix_order(setting, torch.device("cuda"))
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (setting != "off")
    assert torch.are_deterministic_algorithms_enabled() == (setting == "on")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_resumed_run_is_bitwise_the_same(quant: str, batching: str, tmp_path: Path) -> None:
    """On the GPU where there is one; ``on`` must have an algorithm for all of a step."""
    import torch

    if (quant, batching) != ("nf4", "packed") and not torch.cuda.is_available():
        pytest.skip("one of each kind is enough without a GPU")
    words = [*SETTINGS, "train.deterministic=on", "train.precision=bf16", f"model.quant={quant}"]
    words += [f"train.batching={batching}", "train.max_steps=12", "engine.device=auto"]
    train(1, tmp_path / "whole", *words)
    train(1, tmp_path / "run", *words, "train.stop_at=7", expect=75)
    train(1, tmp_path / "run", *words)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
