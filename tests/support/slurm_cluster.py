"""A real Slurm on this one machine: slurmctld, and a slurmd a node in namespaces of its own.

UTS namespace: the node has its own host name. PID namespace: killing its first process takes slurmd
and every job process along, as a power cut does. Mount namespace: its own /proc and /etc/hosts, and
mounts that only this node sees. The network is shared: node K is 127.0.1.K.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "munged",
    "unshare",
    "setpriv",
)


DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # also when the tests themselves are killed


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str | None:
    """Says what this machine lacks for a cluster; None where all is there."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if lacking:
        return f"no {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "not root"
    probe = ["unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "namespaces cannot be made here"
    return None


def _tree(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    for child in map(int, listed.stdout.split()):
        found += [child, *_tree(child)]
    return found


def _free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row."""
    for first in range(16800, 19800, 20):
        with contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                try:
                    stack.enter_context(socket.socket()).bind(("", port))
                except OSError:
                    break
            else:
                return first
    raise RuntimeError("no free ports from 16800 to 19800")


class Cluster:
    """``nodes`` virtual nodes of ``gpus`` fake GPUs each, partitions ``main`` and, above it,
    ``high``.
    """

    def __init__(self, nodes: int = 4, cpus: int = 4, gpus: int = 2) -> None:
        self.nodes, self.port = nodes, _free_ports(nodes + 1)
        self.folder = folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        folder.chmod(0o755)  # munged runs as its own user
        self.options = ""
        for name in ("munge", "ctld", "spool", "log", "dev", "pid", "small-disk"):
            (folder / name).mkdir()
        self.small_disk = folder / "small-disk"
        """A disk of 256 KiB that all nodes share."""
        names = "".join(f"127.0.1.{k} node{k}\n" for k in range(1, nodes + 1))
        hosts = Path("/etc/hosts").read_text() + "127.0.0.1 ctl\n" + names
        (folder / "hosts").write_text(hosts)
        for g in range(gpus):  # the driver's device files must be device nodes; this is /dev/null
            os.mknod(folder / "dev" / f"gpu{g}", 0o020666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(
            f"NodeName=node[1-{nodes}] Name=gpu File={folder}/dev/gpu[0-{gpus - 1}]\n"
        )
        self._nodes = "".join(
            f"NodeName=node{k} NodeAddr=127.0.1.{k} Port={self.port + k} CPUs={cpus}"
            f" RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN\n"
            for k in range(1, nodes + 1)
        )
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()
        try:
            mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(self.small_disk)]
            subprocess.run(mount, check=True)
            self._munge()
            self._spawn("ctl", ["--uts", "--mount"], "exec slurmctld -c -D")
            for k in range(1, nodes + 1):
                self.start(k)
            self._wait_idle()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        f = self.folder
        (f / "slurm.conf").write_text(
            f"""\
ClusterName=test
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={self.port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also what a requeued job waits at least before it starts again
AuthInfo=socket={f}/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={f}/ctld
SlurmctldPidFile={f}/pid/slurmctld.pid
SlurmctldLogFile={f}/log/slurmctld.log
SlurmdSpoolDir={f}/spool/%n
SlurmdPidFile={f}/pid/slurmd.%n.pid
SlurmdLogFile={f}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=86400
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{self.options}
{self._nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
        )

    def _munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        folder.chmod(0o711)
        command = "setpriv --pdeathsig=KILL --reuid=munge --regid=munge --clear-groups"
        command += " munged --foreground"
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log"}
        files["seed-file"] = "seed"
        command += "".join(f" --{option}={folder}/{name}" for option, name in files.items())
        self._processes["munge"] = subprocess.Popen(command.split(), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not (folder / "sock").exists():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.02)

    def _spawn(self, name: str, namespaces: list[str], command: str) -> None:
        script = f"mount --bind {self.folder}/hosts /etc/hosts; hostname {name}; {command}"
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*DIES_WITH_US, "unshare", *namespaces, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
            )

    def start(self, node: int) -> None:
        """Powers a node on."""
        (self.folder / "spool" / f"node{node}").mkdir(exist_ok=True)
        own = ["--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
        wait = "while :; do sleep 3600 & wait $!; done"
        self._spawn(f"node{node}", own, f"slurmd -N node{node}; {wait}")

    def crash(self, node: int, notice: bool = True) -> None:
        """Cuts a node's power; with ``notice`` Slurm learns of it now, not after its time-out."""
        process = self._processes.pop(f"node{node}")
        process.kill()
        process.wait()
        if notice:
            self.run("scontrol", "update", f"nodename=node{node}", "state=down", "reason=cut")

    def freeze(self, node: int) -> list[int]:
        """Stops every process of a node, as a hang of its machine does; returns them."""
        pids = _tree(self._processes[f"node{node}"].pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def thaw(self, pids: list[int]) -> None:
        """Lets frozen processes go on."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def on_node(self, node: int, command: str) -> None:
        """Runs a command in a node's namespaces."""
        (init,) = _tree(self._processes[f"node{node}"].pid)[:1]
        enter = ["nsenter", "--target", str(init), "--mount", "--pid", "--uts"]
        subprocess.run([*enter, "sh", "-c", command], check=True)

    def reconfigure(self, options: str) -> None:
        """Changes lines of slurm.conf while the cluster runs."""
        self.options = options
        self._configure()
        self.run("scontrol", "reconfigure")

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.idle() == self.nodes:
                return
            time.sleep(0.1)
        logs = "\n".join(
            log.read_text()[-1500:] for log in (self.folder / "log").iterdir() if log.is_file()
        )
        raise RuntimeError(f"the cluster did not come up:\n{logs}")

    def idle(self) -> int:
        """Number of nodes that are up and do nothing."""
        listed = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False)
        return listed.split().count("idle")

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Runs a Slurm command and returns what it printed."""
        done = subprocess.run(
            command, env={**self.env, **(env or {})}, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        text = self.run("scontrol", "-o", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Waits until the job is in one of the states; returns what Slurm says of it then."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            log = Path(job["StdOut"])
            text = log.read_text() if log.is_file() else ""
            waits = job["JobState"] not in ENDS and time.monotonic() < deadline
            assert waits, f"{job['JobState']}, not {states}: {job}\n{text}"
            time.sleep(0.1)
        return job

    def restart(self, number: str, count: int, timeout: float = 60) -> dict[str, str]:
        """Waits for the job's ``count``-th restart: Slurm leaves ``cred_expire`` and 1 s before it.

        (StartTime=now cuts that short, and then a node may refuse the job, which stays "running".)
        """
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(number)
            again = int(job["Restarts"]) >= count
            if again and job["JobState"] in ("RUNNING", "COMPLETED", "FAILED"):
                return job
            log = Path(job["StdOut"])
            text = log.read_text() if log.is_file() else ""
            waits = job["JobState"] not in ENDS and time.monotonic() < deadline
            assert waits, f"no restart {count}: {job}\n{text}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends everything that this cluster started."""
        for name in sorted(self._processes, reverse=True):  # nodes first: their jobs go with them
            process = self._processes.pop(name)
            if name.startswith("node"):
                process.kill()
            else:
                process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        subprocess.run(["umount", str(self.small_disk)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
