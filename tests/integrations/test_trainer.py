"""transformers' Trainer and TRL's SFTTrainer with our methods: numbers, stops, ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import trainer_runs
import transformers
from processes import ROOT, Job, rows
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from scalepeft import train
from scalepeft.adapters import inject
from scalepeft.build import task_of
from scalepeft.config import files
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import SIGNALS, StopFlag
from scalepeft.data import loader, token_file
from scalepeft.integrations.trainer import PreemptionCallback, last_checkpoint
from scalepeft.models import tiny
from scalepeft.models.hub import open_base
from scalepeft.parallel.ranks import Ranks

PROGRAM = (str(Path(__file__).with_name("trainer_runs.py")),)
FULL = pytest.mark.full
PORT = {"SCALEPEFT_RENDEZVOUS": ""}  # accelerate's own way of meeting


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny.make(0))


def ranks(runs: list[dict[str, Any]], env: dict[str, str] = PORT, program: Any = PROGRAM) -> Job:
    return Job(2, [json.dumps(runs)], env, program)


def losses(folder: Path) -> list[float]:
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


def wait_for(file: Path, job: Job) -> None:
    limit = time.monotonic() + 90
    while not file.exists():
        if any(rank.poll() is not None for rank in job.ranks) or time.monotonic() > limit:
            pytest.fail(f"no {file.name}\n{job.wait(1)}")
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_signals_far_apart_stop_all_ranks_at_one_step(tmp_path: Path, base: str) -> None:
    """transformers' own just-in-time checkpoint hangs for good here. Resumed, dropout and all, the
    losses are those of the undisturbed run to the bit.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = {"folder": base, "method": "lora", "max_steps": 7, "gradient_accumulation_steps": 2}
    state = {"SCALEPEFT_JOB_STATE": str(tmp_path), **PORT}
    slow = {**run, "out": str(cut), "slow": 0.25}
    job = ranks([{**run, "out": str(whole)}, slow], state)
    wait_for(cut / "rank-1-step-2", job)
    job.ranks[1].send_signal(signal.SIGTERM)
    time.sleep(0.3)
    job.ranks[0].send_signal(signal.SIGTERM)
    codes, text = job.wait()
    assert codes == [75, 75], text
    (saved,) = cut.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert 2 < step < 7 and f"stopped and saved at step {step}; the same command" in text
    for name in ("progress", "stopped"):  # with which the job script has it come back
        assert (tmp_path / name).read_text() == f"step {step}\n"
    codes, text = ranks([{**run, "out": str(cut)}]).wait()
    assert codes == [0, 0], text
    assert losses(cut) == losses(whole) and len(losses(whole)) == 7
    a, b = (load_file(folder / "final/adapter_model.safetensors") for folder in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoint-mine").mkdir()
    state = '{"global_step": 9}'
    for step, text in ((9, state), (10, state), (11, '{"epo'), (12, None), (8, "null")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert capsys.readouterr().err.count("is not whole, passed over") == 2
    assert get_last_checkpoint(str(tmp_path)).endswith("-12"), "then ours is needless"


def test_signals_are_given_back_where_training_began_twice() -> None:
    """As ``auto_find_batch_size`` does after a batch too large, and a list that has it twice."""
    before = [signal.getsignal(number) for number in SIGNALS]
    call, state = PreemptionCallback(), SimpleNamespace(is_world_process_zero=True)
    for _ in range(2):
        call.on_train_begin(SimpleNamespace(save_only_model=False), state, None)
    for _ in range(2):
        call.on_train_end(None, state, None)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signals_are_given_back_after_training(tmp_path: Path, base: str) -> None:
    """Ctrl-C is Python's again; what could not be continued is refused before it begins."""
    before = [signal.getsignal(number) for number in SIGNALS]
    trainer_runs.run(str(tmp_path), base, max_steps=1)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(UserError, match="save_only_model=True: a stopped run could not go on"):
        trainer_runs.run(str(tmp_path / "only"), base, max_steps=1, save_only_model=True)


OWN = [
    "model=tiny", "data=toy", "data.train_size=60", "engine=single", "engine.device=cpu",
    "train.precision=fp32", "train.global_batch=6", "train.micro_batch=3", "train.max_steps=10",
    "train.seed=3", "train.schedule=constant", "train.warmup_steps=0", "train.batching=padded",
    "model.double_quant=false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "load"),
    [
        ("hoft", "fp32"),
        ("hoft", "bnb"),
        *(pytest.param(m, load, marks=FULL) for m, load in
          [("hoft", "nf4"), ("shoft", "fp32"), ("qgoft", "fp32"), ("qgoft", "bnb")]),
    ],
)  # fmt: skip
def test_losses_in_trainer_are_those_of_our_own(
    tmp_path: Path, base: str, method: str, load: str
) -> None:
    """Ten steps on the same rows from the same start, over a plain base and over one in 4 bits;
    what Trainer calls the loss has qGOFT's penalty in it.
    """
    rank = [] if method == "qgoft" else ["adapter.rank=4"]
    settings = [*OWN, f"adapter={method}", *rank]
    settings.append(f"model.quant={'none' if load == 'fp32' else 'nf4'}")
    config, _ = files.load(None, [*settings, f"run_dir={tmp_path / 'own'}", "train.lr=1e-3"])
    assert train.run(config, StopFlag()) == 0
    ours = [row["loss"] + row.get("penalty", 0.0) for row in rows(tmp_path / "own")]

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    task = task_of(config, tokenizer)
    made = token_file.files(task, tokenizer, 768, open_base(config.model, Ranks()).ends)
    tokens, _, _ = token_file.prepared(made, task.config, 3)
    order = loader.Order(len(tokens), 3)
    taken = [order[i] for i in range(60)]
    data = [
        {"input_ids": tokens.row(r).tolist(), "labels": tokens.labels(r).tolist()} for r in taken
    ]

    start = transformers.AutoModelForCausalLM.from_pretrained(base)
    inject.inject(start, config.adapter, seed=3)
    model = trainer_runs.base(base, load)
    kind = trainer_runs.config_class(method)
    chosen = {f: getattr(config.adapter, f) for f in (*kind.own_fields, "target_modules")}
    if "rank" in chosen:
        chosen["r"] = chosen.pop("rank")
    model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **chosen))
    inner = model.base_model.model
    for name, value in inject.trainable(start).items():
        layer, key = name.split(".adapter.")
        box = getattr(inner.get_submodule(layer), f"{method}_adapter")
        box.default.get_parameter(key).data.copy_(value)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "hf"), use_cpu=True, bf16=False, max_steps=10, seed=3,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-3,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=config.train.max_grad_norm,
        adam_beta2=config.train.beta2, train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    trainer = transformers.Trainer(model, arguments, collator, data)
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == 10 and ours[-1] < ours[0] - 0.1, "it must have learned"
    # HOFT's at a rate of 5e-3 are 5e-4 apart: where a gradient is zero but for rounding, Adam makes
    # a step of the rounding.
    print(max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    assert theirs == pytest.approx(ours, abs=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "bnb": {"load": "bnb"},
    "nf4": {"load": "nf4", "bf16": True},
    "recomputed": {"activation_checkpointing": True},
    "sft": {"trl": True},
    "sft-packed": {"trl": True, "packing": True, "bf16": True},
    "sft-bnb-recomputed": {"trl": True, "load": "bnb", "activation_checkpointing": True},
}
ALWAYS = ("hoft-bf16",)  # and SHOFT under SFTTrainer in tests/test_examples.py


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "variant"),
    [
        pytest.param(m, v, id=f"{m}-{v}", marks=() if f"{m}-{v}" in ALWAYS else FULL)
        for m in ("hoft", "shoft", "qgoft")
        for v in VARIANTS
    ],
)
def test_methods_train_save_and_resume(
    tmp_path: Path, base: str, method: str, variant: str
) -> None:
    """From the middle, too, to the same bits; and what is saved is the adapter alone."""
    words = {"folder": base, "method": method, "save_strategy": "steps", "save_steps": 3}
    words |= VARIANTS[variant]
    whole = trainer_runs.run(str(tmp_path), **words)
    assert len(whole) == 6 and whole[-1] < whole[0] - 0.02
    final = load_file(tmp_path / "final/adapter_model.safetensors")
    assert all(f".{method}_adapter." in name for name in final)
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = trainer_runs.run(str(tmp_path), **words)
    if variant == "sft-bnb-recomputed":  # TRL trains in bf16 there, PEFT reads it back as fp32
        assert again == pytest.approx(whole, abs=1e-3) and again != whole, "else take this out"
        return
    assert again == whole
    again = load_file(tmp_path / "final/adapter_model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in final.items())


# What a rank must hold, since accelerate on a CPU makes DDP of either without a word.
ENGINES = {"ddp": ("dtensors", False), "fsdp2": ("dtensors", True), "zero3": ("ds_ids", True)}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_sft_under_accelerates_engines(tmp_path: Path, base: str, engine: str) -> None:
    """Two ranks train, stop, resume to the bit, and save a whole adapter; one process is the
    reference.
    """
    env = {"DS_ACCELERATOR": "cpu"} if engine == "zero3" else {}
    if engine != "ddp":
        env[trainer_runs.SHARDED] = "1"
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    run: dict[str, Any] = {"folder": base, "method": "hoft", "trl": True, "learning_rate": 1e-3}
    options = ["--config_file", str(ROOT / f"configs/accelerate/{engine}.yaml")]
    options += ["--num_processes", "2", "--mixed_precision", "no", *PROGRAM]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *options]
    done = subprocess.run(
        [*command, json.dumps([{**run, "out": str(whole)}])], env={**os.environ, **env}, text=True,
        capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((whole / "held.json").read_text())
    what, sharded = ENGINES[engine]
    assert found[what] == (found["parameters"] if sharded else 0) and found["trained"] > 0
    alone = tmp_path / "alone"
    one = {**run, "out": str(alone), "per_device_train_batch_size": 4}
    assert losses(whole) == pytest.approx(trainer_runs.run(**one), abs=1e-4)

    launcher = ("-m", "scalepeft.integrations.trainer")

    def start(**words: Any) -> Job:
        words = {**run, "out": str(cut), **words}
        return Job(2, [*options, json.dumps([words])], env, launcher)

    job = start(slow=0.2)
    wait_for(cut / "rank-1-step-2", job)
    job.ranks[1].send_signal(signal.SIGUSR1)
    codes, text = job.wait(240)
    assert codes == [75, 75], text
    assert [f.name for f in cut.glob("checkpoint-*")] == ["checkpoint-3"]
    codes, text = start().wait(240)
    assert codes == [0, 0], text
    assert losses(cut) == losses(whole)
    wanted = peft.PeftModel.from_pretrained(trainer_runs.base(base, "fp32"), alone / "final")
    shapes = {k: v.shape for k, v in peft.get_peft_model_state_dict(wanted).items()}
    for folder in (whole, cut, cut / "checkpoint-3"):
        file = folder if folder.name == "checkpoint-3" else folder / "final"
        state = load_file(file / "adapter_model.safetensors")
        assert {k: v.shape for k, v in state.items()} == shapes and all(map(len, state.values()))
    assert trainer_runs.loaded_logits(base, cut / "final").equal(
        trainer_runs.loaded_logits(base, whole / "final")
    )


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.full
def test_a_preempted_script_comes_back_by_itself(tmp_path: Path, base: str) -> None:
    """Under the one-machine form of the job script; tests/cluster/test_slurm.py has Slurm's."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run = {"folder": base, "per_device_train_batch_size": 1}
    ranks([{**run, "out": str(whole)}]).wait()
    words = [json.dumps([{**run, "out": str(out), "slow": 0.3}])]
    command = ["launch/local.sh", "--requeue", "2", "accelerate", *PROGRAM, *words]
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as job:
        while not (out / "rank-0-step-2").exists():
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        text, _ = job.communicate(timeout=240)
    assert job.returncode == 0, text
    assert text.count("comes back") == 1 and "stopped and saved" in text
    assert losses(out) == losses(whole) and len(list(out.glob("checkpoint-*"))) == 1
