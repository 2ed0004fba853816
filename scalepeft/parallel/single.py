"""One process, one device, nothing spread."""

from scalepeft.core.errors import UserError
from scalepeft.parallel.base import Engine


class Single(Engine):
    """The reference every other engine must equal."""

    needs_group = False

    @classmethod
    def check(cls, world_size: int) -> None:
        """Refuses more than one rank: each would train the same model alone."""
        if world_size > 1:
            raise UserError(
                f"engine.name=single runs in one process, {world_size} were started; take fsdp2"
                " or ddp"
            )
