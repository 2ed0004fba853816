"""One process is the reference: every engine and world size must give its losses; bytes fall as
1/N.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import engine_corners
import pytest
import torch
import yaml
from processes import FULL, Job, adapter_bytes, losses, rows, train
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from scalepeft.build import build
from scalepeft.config import files as config_files
from scalepeft.core.errors import UserError
from scalepeft.core.launch import first_host, launch_variables
from scalepeft.models import tiny
from scalepeft.models.hub import open_base
from scalepeft.models.tensors import Reader
from scalepeft.parallel import ranks as ranks_module
from scalepeft.parallel import zero
from scalepeft.parallel.base import MOMENTS
from scalepeft.parallel.fsdp2 import FSDP2, FSDP2Config
from scalepeft.parallel.ranks import Ranks
from scalepeft.run.checkpoint import Checkpoint, verify
from scalepeft.trainer import Trainer

# (ranks, engine settings): every engine at some world sizes, with --full at every one from 1 to 4.
WORLDS = {"ddp": (2,), "fsdp2": (3,), 1: (2,), 2: (3,), 3: (3,)}
if FULL:
    WORLDS = dict.fromkeys(WORLDS, (1, 2, 3, 4))
LAYOUTS = [
    (1, "name=single"),
    *((ranks, f"name={name}") for name in ("ddp", "fsdp2") for ranks in WORLDS[name]),
    (4, "name=fsdp2,shard_over=2"),
    # whole_below: else stage 3 would keep all of so small a model whole.
    *(
        (ranks, f"name=zero,stage={stage}" + ",whole_below=0" * (stage == 3))
        for stage in (1, 2, 3)
        for ranks in WORLDS[stage]
    ),
]


CELLS = [
    (quant, adapter)
    for adapter in (
        "name=hoft,rank=4",
        "name=goft",
        "name=surm,structure=kronecker",
        "name=lora,rank=4,dropout=0.1",
    )
    for quant in ("nf4", "none")
]


# With --full all of the tables; in every run each layout has the first cell, and what it saves
# resumes under one other; ``thorough`` ones have one of the other cells too, and resume themselves.
WHOLE = FULL
STEPS = 20 if FULL else 8


RUN = [
    "data=toy",
    "data.train_size=300",
    "train.precision=fp32",
    "train.lr=3e-3",
    "train.global_batch=12",
    f"train.max_steps={STEPS}",
    f"train.save_every={STEPS // 2}",
]


Layout = tuple[int, str]


def label(layout: Layout) -> str:
    return f"{layout[0]}-{layout[1].replace('name=', '').replace(',', '-')}"


def thorough(layout: Layout) -> bool:
    """Where it brings something new: on two cores four ranks take minutes."""
    return layout[0] < 4 or "shard_over" in layout[1]


def keys(section: str, settings: str) -> list[str]:
    return [f"{section}.{setting}" for setting in settings.split(",")]


def run_all(folder: Path, runs: list[tuple[Layout, Path, list[str]]]) -> None:
    """Trains runs of one world size after another, each size in one launch."""
    for ranks in sorted({layout[0] for layout, _, _ in runs}):
        todo = [
            # Other micro-batches than the reference, so that accumulation is in the tables too.
            [str(path), [*RUN, "train.micro_batch=3", *settings, *keys("engine", layout[1])]]
            for layout, path, settings in runs
            if layout[0] == ranks
        ]
        plan = folder / f"runs-{ranks}.json"
        plan.write_text(json.dumps(todo))
        program = str(Path(__file__).with_name("many_runs.py"))
        codes, text = Job(ranks, [str(plan)], program=(program,)).wait(60 + 20 * len(todo))
        assert codes == [0] * ranks, text


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of two blocks with the built-in tokenizer."""
    folder, source = tmp_path_factory.mktemp("base"), tiny.make(1)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def table(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of the tables: FOLDER/LAYOUT/CELL, with a checkpoint halfway."""
    folder = tmp_path_factory.mktemp("table")
    runs = []
    for i, layout in enumerate(LAYOUTS):
        everything = WHOLE or layout == LAYOUTS[0]
        second = (1 + i % (len(CELLS) - 1),) if thorough(layout) else ()
        for n in range(len(CELLS)) if everything else (0, *second):
            quant, adapter = CELLS[n]
            settings = [f"model.path={small}", f"model.quant={quant}", *keys("adapter", adapter)]
            if layout == LAYOUTS[0]:
                settings.append("train.micro_batch=12")
            elif n:  # accumulation at four ranks too
                settings.append("train.micro_batch=2")
            runs.append((layout, folder / label(layout) / str(n), settings))
    run_all(folder, runs)
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_losses_equal_one_process(layout: Layout, table: Path) -> None:
    """Ragged rows, dropout included; other micro-batches than in the reference."""
    cells = [path for path in (table / label(layout)).iterdir() if path.name.isdigit()]
    assert len(cells) >= 1 + thorough(layout)
    for path in cells:
        reference = table / label(LAYOUTS[0]) / path.name
        pairs = list(zip(losses(path), losses(reference), strict=True))
        assert len(pairs) == STEPS and pairs[0][0] > pairs[-1][0]
        assert max(abs(a - b) for a, b in pairs) < 1e-5, CELLS[int(path.name)]


@pytest.fixture(scope="module")
def resumed(table: Path) -> list[tuple[Layout, Layout, Path]]:
    """(saved under, resumed under, folder)."""
    found, runs = [], []
    for i, source in enumerate(LAYOUTS):
        other = LAYOUTS[(i + 4) % len(LAYOUTS)]
        for target in LAYOUTS if WHOLE else (other, source)[: 1 + thorough(source)]:
            path = table / label(target) / f"from-{label(source)}"
            shutil.copytree(table / label(source) / "0", path)
            for later in ("adapter", f"checkpoints/step-{STEPS:06d}"):  # as if it had ended halfway
                shutil.rmtree(path / later)
            found.append((source, target, path))
            held = yaml.safe_load((path / "config.yaml").read_text())
            settings = [f"model.path={held['model']['path']}", "model.quant=nf4"]
            if target == LAYOUTS[0]:
                settings.append("train.micro_batch=12")
            runs.append((target, path, [*settings, *keys("adapter", CELLS[0][1])]))
    run_all(table, runs)
    return found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_goes_on_under_any_engine_at_any_world_size(
    table: Path, resumed: list[tuple[Layout, Layout, Path]]
) -> None:
    """Saved halfway, run to the end: adapter and order of samples of a run without a stop."""
    assert {source for source, _, _ in resumed} == {t for _, t, _ in resumed} == set(LAYOUTS)
    for source, target, path in resumed:
        where = f"{label(source)} -> {label(target)}"
        undisturbed = table / label(target) / "0"
        for key in ("step", "sample_index", "label_tokens", "lr"):
            assert [r[key] for r in rows(path)] == [r[key] for r in rows(undisturbed)], where
        if source == target:
            assert adapter_bytes(path) == adapter_bytes(undisturbed), where
            continue
        got, want = (
            load_file(p / "adapter/adapter_model.safetensors") for p in (path, undisturbed)
        )
        assert got.keys() == want.keys()
        assert max((got[k] - want[k]).abs().max().item() for k in want) < 1e-5, where


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(["adapter.name=shoft"], marks=pytest.mark.full),
        pytest.param(["adapter.name=shoft", "adapter.form=pairs"], marks=pytest.mark.full),
        pytest.param(["adapter.name=lora"], marks=pytest.mark.full),
        ["adapter=qgoft", "adapter.penalty=1"],
        ["adapter.name=hra", "adapter.rank=4", "adapter.penalty=1", "adapter.dropout=0.2"],
        pytest.param(["adapter=hadamard"], marks=pytest.mark.full),
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
    if "adapter.penalty=1" in adapter:
        assert adapter[0] == "adapter.name=hra" or penalties[0][0] == 0
        assert penalties[0][0] != penalties[0][-1] > 0
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-3)
    else:
        assert not any(penalties[0])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_corners_of_engines(small: Path) -> None:
    """One launch; the program is engine_corners.py."""
    settings = [
        "data=toy", "data.train_size=60", "data.valid_size=20", f"model.path={small}",
        "model.quant=nf4", "adapter=qgoft", "adapter.penalty=1", "train.global_batch=12",
        "train.micro_batch=3", "train.max_steps=3", "train.max_grad_norm=0.05",
    ]  # fmt: skip
    program = str(Path(__file__).with_name("engine_corners.py"))
    codes, text = Job(2, settings, program=(program,)).wait(200)
    assert codes == [0, 0], text
    assert text.count("ok ") == 2 * sum(len(e) for *_, e in engine_corners.PRECISIONS)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_evaluation_under_zero_3(tmp_path: Path) -> None:
    """Each rank holds half of the base; the answers are those of one process."""
    train(1, tmp_path / "run", "model.quant=nf4", "train.max_steps=1", "data.test_size=10")
    answers = []
    for ranks, settings in ((1, []), (2, ["engine=zero", "engine.whole_below=0"])):
        folder = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "run", folder)
        codes, text = Job(ranks, ["evaluate", str(folder), *settings]).wait()
        assert codes == [0] * ranks, text
        found = {row["id"]: row["prediction"] for row in rows(folder, "eval/toy/predictions.jsonl")}
        answers.append(found)
    assert answers[0] == answers[1] and len(answers[0]) > 5


def test_settings_that_an_engine_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"engine.*offload_parameters=true needs stage=3"):
        config_files.load(
            None,
            [
                "run_dir=r",
                "train.max_steps=1",
                "engine.name=zero",
                "engine.stage=2",
                "engine.offload_parameters=true",
            ],
        )
    with pytest.raises(UserError, match=r"engine\.stage"):
        config_files.load(
            None, ["run_dir=r", "train.max_steps=1", "engine.name=zero", "engine.stage=4"]
        )
    with pytest.raises(UserError, match=r"engine\.shard_over"):
        config_files.load(
            None, ["run_dir=r", "train.max_steps=1", "engine.name=fsdp2", "engine.shard_over=nodes"]
        )
    ranks = Ranks(world_size=6)
    with pytest.raises(UserError, match="6 ranks cannot form groups of 4"):
        FSDP2(FSDP2Config(shard_over=4), ranks).group_size()
    assert FSDP2(FSDP2Config(shard_over=3), ranks).group_size() == 3
    zero._deepspeed.cache_clear()
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"engine.name=zero needs deepspeed.*scalepeft\[deepspeed"):
        zero.Zero(zero.ZeroConfig(), Ranks())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_runs_of_the_same_layout_are_bitwise_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(2, tmp_path / name, "engine.name=fsdp2", "model.quant=nf4", "train.max_steps=5")
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bytes_held_and_read_fall_as_one_over_n(tmp_path: Path) -> None:
    found: dict[int, list[dict[str, Any]]] = {}
    for ranks in (1, *[2] * FULL, 3):
        folder = tmp_path / str(ranks)
        train(ranks, folder, "engine.name=fsdp2", "model.quant=nf4", "train.max_steps=1")
        start = next(e for e in rows(folder, "events.jsonl") if e["event"] == "start")
        found[ranks] = start["per_rank"]
    (alone,) = found[1]
    for ranks in found.keys() - {1}:
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


@pytest.mark.multiprocess
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


def test_what_ranks_set_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for given, want in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.setenv(name, given.get(name, ""))
            if name not in given:
                monkeypatch.delenv(name)
        torch.set_float32_matmul_precision("high")
        Ranks.start("auto", process_group=False)
        assert os.environ.get("PYTORCH_ALLOC_CONF") == want
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_pissa_begins_and_goes_on_the_same_under_every_engine(small: Path, tmp_path: Path) -> None:
    """Its start, out of a W that no rank has whole, is saved with what is trained, in bits."""
    common = [
        f"model.path={small}", "model.quant=nf4", "train.max_steps=3", "train.save_every=1",
        "train.keep_checkpoints=3", "train.save_mode=sharded",
        *keys("adapter", "name=lora,rank=4,dropout=0.1,start=pissa"),
    ]  # fmt: skip
    layouts = [LAYOUTS[0], (2, "name=ddp"), (2, "name=fsdp2"), (2, "name=zero,stage=1")]
    layouts += [(2, f"name=zero,stage=3,whole_below={below}") for below in (*[0] * FULL, 500)]
    paths = {layout: tmp_path / label(layout) for layout in layouts}
    run_all(tmp_path, [(layout, path, common) for layout, path in paths.items()])
    one = paths[LAYOUTS[0]]
    wanted = Reader(one / "checkpoints/step-000001")
    kept = {name for name in wanted.shapes if name.endswith(("A0", "B0"))}
    trained = {name.removesuffix("0") for name in kept}
    moments = {f"{name}/{kind}" for name in trained for kind in MOMENTS}
    assert len(kept) == 2 * 5 * 2, "two of each of five layers in two blocks"
    later: list[tuple[Layout, Path, list[str]]] = []
    for layout, path in paths.items():
        reader = Reader(path / "checkpoints/step-000001")
        assert reader.shapes.keys() == kept | trained | moments, layout
        for name in kept:
            assert torch.equal(reader.whole(name), wanted.whole(name)), (layout, name)
        pairs = zip(losses(path), losses(one), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5, layout
        # From step 1 on: what it saved in one process, what one process saved in it.
        for source, target in ((path, LAYOUTS[0]), (one, layout)):
            again = tmp_path / f"{source.name}-on-{label(target)}"
            if source != one or layout != LAYOUTS[0]:
                shutil.copytree(source, again)
                for step in ("adapter", "checkpoints/step-000002", "checkpoints/step-000003"):
                    shutil.rmtree(again / step)
                later.append((target, again, common))
    for layout in layouts[2], layouts[-1]:  # read in one process: the bits that two ranks wrote
        where = [f"run_dir={paths[layout]}", "engine.name=single"]
        config, _ = config_files.load(None, [*RUN, "train.micro_batch=3", *common, *where])
        ranks, folder = Ranks(), paths[layout] / "checkpoints/step-000003"
        built = build(config, open_base(config.model, ranks), ranks, lambda: None)
        trainer, reader = Trainer(config, ranks, built, ""), Reader(folder)
        trainer.restore(Checkpoint(3, folder, verify(folder)["state"]))
        assert all(torch.equal(p, reader.whole(name)) for name, p in trainer.saved.items())
        assert trainer.saved.keys() == kept | trained
    run_all(tmp_path, later)
    want = load_file(one / "adapter/adapter_model.safetensors")
    for _, path, _ in later:
        got = load_file(path / "adapter/adapter_model.safetensors")
        assert got.keys() == want.keys() and rows(path)[1]["step"] == 2
        for name, tensor in want.items():
            away = (got[name] - tensor).abs().max()
            assert tensor.any() and away <= (0 if name.endswith("0") else 1e-5), (path, name)
