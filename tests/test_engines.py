"""One process is the reference: every engine and world size must give its losses; bytes fall as
1/N.
"""

from pathlib import Path
from typing import Any

import pytest
from conftest import Job, adapter_bytes, losses, rows, train

from scalepeft.lookup import UserError
from scalepeft.parallel.mesh import first_host, launch_variables

LAYOUTS = [(1, "fsdp2"), (2, "fsdp2"), (3, "fsdp2"), (2, "ddp")]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """20 steps in one process, for each storage of the base."""
    found = {}
    for quant in ("nf4", "none"):
        folder = tmp_path_factory.mktemp("single") / quant
        train(1, folder, f"model.quant={quant}", "train.max_steps=20")
        found[quant] = losses(folder)
    assert found["nf4"] != found["none"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "engine"), LAYOUTS)
@pytest.mark.parametrize("name", ["hoft"])
def test_losses_equal_one_process(
    ranks: int, engine: str, name: str, references: dict[str, list[float]], tmp_path: Path
) -> None:
    for quant in ("nf4", "none") if (ranks, engine) == (2, "fsdp2") else ("nf4",):
        folder = tmp_path / quant
        # Other micro-batches than the reference, so that accumulation is in the test too.
        train(
            ranks,
            folder,
            f"engine.name={engine}",
            f"model.quant={quant}",
            "train.max_steps=20",
            "train.micro_batch=3",
        )
        pairs = zip(losses(folder), references[quant], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        ["adapter.name=shoft"],
        ["adapter.name=lora"],
        ["adapter=qgoft", "adapter.penalty=1"],
        ["adapter=hadamard"],
    ],
)
def test_other_methods_and_activation_checkpointing_under_fsdp2(
    adapter: list[str], tmp_path: Path
) -> None:
    common = [*adapter, "model.quant=nf4", "train.max_steps=6"]
    train(1, tmp_path / "one", *common)
    train(2, tmp_path / "two", *common, "engine.name=fsdp2", "engine.activation_checkpointing=true")
    pairs = zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5
    # The regulariser counts once, whatever the sharding and the number of micro-batches.
    penalties = [[r.get("penalty") for r in rows(tmp_path / n)] for n in ("one", "two")]
    if adapter[0] == "adapter=qgoft":
        assert penalties[0][0] == 0 < penalties[0][-1]
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-3)
    else:
        assert not any(penalties[0])


@pytest.mark.slow
def test_two_runs_of_the_same_layout_are_bitwise_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(2, tmp_path / name, "engine.name=fsdp2", "model.quant=nf4", "train.max_steps=5")
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


@pytest.mark.slow
def test_bytes_held_and_read_fall_as_one_over_n(tmp_path: Path) -> None:
    found: dict[int, list[dict[str, Any]]] = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        train(ranks, folder, "engine.name=fsdp2", "model.quant=nf4", "train.max_steps=1")
        start = next(e for e in rows(folder, "events.jsonl") if e["event"] == "start")
        found[ranks] = start["per_rank"]
    (alone,) = found[1]
    for ranks in (2, 3):
        for key in ("bytes_read", "bytes_held"):
            values = [r[key] for r in found[ranks]]
            assert sum(values) == alone[key], "rows are read or held twice"
            # Rows split unevenly by at most one row a tensor.
            assert max(values) <= alone[key] / ranks * 1.05


def test_variables_of_srun_and_of_torchrun() -> None:
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[07-09,12],login2",
        "SLURM_JOB_ID": "41234",
    }
    assert launch_variables(slurm) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "29234",
    }
    assert launch_variables({})["WORLD_SIZE"] == "1"
    # A batch script calls python without srun: one process, although the job has four tasks.
    assert launch_variables({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"})["WORLD_SIZE"] == "1"
    with pytest.raises(UserError, match="not MASTER_ADDR, MASTER_PORT"):
        launch_variables({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    for text, first in (("a1", "a1"), ("a1,b2", "a1"), ("n[3-5]", "n3"), ("n[001,4]x,m2", "n001x")):
        assert first_host(text) == first


def test_world_size_must_divide_the_global_batch(tmp_path: Path) -> None:
    codes, text = Job(
        2,
        [
            "train",
            "model=tiny",
            "data=toy",
            "engine.name=fsdp2",
            "train.max_steps=1",
            "train.global_batch=15",
            f"run_dir={tmp_path}/r",
        ],
    ).wait()
    assert codes == [2, 2]
    assert text.count("scalepeft: error:") == 1
    assert "train.global_batch=15" in text and "2 ranks" in text
