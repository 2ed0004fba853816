"""What a person sees of a run: a bar or plain lines, TensorBoard or W&B when asked."""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.core.log import LINE_SECONDS, say
from scalepeft.core.text import one_line


class Progress:
    """Reports steps on rank 0. A tracker that fails is left out; UserError: it is not installed."""

    def __init__(self, config: RunConfig, first_step: int, steps: int) -> None:
        self.steps, self._last_line = steps, 0.0
        self._bar: Any = None
        self._trackers: dict[str, Any] = {}
        folder = Path(config.run_dir).resolve()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
        if config.train.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("train.tensorboard=true: pip install 'scalepeft[track]'") from None
            where = str(folder / "tensorboard")
            self._try("tensorboard", lambda _: SummaryWriter(where, purge_step=first_step + 1))
        if project := config.train.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError(f"train.wandb={project}: pip install wandb") from None
            self._try("wandb", lambda _: wandb.init(
                project=project, name=folder.name, resume="allow", dir=str(folder),
                id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            ))  # fmt: skip

    def _try(self, name: str, act: Callable[[Any], Any]) -> None:
        """Has a tracker do something; what it returns of its opening is the tracker."""
        try:
            self._trackers[name] = act(self._trackers.get(name)) or self._trackers[name]
        except Exception as error:  # its disk, its network, whatever it is: the run goes on
            self._trackers.pop(name, None)
            self.line(f"train.{name}: {one_line(error)}: it gets no more of this start")

    def step(self, row: dict[str, Any]) -> None:
        """Shows one training step."""
        loss = "skipped" if row["loss"] is None else f"{row['loss']:.4f}"
        text = f"loss {loss} lr {row['lr']:.2e} {row['tokens_per_second']:.0f} tok/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line > LINE_SECONDS or row["step"] == self.steps:
            self._last_line = time.monotonic()
            self.line(f"step {row['step']}/{self.steps} {text}")
        self._track("train", row)

    def held_out(self, row: dict[str, Any]) -> None:
        """Shows a validation loss."""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        self.line(f"step {row['step']}/{self.steps} validation loss {loss}")
        self._track("held_out", row)

    def line(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(f"scalepeft: {text}", file=sys.stderr)
        else:
            say(text)

    def _track(self, group: str, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        named = {f"{group}/{key}": value for key, value in numbers.items()}

        def board(writer: Any) -> None:
            for key, value in named.items():
                writer.add_scalar(key, value, row["step"])

        acts = {"tensorboard": board, "wandb": lambda run: run.log(named, step=row["step"])}
        for name in [*self._trackers]:
            self._try(name, acts[name])

    def close(self) -> None:
        """Flushes the trackers."""
        if self._bar is not None:
            self._bar.close()
        for name in [*self._trackers]:
            self._try(name, lambda tracker: (getattr(tracker, "finish", None) or tracker.close)())
