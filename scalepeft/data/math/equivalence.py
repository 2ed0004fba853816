"""Mathematical equivalence of two answers, by math-verify in a process of its own, which can be
killed and limited: ``10^{10^{10}}`` keeps Python in one C call, nested text overflows parsers.
"""

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import weakref
from typing import IO, Any

from scalepeft.core.errors import UserError
from scalepeft.data.math import whole

SECONDS = 3  # math-verify's own limit, for each of its steps
LIMIT = 4 * SECONDS  # then the process is killed
START = 120  # until it has loaded
MEMORY = 4 << 30


def check_installed() -> None:
    """Raises UserError where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        fix = "pip install 'scalepeft[eval]'"
        raise UserError(f"data.name=math scores with math-verify, which is not installed: {fix}")


class EquivalenceServer:
    """Decides whether a prediction equals the right answer; its process starts when first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None

    def __call__(self, right: str, prediction: str) -> bool:
        """True if ``prediction`` is shown to be ``right`` (not symmetric), and in time."""
        if not prediction.strip() or max(len(right), len(prediction)) > whole.LONGEST:
            return False
        for _ in range(2):  # again where the process died: it may have been somebody's signal
            process = self._process or self._start()
            assert process.stdin and process.stdout
            with contextlib.suppress(BrokenPipeError):  # then there is nothing to read either
                process.stdin.write(json.dumps([right, prediction]).encode() + b"\n")
            if answer := _line(process.stdout, LIMIT):
                return answer == b"true\n"
            self.stop()
            if answer is None:
                break
        return False

    def _start(self) -> subprocess.Popen[bytes]:
        check_installed()
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", __name__], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._end = weakref.finalize(self, _end, process)
        assert process.stdout
        if _line(process.stdout, START) != b"ready\n":
            self.stop()
            raise UserError(f"math-verify does not start; see: python -m {__name__}")
        return process

    def stop(self) -> None:
        """Ends the process; the next question starts another."""
        if self._process is not None:
            self._end()
            self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()  # closes the pipes


def _line(pipe: IO[bytes], seconds: float) -> bytes | None:
    """The next line; empty at the pipe's end, None if nothing comes in time."""
    ready, _, _ = select.select([pipe], [], [], seconds)
    return pipe.readline() if ready else None


def serve() -> None:
    """The process: a line with [right, prediction] in, ``true`` or ``false`` out."""
    import logging
    import resource

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the end of the input ends it
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr  # nothing a library prints is taken for an answer

    from math_verify import parse, verify

    def parsed(text: str) -> Any:
        return parse(text if "$" in text else f"${text}$", parsing_timeout=SECONDS)

    logging.disable(logging.CRITICAL)  # a time-out is an answer like another
    out.write("ready\n")
    for line in sys.stdin:
        right, prediction = json.loads(line)
        try:
            same = verify(parsed(right), parsed(prediction), timeout_seconds=SECONDS)
        except Exception:  # of sympy, antlr, math-verify: none says more than "not equal"
            same = False
        out.write(f"{json.dumps(bool(same))}\n")


if __name__ == "__main__":
    serve()
