"""What a save of 100 M trained parameters costs, over a raw write and fsync of the same bytes.

    python tests/run/measured_save.py FOLDER [TURNS] [--dcp]

Takes turns: raw (the same files, one write after the other, fsync each), the save as ``Saver``
makes it on one rank, torch DCP. Each from a folder that is gone and a disk that is idle (sync).
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from scalepeft.models.tensors import as_bytes
from scalepeft.parallel.base import Part
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import RunFolder
from scalepeft.run.records import Save
from scalepeft.run.saver import Saver

PARAMETERS, LAYERS = 100_663_296, 40
STATE = {"base": {}, "data": "", "nonfinite_in_a_row": 0}


class Records:
    """Of RunRecorder what a save takes."""

    def __init__(self, path: Path) -> None:
        self.ranks, self.path, self.folder = Ranks(), path, RunFolder(path)
        self.folder.claim()
        self.generation = self.folder.generation
        self.config = type("C", (), {"train": type("T", (), {"save_mode": "sharded"})})

    def begin_save(self, step: int) -> tuple[Path, str]:
        return self.folder.begin(step), ""

    def commit_save(self, save: Save, files: dict[str, object]) -> None:
        self.folder.commit(save.folder, files, save.state, 2)


def main(folder: Path, turns: int, dcp: bool) -> None:
    size = PARAMETERS // LAYERS
    kinds = ("", "/exp_avg", "/exp_avg_sq")
    tensors = {f"{i}.A{k}": torch.randn(1024, size // 1024) for i in range(LAYERS) for k in kinds}
    parts = {name: Part(t.view(-1), 0, tuple(t.shape)) for name, t in tensors.items()}
    step = 0

    def raw() -> None:
        for kind in ("trained", "optimizer"):
            with (folder / kind).open("wb", buffering=0) as f:
                for name, tensor in tensors.items():
                    if ("/" in name) == (kind == "optimizer"):
                        data = as_bytes(tensor)
                        while data:
                            data = data[f.write(data) :]
                os.fsync(f.fileno())

    def ours() -> None:
        nonlocal step
        step += 1
        records = Records(folder / "run")
        Saver(records, 0).save(step, parts, {"step": step, **STATE}, final=True)  # type: ignore[arg-type]

    def torch_dcp() -> None:
        import torch.distributed.checkpoint as distributed

        distributed.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)

    ways: dict[str, Callable[[], None]] = {"raw": raw, "ours": ours}
    ways |= {"dcp": torch_dcp} if dcp else {}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()
            before, began = time.process_time(), time.perf_counter()
            way()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - before)
    shutil.rmtree(folder)
    for name, seconds in wall.items():
        ratio = statistics.median(seconds) / statistics.median(wall["raw"])
        each = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"{name}: {statistics.median(seconds):.2f} s ({ratio:.2f} x raw; {each}),"
              f" CPU {statistics.median(cpu[name]):.2f} s")  # fmt: skip


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--dcp"]
    main(Path(words[0]), int(words[1]) if len(words) > 1 else 5, "--dcp" in sys.argv)
