"""transformers' Trainer, and TRL's on it, stopped as ``scalepeft train`` is: docs/integrations.

``python -m scalepeft.integrations.trainer [OPTIONS] SCRIPT ...`` is ``accelerate launch`` for a
rank that srun or launch/local.sh started: no process stands between it and the signals.
"""

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.commands import launch
from accelerate.utils import reduce
from transformers import TrainerCallback

from scalepeft.core.errors import UserError
from scalepeft.core.files import read_json
from scalepeft.core.log import say
from scalepeft.core.preemption import STOPPED, StopFlag, tell_job
from scalepeft.parallel.ranks import Ranks


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole ``checkpoint-N``, if any, where transformers' ``get_last_checkpoint`` takes
    what a kill cut short: without a readable ``trainer_state.json``, which is written last.
    """
    found = (f for f in Path(output_dir).glob("checkpoint-*") if f.name[11:].isdecimal())
    for folder in sorted(found, key=lambda f: int(f.name[11:]), reverse=True):
        if read_json(folder / "trainer_state.json"):
            return str(folder)
        say(f"{folder}: is not whole, passed over")
    return None


class PreemptionCallback(TrainerCallback):
    """Takes over SIGTERM, SIGINT and SIGUSR1 while ``train`` runs; a second one as in ``StopFlag``.
    Raises SystemExit(75) when all ranks have saved.
    """

    _flag = StopFlag()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises UserError: what is saved could not be continued."""
        if args.save_only_model:
            raise UserError("save_only_model=True: a stopped run could not go on; leave it out")
        self._flag.give_back()  # a train() before ended in an exception (auto_find_batch_size)
        self._flag, self._stops = StopFlag().install(), False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks all ranks, but after the last step, which ends the run anyway."""
        if state.global_step >= state.max_steps:
            return
        flag = torch.tensor(int(self._flag.signal is not None), device=args.device)
        if reduce(flag, "max").item():
            self._stops = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time that is left is for the save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Comes after a stop too, which has saved."""
        if self._stops:
            control.should_save = control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tells the job script how far the run is."""
        if state.is_world_process_zero:
            tell_job("progress", f"step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends a stopped run; loggers are called before."""
        if not self._stops:
            self._flag.give_back()
            return
        PartialState().wait_for_everyone()  # once one has left, launchers kill the others
        if state.is_world_process_zero:
            say(f"stopped and saved at step {state.global_step}; the same command continues")
            tell_job("stopped", f"step {state.global_step}")
        self._flag.saved = True
        PartialState().wait_for_everyone()
        self._flag.release()
        sys.exit(STOPPED)


def main() -> None:
    """Runs the script in this process, with what ``accelerate launch`` tells a rank."""

    def run_here(args: Any) -> None:
        Ranks.start("auto", process_group=False)
        sys.argv = [args.training_script, *args.training_script_args]
        sys.path.insert(0, str(Path(args.training_script).parent))
        runpy.run_path(args.training_script, run_name="__main__")

    in_place = mock.patch.object(launch, "simple_launcher", run_here)
    with mock.patch("torch.distributed.run.run", run_here), in_place:
        launch.launch_command(launch.launch_command_parser().parse_args())


if __name__ == "__main__":
    main()
