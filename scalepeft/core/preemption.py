"""Signal -> flag -> agreed stop -> exit code. Needs no torch: installed before it is imported.

A job script (slurm/train.sh, launch/local.sh --requeue) names a folder in ``SCALEPEFT_JOB_STATE``.
There it finds ``progress``, what is saved so far, and ``stopped``, left by an orderly stop that a
signal asked for: an exit code says too little, since a killed peer turns srun's into 137.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalepeft.core.files import write_atomically
from scalepeft.core.launch import rank
from scalepeft.core.log import say

FINISHED, BROKEN, USER_ERROR, STOPPED = 0, 1, 2, 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# One event often arrives twice (terminal and launcher, slurmd and srun): repeats this close are one
# signal.
SAME_EVENT_SECONDS = 0.5
BATCH = {"SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_COMPLETION_INDEX", "SKYPILOT_TASK_ID"}


class Stopping(Exception):
    """All ranks agreed to stop here; the state has been saved."""


class StopFlag:
    """Set by the first SIGTERM, SIGINT or SIGUSR1; a later second signal ends the process at once.

    In a batch job only a second SIGINT does: there one preemption is USR1 or TERM, then TERM again
    when the grace is over, in the middle of the save. The scheduler itself kills what hangs.

    The C-level handler writes the signal number into a pipe and a thread reads it, so that a signal
    is seen at once even while the main thread sits in a collective.
    """

    def __init__(self) -> None:
        self.launched = time.time()  # seconds of the epoch; start-up is counted from here
        self.signal: int | None = None
        self.planned = False  # the stop is ``train.stop_at``'s: nobody asked the job to come back
        self.saved = False  # the agreed save is on disk: even a second signal means exit code 75
        self._patient = not BATCH.isdisjoint(os.environ)
        self._first_at = 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> "StopFlag":
        """Takes over the three signals. Main thread only."""
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._fd_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(read_end,), daemon=True).start()
        return self

    def release(self) -> None:
        """Ignore the signals from here on: a late one must not change the exit code."""
        for number in SIGNALS:  # with handlers, Python restores the deadly default at shutdown
            signal.signal(number, signal.SIG_IGN)

    def give_back(self) -> None:
        """Hand the signals back to who had them before ``install``: the work is done."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._write_end)

    def request(self, number: int) -> None:
        """What a signal does; ``train.stop_at`` uses it too."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first_at = number, now
        elif self._patient and number != signal.SIGINT:
            return
        elif now - self._first_at >= SAME_EVENT_SECONDS:
            self._leave(number)

    def check(self) -> None:
        """Raise Stopping once a signal came."""
        if self.signal is not None:
            raise Stopping

    def guard(self, work: Callable[[], int | None], what: str, again: str) -> int:
        """Return the exit code of ``work`` (None: 0); 75 where a signal stopped it, once rank 0 has
        said what does it ``again`` and told the job that ``what`` was stopped.
        """
        try:
            code = work() or FINISHED
        except Stopping:
            code = STOPPED
            if rank() == 0:
                say(f"stopped; {again}")
                tell_job("stopped", what)
        self.saved = True
        return code

    def _watch(self, read_end: int) -> None:
        while numbers := os.read(read_end, 64):
            for number in numbers:
                if number in SIGNALS:
                    self.request(number)
        os.close(read_end)

    def _leave(self, number: int) -> None:
        if self.saved:
            os._exit(STOPPED)
        line = f"scalepeft: second signal ({signal.Signals(number).name}): leaving at once\n"
        with suppress(OSError):
            os.write(2, line.encode())
        os._exit(128 + number)  # as the shell reports a death by this signal


def tell_job(name: str, text: str) -> None:
    """Leave ``progress`` or ``stopped`` for the job script, if any; a disk that refuses is said."""
    folder = os.environ.get("SCALEPEFT_JOB_STATE")
    if not folder:
        return
    try:
        try:
            write_atomically(Path(folder, name), f"{text}\n")
        except OSError:
            if name == "progress":
                raise
            Path(folder, ".writable").replace(Path(folder, name))  # a full disk still renames
    except OSError as error:
        effect = "it will not come back by itself" if name == "stopped" else "it may give up early"
        say(f"{folder}/{name}: {error.strerror}: the job script does not learn of {text}; {effect}")
