"""One process, one device, nothing spread."""

from pydantic.dataclasses import dataclass

from scalepeft.core.errors import UserError
from scalepeft.core.fields import STRICT
from scalepeft.parallel.base import Engine, EngineConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SingleConfig(EngineConfig):
    """Settings of the one-process engine."""

    name: str = "single"


class Single(Engine):
    """The reference every other engine must equal."""

    Config = SingleConfig
    needs_group = False

    @classmethod
    def check(cls, world_size: int) -> None:
        """Refuses more than one rank: each would train the same model alone."""
        if world_size > 1:
            raise UserError(
                f"engine.name=single runs in one process, {world_size} were started; take fsdp2"
                " or ddp"
            )
