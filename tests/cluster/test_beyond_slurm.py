"""launch/elsewhere and containers, as far as a machine without those systems goes.

The job files are run as they stand but for their settings, by a scheduler played here (variables,
queue, signals) and an mpiexec that starts real ranks, keeps the job's environment from them and
kills them at TERM, as launchers do. Manifests are held to the fields that the public schemas name.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT, TINY, adapter_bytes, losses, rows, train

ELSEWHERE = ROOT / "launch/elsewhere"
SETTINGS = [*TINY, "engine=fsdp2", "engine.device=cpu", "train.save_every=5", "train.max_steps=60"]

# mpiexec [--version] -n N OPTION VALUE... PROGRAM: ranks as children, with a launcher's names.
MPIEXEC = """\
#!{python}
import os, signal, subprocess, sys
flavor = os.environ["FLAVOR"]
if sys.argv[1] == "--version":
    print({{"openmpi": "mpiexec (Open MPI) 4.1.4", "mpich": "HYDRA build details:"}}[flavor])
    sys.exit()
n = int(sys.argv[2])
begin = sys.argv.index("bash")
print("mpiexec", *sys.argv[1:begin], flush=True)
names = {{
    "openmpi": ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
    "mpich": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
}}[flavor]
env = {{"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}}
ranks = [
    subprocess.Popen(sys.argv[begin:], env={{**env, **dict(zip(names, map(str, (r, n, r))))}})
    for r in range(n)
]
def kill(*_):
    for rank in ranks:
        subprocess.run(["pkill", "-KILL", "-P", str(rank.pid)])
        rank.kill()
signal.signal(signal.SIGTERM, kill)
codes = [rank.wait() for rank in ranks]
sys.exit(max(codes, key=abs))
"""

QSUB = """\
#!/bin/bash
# qsub -v NAMES FILE, with the directives in FILE: noted in queue/, to be started by the test
[ "$1" = -v ] && [ $# -eq 3 ] || exit 1
number=$(($(ls {folder}/queue | wc -l) + 1))
for name in ${{2//,/ }}; do [ -n "${{!name+set}}" ] || exit 1; done
for name in ${{2//,/ }}; do echo "$name=${{!name}}"; done > {folder}/queue/$number
cp "$3" {folder}/queued-$number.pbs
echo $number.server
"""

QSTAT = """\
#!/bin/bash
# as PBS folds it: a line that goes on begins with a tab
printf 'Job Id: %s\\n    Resource_List.walltime = %s\\n' "$2" "$(cat {folder}/walltime)"
printf '    Variable_List = PBS_O_HOME=/home/me,RUN_NAME=of the user\\\\,x=1,\\n\\tPBS_O_QUEUE=q\\n'
"""


class Desk:
    """A user's folder, the commands of a scheduler, and the jobs that run."""

    def __init__(self, folder: Path, flavor: str) -> None:
        self.folder, self.jobs = folder, list[subprocess.Popen[bytes]]()
        (folder / "bin").mkdir()
        (folder / "queue").mkdir()
        programs = {"mpiexec": MPIEXEC, "qsub": QSUB, "qstat": QSTAT}
        for name, text in programs.items():
            file = folder / "bin" / name
            file.write_text(text.format(python=sys.executable, folder=folder))
            file.chmod(0o755)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PBS_", "LSB_"))},
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "SCALEPEFT_ROOT": str(ROOT),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "FLAVOR": flavor,
        }

    def job_file(self, template: str) -> Path:
        """A template with the toy run's settings in place of its own."""
        text = (ELSEWHERE / template).read_text()
        words = "\n".join([*SETTINGS, f"run_dir={self.folder}/run"])
        text = re.sub(r"^CONFIG=.*\n", "", text, flags=re.M)
        text, count = re.subn(
            r"(?s)^SETTINGS=\(\n.*?^\)", f"SETTINGS=(\n{words}\n)", text, flags=re.M
        )
        assert count == 1
        file = self.folder / template
        file.write_text(text)
        return file

    def start(self, file: Path, **env: str) -> subprocess.Popen[bytes]:
        job = subprocess.Popen(["bash", file], cwd=self.folder, env={**self.env, **env})
        self.jobs.append(job)
        return job

    def wait_step(self, step: int, job: subprocess.Popen[bytes]) -> None:
        file = self.folder / "run/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not file.exists() or file.read_text().count("\n") < step:
            assert time.monotonic() < deadline and job.poll() is None, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return "".join(file.read_text() for file in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(2, folder, *SETTINGS)
    return folder


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, getattr(request, "param", "mpich"))
    yield desk
    for job in desk.jobs:
        if job.poll() is None:
            job.kill()


def pbs(desk: Desk, number: int) -> dict[str, str]:
    """What PBS sets for job ``number``: two ranks on one node."""
    nodes = desk.folder / "nodes"
    nodes.write_text("node1\nnode1\n")
    return {
        "PBS_JOBID": f"{number}.server",
        "PBS_JOBNAME": "hoft_llama70b",
        "PBS_O_WORKDIR": str(desk.folder),
        "PBS_NODEFILE": str(nodes),
    }


def queued(desk: Desk, number: int) -> tuple[Path, dict[str, str]]:
    text = (desk.folder / f"queue/{number}").read_text()
    passed = dict(line.split("=", 1) for line in text.splitlines())
    return desk.folder / f"queued-{number}.pbs", {**pbs(desk, number), **passed}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_under_pbs_the_job_saves_before_its_walltime_and_submits_itself_again(
    desk: Desk, undisturbed: Path
) -> None:
    """Once by its clock, once by a signal; what the user passed by qsub -v is passed again."""
    file = desk.job_file("hoft_llama70b.pbs")
    (desk.folder / "walltime").write_text("00:05:01")  # GRACE=300: a second
    first = desk.start(file, **pbs(desk, 0), RUN_NAME="of the user")
    assert first.wait(120) == 75, desk.log()
    file.write_text("exit 9  # edited since: what was submitted counts")
    (desk.folder / "walltime").write_text("24:00:00")
    script, env = queued(desk, 1)
    assert env["RUN_NAME"] == "of the user" and env["SCALEPEFT_FIRST_JOB"] == "0.server"
    second = desk.start(script, **env)
    desk.wait_step(12, second)
    second.send_signal(signal.SIGUSR1)
    assert second.wait(120) == 75, desk.log()
    assert 12 <= len(rows(desk.folder / "run")) < 60
    script, env = queued(desk, 2)
    assert desk.start(script, **env).wait(120) == 0, desk.log()
    log = (desk.folder / "hoft_llama70b-0.log").read_text()  # all starts in one
    assert (
        log.count("submitted itself again") == 2 and log.count("scalepeft job 0.server: start") == 3
    )
    assert "mpiexec -n 2 -ppn 2" in log and "finished" in log
    assert len(list((desk.folder / "queue").iterdir())) == 2
    assert not list((desk.folder / "runs/.jobs").iterdir())
    assert losses(desk.folder / "run") == losses(undisturbed)
    assert adapter_bytes(desk.folder / "run") == adapter_bytes(undisturbed)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("desk", ["openmpi"], indirect=True)
def test_under_lsf_a_warning_ends_with_75_and_bkill_does_not(desk: Desk, undisturbed: Path) -> None:
    file = desk.job_file("hoft_llama70b.lsf")
    assert re.search(r"^#BSUB -Q 75$", file.read_text(), re.M)
    env = {"LSB_JOBID": "7", "LSB_JOBNAME": "hoft", "LSB_JOBINDEX": "0", "LSB_MCPU_HOSTS": "a 2 "}
    job = desk.start(file, **env)
    desk.wait_step(12, job)
    job.send_signal(signal.SIGUSR1)  # -wa USR1
    assert job.wait(120) == 75, desk.log()
    begun = len(rows(desk.folder / "run"))
    job = desk.start(file, **env)
    desk.wait_step(begun + 3, job)
    job.send_signal(signal.SIGINT)  # bkill: INT, then TERM, then KILL
    time.sleep(1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 143, desk.log()  # -Q 75 does not take it up
    assert "does not start again" in desk.log()
    assert desk.start(file, **env).wait(120) == 0, desk.log()
    assert "mpiexec -n 2 --map-by ppr:2:node --bind-to none" in desk.log()
    assert adapter_bytes(desk.folder / "run") == adapter_bytes(undisturbed)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_after_qdel_and_after_an_error_nothing_is_submitted(desk: Desk) -> None:
    (desk.folder / "walltime").write_text("24:00:00")
    file = desk.job_file("hoft_llama70b.pbs")
    job = desk.start(file, **pbs(desk, 0))
    desk.wait_step(3, job)
    # TERM to the whole job, as PBS sends it: this mpiexec kills its ranks.
    launcher = subprocess.run(
        ["pgrep", "-P", str(job.pid), "-f", "bin/mpiexec"],
        capture_output=True,
        text=True,
        check=True,
    )
    job.send_signal(signal.SIGTERM)
    os.kill(int(launcher.stdout.split()[0]), signal.SIGTERM)
    assert job.wait(60) not in (0, 75), desk.log()
    file.write_text(file.read_text().replace("model=tiny", "model=nonsense"))
    assert desk.start(file, **pbs(desk, 1)).wait(60) not in (0, 75)
    assert "nonsense" in desk.log() and "it does not start again" in desk.log()
    assert not list((desk.folder / "queue").iterdir())


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"PBS_ARRAY_INDEX": "1"}, "submit a job for each"),
        ({"SCALEPEFT_MAX_RESTARTS": "0"}, "SCALEPEFT_MAX_RESTARTS=0: expected a whole number"),
        ({"SCALEPEFT_MPIEXEC": "env -u X"}, "the launcher sets no rank"),
    ],
)
def test_what_a_job_cannot_do_is_said_before_it_runs(
    desk: Desk, env: dict[str, str], reason: str
) -> None:
    (desk.folder / "walltime").write_text("24:00:00")
    job = desk.start(desk.job_file("hoft_llama70b.pbs"), **pbs(desk, 0), **env)
    assert job.wait(60) == 2 and reason in desk.log()


def test_a_job_that_cannot_tell_its_file_says_how_to_name_it(desk: Desk) -> None:
    """Fed to bash as standard input, as some sites have PBS do."""
    file = desk.job_file("hoft_llama70b.pbs")
    (desk.folder / "walltime").write_text("00:05:00")
    with file.open() as script:
        for more, reason in (
            ({}, "-v SCALEPEFT_JOB_FILE=FILE"),
            ({"SCALEPEFT_JOB_FILE": str(file)}, "leaves nothing of a walltime"),
        ):
            script.seek(0)
            env = {**desk.env, **pbs(desk, 0), **more}
            done = subprocess.run(["bash"], cwd=desk.folder, env=env, stdin=script, check=False)
            assert done.returncode == 2 and reason in desk.log()


def test_a_walltime_shorter_than_the_grace_is_refused(desk: Desk) -> None:
    (desk.folder / "walltime").write_text("00:05:00")
    assert desk.start(desk.job_file("hoft_llama70b.pbs"), **pbs(desk, 0)).wait(60) == 2
    assert "GRACE=300 s leaves nothing of a walltime of 00:05:00" in desk.log()


# Fields by kubernetes-sigs/jobset api/jobset/v1alpha2/jobset_types.go and kubernetes' batch/v1 and
# core/v1 references; those that the manifest may use. A tuple: allowed values. A list: of such.
JOBSET: dict[str, Any] = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": str},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate"),
            "rules": [
                {
                    "name": str,
                    "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                    "onJobFailureReasons": [("PodFailurePolicy", "BackoffLimitExceeded")],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "completionMode": ("Indexed",),
                        "completions": int,
                        "parallelism": int,
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": ("FailJob", "FailIndex", "Ignore", "Count"),
                                    "onExitCodes": {
                                        "containerName": str,
                                        "operator": ("In", "NotIn"),
                                        "values": [int],
                                    },
                                    "onPodConditions": [
                                        {"type": ("DisruptionTarget",), "status": ("True",)}
                                    ],
                                }
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": ("Never",),  # what a podFailurePolicy demands
                                "terminationGracePeriodSeconds": int,
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "workingDir": str,
                                        "resources": {"limits": {"nvidia.com/gpu": int}},
                                        "env": [{"name": str, "value": str}],
                                        "command": [str],
                                        "args": [str],
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name": str,
                                        "persistentVolumeClaim": {"claimName": str},
                                        "emptyDir": {"medium": ("Memory",)},
                                    }
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}
# By skypilot-org/skypilot sky/utils/schemas.py and docs/source/reference/yaml-spec.rst.
SKYPILOT: dict[str, Any] = {
    "name": str, "num_nodes": int, "workdir": str, "setup": str, "run": str,
    "resources": {
        "infra": str, "accelerators": str, "use_spot": bool,
        "job_recovery": {
            "strategy": ("FAILOVER", "EAGER_NEXT_REGION"),
            "max_restarts_on_errors": int,
            "recover_on_exit_codes": [int],
        },
    },
    "volumes": {"/shared": str},
    "envs": {"HF_HOME": str, "SCALEPEFT_CACHE": str},
}  # fmt: skip


def conform(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict) and set(value) <= set(schema), (where, value)
        for key, inner in value.items():
            conform(inner, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, (where, value)
        for inner in value:
            conform(inner, schema[0], f"{where}[]")
    elif isinstance(schema, tuple):
        assert value in schema, (where, value)
    else:
        assert type(value) is schema, (where, value)


def shells() -> dict[str, str]:
    """What the two manifests have a node run."""
    jobset = yaml.safe_load((ELSEWHERE / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    sky = yaml.safe_load((ELSEWHERE / "skypilot.yaml").read_text())
    return {"jobset": job["template"]["spec"]["containers"][0]["args"][0], "sky": sky["run"]}


def test_the_jobset_restarts_on_75_without_limit_and_else_three_times() -> None:
    jobset = yaml.safe_load((ELSEWHERE / "jobset.yaml").read_text())
    conform(jobset, JOBSET, "jobset")
    spec = jobset["spec"]
    again, counted = spec["failurePolicy"]["rules"]  # the first that matches decides
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert again["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert counted["action"] == "RestartJobSet" and "onJobFailureReasons" not in counted
    assert spec["failurePolicy"]["maxRestarts"] == 3
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (codes, disrupted) = job["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [75] and codes["action"] == disrupted["action"]
    assert codes["onExitCodes"]["containerName"] == container["name"]
    env = {pair["name"]: pair["value"] for pair in container["env"]}
    assert int(env["SCALEPEFT_NODES"]) == job["completions"] == job["parallelism"]
    name = jobset["metadata"]["name"]  # <jobset>-<replicatedJob>-<job>-<pod>.<jobset>
    assert env["MASTER_ADDR"] == f"{name}-{group['name']}-0-0.{name}"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"launch/local.sh {gpus} train" in container["args"][0]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_the_skypilot_job_recovers_on_75_without_limit_and_else_three_times() -> None:
    job = yaml.safe_load((ELSEWHERE / "skypilot.yaml").read_text())
    conform(job, SKYPILOT, "skypilot")
    recovery = job["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75] and recovery["max_restarts_on_errors"] == 3


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_manifests_commands_train_on_two_machines_and_end_with_75_together(
    desk: Desk, undisturbed: Path
) -> None:
    """The pods' command is stopped by a TERM to one; SkyPilot's command finishes the run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    words = " ".join([*SETTINGS, f"run_dir={desk.folder}/run"])

    def nodes(text: str, **env: str) -> list[subprocess.Popen[bytes]]:
        text, count = re.subn(r"(?s)train commonsense_hoft.*", f"train {words}\n", text)
        assert count == 1
        file = desk.folder / "node.sh"
        file.write_text(
            text.replace("/opt/scalepeft", str(ROOT))
            .replace("launch/local.sh 8", "launch/local.sh 1")
            .replace("bash launch/", f"bash {ROOT}/launch/")
        )
        index = "JOB_COMPLETION_INDEX" if "JOB_COMPLETION_INDEX" in text else "SKYPILOT_NODE_RANK"
        return [desk.start(file, MASTER_PORT=port, **env, **{index: str(i)}) for i in range(2)]

    pods = nodes(shells()["jobset"], SCALEPEFT_NODES="2", MASTER_ADDR="127.0.0.1")
    desk.wait_step(10, pods[0])
    pods[1].send_signal(signal.SIGTERM)
    assert [pod.wait(60) for pod in pods] == [75, 75]
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    again = nodes(shells()["sky"], **sky, SKYPILOT_NUM_GPUS_PER_NODE="1")
    assert [node.wait(120) for node in again] == [0, 0]
    assert adapter_bytes(desk.folder / "run") == adapter_bytes(undisturbed)


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"SCALEPEFT_NODES": "2"}, "needs MASTER_ADDR=HOST"),
        ({"SCALEPEFT_NODES": "x"}, "expected whole numbers"),
        ({"SCALEPEFT_NODES": "2", "SCALEPEFT_NODE": "2", "MASTER_ADDR": "a"}, "the first is 0"),
    ],
)
def test_local_sh_refuses_half_a_word_on_machines(env: dict[str, str], reason: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "launch/local.sh", "1", "train"],
        env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_shell_passes_shellcheck(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "no shellcheck (Debian: shellcheck)"
        pytest.skip("no shellcheck")
    files = [f for end in ("sh", "pbs", "lsf") for f in ELSEWHERE.glob(f"*.{end}")]
    files.append(ROOT / "containers/install.sh")
    for name, text in shells().items():
        files.append(tmp_path / f"{name}.sh")
        files[-1].write_text(f"#!/bin/bash\n{text}")
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, files)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_both_container_recipes_install_the_same() -> None:
    docker = (ROOT / "containers/Dockerfile").read_text()
    apptainer = (ROOT / "containers/scalepeft.def").read_text()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (.*)$", docker, re.M)]
    into_docker = {source for sources in copied for source in sources}
    section = apptainer.partition("%files\n")[2].partition("\n\n")[0]
    pairs = [line.split() for line in section.splitlines()]
    assert into_docker == {source for source, _ in pairs}
    for source, target in pairs:
        assert (ROOT / source).exists() and target == f"/opt/scalepeft/{source}"
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", docker, re.M))
    assert arguments == dict(re.findall(r"^    (\w+)=(.*)$", apptainer, re.M))
    assert 'install.sh "$EXTRAS" "$TORCH_INDEX"' in docker
    assert 'install.sh "{{ EXTRAS }}" "{{ TORCH_INDEX }}"' in apptainer
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(arguments["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
    # what the build of the package reads
    assert {"pyproject.toml", "README.md", *project["license-files"], "configs"} <= into_docker
    lines = (ROOT / "containers/install.sh").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in x and "--no-cache-dir" in x for x in installs)
    assert re.search(r"^USER \d+:\d+$", docker, re.M)
