"""Kills, signals and restarts of real runs: nothing lost, nothing doubled, the same adapter to the
bit.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import FULL, ROOT, TINY, Job, adapter_bytes, losses, rows, train
from test_checkpoint import delete_a_file, empty, flip_a_bit, truncate

from scalepeft.adapters.inject import read_adapter
from scalepeft.core.errors import UserError
from scalepeft.run import lease
from scalepeft.run.checkpoint import RunFolder

pytestmark = pytest.mark.slow


# How often the random moments of kills and signals are drawn: 1 in every run, more with --full.
ROUNDS = 3 if FULL else 1


RUN = ["model.quant=nf4", "train.save_every=2", "data.valid_size=20", "train.eval_every=20"]


# Two of the five kinds of layers: a step of two ranks is mostly calls.
FEW = ["adapter.target_modules=[q_proj,down_proj]"]


def same_checkpoint(one: Path, other: Path, step: int) -> None:
    """The same tensor files to the byte, the order of their tensors included."""
    a, b = (
        {f.name: f.read_bytes() for f in (folder / f"checkpoints/step-{step:06d}").iterdir()}
        for folder in (one, other)
    )
    manifests = [json.loads(files.pop("manifest.json")) for files in (a, b)]
    assert a == b and manifests[0]["files"] == manifests[1]["files"]


def step_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def newest_saved(folder: Path) -> int:
    names = [p.name for p in (folder / "checkpoints").glob("step-*") if "." not in p.name]
    return max((int(n.split("-")[1]) for n in names), default=0)


def start(ranks: int, folder: Path, *settings: str, fresh: bool = False) -> Job:
    return Job(ranks, ["train", *TINY, *RUN, f"run_dir={folder}", *settings], fresh=fresh)


def kill_in_training(job: Job, folder: Path, rng: random.Random) -> None:
    """kill -9 to all ranks at a random moment: some in start-up, some in mid-save, most in or
    between steps.
    """
    how = rng.random()
    begin, target = time.monotonic(), step_of(folder) + rng.randint(1, 4)
    startup = rng.uniform(0, 1)
    while job.ranks[0].poll() is None:
        if how < 0.15 and time.monotonic() - begin > startup:
            break
        if how > 0.7 and list((folder / "checkpoints").glob("*.tmp-*")):
            break
        if 0.15 <= how <= 0.7 and newest_saved(folder) + 4 > step_of(folder) >= target:
            time.sleep(rng.uniform(0, 0.08))
            break
    job.kill()
    job.wait()


@pytest.mark.parametrize(
    ("ranks", "kills"), [pytest.param(1, 4 * ROUNDS, marks=pytest.mark.full), (2, 2 * ROUNDS)]
)
def test_kill_9_at_random_moments_changes_nothing(ranks: int, kills: int, tmp_path: Path) -> None:
    engine = (
        ["engine.name=single"] if ranks == 1 else ["engine.name=fsdp2", "train.save_mode=async"]
    )
    steps = 60 if FULL else 20
    engine += [*FEW, f"train.max_steps={steps}"]
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    train(ranks, undisturbed, *RUN, *engine)
    rng = random.Random(ranks)
    for _ in range(kills):
        saved = newest_saved(disturbed)
        kill_in_training(start(ranks, disturbed, *engine), disturbed, rng)
        assert newest_saved(disturbed) >= saved
    saved = newest_saved(disturbed)
    assert saved > 0
    text = train(ranks, disturbed, *RUN, *engine)
    resumed = f"resuming {disturbed} at step {saved}" in text
    assert resumed or "is finished" in text or saved == steps
    assert losses(disturbed) == losses(undisturbed)
    validation = [
        [(row["step"], row["loss"]) for row in rows(folder, "validation.jsonl")]
        for folder in (disturbed, undisturbed)
    ]
    assert validation[0] == validation[1] != []
    assert adapter_bytes(disturbed) == adapter_bytes(undisturbed)


@pytest.mark.multiprocess
def test_sigusr1_ends_in_one_agreed_save_and_75(tmp_path: Path) -> None:
    """To one rank, and to both 0.3 s apart, in turns."""
    folder = tmp_path / "run"
    settings = [*FEW, "engine.name=fsdp2", f"train.max_steps={30 + 20 * ROUNDS if FULL else 30}"]
    rng = random.Random(0)
    for turn in range(3 * ROUNDS):
        both = turn % 2 == 1
        early = turn % 5 == 0
        job = start(2, folder, *settings, fresh=early)
        job.wait_for_handlers()
        if early:
            time.sleep(rng.uniform(0, 4))  # somewhere in start-up
        else:
            before = step_of(folder)
            while step_of(folder) < before + 1 and job.ranks[0].poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
        first = rng.randrange(2)
        job.ranks[first].send_signal(signal.SIGUSR1)
        if both:
            time.sleep(0.3)
            if job.ranks[1 - first].poll() is None:
                job.ranks[1 - first].send_signal(signal.SIGUSR1)
        codes, text = job.wait(60)
        assert codes == [75, 75], text
        assert newest_saved(folder) == step_of(folder), "a step was lost"
    train(2, folder, *RUN, *settings)
    train(2, tmp_path / "undisturbed", *RUN, *settings)
    assert losses(folder) == losses(tmp_path / "undisturbed")
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_other_signals_in_one_process(number: signal.Signals, tmp_path: Path) -> None:
    job = start(1, tmp_path / "run", "train.max_steps=2000")
    while step_of(tmp_path / "run") < 3:
        time.sleep(0.02)
    job.kill(number)
    job.kill(number)  # the same event twice within a moment is one signal
    assert job.wait()[0] == [75]
    assert newest_saved(tmp_path / "run") == step_of(tmp_path / "run") > 0
    job = start(1, tmp_path / "run", "train.max_steps=2000")
    while step_of(tmp_path / "run") < newest_saved(tmp_path / "run") + 1:
        time.sleep(0.02)
    saved = newest_saved(tmp_path / "run")
    os.kill(
        job.ranks[0].pid, signal.SIGSTOP
    )  # so that both signals are there before it can finish its save
    job.kill(number)
    os.kill(job.ranks[0].pid, signal.SIGCONT)
    job.wait()
    assert newest_saved(tmp_path / "run") >= saved


@pytest.mark.multiprocess
def test_a_second_signal_leaves_at_once_even_in_a_stuck_collective(tmp_path: Path) -> None:
    job = start(2, tmp_path / "run", "engine.name=fsdp2", "train.max_steps=2000")
    while step_of(tmp_path / "run") < 3:
        time.sleep(0.02)
    job.ranks[1].send_signal(
        signal.SIGSTOP
    )  # rank 0 now waits in a collective for a rank that does not come
    time.sleep(0.5)
    saved = newest_saved(tmp_path / "run")
    job.ranks[0].send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert job.ranks[0].poll() is None, "the first signal waits for an agreement"
    begin = time.monotonic()
    job.ranks[0].send_signal(signal.SIGTERM)
    job.ranks[0].wait(10)
    assert time.monotonic() - begin < 2
    assert job.ranks[0].returncode == 128 + signal.SIGTERM
    job.kill()
    job.wait()
    assert newest_saved(tmp_path / "run") >= saved


@pytest.mark.multiprocess
def test_a_run_continues_at_other_world_sizes_with_the_same_samples(tmp_path: Path) -> None:
    settings = [*RUN, *FEW, "engine.name=fsdp2", "train.max_steps=8"]
    train(2, tmp_path / "whole", *settings)
    train(2, tmp_path / "stopped", *settings, "train.stop_at=4", expect=75)
    assert step_of(tmp_path / "stopped") == newest_saved(tmp_path / "stopped") == 4
    for ranks in (1, 3):
        folder = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "stopped", folder)
        train(ranks, folder, *settings)
        got, want = rows(folder), rows(tmp_path / "whole")
        # Other samples would have other label tokens and another loss.
        for key in ("step", "sample_index", "label_tokens", "lr"):
            assert [r[key] for r in got] == [r[key] for r in want]
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.multiprocess
@pytest.mark.parametrize("mode", ["sharded", "async"])
def test_ranks_write_what_they_hold_and_read_what_they_need(mode: str, tmp_path: Path) -> None:
    settings = [*RUN, "engine.name=fsdp2", f"train.save_mode={mode}", "train.max_steps=6"]
    train(2, tmp_path / "whole", *settings)
    train(2, tmp_path / "run", *settings, "train.stop_at=4", expect=75)
    folder = tmp_path / "run/checkpoints/step-000004"
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert sorted(sizes) == sorted(
        f"{kind}-{rank:05d}-of-00002.safetensors"
        for kind in ("trained", "optimizer")
        for rank in range(2)
    )
    # Three numbers a parameter, and one step for each of the 40 tensors, which every rank needs.
    numbers = 3 * 24_576 * 4
    for kind, share in (("trained", 1 / 3), ("optimizer", 2 / 3)):
        for rank in range(2):
            assert sizes[f"{kind}-{rank:05d}-of-00002.safetensors"] < numbers * share / 2 + 20_000
    for ranks in (2, 3) if mode == "sharded" else (2,):
        other = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "run", other)
        train(ranks, other, *settings)
        start = [event for event in events(other) if event["event"] == "start"][-1]
        read = [rank["checkpoint_bytes_read"] for rank in start["per_rank"]]
        assert sum(read) == numbers + ranks * 40 * 4
        assert max(read) <= numbers / ranks * 1.1
    assert adapter_bytes(tmp_path / "on-2") == adapter_bytes(tmp_path / "whole")
    same_checkpoint(tmp_path / "on-2", tmp_path / "whole", 6)
    file = tmp_path / "on-2/adapter/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=r"adapter_model.safetensors: has changed since it was written"
    ):
        read_adapter(file.parent)
    saved = [e for e in events(tmp_path / "whole") if e["event"] == "saved"]
    assert [e["step"] for e in saved] == [2, 4, 6]
    assert all(0 < e["seconds"] <= e["written"] and e["bytes"] > numbers for e in saved)


def test_the_optimizer_really_is_restored(tmp_path: Path) -> None:
    """Restarted with empty moments, the losses would part; a warm-up hides nothing here."""
    settings = [*RUN, "train.max_steps=12", "train.schedule=constant"]
    train(1, tmp_path / "whole", *settings)
    train(1, tmp_path / "run", *settings, "train.stop_at=6", expect=75)
    state = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text())
    assert state["step"] == 6 and state["sample_index"] == 72
    train(1, tmp_path / "run", *settings)
    same_checkpoint(tmp_path / "run", tmp_path / "whole", 12)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_damaged_newest_checkpoint_is_passed_over_by_the_run(tmp_path: Path) -> None:
    settings = [*RUN, "train.max_steps=12"]
    train(1, tmp_path / "whole", *settings)
    train(1, tmp_path / "cut", *settings, "train.stop_at=8", expect=75)
    for damage in (truncate, flip_a_bit, delete_a_file, empty):
        folder = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "cut", folder)
        damage(folder / "checkpoints" / "step-000008")
        text = train(1, folder, *settings)
        assert (
            "checkpoint passed over: step-000008: " in text
            and f"resuming {folder} at step 6" in text
        )
        assert losses(folder) == losses(tmp_path / "whole")
        assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")


def test_another_config_in_an_old_run(tmp_path: Path) -> None:
    settings = [*RUN, "train.max_steps=4"]
    train(1, tmp_path / "run", *settings, "train.stop_at=2", expect=75)
    text = train(1, tmp_path / "run", *settings, "adapter.rank=8", expect=2)
    assert "adapter.rank: 4 there, 8 now" in text and text.count("\n") == 1
    text = train(1, tmp_path / "run", *settings, "train.save_every=1", expect=2)
    assert "--resume-with-changes" in text
    text = train(1, tmp_path / "run", *settings, "train.save_every=1", "--resume-with-changes")
    assert "at step 2" in text
    text = train(1, tmp_path / "run", *settings, "train.save_every=1")
    assert "is finished" in text or "finished:" in text
    text = train(1, tmp_path / "run", *settings, "train.save_every=1", "data.rows_seed=1", expect=2)
    assert "data.rows_seed" in text


def test_a_start_that_cannot_train_leaves_the_running_one_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = start(1, folder, "train.max_steps=4000", "train.save_every=1000")
    while step_of(folder) < 5:
        time.sleep(0.02)
    settings = [*RUN, "train.max_steps=4000", "train.save_every=1000"]
    text = train(1, folder, *settings, f"model.path={tmp_path}", expect=2)
    assert "is in use by" in text
    before = step_of(folder)
    while step_of(folder) < before + 3:
        assert job.ranks[0].poll() is None, "the running job was stopped by a start that failed"
        time.sleep(0.02)
    # A start that could train says who does, and leaves.
    pid = job.ranks[0].pid
    text = train(1, folder, *settings, expect=2)
    assert f"is in use by start 1 on {socket.gethostname()}, pid {pid}," in text
    # The same from a machine on which the holder's pid means nothing: its heart beats.
    held = json.loads((folder / "holder-1.json").read_text())
    (folder / "holder-1.json").write_text(json.dumps({**held, "machine": "another", "job": "41"}))
    text = train(1, folder, *settings, expect=2)
    assert "Slurm job 41, which is training there; wait for it, or scancel 41" in text
    # Two shells of one allocation have the same job; its restart is the one that may take over.
    job_41 = {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "0"}
    words = ["train", *TINY, *settings, f"run_dir={folder}"]
    codes, text = Job(1, words, job_41).wait()
    assert codes == [2] and "Slurm job 41, which is training there" in text
    # Frozen, it is taken over, and once it wakes up it stops without writing, in one line.
    os.kill(pid, signal.SIGSTOP)
    second = Job(1, words, job_41 | {"SLURM_RESTART_COUNT": "1"})
    while not any(row["event"] == "start" and row["generation"] == 2 for row in events(folder)):
        assert second.ranks[0].poll() is None
        time.sleep(0.05)
    os.kill(pid, signal.SIGCONT)
    codes, text = job.wait(60)
    assert codes == [1]
    assert (
        "start 2 of this run owns the folder, this is start 1" in text and "Traceback" not in text
    )
    while step_of(folder) < 3:
        time.sleep(0.02)
    second.kill(signal.SIGTERM)
    codes, text = second.wait()
    assert codes == [75], text
    assert [r["step"] for r in rows(folder)] == list(range(1, step_of(folder) + 1))
    (held,) = folder.glob("holder-*.json")
    assert (held.name, held.read_text()) == ("holder-2.json", "{}\n"), "nobody holds it"


def test_a_holder_without_a_sign_of_life_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.0)
    held = {"start": 3, "host": "n7", "pid": 9, "machine": "another", "began": "1", "job": None}
    for text in (json.dumps({**held, "restarts": 0}), "", "[]", '{"start": 3}', "torn {"):
        (tmp_path / "holder.json").write_text(text)
        lease.check_free(tmp_path)
        said = capsys.readouterr()
        assert "no sign of life from start" in said.out + said.err
        beat = threading.Timer(0.3, lambda: (tmp_path / "heartbeat").write_text("3 1\n"))
        beat.start()
        with pytest.raises(UserError, match="is in use by start"):
            lease.check_free(tmp_path)
        beat.join()
        (tmp_path / "heartbeat").unlink()


FAULTS = (str(Path(__file__).with_name("faults.py")),)


@pytest.mark.parametrize("moment", [pytest.param("row", marks=pytest.mark.full), "save", "end"])
def test_a_hiccup_of_the_file_system_is_lived_through(moment: str, tmp_path: Path) -> None:
    """The fence cannot be read for a moment; a run without its generation file goes on too."""
    settings = [*TINY, *RUN, "train.max_steps=6"]
    train(1, tmp_path / "whole", *settings)
    words = ["train", *settings, f"run_dir={tmp_path}/run"]
    codes, text = Job(1, words, {"FAULT": moment}, FAULTS).wait()
    assert codes == [0], text
    assert int(text.split("looked ")[1].split()[0]) > 15, "all of the trouble came"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


@pytest.mark.multiprocess
@pytest.mark.parametrize("mode", [pytest.param("sharded", marks=pytest.mark.full), "async"])
def test_a_rank_whose_write_fails_commits_nothing(mode: str, tmp_path: Path) -> None:
    """Whatever the error: the other rank's half is no checkpoint, and older ones stay."""
    settings = ["engine.name=fsdp2", f"train.save_mode={mode}", "train.max_steps=8"]
    words = ["train", *TINY, *RUN, *settings, f"run_dir={tmp_path}/run", "train.stop_at=7"]
    codes, text = Job(2, words, {"FAULT": "memory"}, FAULTS).wait()
    # On rank 1 fail the saves of steps 4 and 6, and the last one twice before it is written.
    assert codes == [75, 75], text
    assert text.count("could not be saved: rank 1: MemoryError: no room") == 2
    assert [e["step"] for e in events(tmp_path / "run") if e["event"] == "saved"] == [2, 7]
    train(2, tmp_path / "run", *RUN, *settings)
    train(2, tmp_path / "whole", *RUN, *settings)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def events(folder: Path) -> list[dict[str, Any]]:
    return rows(folder, "events.jsonl")


def test_a_refused_first_start_leaves_no_folder(tmp_path: Path) -> None:
    wrong, old = ["train.max_steps=3", "adapter.target_modules=nobody"], tmp_path / "old"
    for ranks in (1, 2):
        engine = "engine=single" if ranks == 1 else "engine=fsdp2"
        text = train(ranks, tmp_path / "new" / "run", *RUN, *wrong, engine, expect=2)
        assert "nobody" in text and "Traceback" not in text
        assert not (tmp_path / "new").exists()
    old.mkdir()  # the user's own
    assert "nobody" in train(1, old, *RUN, *wrong, expect=2)
    assert old.is_dir() and not list(old.iterdir())
    (old / "notes").write_text("mine")
    assert "nobody" in train(1, old, *RUN, *wrong, expect=2)
    assert [file.name for file in old.iterdir()] == ["notes"]


def test_a_start_whose_folder_another_one_took_away_makes_it_anew(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "a/run"), RunFolder(tmp_path / "a/run")
    first.withdraw()
    assert not (tmp_path / "a").exists()
    second.claim()
    second.withdraw()
    assert second.checkpoints.is_dir()
    third = RunFolder(tmp_path / "a/run")
    third.withdraw()
    assert second.checkpoints.is_dir()


def test_a_start_that_goes_leaves_the_owner_its_folder(tmp_path: Path) -> None:
    owner, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    other._made = owner._made  # both began at once
    owner.claim()
    other.withdraw()
    assert owner.checkpoints.is_dir()


def test_a_run_that_is_longer_than_asked_for_or_lost_its_config(tmp_path: Path) -> None:
    settings = [*RUN, "train.save_every=1"]
    train(1, tmp_path / "run", *settings, "train.max_steps=4", "train.stop_at=3", expect=75)
    text = train(
        1, tmp_path / "run", *settings, "train.max_steps=2", "--resume-with-changes", expect=2
    )
    assert "is at step 3 already, the run is to end at 2" in text
    train(1, tmp_path / "run", *settings, "train.max_steps=4")
    (tmp_path / "run/config.yaml").unlink()
    text = train(1, tmp_path / "run", *settings, "train.max_steps=4", "train.lr=0.5", expect=2)
    assert "config.yaml: no such file; restore it" in text


def test_torchrun_passes_sigusr1_on_with_the_flag_of_the_readme(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc-per-node=2",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
    ]
    assert command[-1] in (ROOT / "docs/getting-started.md").read_text()
    settings = [*TINY, *RUN, "engine.name=fsdp2", "train.max_steps=4000", "train.save_every=1000"]
    agent = subprocess.Popen(
        [*command, "-m", "scalepeft", "train", *settings, f"run_dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while step_of(folder) < 3:
        assert agent.poll() is None
        time.sleep(0.02)
    agent.send_signal(signal.SIGUSR1)
    assert agent.wait(60) == 1, "torchrun has one code for every rank that does not end with 0"
    assert newest_saved(folder) == step_of(folder) >= 3
    assert events(folder)[0]["world_size"] == 2
