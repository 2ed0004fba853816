"""DeepSpeed's ZeRO: stage 1 splits the optimizer over N ranks, 2 its gradients too, 3 every
parameter. DeepSpeed divides summed gradients by N; the loss is multiplied by N before.
"""

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT
from scalepeft.parallel.base import Engine, EngineConfig, Part, Shares, full_shape, local_part
from scalepeft.parallel.ranks import Ranks

TESTED = "0.19."
BUCKET = 50_000_000  # elements of gradient that are exchanged at one time, at most
LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
PREFETCHED = 50_000_000  # its stage3_prefetch_bucket_size


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ZeroConfig(EngineConfig):
    """Settings of the DeepSpeed engine.

    Attributes:
        stage: 1: each rank keeps 1/N of the optimizer's state; 2: and of the gradients; 3: and of
            every parameter, the frozen base included. Stages 1 and 2 keep the whole base on each
            rank: for adapters, whose optimizer is small, they save little over ``ddp``.
        offload_optimizer: optimizer state and its step on the host.
        whole_below: stage 3: parameters of at most so many elements (norms, small adapters) stay
            whole on every rank between steps, DeepSpeed's ``stage3_param_persistence_threshold``.
        offload_parameters: stage 3: the parts of the parameters too; a block is copied to the
            device when it computes.
    """

    name: str = "zero"
    stage: Literal[1, 2, 3] = 3
    offload_optimizer: bool = False
    whole_below: Annotated[int, Field(ge=0)] = 100_000
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        if self.compile != "off":
            raise ValueError(
                f"compile={self.compile} does not go with DeepSpeed's hooks within blocks; set"
                " engine.compile=off, or take engine.name=fsdp2 or ddp"
            )
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters=true needs stage=3, not stage={self.stage}: only there are"
                " parameters kept in parts"
            )


@cache
def _deepspeed(device_type: str) -> Any:
    """Imports DeepSpeed for this kind of device; silences all but its warnings."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its level is read at import, from this variable.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine.name=zero needs deepspeed ({error}); pip install 'scalepeft[deepspeed]', or"
            " take engine.name=fsdp2"
        ) from error
    if not deepspeed.__version__.startswith(TESTED):
        raise UserError(
            f"engine.name=zero uses inner parts of deepspeed {TESTED}*, {deepspeed.__version__} is"
            f" installed; pip install 'deepspeed=={TESTED}*', or take engine.name=fsdp2"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated")
    if device_type == "cpu":
        # It would first compile a shared-memory all-reduce; not every node has a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Zero(Engine):
    """ZeRO-1, 2 and 3 around the trained parameters, with torch's AdamW. Under stage 3 a rank makes
    the DeepSpeed form of each parameter itself, one at a time, and reads just its own 1/N from
    disk: DeepSpeed's own ways in would need the whole model on each rank.
    """

    Config = ZeroConfig
    takes_idle = False  # DeepSpeed keeps the last step's gradient of one that got none
    config: ZeroConfig
    _engine: Any = None
    _optimizer: Any = None  # DeepSpeed's wrapper around the optimizer, where there is one
    _group: dict[int, int]  # id of a parameter -> number of its group

    def __init__(self, config: ZeroConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.sharded = config.stage == 3  # type: ignore[misc]
        self._ds = _deepspeed(ranks.device.type)
        self._in_head: list[nn.Parameter] = []

    @classmethod
    def shares(cls, config: Any, model: nn.Module, world_size: int, ranks_per_node: int) -> Shares:
        """By arithmetic, as it runs on no fake tensors; what stage 3 gathers is an upper bound."""
        stage, n = config.stage, world_size
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        trained_bytes, all_bytes = (sum(p.nbytes for p in ps) for ps in (trained, parameters))
        bucket = 4 * min(BUCKET, sum(p.numel() for p in trained))
        host = ("optimizer", "gradients") if config.offload_optimizer else ()
        transient = {"gradients": float(bucket + (trained_bytes if stage == 1 else 0))}
        reduce = ("reduce-scatter", "micro") if stage == 2 else ("all-reduce", "last")
        exchanges = [("all-gather", "step", 1, trained_bytes), (*reduce, 1, trained_bytes)]
        if stage == 3:
            mean = all_bytes / sum(p.numel() for p in parameters)
            live = max(LIVE * mean, *(p.nbytes for p in parameters)) + PREFETCHED * mean
            transient["gathered"] = min(all_bytes, live)
            owners = sum(any(True for _ in m.parameters(recurse=False)) for m in model.modules())
            exchanges = [
                ("all-gather", "micro", 2 * owners, 2 * all_bytes),
                ("reduce-scatter", "micro", -(-trained_bytes // bucket), trained_bytes),
            ]
        return Shares(
            base=n if stage == 3 else 1,
            adapter=n if stage == 3 else 1,
            gradients=n if stage > 1 else 1,
            optimizer=n,
            copies=1,  # fp32, which the optimizer changes
            on_host=host + (("base", "adapter") if config.offload_parameters else ()),
            simulated=False,
            transient=transient,
            exchanges=tuple(exchanges),
        )

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        trained = sum(full_shape(p).numel() for p in model.parameters() if p.requires_grad)
        bucket = max(1, min(BUCKET, trained))
        zero: dict[str, Any] = {
            "stage": self.config.stage,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": self.config.whole_below,
        }
        host = {"device": "cpu", "pin_memory": self.ranks.device.type == "cuda"}
        if self.config.offload_optimizer:
            zero["offload_optimizer"] = host
        if self.config.offload_parameters:
            zero["offload_param"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,  # counts nothing here: loss and steps are ours
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def wrap(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """Stage 3: makes every parameter of the meta model DeepSpeed's, with an empty part."""
        # DeepSpeed's word for the number of the device, which is 0 where srun shows each task one.
        device = self.ranks.device.index
        os.environ["LOCAL_RANK"] = str(self.ranks.local_rank if device is None else device)
        self._ds.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
        if self.config.stage != 3:
            return
        settings = self._settings(model) | {"train_batch_size": self.ranks.world_size}
        init = self._ds.zero.Init(module=nn.Module(), config_dict_or_path=settings)
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) not in made:
                    # DeepSpeed cuts its part out of a whole tensor: one at a time, and empty.
                    whole = torch.empty_like(p, device=self.ranks.device)
                    made[id(p)] = nn.Parameter(whole, requires_grad=p.requires_grad)
                    init._convert_to_deepspeed_param(made[id(p)])
                    made[id(p)].partition()  # type: ignore[attr-defined]
                module._parameters[name] = made[id(p)]

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Hands model and optimizer to DeepSpeed, which splits the optimizer's parameters."""
        if optimizer is None and self.config.stage != 3:
            return model
        rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        for group in optimizer.param_groups if optimizer else []:
            group["lr"] = 0.0  # stage 3 makes the moments by a step
        self._engine, *_ = self._ds.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=self._settings(model),
            dist_init_required=False,
        )
        if optimizer is not None:
            self._optimizer = self._engine.optimizer
            if self.config.stage != 3:
                groups = enumerate(self._optimizer.bit16_groups)
                self._group = {id(p): i for i, group in groups for p in group}
            elif head := getattr(model, "get_output_embeddings", lambda: None)():
                self._in_head = [p for p in head.parameters() if p.requires_grad]
                for p in self._in_head:  # so that no module's hook lets go of it
                    p.is_external_param = True  # type: ignore[attr-defined]
            optimizer.state.clear()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        return self._engine

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Stage 1 exchanges gradients on the last micro-batch; 2 and 3 on each: they keep parts. An
        adapter on the head stays whole within: the loss differentiates it in its forward.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        return self.gathered(self._in_head)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds N times the gradient, of which DeepSpeed makes the sum."""
        self._engine.backward(loss * self.ranks.world_size)

    def sum_gradients(self, tensors: Sequence[Tensor]) -> None:
        """A mean, as ``backward`` makes N times the gradient."""
        super().sum_gradients(tensors)
        for tensor in tensors:
            tensor /= self.ranks.world_size

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Makes parameters whole on every rank for the moment, under stage 3."""
        if self.config.stage != 3 or not parameters:
            return nullcontext()
        return self._ds.zero.GatheredParameters(parameters)

    @torch.no_grad()
    def add_gradients(self, parameters: list[nn.Parameter], grads: list[Tensor | None]) -> None:
        """Adds this rank's part of each."""
        for parameter, grad in zip(parameters, grads, strict=True):
            flat, offset, numel, start = self._flat(parameter)
            if grad is None or not numel:
                continue
            values = grad.reshape(-1)[start : start + numel]
            if self.config.offload_optimizer:
                assert flat.grad is not None
                held = flat.grad[offset : offset + numel].add_(values.to(flat.device))
                # DeepSpeed took it when it copied the gradient to the host.
                key = self._optimizer.get_param_id(parameter)
                self._optimizer.norm_for_param_grads[key] = held.double().norm()
            elif self.config.stage == 3:
                held = self._ds.utils.safe_get_local_grad(parameter)
                held[:numel] += values
                self._ds.utils.safe_set_local_grad(parameter, held)
            else:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                index = parameter._index_in_param_group  # type: ignore[attr-defined]
                mapping.get_lp_grad_fragment(index).view(-1).add_(values)

    def grad_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """As DeepSpeed has it; infinite where a gradient is not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        held = self._optimizer
        if self.config.stage == 3:
            norm = combine_grad_norm_groups(held._get_norm_groups())
        else:
            norm = held.scaled_global_norm()
        return torch.as_tensor(norm, device=self.ranks.device)

    def update(
        self, optimizer: torch.optim.Optimizer, max_norm: float, norm: Tensor, finite: Tensor
    ) -> None:
        """DeepSpeed's step: clips, updates this rank's part, and gathers (stages 1 and 2)."""
        if not finite:
            self._discard()
            return
        self._optimizer.clip_grad = max_norm
        self._engine.step()

    def _discard(self) -> None:
        """Drops the gradients as DeepSpeed does after an overflow."""
        held = self._optimizer
        if self.config.stage == 3:
            held._pre_step()
            held._partition_all_parameters()
            held._overflow_clean_up(held.loss_scale)
            return
        held.micro_step_id = -1
        held.zero_grad(set_to_none=True)
        held._release_preflattened_grad_buffers()
        if self.config.offload_optimizer:
            held.reset_cpu_buffers()
            return
        for i in held.averaged_gradients:
            held.averaged_gradients[i] = held.all_grad_tensors[i] = None

    def _flat(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        """Where its elements of this rank are: flat fp32 tensor, offset, number; which is first."""
        if self.config.stage == 3:
            key = self._optimizer.get_param_id(parameter)
            group, offset, _ = self._optimizer.grad_position[key]
            part = local_part(parameter)
            flat = self._optimizer.fp32_partitioned_groups_flat[group]
            return flat, offset, part.data.numel(), part.start
        flat = self._optimizer.single_partition_of_fp32_groups[self._group[id(parameter)]]
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return flat, 0, 0, 0
        place, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, place.start, place.numel, own.start

    def owner(self, parameter: nn.Parameter) -> Tensor:
        """The flat tensor that it lies in, where it is trained."""
        return self._flat(parameter)[0] if parameter.requires_grad else parameter

    def part(self, parameter: nn.Parameter, state: Any, kind: str = "", turn: int = 0) -> Part:
        """Of the fp32 parameter, as of its moments; the step is whole on every rank."""
        if not parameter.requires_grad:
            kept = super().part(parameter, state, kind, turn)
            return replace(kept, mine=kept.mine or self.config.stage == 3)
        flat, offset, numel, start = self._flat(parameter)
        held = state[flat][kind] if kind else flat
        if kind == "step":
            return Part(held.view(-1), 0, (), turn % self.ranks.world_size == self.ranks.rank)
        data = held.detach().view(-1)[offset : offset + numel]
        return Part(data, start, tuple(full_shape(parameter)))

    def state_loaded(self) -> None:
        """Copies the fp32 parts into the parameters of the model."""
        if self.config.stage != 3:
            self._optimizer.update_lp_params()
            return
        for group in self._optimizer.fp16_groups:
            for parameter in group:
                part = self.part(parameter, self._optimizer.optimizer.state)
                local_part(parameter).put(part.start, part.data)
