"""transformers' Trainer, and TRL's trainers on it, stopped as ``scalepeft train`` is: a signal to any
rank, agreed by all at the end of a step, a checkpoint, exit code 75 on every rank.

    trainer = Trainer(..., callbacks=[PreemptionCallback()])
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalepeft.core.errors import UserError
from scalepeft.core.log import say
from scalepeft.core.preemption import STOPPED, StopFlag, tell_job


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole ``checkpoint-N``, None without any: one that a kill cut short, which
    transformers' ``get_last_checkpoint`` takes, has no readable ``trainer_state.json``, written last.
    """
    found = Path(output_dir).glob("checkpoint-*")
    for folder in sorted(found, key=lambda f: int(f.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            say(f"{folder}: is not whole, passed over")
        else:
            return str(folder)
    return None


class PreemptionCallback(TrainerCallback):
    """Takes SIGTERM, SIGINT and SIGUSR1 over while ``train`` runs; a second one means what it means
    to ``StopFlag``. One small all-reduce a step. Raises SystemExit(75) once every rank has saved.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raises UserError: what is saved could not be continued."""
        if args.save_only_model:
            raise UserError("save_only_model=True: no stopped run could go on; leave it out")
        self._flag, self._stopping = StopFlag().install(), False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks all ranks; but after the last step, which ends the run as it is."""
        if state.global_step >= state.max_steps:
            return
        signaled = torch.tensor(int(self._flag.signal is not None), device=args.device)
        if reduce(signaled, "max").item():
            self._stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the grace is for the save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A stop passes here too, saved already."""
        if self._stopping:
            control.should_save = control.should_evaluate = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tells the job script how far it is."""
        if state.is_world_process_zero:
            tell_job("progress", f"step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Loggers, which are asked before, are done by now."""
        if not self._stopping:
            self._flag.give_back()
            return
        ranks = PartialState()
        ranks.wait_for_everyone()  # a launcher ends the others, amid their save, once one has left
        if state.is_world_process_zero:
            say(f"stopped and saved at step {state.global_step}; the same command continues")
            tell_job("stopped", f"step {state.global_step}")
        self._flag.saved = True
        ranks.wait_for_everyone()
        self._flag.release()
        sys.exit(STOPPED)
