"""A base that is damaged, replaced or wants its own code is refused at the next start, by name."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from processes import ROOT, Job, call, flip

from scalepeft.core.errors import UserError
from scalepeft.models import hub
from scalepeft.parallel.ranks import Ranks

BASE = ROOT / "tests/data/run-2026-11-21/base"
SHARD = "model.safetensors"
SETTINGS = (
    "data=toy data.train_size=40 adapter=hoft adapter.rank=2 adapter.target_modules=q_proj"
    " train.precision=fp32 train.global_batch=4 train.micro_batch=2 train.max_steps=4"
    " train.save_every=2 evaluate.limit=4 evaluate.max_new_tokens=2"
).split()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "base"))


@pytest.mark.slow
def test_a_flipped_bit_is_refused_wherever_the_base_is_used(base: Path, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    arguments = ["train", f"model.path={base}", *SETTINGS, run]
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    recorded = {SHARD: hashlib.sha256((base / SHARD).read_bytes()).hexdigest()}
    about = json.loads((tmp_path / "run/adapter/scalepeft.json").read_text())
    assert about["base_model"]["sha256"] == recorded
    for state in (tmp_path / "run").glob("checkpoints/*/state.json"):
        assert json.loads(state.read_text())["base"]["sha256"] == recorded

    at = (base / SHARD).stat().st_size * 2 // 3 + 1  # between the places of the fingerprint
    flip(base / SHARD, at)
    commands = (
        arguments,
        [*arguments[:-1], "train.max_steps=6", run, "--resume-with-changes"],
        ["evaluate", str(tmp_path / "run")],
        ["merge", str(tmp_path / "run"), str(tmp_path / "merged")],
        ["export", str(tmp_path / "run"), str(tmp_path / "peft"), "--format", "lora"],
    )
    for command in commands:
        refused = call(*command)
        assert refused.returncode == 2, (command, refused.stderr)
        last = refused.stderr.strip().splitlines()[-1]
        assert f"model.path={base}: {SHARD}: other bytes than those that" in last
    assert not (tmp_path / "merged").exists()
    flip(base / SHARD, at)
    assert call("evaluate", str(tmp_path / "run")).returncode == 0


def test_two_ranks_record_what_one_does(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS, "engine=fsdp2", f"model.path={base}", f"run_dir={run}"]
    codes, text = Job(2, ["train", *settings]).wait()
    assert codes == [0, 0], text
    about = json.loads((run / "adapter/scalepeft.json").read_text())
    want = hashlib.sha256((base / SHARD).read_bytes()).hexdigest()
    assert about["base_model"]["sha256"] == {SHARD: want}


def test_a_shard_is_read_once(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path / "cache"))
    first = hub.shard_digests([base / SHARD], Ranks())
    (kept,) = (tmp_path / "cache/digests").iterdir()
    assert kept.read_text() == first[SHARD]
    kept.write_text("f" * 64)  # what is returned next was not computed
    assert hub.shard_digests([base / SHARD], Ranks()) == {SHARD: "f" * 64}
    kept.write_text("torn")
    assert hub.shard_digests([base / SHARD], Ranks()) == first
    flip(base / SHARD, 9000)
    assert hub.shard_digests([base / SHARD], Ranks()) != first


def test_a_cache_that_cannot_be_written_is_no_fault(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path / "cache"))
    want = hashlib.sha256((base / SHARD).read_bytes()).hexdigest()
    assert hub.shard_digests([base / SHARD], Ranks()) == {SHARD: want}


def test_the_hub_knows_the_digest(base: Path, tmp_path: Path) -> None:
    data = (base / SHARD).read_bytes()
    name = hashlib.sha256(data).hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(data)
    link = tmp_path / SHARD
    link.symlink_to(tmp_path / "blobs" / name)
    assert hub.shard_digests([link], Ranks()) == {SHARD: name}
    flip(tmp_path / "blobs" / name, 9000)
    with pytest.raises(UserError, match=f"{link}: damaged: its sha256 is not the hub's"):
        hub.shard_digests([link], Ranks())


def test_code_beside_a_base_is_never_run(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "configuration_own.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match="needs Python code that lies beside the weights") as caught:
        hub.architecture(base)
    assert "\n" not in str(caught.value)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    done = call("train", f"model.path={base}", *SETTINGS, f"run_dir={base.parent / 'run'}")
    assert done.returncode == 2
    assert "needs Python code" in done.stderr
