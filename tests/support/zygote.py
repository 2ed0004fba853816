"""A warm Python that has imported what a rank imports and forks one for each process of a test.

An import of torch, transformers and bitsandbytes takes 4 s of a core; the tests start hundreds of
ranks. A forked rank is a process of its own: signals, kills and exit codes are real. It runs the
module's ``__main__`` as ``python -m`` does. ``fresh`` processes are for tests of the start itself.
"""

import array
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


# Read once, at import: with another value than the warm process has, a rank must start cold.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "PYTHON", "OMP_", "MKL_", "TORCH", "LD_")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def read_at_import(env: dict[str, str]) -> dict[str, str]:
    """The variables that a warm process cannot change any more."""
    return {key: value for key, value in env.items() if key.startswith(READ_AT_IMPORT)}


class Forked:
    """A process that the warm one forked; what the tests use of ``subprocess.Popen``."""

    def __init__(self, pid: int, status: int, stdout: int) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None
        self.stdout = os.fdopen(stdout, errors="replace")

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code. Raises subprocess.TimeoutExpired."""
        code = self._read(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked rank", timeout)
        return code

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            text = os.read(self._status, 64)
            os.close(self._status)
            assert text, "the warm process is gone"
            self.returncode = int(text)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Everything it printed, once it has ended. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        parts = []
        fd = self.stdout.fileno()
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([fd], [], [], left)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired("a forked rank", timeout, "".join(parts))
            if not (piece := os.read(fd, 1 << 16)):
                break
            parts.append(piece.decode(errors="replace"))
        self.wait(None if deadline is None else max(1.0, deadline - time.monotonic()))
        self.stdout.close()
        return "".join(parts), None

    def send_signal(self, number: int) -> None:
        """As Popen's: nothing where it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Zygote:
    """The warm process, seen from the tests."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.env = read_at_import({**os.environ, "OMP_NUM_THREADS": "1"})
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )
        theirs.close()

    def start(
        self,
        program: tuple[str, ...],
        arguments: list[str],
        env: dict[str, str],
        stderr: int | None = None,
        cwd: Path | None = None,
    ) -> Forked:
        """Runs ``python PROGRAM ARGUMENTS``; stderr goes where stdout goes, or to a descriptor."""
        status, their_status = os.pipe()
        stdout, their_stdout = os.pipe()
        asked = {"program": program, "arguments": arguments, "env": env}
        message = json.dumps({**asked, "cwd": None if cwd is None else str(cwd)})
        their_stderr = their_stdout if stderr is None else stderr
        fds = array.array("i", [their_status, their_stdout, their_stderr])
        self._socket.sendmsg(
            [message.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds.tobytes())]
        )
        os.close(their_status)
        os.close(their_stdout)
        answer = self._socket.recv(64)
        assert answer, "the warm process has ended; its traceback stands above"
        return Forked(int(answer), status, stdout)

    def run(
        self,
        program: tuple[str, ...],
        arguments: list[str],
        env: dict[str, str],
        timeout: float,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` with captured output."""
        with tempfile.TemporaryFile() as stderr:
            process = self.start(program, arguments, env, stderr.fileno(), cwd)
            out, _ = process.communicate(timeout)
            stderr.seek(0)
            return subprocess.CompletedProcess(
                arguments, process.wait(), out, stderr.read().decode(errors="replace")
            )

    def close(self) -> None:
        """Ends the warm process and with it whatever still runs of it."""
        self._process.kill()
        self._process.wait()


def _serve(server: socket.socket) -> dict[str, Any]:
    """Forks at every request, reports the ends; in a child, returns what it is to run."""
    ends: dict[int, tuple[int, int]] = {}  # pidfd -> (pid, status pipe)
    while True:
        for fd in select.select([server.fileno(), *ends], [], [])[0]:
            if fd != server.fileno():
                pid, status = ends.pop(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(status, str(code).encode())
                os.close(status)
                os.close(fd)
                continue
            text, fds, _, _ = socket.recv_fds(server, 1 << 20, 3)
            if not text:
                sys.exit(0)
            status, stdout, stderr = fds
            pid = os.fork()
            if pid == 0:
                _die_with_parent()
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for other in [server.fileno(), *fds, *ends, *(s for _, s in ends.values())]:
                    os.close(other)
                server.detach()
                message: dict[str, Any] = json.loads(text)
                return message
            os.close(stdout)
            os.close(stderr)
            ends[os.pidfd_open(pid)] = (pid, status)
            server.send(str(pid).encode())


def _warm_up() -> None:
    # bitsandbytes would load Triton, which lists at the end of a process what is frozen below.
    sys.modules["triton"] = None  # type: ignore[assignment]
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import scalepeft.analysis.report.command
    import scalepeft.cli
    import scalepeft.cluster.status
    import scalepeft.cluster.submit
    import scalepeft.eval.evaluate
    import scalepeft.export.merge
    import scalepeft.export.peft
    import scalepeft.models.tiny
    import scalepeft.train  # noqa: F401
    from scalepeft.config import changes
    from scalepeft.models import quant

    quant._kernels()
    changes.marks()  # of every method, engine and task
    get_checkpoint_conversion_mapping("llama")
    del sys.modules["triton"]
    gc.collect()
    gc.freeze()  # a collection in a child copies no page of what stands here
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"


if __name__ == "__main__":
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test runner's
    _warm_up()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    if request["cwd"] is not None:
        os.chdir(request["cwd"])
    program = request["program"]
    import runpy

    if program[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = [program[1], *request["arguments"]]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    elif program[0] == "-c":
        sys.argv = ["-c", *request["arguments"]]
        exec(program[1], {"__name__": "__main__"})
    else:
        sys.path[:0] = [str(Path(program[0]).resolve().parent), str(Path(__file__).parent)]
        sys.argv = [program[0], *request["arguments"]]
        runpy.run_path(program[0], run_name="__main__")
