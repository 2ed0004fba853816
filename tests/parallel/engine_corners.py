"""Two ranks of test_corners_of_engines: a penalty, a step that is not finite, offloads, bf16.

Under each engine: one step, one with an infinite weight in the base, one more. The reference is the
same on one rank alone, in this process.
"""

import sys

import torch
from processes import FULL

from scalepeft.build import build, task_of
from scalepeft.config import files as config_files
from scalepeft.data import token_file
from scalepeft.models.hub import open_base
from scalepeft.parallel.base import local_part
from scalepeft.parallel.ranks import Ranks
from scalepeft.train import held_out_loss
from scalepeft.trainer import Trainer, batches

ENGINES = [
    "ddp", "fsdp2", "fsdp2 shard_over=1",
    "zero stage=1", "zero stage=2", "zero stage=3 whole_below=0",
    "zero stage=1 offload_optimizer=true", "zero stage=2 offload_optimizer=true",
    "zero stage=3 offload_optimizer=true offload_parameters=true whole_below=0",
    "zero stage=3 activation_checkpointing=true whole_below=0",
]  # fmt: skip
# (precision, tolerance, engines): in bf16 without --full one of each way to keep its sums.
PRECISIONS = [
    ("fp32", 1e-5, ENGINES),
    ("bf16", 2e-2, ENGINES if FULL else [*ENGINES[:2], *ENGINES[6:9]]),
]


def steps(settings: list[str], engine: str, ranks: Ranks) -> list[float | None]:
    """(loss, gradient norm) of three steps, the penalty of the last, and a held-out loss."""
    name, *more = engine.split()
    keys = [f"engine.name={name}", *(f"engine.{setting}" for setting in more)]
    config, _ = config_files.load(None, [*settings, *keys, "run_dir=unused"])
    base = open_base(config.model, ranks)
    files = token_file.files(task_of(config), base.tokenizer, base.vocab_size, [])
    rows, held_out, _ = token_file.prepared(files, config.data, config.train.seed)
    assert held_out is not None
    built = build(config, base, ranks, lambda: None)
    trainer = Trainer(config, ranks, built, "")
    built.model.train()
    found: list[float | None] = []
    norm = local_part(built.model.get_parameter("model.norm.weight")).data
    for batch in batches(trainer, rows, 0, 3):
        before = norm.clone()
        if batch.step == 1:
            norm.fill_(torch.inf)
        parts = {name: part.data.clone() for name, part in trainer.parts().items()}
        *numbers, penalty = trainer.step(batch.micro, batch.label_tokens, 0.01).read()
        found += numbers
        if batch.step == 1:
            assert found[-2:] == [None, None], "the step is skipped"
            for key, part in trainer.parts().items():
                assert torch.equal(part.data, parts[key]), f"{engine}: {key} moved"
        norm.copy_(before)
    assert trainer.nonfinite == 0
    return [*found, penalty, held_out_loss(trainer, held_out, lambda: None)]


def main() -> None:
    ranks = Ranks.start("cpu", process_group=True)
    for precision, tolerance, engines in PRECISIONS:
        settings = [*sys.argv[1:], f"train.precision={precision}"]
        want = steps(settings, "single", Ranks())
        assert want[2:4] == [None, None] and want[6] is not None and want[6] > 0
        for engine in engines:
            got = steps(settings, engine, ranks)
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None), (engine, got, want)
                assert a is None or b is None or abs(a - b) <= tolerance * max(1, abs(b)), (
                    f"{engine} {precision}: {got}, alone {want}"
                )
            print(f"ok {engine} {precision}", flush=True)
    ranks.finish()


if __name__ == "__main__":
    main()
