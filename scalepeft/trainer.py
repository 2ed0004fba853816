"""One optimizer step, and everything that a step, a save or a resume touches."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scalepeft.adapters import inject as injection
from scalepeft.adapters.base import Adapter, Dropout, dropout_keys
from scalepeft.adapters.factors import Factors
from scalepeft.build import Built
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.data import loader
from scalepeft.data.tokens import TokenSet
from scalepeft.models import attention
from scalepeft.models.tensors import Reader
from scalepeft.parallel.base import Part
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import Checkpoint
from scalepeft.run.saver import Saver


class Trainer:
    """Everything that a step, a save or a resume touches."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, built: Built, data_fingerprint: str
    ) -> None:
        self.config, self.ranks, self.built = config, ranks, built
        self.data_fingerprint = data_fingerprint
        self.done = 0  # steps
        self.trained = injection.trainable(built.model)
        self.saved = injection.tensors(built.model)
        train, decayed = config.train, injection.decayed_names(built.model)
        groups = [
            {"params": [p for name, p in self.trained.items() if (name in decayed) == decays],
             "weight_decay": train.weight_decay if decays else 0.0}
            for decays in (True, False)
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True,
        )  # fmt: skip
        # The model, or the engine's wrapper around it.
        self.call = built.engine.attach(built.model, self.optimizer)
        self.factors = Factors(built.model, built.engine)
        adapters = [adapter for _, adapter in injection.adapters(built.model)]
        self.penalized = any(type(a).penalty is not Adapter.penalty for a in adapters)
        self.dropouts = [m for m in built.model.modules() if isinstance(m, Dropout)]
        self.nonfinite = 0  # steps in a row that were skipped, as loss or gradient was not finite
        self.packed = train.batching != "padded" and not built.unpacked

    def step(self, micro: list[loader.MicroBatch], label_tokens: int, lr: float) -> "Outcome":
        """One optimizer step, for which the host need not wait.

        ``loss = sum over ranks and micro-batches of the summed cross-entropy / label_tokens``: sums
        all the way, divided once, so that how rows are dealt to ranks and micro-batches changes
        nothing. A step that is not finite changes no parameter and no moment.
        """
        engine, train = self.built.engine, self.config.train
        total = torch.zeros((), device=self.ranks.device)
        with self.factors.of_step():
            for i, batch in enumerate(micro):
                batch = batch.to(self.ranks.device)
                last = i == len(micro) - 1
                # The adapter's: a function of (seed, sample), whatever the layout.
                keys = dropout_keys(batch.samples, train.seed)
                for dropout in self.dropouts:
                    dropout.keys, dropout.positions = keys, batch.positions
                with engine.accumulate(last):
                    value = summed_loss(self.call, batch, self.config) / label_tokens
                    engine.backward(value, last)
                total += value.detach()
        mean = self.ranks.sum(total.double())
        parameters = list(self.trained.values())
        penalty = self._add_penalty(parameters)
        norm = engine.grad_norm(parameters)
        numbers = torch.stack([mean, norm, *([] if penalty is None else [penalty])])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        finite = numbers[:2].isfinite().all()
        engine.update(self.optimizer, train.max_grad_norm, norm, finite)
        self.done += 1
        return Outcome(self, numbers)

    def _add_penalty(self, parameters: list[nn.Parameter]) -> Tensor | None:
        """Adds the gradient of the adapters' regularizers, once: the data's is summed by now."""
        engine = self.built.engine
        with engine.gathered(parameters if self.penalized else []):
            value = injection.penalty(self.built.model)
            if value is None:
                return None
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
        engine.add_gradients(parameters, list(grads))
        return value.detach()

    def check_finite(self, step: int, total: int, saver: Saver) -> None:
        """Ends the run after ``train.max_nonfinite`` skipped steps in a row, the last ``step``."""
        if self.nonfinite >= min(self.config.train.max_nonfinite, total):
            saver.wait()
            newest = f"is of step {saver.saved}" if saver.saved else "does not exist yet"
            raise FloatingPointError(
                f"loss or gradient was not finite for {self.nonfinite} steps in a row, to step"
                f" {step}. The newest checkpoint {newest}. Lower"
                f" train.lr={self.config.train.lr}, or look at the rows of these steps"
            )

    def restore(self, resumed: Checkpoint | None) -> int:
        """Reads this rank's part of a checkpoint, or starts anew; returns the bytes it read."""
        if resumed is None:
            injection.start_adapters(self.built.model, self.built.engine.whole)
            return 0
        engine, where = self.built.engine, f"checkpoint step-{resumed.step:06d}"

        def read() -> int:
            reader = Reader(resumed.folder)
            shapes = {name: shape for name, shape in reader.shapes.items() if "/" not in name}
            injection.check_state(self.built.model, shapes, where)

            def fill(name: str, part: Part) -> None:
                reader.fill(name, part)
                if not torch.isfinite(part.data).all():
                    raise UserError(f"{where}: {name} holds NaN or infinity; remove that folder")

            engine.load_state_parts(self.saved, self.optimizer, reader.shapes, fill)
            return reader.bytes_read

        read_bytes = self.ranks.all_or_raise(read)
        engine.state_loaded()
        self.done, self.nonfinite = resumed.step, resumed.state["nonfinite_in_a_row"]
        return read_bytes

    @property
    def sample_index(self) -> int:
        """Samples that the steps so far have taken: the position in the data."""
        return self.done * self.config.train.global_batch

    def save(self, saver: Saver, final: bool) -> None:
        """Saves what is trained so far; raises as ``Saver.save``."""
        state = {
            "step": self.done,
            "sample_index": self.sample_index,
            "nonfinite_in_a_row": self.nonfinite,
            # Order and dropout are functions of the seed: there is no generator state.
            "seed": self.config.train.seed,
            "base": self.built.base,
            "data": self.data_fingerprint,
            "world_size": self.ranks.world_size,
            "engine": self.config.engine.name,
        }
        saver.save(self.done, self.parts(), state, final)

    def parts(self) -> dict[str, Part]:
        """This rank's parts of parameters and moments."""
        return self.built.engine.state_parts(self.saved, self.optimizer)


class Outcome:
    """A step's numbers, on their way from the device while the next step is queued there."""

    def __init__(self, trainer: Trainer, numbers: Tensor) -> None:
        self._trainer, self._numbers = trainer, numbers.to("cpu", non_blocking=True)
        self.late = numbers.is_cuda  # the device is at it, and the next step is to be queued first
        self._copied = torch.cuda.current_stream().record_event() if numbers.is_cuda else None

    def read(self) -> tuple[float | None, float | None, float | None]:
        """(Mean loss over the global batch's label tokens, gradient norm, value of the adapters'
        regularizers before the step); None: the step was skipped, or the method has none.

        Waits for the step. To be called once for each, in their order: counts ``nonfinite``.
        """
        if self._copied is not None:
            self._copied.synchronize()
        mean, norm, penalty = (*self._numbers.tolist(), None)[:3]
        finite = math.isfinite(mean) and math.isfinite(norm)
        self._trainer.nonfinite = 0 if finite else self._trainer.nonfinite + 1
        return (mean, norm, penalty) if finite else (None, None, penalty)


def summed_loss(call: Callable[..., Tensor], batch: loader.MicroBatch, config: RunConfig) -> Tensor:
    """Cross-entropy summed over a micro-batch's label tokens, by the model or a wrapper of it."""
    at = {} if batch.positions is None else {"position_ids": batch.positions}
    learned = {"token_labels": batch.labels, "label_places": batch.places}
    with attention.rows_known(batch.positions if batch.on_host is None else batch.on_host):
        return call(batch.input_ids, **learned, loss_chunk=config.train.loss_chunk, **at)


def batches(
    trainer: Trainer, rows: TokenSet, first: int, steps: int, *, shuffle: bool = True
) -> loader.Loader:
    """This rank's micro-batches of ``steps`` steps from step ``first``."""
    config = trainer.config
    train, packing = config.train, dict[str, Any]()
    if trainer.packed:
        model: Any = trainer.built.model
        text = model.config.get_text_config()
        # A block's products cost about 24 hidden^2 a token, attention 4 hidden a token it reads.
        masked = text._attn_implementation in ("sdpa", "eager")
        packing["width"] = 6 * text.hidden_size if masked else math.inf
        packing["micro_tokens"] = train.micro_tokens or train.micro_batch * config.data.cutoff
    return loader.Loader(
        rows, trainer.ranks, first, steps, global_batch=train.global_batch,
        micro_batch=train.micro_batch, seed=train.seed, workers=config.data.workers,
        shuffle=shuffle, **packing,
    )  # fmt: skip
