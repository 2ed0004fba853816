"""scalepeft report --peft-result: keys and types of HF PEFT's files, figures of the run's own."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from processes import ROOT, call, rows

from scalepeft.cli import main

text, whole, real, truth, missing = "text", "whole", "real", "truth", "missing"
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
MADE = {"sha": text, "created_at": text}
# results/lora--llama-3.2-3B-rank32-riemannian.json of 2026-09-15 in PEFT's repository: its keys and
# types, but for peft_config, whose keys are the method's, and the optimizer_kwargs of its own.
SCHEMA: dict[str, Any] = {
    "run_info": {
        "created_at": text, "total_time": real, "experiment_name": text, "peft_branch": text,
        "peft_worktree_is_dirty": truth,
        "train_config": {
            "model_id": text, "dtype": text, "max_seq_length": whole, "batch_size": whole,
            "batch_size_eval": whole, "max_steps": whole, "eval_steps": whole, "compile": truth,
            "use_gc": truth, "query_template": text, "seed": whole, "grad_norm_clip": real,
            "optimizer_type": text, "optimizer_kwargs": {"lr": real, "weight_decay": real},
            "lr_scheduler": text, "use_amp": truth, "autocast_adapter_dtype": truth,
            "generation_kwargs": {"max_length": whole, "max_new_tokens": whole},
            "attn_implementation": missing, "init_kv_cache_prefix": missing,
        },
        "peft_config": None,
        "error_msg": text,
    },
    "train_info": {
        "accelerator_memory_reserved_avg": whole, "accelerator_memory_max": whole,
        "accelerator_memory_reserved_99th": whole, "train_time": real, "file_size": whole,
        "num_trainable_params": whole, "num_total_params": whole, "status": text, "metrics": None,
    },
    "meta_info": {
        "model_info": MADE,
        "dataset_info": {"metamath": MADE, "gsm8k": MADE},
        "package_info": {
            f"{name}-{what}": text for name in PACKAGES for what in ("version", "commit-hash")
        },
        "system_info": dict.fromkeys(
            ("system", "release", "version", "machine", "processor", "accelerator"), text
        ),
        "pytorch_info": text,
    },
}  # fmt: skip
STEP = {
    "step": whole, "valid accuracy": real, "train loss": real, "train samples": whole,
    "train time": real, "eval time": real, "tokens / sec": real, "mem allocated avg": real,
    "mem reserved avg": real, "elapsed time": real,
}  # fmt: skip
LAST = {
    "step": whole, "test accuracy": real, "train loss": real, "train samples": whole,
    "train total tokens": whole, "forgetting": real,
}  # fmt: skip
TYPES = {text: str, whole: int, real: float, truth: bool, missing: type(None)}


def nulls(value: Any, schema: Any, where: str = "") -> list[str]:
    """What is null of a result; fails where keys or types are not the schema's."""
    if isinstance(schema, dict):
        assert list(value) == list(schema), where
        return [n for k in schema for n in nulls(value[k], schema[k], f"{where}.{k}".lstrip("."))]
    if schema is None:
        return []
    if value is None and schema != missing:
        return [where]
    assert type(value) is TYPES[schema], f"{where}: {value!r}"
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    lines = [
        {"query": f"What is {i} plus 1?", "response": f"It is {i + 1}.\nThe answer is: {i + 1}"}
        for i in range(40)
    ]
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [{"question": f"What is {i} plus 3?", "answer": f"So\n#### {i + 3}"} for i in range(4)]
    test.write_text("".join(json.dumps(line) + "\n" for line in asked))
    done = call(
        "train", "peft_lora", "model.path=builtin:tiny", f"data.train={train}", "data.cutoff=256",
        f"data.valid={test}", f"data.test={test}", "train.max_steps=12", "train.warmup_steps=2",
        "train.eval_every=5", "train.precision=fp32", "adapter.rank=4", f"run_dir={folder}/run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    done = call("evaluate", f"{folder}/run", "evaluate.max_new_tokens=4")
    assert done.returncode == 0, done.stdout
    return folder / "run"


def written(run: Path) -> dict[str, Any]:
    assert main(["report", str(run), "--peft-result", str(run / "result.json")]) == 0
    made: dict[str, Any] = json.loads((run / "result.json").read_text())
    return made


@pytest.mark.slow
def test_keys_and_types_are_theirs_and_figures_are_the_runs(run: Path) -> None:
    made = written(run)
    assert nulls(made, SCHEMA) == [  # what a run on a CPU does not measure
        "run_info.peft_branch", "run_info.peft_worktree_is_dirty",
        "train_info.accelerator_memory_reserved_avg", "train_info.accelerator_memory_max",
        "train_info.accelerator_memory_reserved_99th", "train_info.num_total_params",
        "meta_info.model_info.sha", "meta_info.model_info.created_at",
        *(f"meta_info.dataset_info.{name}.{key}" for name in ("metamath", "gsm8k") for key in MADE),
        *(f"meta_info.package_info.{name}-commit-hash" for name in PACKAGES),
        *(f"meta_info.system_info.{k}" for k in list(SCHEMA["meta_info"]["system_info"])[:-1]),
        "meta_info.pytorch_info",
    ]  # fmt: skip
    *steps, last = made["train_info"]["metrics"]
    told = ["valid accuracy", "mem allocated avg", "mem reserved avg"]
    assert [nulls(step, STEP) for step in steps] == [told, told]
    assert nulls(last, LAST) == ["test accuracy", "forgetting"]  # data.cutoff is not theirs here
    logged, held = rows(run), rows(run, "validation.jsonl")
    tokens = [row["tokens_per_second"] * row["seconds"] for row in logged]
    assert last["train loss"] == pytest.approx(fmean(row["loss"] for row in logged[-5:]))
    assert last["train total tokens"] == round(sum(tokens))
    assert (last["step"], last["train samples"]) == (12, 48)
    for n, step in enumerate(steps):
        part = logged[5 * n : 5 * n + 5]
        seconds = sum(row["seconds"] for row in part)
        assert (step["step"], step["train samples"]) == (5 * n + 5, 20 * n + 20)
        assert step["train loss"] == pytest.approx(fmean(row["loss"] for row in part))
        assert step["train time"] == pytest.approx(seconds)
        assert step["tokens / sec"] == pytest.approx(sum(tokens[5 * n : 5 * n + 5]) / seconds)
        assert step["eval time"] == held[n]["seconds"]
    told = made["train_info"]
    assert told["train_time"] == pytest.approx(sum(row["seconds"] for row in logged))
    assert told["file_size"] == (run / "adapter/adapter_model.safetensors").stat().st_size
    assert (told["status"], told["num_trainable_params"]) == (
        "success",
        rows(run, "events.jsonl")[0]["parameters"],
    )
    info = made["run_info"]
    assert info["experiment_name"] == "lora/run"
    assert info["peft_config"] == json.loads((run / "adapter/adapter_config.json").read_text())
    assert (
        info["train_config"]["query_template"] == "Question: {query} Think step by step.\nAnswer:"
    )
    assert info["train_config"]["optimizer_kwargs"] == {"lr": 1e-4, "weight_decay": 0.1}


@pytest.mark.slow
def test_accuracy_is_that_of_their_rule_and_memory_that_of_the_gpu(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, folder := tmp_path / "run")
    file = folder / "eval/math/scores.json"
    scores = json.loads(file.read_text())
    scores["deviations"] = {}
    scores["metrics"]["strict_accuracy"]["value"] = 0.75
    file.write_text(json.dumps(scores))
    metrics = [row | {"memory_reserved": 1000 * row["step"]} for row in rows(folder)]
    (logs,) = folder.glob("metrics*.jsonl")
    logs.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    made = written(folder)
    assert made["train_info"]["metrics"][-1]["test accuracy"] == 0.75
    assert [m["mem reserved avg"] for m in made["train_info"]["metrics"][:-1]] == [3000.0, 8000.0]
    assert made["train_info"]["accelerator_memory_reserved_avg"] == 6500
    assert made["train_info"]["accelerator_memory_reserved_99th"] == 11890
    scores["step"] = 10  # evaluated, then trained on: no accuracy of this adapter
    file.write_text(json.dumps(scores))
    starts = [rows(folder, "events.jsonl")[0] | {"steps": steps} for steps in (12, 20)]
    with (folder / "events.jsonl").open("a") as events:
        events.writelines(json.dumps(start) + "\n" for start in starts)
    made = written(folder)
    assert made["train_info"]["metrics"][-1]["test accuracy"] is None
    assert made["run_info"]["train_config"]["max_steps"] == 20


@pytest.mark.parametrize("which", ["none", "two", "older"])
def test_one_run_that_has_trained(
    which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = ROOT / "tests/data/run-2026-11-21/finished"
    shutil.copytree(older, one := tmp_path / "one")
    shutil.copytree(older, two := tmp_path / "two")
    if which == "older":
        made = written(one)
        assert made["run_info"]["peft_config"] is made["train_info"]["file_size"] is None
        for place in ("", ".", str(one)):
            assert main(["report", str(one), "--peft-result", place]) == 2
            assert "--peft-result another file" in capsys.readouterr().err
        return
    if which == "none":
        (one / "metrics.jsonl").unlink()
    runs = [str(one), str(two)] if which == "two" else [str(one)]
    assert main(["report", *runs, "--peft-result", str(tmp_path / "r.json")]) == 2
    said = "one has no step yet" if which == "none" else "not of 2"
    assert (
        f"--peft-result is of one run that has trained, {said}"
        in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    )
    assert not (tmp_path / "r.json").exists()
