"""What launch/submit refuses before the queue, and what it renders. The queue: test_slurm.py."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from processes import ROOT, TINY, train

from scalepeft.analysis.compare import cells
from scalepeft.analysis.compare import command as compare
from scalepeft.cluster import sbatch, status, submit
from scalepeft.cluster.plan import planning
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag
from scalepeft.run import status as run_status

SOURCE = 'source "${SCALEPEFT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/train.sh" "$@"\n'


HEAD = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = [p for p in ("/usr/bin", "/bin") if not shutil.which("sbatch", path=p)]
    (tmp_path / "bin").mkdir()
    for name in ("bash", "git", "env"):  # a machine without Slurm
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", ":".join([str(tmp_path / "bin"), *path]))


def job(*settings: str, head: str = HEAD) -> str:
    words = " ".join([*TINY, "engine=fsdp2", "train.max_steps=4", "run_dir=run", *settings])
    Path("job.sh").write_text(f"{head}SETTINGS=({words})\n{SOURCE}")
    return "job.sh"


def parts(printed: str) -> dict[str, str]:
    """What a dry run prints of each job: its script, and its words for sbatch."""
    found: dict[str, str] = {}
    pieces = re.split(r"# ---- (\w+)\.(?:sh|args)\n", printed.partition("# ---- configs/")[0])
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        found[name] = found.get(name, "") + text
    return found


def call(file: str, *settings: str, **more: object) -> None:
    values = {"sweep": [], "throttle": 0, "then": None, "sbatch": [], "dry_run": True}
    values |= {"resume_with_changes": False, **more}
    submit.run(submit.Options(job_file=file, settings=list(settings), **values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "more", "text"),
    [
        (["train.global_batch=7"], {}, "train.global_batch=7 cannot be shared evenly by 2 ranks"),
        (["adapter=hotf"], {}, "Did you mean 'hoft'"),
        (["model.path=/nowhere"], {}, "model.path=/nowhere: no such folder"),
        (["data=commonsense", "data.train=rows.json"], {}, "rows.json: no such file"),
        ([], {"sweep": ["train.lr"]}, "expected KEY=A,B,C"),
        ([], {"sweep": ["train.seed=1,2", "train.seed=3,4"]}, "the same run appears twice"),
        ([], {"sweep": ["train.lr=1e-3,x"]}, "train.lr='x'"),
        ([], {"throttle": 2}, "--throttle 2"),
        ([], {"sbatch": ["array=0-3"]}, "--sweep KEY=A,B,C"),
        ([], {"sbatch": ["chdir=nowhere"]}, "--chdir=nowhere: No such file"),
        ([], {"sbatch": ["ntasks=5"]}, "cannot be shared evenly by 5 ranks"),
    ],
)
def test_settings_are_refused_before_the_queue(
    settings: list[str], more: dict[str, object], text: str
) -> None:
    with pytest.raises(UserError) as found:
        call(job(), *settings, **more)
    assert text in str(found.value) and not Path("run").exists()


@pytest.mark.parametrize(
    ("head", "tail", "text"),
    [
        ("", SOURCE, "not a job file"),
        (HEAD, "", "not a job file"),
        (HEAD + "export A=1\n#SBATCH --time=10\n", SOURCE, "line 4: Slurm does not read"),
        ("#!/bin/bash\n#SBATCH --comment=it's\n", SOURCE, "No closing quotation"),
        ("#!/bin/bash\n#SBATCH -N 2\n", SOURCE, "--nodes=2 without --ntasks-per-node"),
        ("#!/bin/bash\n#SBATCH -N2 --ntasks-per-node 5\n", SOURCE, "by 10 ranks"),
        (HEAD + "if true; then\n", SOURCE + "fi\n", "ends within an if"),
        (HEAD + "echo broken >&2; exit 3\n", SOURCE, "broken"),
        (HEAD + "SETTINGS=(run_dir=r/$SLURM_ARRAY_TASK_ID)\n", SOURCE, "run_dir=r/$SLURM_..."),
    ],
)
def test_job_files_are_refused_before_the_queue(head: str, tail: str, text: str) -> None:
    words = " ".join([*TINY, "engine=fsdp2", "train.max_steps=4"])
    if "run_dir" not in head:
        words += " run_dir=run"
    Path("job.sh").write_text(f"{head}SETTINGS+=({words})\n{tail}")
    with pytest.raises(UserError, match=re.escape(text)):
        call("job.sh")
    with pytest.raises(UserError, match=r"nofile\.sh"):
        call("nofile.sh")


@pytest.mark.slow
def test_what_is_rendered(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub dir").mkdir()
    head = HEAD + '#SBATCH --time=5\n\nmodule() { :; }\nexport HF_HOME="/a b"\n'
    file = job("'data.prompt={instruction} \"$5\"'", head=head)
    call(
        file,
        "adapter.rank=2",
        sweep=["adapter=hoft,lora", "train.lr=1e-3,2e-3"],
        throttle=1,
        sbatch=["chdir=sub dir", "--time=7", "-p debug"],
        then="evaluate",
    )
    printed = capsys.readouterr().out
    script = printed.partition("# ---- evaluate.sh")[0]
    order = ["#SBATCH --time=5", "module()", "HF_HOME", "targets=(", "source"]
    assert [script.index(part) for part in order] == sorted(script.index(p) for p in order)
    here = Path.cwd()
    words = shlex.split(script.split("# ---- train.args\n")[1])
    assert here.name == "sub dir" and f"--chdir={here}" in words and "--time=7" in words
    assert "--array=0-3%1" in words and "--partition=debug" in words
    assert printed.count("rank: 2") == 4, "the command line's keys are laid over a swept section"
    assert printed.count("prompt: '{instruction} \"$5\"'") == 4
    assert sorted(p for p in here.iterdir()) == [], "a dry run writes nothing"


def test_stages_that_need_no_gpu_ask_for_none(capsys: pytest.CaptureFixture[str]) -> None:
    head = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --mem=0\n#SBATCH --gres=gpu:8\n"
    file = job(head=head)
    call(
        file, pipeline=True, plan=False, sbatch=["gpus-per-node=4", "time=9"],
        cpu_sbatch=["partition=cpu", "mem=4G"],
    )  # fmt: skip
    found = parts(capsys.readouterr().out)
    assert list(found)[:5] == ["prepare", "train", "merge", "evaluate", "report"]
    for stage in ("prepare", "merge", "report"):
        assert "--gpus" not in found[stage] and "--time=9" in found[stage]
        assert "gres" not in found[stage] and "--mem=0" not in found[stage]
        assert "--nodes=1" in found[stage] and "--partition=cpu" in found[stage]
        assert "#SBATCH" not in found[stage]
    for stage in ("train", "evaluate"):
        assert "#SBATCH --gres=gpu:8" in found[stage] and "--partition" not in found[stage]
        assert f"SETTINGS=(--stage {stage})" in found[stage]
    with pytest.raises(UserError, match="has no effect with --pipeline"):
        call(file, pipeline=True, then="evaluate")
    with pytest.raises(UserError, match="--cpu-sbatch is for the CPU stages"):
        call(file, cpu_sbatch=["partition=cpu"])


@pytest.mark.slow
def test_a_run_with_changes_needs_the_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(1, tmp_path / "run", "train.max_steps=2", "engine=fsdp2")
    with pytest.raises(UserError, match="add --resume-with-changes"):
        call(job())
    call(job(), resume_with_changes=True)
    assert "SETTINGS=(--resume-with-changes)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no sbatch on this machine"):
        call(job(), resume_with_changes=True, dry_run=False)
    folder = tmp_path / "run/submissions/001"
    assert (folder / "code/scalepeft/train.py").read_bytes() == (
        ROOT / "scalepeft/train.py"
    ).read_bytes()
    assert re.match(r"[0-9a-f]{40}\n", (folder / "code/COMMIT").read_text())


@pytest.mark.parametrize(
    ("head", "more", "text"),
    [
        (HEAD, {"gpu": "H1000"}, "no GPU 'H1000'"),
        (
            HEAD + "#SBATCH --gpus-per-node=a100:1 --constraint=a100-40\n",
            {"gpu": "A100-40", "settings": ["model.path=meta-llama/Llama-3.1-405B"]},
            "A100-40 has 39.4",
        ),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_a_plan_refuses(
    head: str, more: dict[str, object], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = more.pop("settings", [])
    with pytest.raises(UserError) as found:
        call(job(head=head), *settings, **more)  # type: ignore[misc]
    assert text in str(found.value)
    call(job(head=head), *settings, plan=False)  # type: ignore[misc]
    assert "GiB a GPU" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_too_late_even_for_the_step_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HEAD + "#SBATCH --signal=B:USR1@30\n"
    call(job(head=head))
    said = capsys.readouterr().err
    assert "comes 30 s before the time limit; --signal=B:USR1@60 leaves 2 times" in said
    monkeypatch.setattr(planning, "HASH_BYTES_PER_SECOND", 1.0)
    with pytest.raises(UserError, match=r"a step and a save alone take [\d.]+ s .*@\d+, or add"):
        call(job(head=head))


@pytest.mark.slow
def test_what_only_the_assumed_constants_overfill_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "CONTEXT_BYTES", 80 * planning.GIB)
    call(job(), gpu="NVIDIA H100 80GB HBM3")
    said = capsys.readouterr().err
    assert "for GPU H100, by --gpu" in said and "plan: tight: 0.0 GiB of tensors fit H100" in said


@pytest.mark.parametrize(
    ("option", "nodes"), [("--nodes=2-4", 2), ("-N 3", 3), ("-N2-4", 2), ("-t 5", None)]
)
def test_a_range_of_nodes_is_its_fewest(option: str, nodes: int | None) -> None:
    assert sbatch.nodes_of(sbatch.header_of([f"#SBATCH {option}"])) == nodes


def test_gpu_without_a_plan_is_refused() -> None:
    with pytest.raises(UserError, match="--gpu H100 has no effect with --no-plan"):
        call(job(), gpu="H100", plan=False)


@pytest.mark.slow
def test_what_a_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    call(job(head=HEAD + "#SBATCH --signal=B:USR1@60 --gres=gpu:h100:1\n"))
    said = capsys.readouterr().err
    assert "for GPU H100, by --gres=gpu:h100:1\n" in said and "grace period 60 s" in said
    assert "comes 60 s" not in said
    call(job(head=HEAD + "#SBATCH --gres=gpu:a100:1\n"))
    assert "--gres=gpu:a100:1 names no GPU that is known here" in capsys.readouterr().err
    call(job(), "model.path=someone/model", sweep=["train.lr=1e-3,1e-4"])
    assert capsys.readouterr().err.count("not planned: model.path=someone/model") == 1


@pytest.mark.parametrize(
    ("head", "gpu"),
    [
        ("--gres=gpu:h100:8", "H100"),
        ("--gres=nvme:200,gpu:h100", "H100"),
        ("--gpus-per-node=nvidia_h200:8", "H200"),
        ("--gpus-per-task=l40s:1 --cpus-per-gpu=40", "L40S"),
        ("--gres=gpu:a100_80gb:4", "A100-80"),
        ("--gpus=b200:4", "B200"),
        ("-G a100-sxm4-80gb:4", "A100-80"),
        ("--gpus-per-node=8", None),
        ("--gres=gpu:a100:4", None),
        ("--gres=gpu:gh200:4", None),
        ("--gres=gpu:a100:8 --mem-per-gpu=80G", None),
        ("--gres=gpu:a100:8 --cpus-per-gpu=40", None),
        ("--gpus=a100:40", None),
        ("--gres=shard:80 --constraint=h100", None),
        ("--gres=gpu:h100_1g.10gb:2", None),
        ("--gpus=h100:4,h200:4", None),
    ],
)
def test_the_gpu_that_a_job_file_names(head: str, gpu: str | None) -> None:
    found, _ = sbatch.gpu_of(sbatch.header_of([f"#SBATCH {head}"]))
    assert (found and found.name) == gpu


@pytest.mark.slow
def test_a_comparison_is_two_arrays_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    head = "#!/bin/bash\n#SBATCH --nodes=1 --ntasks-per-node=2 --gpus-per-node=2\n"
    file = job("data.valid_size=20", "adapter.rank=4", "train.lr=1e-3", head=head)
    words = ["methods=hoft,lora,goft", "lrs=1e-4,1e-3", "seeds=2"]
    call(file, compare=words, plan=False, throttle=3, cpu_sbatch=["mem=2G"])
    read = capsys.readouterr()
    assert "adapter.rank=4, train.lr=1e-3: left out, each method brings its own" in read.err
    found = parts(read.out)
    assert list(found)[:3] == ["sweep", "seeds", "table"]
    for name, first, last in (("sweep", 0, 5), ("seeds", 6, 11)):
        assert "--array=0-5%3" in found[name] and "%A_%a.log" in found[name]
        cells = " ".join(f"--cell={i}" for i in range(first, last + 1))
        assert f"targets=({cells})\n" in found[name] and "gpus-per-node" in found[name]
        assert "SCALEPEFT_COMMAND=compare\n" in found[name]
    assert "targets=(--table)\n" in found["table"] and "--array" not in found["table"]
    assert "gpus-per-node" not in found["table"] and "--mem=2G" in found["table"]
    assert f"SETTINGS=(--out {Path.cwd()}/run)" in found["table"]
    assert not Path("run").exists(), "a dry run writes nothing"
    assert "# ---- design.json" in read.out and "# ---- configs/0.yaml" not in read.out
    call(file, compare=["methods=hoft,goft", "lrs=1e-3"])
    said = capsys.readouterr().err
    assert "plan: hoft: " in said and "plan: goft: " in said and "plan: lora: " not in said


def test_a_site_stands_between_file_and_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("here.yaml").write_text("{gpus_per_node: 2, sbatch: {account: ours, constraint: gpu}}")
    file = job(head="#!/bin/bash\n#SBATCH -N2 -A mine -c 3 -o %x.log -J other --exclusive\n")
    more = {"site": "here.yaml", "pipeline": True, "plan": False, "cpu_sbatch": ("-C=cpu",)}
    call(file, "data.test=[]", sbatch=["-A=last"], **more)
    read = capsys.readouterr()
    assert "site here.yaml: its own in the place of the job file's --account=mine" in read.err
    found = parts(read.out)
    log = f"--output={Path.cwd()}/run/submissions/001/%x-%j.log"
    for name, kind in (("train", "gpu"), ("merge", "cpu")):
        words = shlex.split(found[name].rpartition("\n--")[2])
        assert {"account=last", log[2:], f"constraint={kind}"} <= {w.lstrip("-") for w in words}
        assert not any(w.startswith("-") and not w.startswith("--") for w in words)
        assert ("--exclusive" in words) == (kind == "gpu") and "--cpus-per-task=3" in words
        assert "--job-name=run-merge" in words or kind == "gpu"


@pytest.mark.parametrize(
    ("words", "more", "text"),
    [
        (["seeds=2"], {}, "--methods is missing"),
        (["methods=hoft", "seed=2"], {}, "--compare seed=2: expected methods=..."),
        (["methods=hoft", "seeds=two"], {}, "--seeds two: Input should be a valid integer"),
        (["methods=hoft", "budget=time"], {}, "'parameters' or 'steps'"),
        (["methods=hoft", "seconds=5"], {}, "--compare seconds=5: expected methods=..."),
        (["methods=hotf"], {}, "Did you mean 'hoft'"),
        (["methods=hoft"], {"then": "evaluate"}, "--compare goes without --then"),
        (["methods=hoft"], {"sweep": ["train.lr=1,2"]}, "--compare goes without --then"),
        (["methods=hoft"], {"resume_with_changes": True}, "runs again what a change asks for"),
    ],
)
def test_a_comparison_is_refused_before_the_queue(
    words: list[str], more: dict[str, object], text: str
) -> None:
    with pytest.raises(UserError) as found:
        call(job("data.valid_size=20"), compare=words, plan=False, **more)
    assert text in str(found.value) and not Path("run").exists()


def slurm(**jobs: list[str]) -> None:
    """A Slurm that knows these jobs: number after ``j`` -> the states of its tasks."""
    cases = ""
    for name, states in jobs.items():
        said = "; ".join(f"echo JobId={name[1:]} {state} NodeList=n1" for state in states)
        cases += f"{name[1:]}) {said} ;;\n"
    file = Path("bin/scontrol")
    file.write_text(f'#!/bin/bash\ncase "$4" in\n{cases}*) exit 1;;\nesac\n')
    file.chmod(0o755)


def queued(**steps: int) -> None:
    for number, names in (("001", {"train": 1}), ("002", steps)):
        folder = Path("run/submissions") / number
        folder.mkdir(parents=True)
        for name, n in names.items():
            (folder / f"{name}.job").write_text(f"{n}\n")


@pytest.mark.parametrize(
    ("steps", "jobs", "text"),
    [
        (
            {"sweep": 2, "seeds": 3},
            {"j3": ["JobState=PENDING Reason=Dependency"]},
            "job of the run: 3 (",
        ),
        (
            {"prepare": 2, "train": 3, "evaluate": 4},
            {"j3": ["JobState=COMPLETED"], "j4": ["JobState=PENDING"]},
            "job of the run: 4 (PENDING)",
        ),
        (
            {"sweep": 2},
            {"j2": ["JobState=FAILED", "JobState=RUNNING"]},
            "job of the run: 2 (RUNNING)",
        ),
        (
            {"sweep": 2},
            {"j1": ["JobState=RUNNING"], "j2": ["JobState=FAILED"]},
            "job of the run: 1 (RUNNING)",
        ),
        ({"sweep": 2}, {"j1": ["JobState=COMPLETED"], "j2": ["JobState=FAILED"] * 2}, ""),
    ],
)
def test_a_run_with_a_job_in_the_queue_is_refused(
    steps: dict[str, int], jobs: dict[str, list[str]], text: str
) -> None:
    slurm(**jobs)
    queued(**steps)
    file = job()
    if not text:
        assert run_status.job_of(Path("run")) is None
        return
    with pytest.raises(UserError) as found:
        call(file, plan=False)
    assert text in str(found.value)


def test_status_of_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    options = compare.Options.parse(
        ["methods=lora", "lrs=1,2", "seeds=3", "budget=steps"],
        ["model=tiny", "data=toy", "train.max_steps=4", "data.valid_size=20"],
        "run",
    )
    design = compare.prepare(options)
    compare.keep(Path("run"), design)
    runner = cells.Runner(Path("run"), design, StopFlag())
    tried = [*cells.sweep(design), cells.Cell("lora", 2.0, 1), cells.Cell("lora", 2.0, 2)]
    states = ["done", "done", "broke", "begun"]
    for cell, state in zip(tried, states, strict=True):
        ((stage, inputs),) = runner.stages(runner.config(cell))
        stage.begin(inputs)
        if state == "done":
            stage.finish(inputs, [], 0.0, result={"loss": 1 / (cell.lr or 1)})
        elif state == "broke":
            stage.note(state=state, reason="gone")
    begun = {"event": "start", "time": time.time(), "steps": 4}
    (stage.root / "events.jsonl").write_text(json.dumps(begun) + "\n")
    slurm(j2=["JobState=COMPLETED"], j3=["JobState=RUNNING", "JobState=PENDING Reason=Priority"])
    queued(sweep=2, seeds=3, table=4)
    status.run(["run"], as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "comparison run",
        "  cells     2 done, 1 running, 1 broke, 1 left of 5",
        "  sweep     Slurm job 2: 1 COMPLETED",
        "  seeds     Slurm job 3: 1 RUNNING, 1 PENDING (Priority)",
        "  table     Slurm job 4: not known to a Slurm here",
    ]
    status.run(["run"], as_json=True)
    (found,) = json.loads(capsys.readouterr().out)
    assert found["cells"] == {
        "done": 2, "running": 1, "failed": 0, "broke": 1, "left": 1, "all": 5,
    }  # fmt: skip
