"""A rank of test_families.py's runs: several families trained in one process, one after the other.

    python family_runs.py RUNS FOLDER [FOLDER ...]

One rank trains on the engine ``single``, several on FSDP2. RUNS/NAME is the run folder of the
checkpoint FOLDER/NAME; a failure is written to RUNS/NAME.error and does not stop the others.
"""

import sys
from pathlib import Path

import torch
from families import FAMILIES

from scalepeft import train
from scalepeft.build import start_ranks
from scalepeft.config import schema as cfg
from scalepeft.core.launch import world_size
from scalepeft.core.preemption import StopFlag


def settings(run_dir: Path, folder: Path, quant: str = "nf4") -> cfg.RunConfig:
    return cfg.from_dict({
        "run_dir": str(run_dir),
        "model": {"path": str(folder), "quant": quant},
        "data": {"name": "toy", "train_size": 40, "valid_size": 4, "cutoff": 256},
        "adapter": {"name": "lora", "rank": 4, "alpha": 32, "dropout": 0.0},
        "engine": {"name": "single" if world_size() == 1 else "fsdp2", "device": "cpu"},
        "train": {"max_steps": 2, "precision": "fp32", "lr": 1e-2, "global_batch": 4,
                  "micro_batch": 2, "loss_chunk": 64, "eval_every": 2},
    })  # fmt: skip


def main(runs: Path, folders: list[Path]) -> None:
    ranks = start_ranks(settings(runs, folders[0]))
    for folder in folders:
        try:
            quant = "none" if FAMILIES[folder.name].no_nf4 else "nf4"
            config = settings(runs / folder.name, folder, quant)
            code = train.run_on(ranks, config, StopFlag(), False)
            assert code == 0
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if ranks.is_main:
                (runs / f"{folder.name}.error").write_text(text)
    ranks.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
