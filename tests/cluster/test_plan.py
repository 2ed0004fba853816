"""scalepeft plan: arithmetic of what stays, peaks and collectives of steps really run, advice."""

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, TINY, Job, train

from scalepeft.cli import main
from scalepeft.cluster.plan import command, gpus, planning
from scalepeft.cluster.plan.gpus import Options
from scalepeft.cluster.plan.memory import measure, resident
from scalepeft.cluster.plan.planning import GIB, plan
from scalepeft.config import files as config_files
from scalepeft.core import registry
from scalepeft.core.errors import UserError
from scalepeft.models import dimensions as source
from scalepeft.models import shapes, tiny
from scalepeft.parallel.base import Engine

LLAMA70B = [
    "model=llama-3.1-70b", "engine=fsdp2", "adapter=hoft", "data=commonsense", "data.train=x",
    "data.cutoff=4096", "train.micro_batch=1", "train.max_steps=10", "run_dir=run",
]  # fmt: skip


FEW = "adapter.target_modules=q_proj"  # fewer operators to simulate


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run on two blocks of Llama-3.1-8B, embeddings and head: a config.json alone."""
    folder = tmp_path_factory.mktemp("two")
    values = shapes.architecture("llama-3.1-8b").to_dict() | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(values))
    return [
        f"model.path={folder}", "model.quant=nf4", "engine=fsdp2", "adapter=hoft", "data=toy",
        "data.cutoff=512", "train.micro_batch=16", "train.max_steps=10", "run_dir=run",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with six blocks: too many to be simulated whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("six")
    shape = LlamaConfig(**{**tiny.SPEC, "num_hidden_layers": 6, "tie_word_embeddings": False})
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def settings(model: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}", "data=toy", "data.cutoff=256", "adapter=hoft", "adapter.rank=4",
        "train.global_batch=8", "train.micro_batch=4", "train.max_steps=5", "run_dir=run", *more,
    ]  # fmt: skip


def planned(words: list[str], **where: Any) -> planning.Plan:
    return plan(config_files.load(None, words)[0], Options(**where))


CASES = {
    1: [
        ["train.micro_batch=8"],
        ["adapter=lora", "engine.activation_checkpointing=true", "model.quant=nf4",
         "train.precision=fp32", "train.loss_chunk=100"],
    ],
    2: [
        ["engine=fsdp2", "model.quant=nf4", "model.double_quant=true"],
        ["engine=fsdp2", "engine.reshard_after_forward=false", "train.micro_batch=2",
         "engine.activation_checkpointing=false", "adapter=goft"],
        ["engine=fsdp2", "engine.shard_over=1", "model.quant=int8", "train.precision=fp32"],
        ["engine=ddp", "adapter=shoft", "train.micro_batch=2"],
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_plan_is_what_really_happens(ranks: int, model: Path) -> None:
    """Peaks to 10 % of the profiler's (they are within 0.2), all else exactly."""
    cases = [settings(model, *more) for more in CASES[ranks]]
    words = [word for case in cases for word in ("--", *case)][1:]
    program = str(Path(__file__).with_name("measured_steps.py"))
    codes, text = Job(ranks, words, program=(program,)).wait(120)
    assert codes == [0] * ranks, text
    found = json.loads(text.split("MEASURED ")[1].splitlines()[0])
    for case, real in zip(cases, found, strict=True):
        step = planned(case, gpus_per_node=ranks).step
        assert step.simulated == (3, 4)
        assert step.resident_bytes == real["held"], case
        assert step.peak_bytes == pytest.approx(real["peak"], rel=0.01), case
        assert step.parameters[1] == real["trained"]
        assert step.load == real["bytes_read"]
        calls = {"_".join(key[0].split("-")): 0.0 for key in step.exchanges}
        for (name, _, _), (count, _) in step.exchanges.items():
            calls["_".join(name.split("-"))] += count
        names = {"allgather_base": "all_gather", "reduce_scatter_base": "reduce_scatter"}
        names["allreduce"] = "all_reduce"
        want = {names[name]: count for name, count in real["calls"].items()}
        assert calls == want, case


@pytest.mark.slow
@pytest.mark.full
def test_short_models_stand_for_long_ones(model: Path) -> None:
    config, _ = config_files.load(None, settings(model, "engine=fsdp2", "model.quant=nf4"))
    found = source.find(config.model)
    stretched = measure(config, found, 4, 2)
    other = replace(config, adapter=replace(config.adapter, layers=[0, 1, 2, 3, 4, 5]))
    assert measure(other, found, 4, 2).peak_bytes == stretched.peak_bytes, "all blocks by number"
    some = replace(config, adapter=replace(config.adapter, layers=[0, 3]))
    assert measure(some, found, 4, 2).simulated == (6,), "blocks that differ"
    kinds = ["full_attention", "sliding_attention"] * 3
    whole = source.Source(found.values | {"layer_types": kinds}, "", {})
    exact = measure(config, whole, 4, 2)
    assert exact.simulated == (6,)
    assert stretched.peak_bytes == pytest.approx(exact.peak_bytes, rel=1e-3)
    assert stretched.exchanges == exact.exchanges and stretched.flops == exact.flops


@pytest.mark.slow
@pytest.mark.parametrize("quant", [pytest.param("none", marks=pytest.mark.full), "nf4"])
def test_so_do_they_where_the_embedding_outweighs_a_block(quant: str, tmp_path: Path) -> None:
    values = shapes.architecture("llama-3.1-8b").to_dict() | {"num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(values))
    words = [f"model.path={tmp_path}", f"model.quant={quant}", "engine=fsdp2", FEW]
    config, _ = config_files.load(None, [*words, "data=toy", "run_dir=run", "train.max_steps=9"])
    found = source.find(config.model)
    kinds = ["full_attention", "sliding_attention"] * 4
    whole = source.Source(found.values | {"layer_types": kinds}, "", {})
    stretched, exact = measure(config, found, 2, 2), measure(config, whole, 2, 2)
    assert (stretched.simulated, exact.simulated) == ((3, 4), (8,))
    assert stretched.peak_bytes == pytest.approx(exact.peak_bytes, rel=1e-3)
    assert stretched.exchanges == exact.exchanges


def bytes_by_hand(
    shape: str, quant: str, ranks: int, layers: int, rank: int = 16
) -> tuple[float, float]:
    """(base, trained) bytes of a rank for HOFT on q, k, v, up, down, from the dimensions alone."""
    s = shapes.SHAPES[shape]
    d, ff = s["hidden_size"], s["intermediate_size"]
    kv = d // s["num_attention_heads"] * s["num_key_value_heads"]
    linear = layers * (2 * d * d + 2 * d * kv + 3 * d * ff)
    other = 2 * s["vocab_size"] * d + (2 * layers + 1) * d
    per_weight = {"none": 2, "nf4": 4.5 / 8, "int8": 1 + 4 / d}[quant]
    trained = layers * rank * (2 * d + 2 * (d + kv) + 2 * (d + ff))
    return (linear * per_weight + 2 * other) / ranks, 4 * trained / ranks


@pytest.mark.parametrize(
    ("engine", "world", "quant", "split"),
    [
        (["engine=fsdp2"], (2, 8), "nf4", 16),
        (["engine=fsdp2", "engine.shard_over=node"], (2, 8), "none", 8),
        (["engine=fsdp2", "engine.shard_over=4"], (2, 8), "int8", 4),
        (["engine=ddp"], (1, 4), "nf4", 1),
    ],
)
def test_what_stays_is_arithmetic(
    engine: list[str], world: tuple[int, int], quant: str, split: int, blocks: list[str]
) -> None:
    words = [*blocks, *engine, f"model.quant={quant}"]
    step = planned(words, nodes=world[0], gpus_per_node=world[1]).step
    base, trained = bytes_by_hand("llama-3.1-8b", quant, split, layers=2)
    assert step.resident["base"] == pytest.approx(base, rel=0.01)
    assert step.resident["adapter"] == pytest.approx(trained, rel=0.01)
    assert step.resident["optimizer"] == pytest.approx(2 * trained, rel=0.01)
    assert step.checkpoint == pytest.approx(3 * trained * split, rel=0.01)
    assert {k: step.peak[k] for k in ("base", "adapter")} == pytest.approx(
        {k: step.resident[k] for k in ("base", "adapter")}, rel=1e-4
    ), "the simulated ranks hold what arithmetic says"


def test_packed_lines_are_rows_of_the_full_length(blocks: list[str]) -> None:
    words = [*blocks, "engine=single", "train.global_batch=16", "train.micro_batch=2"]
    words += ["data.cutoff=512", "train.micro_tokens=2000"]
    assert planned(words).step.rows == 4
    assert planned([*words, "train.batching=padded"]).step.rows == 2


@pytest.mark.slow
def test_zero_by_arithmetic(blocks: list[str]) -> None:
    base, trained = bytes_by_hand("llama-3.1-8b", "nf4", 1, layers=2)
    one = [*blocks, "engine=zero"]
    parts = {}
    for stage in (1, 2, 3):
        step = planned([*one, f"engine.stage={stage}"], gpus_per_node=8).step
        parts[stage] = step
        assert step.resident["base"] == pytest.approx(base / (8 if stage == 3 else 1), rel=0.01)
        assert step.resident["optimizer"] == pytest.approx(3 * trained / 8, rel=0.01)
        assert step.host == 0
    assert parts[1].peak["gradients"] > parts[2].peak["gradients"]
    assert parts[3].peak["gathered"] > 0.2 * GIB
    moved = planned(
        [*one, "engine.stage=3", "engine.offload_optimizer=true", "engine.offload_parameters=true"],
        gpus_per_node=8,
    )  # fmt: skip
    assert moved.step.host == pytest.approx((base + 5 * trained) / 8, rel=0.01)
    assert moved.step.resident_bytes == 0 and moved.need < planned(one, gpus_per_node=8).need
    assert "by arithmetic" in command.table(moved) and "in host memory" in command.table(moved)


@pytest.mark.slow
@pytest.mark.full
def test_70b_on_a_laptop() -> None:
    """16 GPUs as 2 nodes, 4,096 tokens: under 3 minutes and 4 GB, the part that stays to 1 %."""
    words = [*LLAMA70B, "model.double_quant=false"]
    done = subprocess.run(
        [sys.executable, "-m", "scalepeft", "plan", *words, "--nodes=2", "--gpus-per-node=8",
         "--gpu=H100", "--json"],
        capture_output=True, text=True, timeout=180, check=True, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(done.stdout)
    base, trained = bytes_by_hand("llama-3.1-70b", "nf4", 16, layers=80)
    assert found["resident"]["total"] == pytest.approx(base + 3 * trained, rel=0.01)
    assert found["trained_parameters"] == 138_936_320 and found["fits"]
    # Reaped children alone, so at least that of this one.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4_000_000


@pytest.mark.slow
def test_a_checkpoint_has_the_size_it_was_said_to_have(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, run, "train.max_steps=1")
    step = planned([*TINY, "train.max_steps=1", "run_dir=run"]).step
    files = (run / "checkpoints/step-000001").glob("*.safetensors")
    tensors = sum(
        f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files
    )
    assert tensors == step.checkpoint


def test_what_a_run_that_does_not_fit_is_told(blocks: list[str]) -> None:
    words = [*blocks, FEW, "engine=single", "model.quant=none", "data.cutoff=1024"]
    large = planned(words, memory=8.0)
    assert large.fits is False and large.smallest is None
    lines = command.table(large)
    assert "does NOT fit GPUs of 8 GiB" in lines and "fits on no number of GPUs" in lines
    for hint in ("activation_checkpointing", "train.micro_batch=1", "engine=fsdp2", "nf4"):
        assert hint in lines
    smaller = planned([*words, "train.micro_batch=1", "model.quant=nf4"], memory=8.0)
    assert smaller.fits and smaller.need < large.need
    assert "train.micro_batch=1" not in command.table(smaller), "no hints where it fits"


@pytest.mark.slow
@pytest.mark.full
def test_the_smallest_number_of_gpus() -> None:
    words = ["model=llama-3.1-8b", "data=toy", "run_dir=run", "train.max_steps=9", FEW]
    words += ["engine=fsdp2", "model.quant=none", "model.double_quant=false"]
    need = {n: planned(words, gpus_per_node=n).need / GIB for n in (2, 4)}
    found = planned(words, nodes=2, gpus_per_node=8, memory=need[4])
    assert need[2] > need[4] and found.fits and found.smallest == (1, 4)
    counts = list(planning.counts(config_files.load(None, [*words, "train.global_batch=48"])[0], 8))
    assert counts == [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8)], "divisors of the batch, whole nodes"


def test_grace_follows_step_and_save(blocks: list[str]) -> None:
    slow = planned([*blocks, FEW], gpus_per_node=8, step_seconds=100.0, disk=1e6)
    assert planned([*blocks, FEW], gpus_per_node=8).grace == 60
    save = slow.step.checkpoint * (1e-6 + 2e-9)
    assert slow.save_seconds == pytest.approx(save)
    assert slow.grace % 30 == 0 and 0 <= slow.grace - (2 * (100 + save) + 30) < 30
    beside = planned(
        [*blocks, FEW, "train.save_mode=async"], gpus_per_node=8, step_seconds=100.0, disk=1e6
    )
    save = beside.step.checkpoint * (1e-6 + 2e-9 / 8)
    assert 0 <= beside.grace - (2 * (100 + 2 * save) + 30) < 30, "one under way, and the last one"


MEASURED = {
    "env": {"device": "NVIDIA H200", "tiny": False},
    "training": {
        "hoft none": {"ms": 1.0, "CUDA GiB": 0.5}, "lora none": {"ms": 1.0, "CUDA GiB": 0.75},
        "frozen none": {"ms": 1.0, "CUDA GiB": 9.0}, "goft none": {"fault": "of this test"},
    },
    "plan": {
        "hoft none": {"TFLOP/s of plan": 400.0, "holes": 0.01},
        "lora none": {"TFLOP/s of plan": 500.0, "holes": 0.02},
        "goft none": {"skipped": "no time left"},
    },
}  # fmt: skip


def results(file: Path, **env: Any) -> str:
    file.write_text(json.dumps({**MEASURED, "env": {**MEASURED["env"], **env}}))
    return str(file)


def test_what_bench_gpu_measured_is_taken_in_place_of_what_is_assumed(
    blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "RESULTS", tmp_path)
    words = [*blocks, "engine=single", "train.micro_batch=1", FEW, "train.precision=bf16"]
    before = planned(words, gpu="H200")
    assert before.options.found is None and "assumed, not measured" in command.table(before)
    file = results(tmp_path / "gpu.json")
    after = planned(words, gpu="NVIDIA H200", measured=file)
    assert after.compute_seconds == after.step.flops / 450e12
    changes = after.step.peak_bytes - after.step.resident_bytes
    assert after.runtime == 0.75 * GIB + 0.02 * changes
    assert after.basis == f"measured: {file}" and f"as measured: {file}" in command.table(after)
    assert command.as_dict(after)["measured"]["file"] == file
    exact = planned([*words, "train.precision=fp32"], gpu="H200", measured=file)
    assert exact.basis.startswith("assumed: 35%"), "only bf16 was measured"
    assert exact.compute_seconds == exact.step.flops / (67e12 * planning.MFU)


def test_the_newest_result_of_that_gpu_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "RESULTS", tmp_path)
    results(tmp_path / "2026-12-01-bench-gpu-h200.json")
    newest = results(tmp_path / "2026-12-02-bench-gpu-h200.json")
    results(tmp_path / "2026-12-03-bench-gpu-h200-tiny.json", tiny=True)
    other = results(tmp_path / "2026-12-04-bench-gpu-a.json", device="NVIDIA A100-SXM4-80GB")
    results(tmp_path / "2026-12-05-methods-h200.json")
    assert Options(gpu="H200").found["file"] == newest
    assert Options(gpu="A100-80").found["file"] == other
    assert Options(gpu="L40S").found is Options().found is Options(memory=140).found is None


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({}, {"gpu": "H100"}, "of 'NVIDIA H200', which --gpu does not name"),
        ({}, {}, "of 'NVIDIA H200', which --gpu does not name; give both of the same"),
        ({}, {"memory": 139.7}, "which --gpu does not name"),
        ({"tiny": True}, {"gpu": "H200"}, "of 'NVIDIA H200 --tiny', which --gpu"),
        ({"device": None}, {"gpu": "H200"}, "TypeError.* expected gpu.json of a full"),
        (None, {"gpu": "H200"}, "FileNotFound.* expected gpu.json of a full"),
        ("[]", {"gpu": "H200"}, "expected gpu.json of a full"),
        ('{"env": {}', {"gpu": "H200"}, "ValueError.* expected gpu.json of a full"),
        (json.dumps({**MEASURED, "plan": {}}), {"gpu": "H200"}, "expected gpu.json of a full"),
        (json.dumps(MEASURED).replace("0.75", '"NaN"').replace("0.5", '"NaN"'), {"gpu": "H200"},
         "ValueError.*nan.* expected gpu.json"),
        (json.dumps(MEASURED).replace("0.02", "null"), {"gpu": "H200"}, "TypeError.* expected"),
    ],
)  # fmt: skip
def test_a_measurement_that_cannot_be_used_is_refused(
    change: Any, where: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "gpu.json"
    if isinstance(change, str):
        file.write_text(change)
    elif change is not None:
        results(file, **change)
    with pytest.raises(UserError, match=message):
        Options(**where, measured=str(file))


@pytest.mark.slow
def test_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["model=tiny", "data=toy", "run_dir=run", "train.max_steps=5"]
    assert main(["plan", *words, "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    for part in ("trained parameters  98,304", "fits H100", "1 GPU", "B:USR1@60", "assumed"):
        assert part in text
    assert main(["plan", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained_parameters"] == 98_304 and found["fits"] is None
    assert sum(v for k, v in found["peak"].items() if k != "total") == found["peak"]["total"]
    assert main(["plan", *words]) == 0
    assert "fits A100-40, L40S, A100-80, H100, H200, B200" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "no run folder"


@pytest.mark.slow
def test_run_folder_and_length_may_be_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "model=tiny", "data=toy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["config"]
    assert (found["run_dir"], found["train"]["epochs"]) == ("unset", 1.0)
    file = tmp_path / "run.yaml"
    file.write_text("model: tiny\ndata: toy\nrun_dir: mine\ntrain: {epochs: 3}\n")
    assert main(["plan", str(file), "train.max_steps=7", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["config"]
    assert (found["run_dir"], found["train"]["max_steps"]) == ("mine", 7)
    assert "train.max_steps=7 replaces train.epochs=3" in printed.err


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("A100-SXM4-80GB", "A100-80"),
        ("A100 80GB PCIe", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("a100_80g", "A100-80"),
        ("NVIDIA L40S", "L40S"),
        ("A100", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 NVL", None),
        ("H100-94GB", None),
        ("GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("80", None),
        ("", None),
    ],
)
def test_the_gpu_that_a_text_names(text: str, name: str | None) -> None:
    found = gpus.named(text)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--gpu", "H1000"], "no GPU 'H1000'. Did you mean 'H100'?"),
        (
            ["--gpu", "A100"],
            "Did you mean 'A100-80'? Known: A100-40, L40S, A100-80, H100, H200, B200",
        ),
        (["--gpu", "NVIDIA H100 NVL"], "for another one: scalepeft plan --memory GIB"),
        (["--nodes", "0"], "--nodes 0: expected a number above 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: expected"),
        (["--memory", "nan"], "--memory nan: expected"),
        (["--disk-gbps", "0"], "--disk-gbps 0: expected"),
        (["--memory", "80", "--gpu", "H100"], "one of --gpu and --memory"),
        (["--nodes", "x"], "invalid int value"),
        (["--gpus-per-node", "3"], "cannot be shared evenly by 3 ranks"),
        (["--gpus-per-node", "2", "engine=single"], "engine.name=single runs in one process"),
        (["--gpus-per-node", "4", "engine.shard_over=3"], "engine.shard_over=3"),
        (["adapter.rnk=2"], "adapter.rnk=2: no such key"),
        (["adapter.target_modules=nope"], "'nope' matches no linear layer"),
        (["adapter.layers=9"], "no block 9"),
        (["data.cutoff=2048"], "beyond the model's 1024 positions"),
        (["model.path=/nowhere"], "/nowhere: no such folder"),
        (["model.path=."], "no config.json there"),
        (["train.max_steps=0"], "train.max_steps=0"),
        (["train.epochs=1"], "give one of train.max_steps and train.epochs, not both"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    own = ["model=tiny", "data=toy", "engine=fsdp2", "run_dir=run", "train.max_steps=5"]
    try:
        code = main(["plan", *own, *words])
    except SystemExit as error:  # argparse
        code = error.code  # type: ignore[assignment]
    printed = capsys.readouterr().err.strip()
    assert code == 2 and text in printed
    assert printed.startswith("scalepeft: error: ") and "\n" not in printed


def test_where_dimensions_come_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    load = []
    for folder in (tmp_path, model):
        config, _ = config_files.load(None, settings(folder))
        load.append(resident(config, source.find(config.model), 1, 1).load)
    assert load[0] == load[1] > 0
    assert shapes.of_hub_id("meta-llama/Meta-Llama-3.1-8B-Instruct") == "llama-3.1-8b"
    assert shapes.of_hub_id("Qwen/Qwen2.5-7B-Instruct") == "qwen2.5-7b"
    assert shapes.of_hub_id("someone/Llama-3.1-8B") is None
    unknown = config_files.load(None, settings(Path("org/name")))[0]
    remedy = re.escape("set model.path=FOLDER (the model's config.json is enough)")
    with pytest.raises(UserError, match=f"org/name: its config.json .* {remedy}"):
        source.find(unknown.model, network=False)

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(UserError, match=r"the download failed \(OSError\)"):
        command.run(settings(Path("org/name")), Options(), False)


def test_private_names_that_the_simulation_leans_on() -> None:
    """Where one is missing its work would count as activations: a new torch must say so here."""
    from torch.distributed import ProcessGroup, distributed_c10d
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from transformers import masking_utils

    model = torch.nn.Linear(2, 2, device="meta")
    marks = [
        (module, name)
        for kind in ("single", "ddp", "fsdp2", "zero")
        for engine in [registry.find_class("parallel", kind, "engine", Engine)]
        for module, name, _ in engine.shares(engine.Config(name=kind), model, 2, 2).marks
    ]
    assert len(marks) == 4, "three of FSDP2 and the sum of ddp"
    for owner, name in [
        *marks,
        (ShardingPropagator, "_propagate_tensor_meta_non_cached"),
        (masking_utils, "find_packed_sequence_indices"),
        (distributed_c10d, "_resolve_process_group"),
        (ProcessGroup, "unbox"),
        (torch.UntypedStorage, "_cdata"),
        (torch.UntypedStorage, "resize_"),
    ]:
        assert hasattr(owner, name), (owner, name)
