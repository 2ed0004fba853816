"""The command line as a user meets it: one line and exit code 2 for a mistake, help, evaluation,
trackers.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, TINY, Job, call, rows, train, zygote


def wrong(*arguments: str) -> str:
    """Runs a wrong command; returns its one line on stderr."""
    done = call(*arguments)
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("scalepeft: error: "), done.stderr
    assert not [line for line in lines if line.startswith("Traceback")]
    return lines[-1]


BASE = ["train", *TINY, "train.max_steps=2"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["train.learning_rate=1"], ["train.learning_rate=1", "no such key", "Allowed", "lr"]),
        (["trian.lr=1"], ["no section 'trian'", "Did you mean 'train'?"]),
        (["adapter.rank=many"], ["adapter.rank='many'", "integer"]),
        (["adapter.rank=7"], ["adapter.rank=7", "even", "6 or 8"]),
        (["adapter.name=hotf"], ["no adapter 'hotf'", "Did you mean 'hoft'?", "lora"]),
        (
            ["adapter.target_modules=q_prj"],
            ["'q_prj' matches no linear layer", "Did you mean 'q_proj'?", "down_proj"],
        ),
        (
            ["data=commonsense", "data.train=/none/rows.json"],
            ["data.train", "/none/rows.json", "no such file"],
        ),
        (["model.path=./no-such-model"], ["model.path=./no-such-model", "no such folder"]),
        (["engine.device=cuda"], ["engine.device=cuda", "no CUDA device"]),
        (["train.max_steps=0"], ["train.max_steps=0", "greater than or equal to 1"]),
        (["train.epochs=1"], ["one of train.max_steps and train.epochs"]),
        (["train.stop_at=2"], ["train.stop_at=2", "train.max_steps=2"]),
        (
            ["model.quant=int8", "model.double_quant=true"],
            ["model.double_quant=true needs model.quant=nf4"],
        ),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
    ids=lambda v: v[0] if len(v) == 1 else None,
)
def test_wrong_settings(settings: list[str], expected: list[str], tmp_path: Path) -> None:
    if "engine.device=cuda" in settings:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    line = wrong(*BASE, f"run_dir={tmp_path}/run", *settings)
    for part in expected:
        assert part in line, line
    assert len(line) < 700


def test_wrong_calls(tmp_path: Path) -> None:
    assert "run_dir is not set" in wrong(*BASE)
    assert "no config file" in wrong("train", "nowhere.yaml")
    assert "COMMAND" in wrong() or "required" in wrong()
    assert "is not a run directory" in wrong("evaluate", str(tmp_path))
    assert "metrics.jsonl" in wrong("report", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in wrong(*BASE, f"run_dir={tmp_path}/file/run")


def test_flags_may_stand_between_settings(tmp_path: Path) -> None:
    line = wrong(*BASE, "--resume-with-changes", f"run_dir={tmp_path}/run", "train.lr=x")
    assert "train.lr='x'" in line
    line = wrong("train", "--nonsense", "run_dir=x")
    assert "unrecognized arguments: --nonsense; see scalepeft train --help" in line
    assert "see scalepeft evaluate --help" in wrong("evaluate")


def test_a_setting_beyond_the_end_of_the_epochs_is_refused(tmp_path: Path) -> None:
    settings = ["train.max_steps=null", "train.epochs=0.04", f"run_dir={tmp_path}/run"]
    line = wrong(*BASE, *settings, "train.stop_at=500")
    assert "train.stop_at=500 is not before the end, train.epochs=0.04 (1 steps)" in line


def test_a_warm_up_longer_than_the_run_is_said(tmp_path: Path) -> None:
    done = call(*BASE, "train.max_steps=1", "train.warmup_steps=500", f"run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "train.warmup_steps=500 is not shorter than the run of 1 steps" in done.stderr


def test_a_cutoff_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    line = wrong(*BASE, "data.cutoff=4096", f"run_dir={tmp_path}/run")
    assert "data.cutoff=4096 is beyond the model's 1024 positions" in line


def test_an_input_that_the_prompt_would_drop_is_refused(tmp_path: Path) -> None:
    row = {"instruction": "a", "input": "context", "output": "b", "answer": "true"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    settings = [s for s in BASE if not s.startswith("data")]
    line = wrong(
        *settings, "data=commonsense", f"data.train={tmp_path}/rows.json", f"run_dir={tmp_path}/run"
    )
    assert "row 1: 'input' is not empty, but data.prompt has no {input}" in line


def test_bad_row_names_file_and_row_and_can_be_skipped(tmp_path: Path) -> None:
    good = {
        "instruction": "Is it?",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(
            [json.dumps({**good, "instruction": f"Is {i}?"}) for i in range(12)]
            + ["{broken"]
            + [json.dumps({**good, "output": ""})]
        )
        + "\n"
    )
    settings = [*BASE, "data=commonsense", f"data.train={file}", f"run_dir={tmp_path}/run"]
    settings.remove("data.train_size=300")
    line = wrong(*settings)
    assert f"{file}, row 13: broken JSON at column 2" in line and "data.on_error=skip" in line
    done = call(*settings, "data.on_error=skip")
    assert done.returncode == 0, done.stderr
    assert f"{file}, row 14: 'output' is empty" in done.stderr and "12 training rows" in done.stderr


def test_wrong_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    line = wrong(
        "train",
        "data=toy",
        f"model.path={shared_data}/models/stories260K/hf",
        "train.max_steps=1",
        f"model.tokenizer={shared_data}/tokenizer/mistral_v1",
        f"run_dir={tmp_path}/run",
    )
    assert "model.tokenizer" in line and "512 ids" in line and "do not belong together" in line


def test_help_and_version_need_no_torch() -> None:
    for arguments in (["--help"], ["train", "--help"], ["submit", "--help"], ["--version"]):
        code = f"import sys\nfrom scalepeft.cli import main\ntry:\n    main({arguments})\n"
        code += (
            "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
        )
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout, done.stderr
    assert "exit codes: 0 finished; 75" in call("train", "--help").stdout


def test_debug_shows_the_traceback() -> None:
    done = call("train", "nowhere.yaml", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(
        1,
        folder,
        "model.quant=nf4",
        "train.max_steps=4",
        "train.tensorboard=true",
        "data.test_size=40",
        "evaluate.batch_size=4",
        "evaluate.max_new_tokens=8",
    )
    return folder


def test_run_folder_holds_what_the_contract_says(finished: Path) -> None:
    found = rows(finished)
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    keys = [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "label_tokens",
        "sample_index",
        "seconds",
        "tokens_per_second",
        "time",
    ]
    assert all(list(r) == keys for r in found)
    assert (finished / "checkpoints/step-000004/manifest.json").is_file()
    description = json.loads((finished / "adapter/scalepeft.json").read_text())
    assert description["adapter"]["name"] == "hoft" and description["base_model"]["quant"] == "nf4"
    assert "rank: 4" in (finished / "config.yaml").read_text()


def test_tensorboard_events_hold_the_losses(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("train/loss")[2].value == pytest.approx(rows(finished)[2]["loss"])


def test_a_finished_run_is_not_trained_again(finished: Path) -> None:
    before = (finished / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    settings = [
        "model.quant=nf4",
        "train.max_steps=4",
        "train.tensorboard=true",
        "data.test_size=40",
    ]
    train(1, finished, *settings)
    assert (finished / "adapter/adapter_model.safetensors").stat().st_mtime_ns == before


def predictions(folder: Path) -> dict[str, str]:
    found = rows(folder, "eval/toy/predictions.jsonl")
    assert len({r["id"] for r in found}) == len(found), "a prediction is doubled"
    return {r["id"]: r["prediction"] for r in found}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.full
def test_evaluation_killed_and_stopped_continues_to_the_same_predictions(
    finished: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(finished, folder)
    assert Job(1, ["evaluate", str(whole)]).wait()[0] == [0]
    scores = json.loads((whole / "eval/toy/scores.json").read_text())
    accuracy = scores["metrics"]["accuracy"]
    assert scores["count"] == 40 and accuracy["ci95"][0] <= accuracy["value"] <= accuracy["ci95"][1]
    assert scores["versions"]["torch"] and scores["no_answer_found"] <= 40

    file = killed / "eval/toy/predictions.jsonl"
    for number, code in ((signal.SIGKILL, -9), (signal.SIGUSR1, 75)):
        job = Job(1, ["evaluate", str(killed)])
        before = file.stat().st_size if file.exists() else 0
        while not file.exists() or file.stat().st_size <= before:
            assert job.ranks[0].poll() is None
            time.sleep(0.005)
        job.kill(number)
        assert job.wait()[0] == [code]
        assert 0 < len(predictions(killed)) < 40
    with file.open("a") as f:
        f.write('{"id": "toy/te')  # torn by a kill in mid-write
    codes, text = Job(1, ["evaluate", str(killed)]).wait()
    assert codes == [0] and "predictions are there already" in text
    assert predictions(killed) == predictions(whole)

    # Two sharded ranks, the last one short of a row: the same answers; other settings do not mix
    # with the old.
    more = ["engine=fsdp2", "evaluate.limit=13", "evaluate.stop=nowhere in an answer"]
    codes, text = Job(2, ["evaluate", str(killed), *more]).wait()
    assert codes == [0, 0], text
    assert f"kept in {killed}/replaced-1" in text
    sharded = predictions(killed)
    assert len(sharded) == 13 and all(predictions(whole)[k] == v for k, v in sharded.items())


BROKEN_FILES = {
    "config.yaml": ["[1, 2]", "hello", "\xff\xfe"],
    "adapter/scalepeft.json": ["[]", '{"adapter": 3}', "{}", "\xff\xfe"],
    "adapter/adapter_config.json": ["[]", "{}"],
    "holder-1.json": ["\xff\xfe"],
    "metrics.jsonl": ["junk\n[1]\n"],
    "events.jsonl": ['{"event": "start"}\njunk\n'],
    "eval/toy/scores.json": ["x"],
    "eval/toy/settings.json": ["x"],
    "eval/toy/predictions.jsonl": ['junk\n{"id": 3}\n'],
}


@pytest.mark.slow
def test_broken_files_of_a_run_never_end_in_a_traceback(finished: Path, tmp_path: Path) -> None:
    """Each command on each broken file: it works, or says in one line what is wrong."""
    settings = [
        "model.quant=nf4",
        "train.max_steps=4",
        "train.tensorboard=true",
        "data.test_size=40",
    ]
    whole = tmp_path / "whole"
    shutil.copytree(finished, whole)
    assert call("evaluate", str(whole), "evaluate.limit=4").returncode == 0
    calls = []
    for name, contents in BROKEN_FILES.items():
        for number, text in enumerate(contents):
            run = tmp_path / f"{name.replace('/', '-')}-{number}"
            shutil.copytree(whole, run)
            (run / name).write_bytes(text.encode("latin-1"))
            commands = [["report", str(run)], ["evaluate", str(run), "evaluate.limit=4"]]
            if name in ("config.yaml", "adapter/scalepeft.json", "holder-1.json"):
                commands = [["train", *TINY, *settings, f"run_dir={run}"], commands[1]]
            calls += commands if "eval" not in name else commands[::-1]
    # One process for all: a start takes longer than what is tested.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = zygote().run(("-c", CALLS), [json.dumps(calls)], env, 300)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(results) == len(calls) > 20
    for command, (code, printed) in zip(calls, results, strict=True):
        assert code in (0, 2), (command, printed)
        if code:
            assert printed.strip().splitlines()[-1].startswith("scalepeft: error: "), printed


CALLS = """
import contextlib, io, json, sys
from scalepeft.cli import main
from scalepeft.run import lease
lease.WATCH_SECONDS = 1.0
for words in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = main(words)
    print(json.dumps([code, printed.getvalue()]))
"""


@pytest.mark.slow
def test_evaluation_refuses_what_would_be_another_run(finished: Path, tmp_path: Path) -> None:
    assert "adapter.rank: cannot be changed" in wrong("evaluate", str(finished), "adapter.rank=8")
    other = tmp_path / "run"
    shutil.copytree(finished, other)
    (other / "adapter/adapter_model.safetensors").write_bytes(b"no adapter")
    assert "is no readable adapter folder" in wrong("evaluate", str(other))
    shutil.rmtree(other / "adapter")
    assert "is no readable adapter folder" in wrong("evaluate", str(other))


def test_nonfinite_steps_are_skipped_and_end_the_run(tmp_path: Path) -> None:
    done = call(
        *BASE,
        "train.max_steps=30",
        "train.lr=1e30",
        "train.max_grad_norm=0",
        "train.max_nonfinite=3",
        "train.schedule=constant",
        "adapter.name=lora",
        "train.save_every=1",
        f"run_dir={tmp_path}/run",
    )
    assert done.returncode == 1
    assert "not finite for 3 steps in a row" in done.stderr
    found = rows(tmp_path / "run")
    assert [r["loss"] is None for r in found][-3:] == [True] * 3
    # The checkpoints are from before the trouble.
    first_bad = next(r["step"] for r in found if r["loss"] is None)
    saved = [int(p.name[5:]) for p in (tmp_path / "run/checkpoints").glob("step-??????")]
    assert saved and max(saved) < first_bad


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [pytest.param("torchrun", marks=pytest.mark.full), "accelerate"],  # test_resume.py has torchrun
)
def test_under_the_usual_launchers(launcher: str, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name(launcher)
    first = (
        [str(program), "--nproc-per-node", "2", "--standalone"]
        if launcher == "torchrun"
        else [
            str(program),
            "launch",
            "--multi_gpu",  # the launcher of real runs: it counts processes, not GPUs
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "29653",
        ]
    )
    command = [*first, "-m", "scalepeft", *BASE, "engine.name=fsdp2", f"run_dir={tmp_path}/run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run", "events.jsonl")[0]["world_size"] == 2


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """scalepeft data ... | head"""
    command = [sys.executable, "-m", "scalepeft", "data", *TINY, "--show", "2000"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert job.stdout and job.stderr
    job.stdout.readline()
    job.stdout.close()
    assert b"Broken" not in job.stderr.read() and job.wait() == 1
