"""``scalepeft doctor``: what is in order is called so, and what is broken is named."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import ROOT, TINY, Job, train
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

from scalepeft.cluster.doctor import command as doctor
from scalepeft.cluster.doctor import links, machine, storage
from scalepeft.cluster.doctor.check import Context, Finding, by_value, compare, where
from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.models import tiny
from scalepeft.parallel import zero
from scalepeft.parallel.ranks import Ranks
from scalepeft.run import lease, provenance

HOSTS = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}


NF4_FSDP2 = [*TINY, "engine=fsdp2", "model.quant=nf4", "train.max_steps=2"]


def of(*settings: str) -> config.RunConfig:
    return config_files.load(None, [*TINY, "train.max_steps=2", "run_dir=none", *settings])[0]


def context(*settings: str, run_dir: Path = Path("x"), alone: bool = False) -> Context:
    store, config = torch.distributed.HashStore(), None if alone else of(*settings)
    return Context(Ranks(), 5.0, config, run_dir, store, HOSTS)


def report(text: str) -> dict[str, Any]:
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def states(findings: Any) -> list[str]:
    return [state for state, *_ in findings]


# Real processes


@pytest.mark.multiprocess
@pytest.mark.slow
def test_three_ranks_in_order(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    codes, text = Job(3, ["doctor", *NF4_FSDP2, f"run_dir={run_dir}", "--json"]).wait()
    found = report(text)
    assert codes == [0, 0, 0] and found["healthy"] and len(found["hosts"]) == 3
    by_check: dict[str, str] = {}
    for f in found["findings"]:
        assert f["state"] in ("ok", "info"), f
        by_check[f["check"]] = by_check.get(f["check"], "") + f["found"]
    assert f"torch {torch.__version__.split('+')[0]}" in by_check["versions"]
    assert "right on 3 ranks" in by_check["links"]
    assert "uneven shards on 3 ranks" in by_check["4-bit bytes"]
    assert "nf4: known bytes" in by_check["kernels"]
    assert "4 rows a step" in by_check["global batch"]
    assert "every rank sees the same folder" in by_check["run folder"]
    assert "2 checkpoints of" in by_check["free space"]
    assert {rank["devices"]["type"] for rank in found["ranks"]} == {"cpu"}
    assert not list(tmp_path.iterdir()), "doctor leaves nothing behind"


@pytest.mark.slow
def test_ranks_that_never_come() -> None:
    env = {"WORLD_SIZE": "3", "SCALEPEFT_RENDEZVOUS": ""}  # as under torchrun
    alone = [Job(1, ["doctor", "--timeout", "3"], env={**env, "RANK": r}) for r in "02"]
    (first,), text = alone[0].wait(60)
    assert first == 1
    assert "FIX   ranks         ranks 1-2 of 3 did not come to 127.0.0.1:" in text
    assert "within 3 s; there: rank 0 on " in text
    (last,), text = alone[1].wait(60)
    assert last == 1 and len(text.splitlines()) == 1, text
    assert "rank 2 on " in text and "does not reach rank 0 at 127.0.0.1:" in text
    assert "Connection refused)" in text and "MASTER_ADDR" in text


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "timeout", "codes", "fix"),
    [
        ("hang", 5, [1, 1], "kernels: still not done after 5 s on rank 1 on n2"),
        ("hang-in-the-lock", 3, [1, None], "ranks: kernels: rank 1 on n2: no answer within 3 s"),
        ("die", 3, [1, 3], "ranks: kernels: rank 1 on n2: no answer within 3 s: died, or hangs"),
        ("versions", 60, [1, 1], "torch 2.12.1, source abc on rank 1 on n2 -> give every node the"),
        ("folder", 60, [1, 1], "is not the folder of rank 0's node on rank 1 on n2"),
        ("read-only", 60, [1, 1], "cannot be written: Read-only file system on rank 1 on n2"),
        ("sums", 60, [1, 1], "links: wrong sums: all-reduce"),
        ("bytes", 60, [1, 1], "an all-gather changes bytes: weight: 1 of 131584 bytes changed"),
    ],
)
def test_a_fault_on_another_node(
    tmp_path: Path, fault: str, timeout: int, codes: list[int | None], fix: str
) -> None:
    program = (str(ROOT / "tests" / "cluster" / "doctor_ranks.py"),)
    job = Job(2, [fault, str(tmp_path), str(timeout)], program=program)
    if codes[1] is None:
        text = job.ranks[0].communicate(timeout=90)[0]
        ended = [job.ranks[0].returncode, None]
        job.kill()
    else:
        ended, text = job.wait(90)
    if 77 in ended:
        pytest.skip("needs root to mount")
    lines = text.splitlines()
    fixes = [line for line in lines if line.startswith("  ")]
    assert ended == codes and any(fix in line for line in fixes), text
    assert all(" on n2" in line or " n1" in line for line in fixes), text
    assert len(fixes) == 1
    if fault in ("die", "hang-in-the-lock"):
        assert "what comes after this was not tried" in text
    if fault == "hang":  # the other checks are made all the same
        assert "right on 2 ranks" in text and "every rank sees the same folder" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
@pytest.mark.slow
def test_links_that_are_dead(tmp_path: Path) -> None:
    arguments = ["doctor", "--timeout", "20", "--json", "--run-dir", str(tmp_path)]
    codes, text = Job(2, arguments, env={"GLOO_SOCKET_IFNAME": "nowhere"}).wait(60)
    assert codes == [1, 1], text
    (wrong,) = [f for f in report(text)["findings"] if f["state"] == "fix"]
    assert wrong["check"] == "links" and "nowhere on ranks 0-1 on " in wrong["found"]
    assert "GLOO_SOCKET_IFNAME" in wrong["remedy"]
    assert "every rank sees the same folder" in text, "which needs no links"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_deepspeed_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    settings = [*TINY, "engine.name=zero", "train.max_steps=2", f"run_dir={tmp_path}/run"]
    codes, text = Job(2, ["doctor", *settings, "--json"]).wait()
    found = {f["check"]: f["found"] for f in report(text)["findings"] if f["state"] == "ok"}
    assert codes == [0, 0] and "can be imported" in found["deepspeed"], text
    assert "deepspeed 0" in found["versions"] and "6 rows a step" in found["global batch"]


@pytest.mark.slow
def test_the_size_of_a_checkpoint_is_that_of_a_real_one(tmp_path: Path) -> None:
    train(1, tmp_path / "run", "train.max_steps=2", "train.save_every=1")
    (newest, *_) = sorted(tmp_path.glob("run/checkpoints/step-*"), reverse=True)
    real = sum(f.stat().st_size for f in newest.iterdir())
    assert storage.checkpoint_bytes(of()) == pytest.approx(real, rel=0.1)


# One process


def fixes(capsys: pytest.CaptureFixture[str], *settings: str, run_dir: str | None = None) -> Any:
    """Runs doctor on one process; returns what is to fix, without the numbers."""
    wrong = doctor.run(list(settings), run_dir)
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(". ", 1)[1] for line in lines if line.startswith("  ")]
    assert wrong == bool(found) and len(found) == sum(line[:3] == "FIX" for line in lines)
    return found


def test_one_process_prints_a_line_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "model.quant=int8", "train.max_steps=2", f"run_dir={tmp_path}/run"]
    assert doctor.run(settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("nothing to fix")
    assert any("int8: known bytes" in line for line in lines)
    assert not torch.distributed.is_initialized()
    assert doctor.run([], str(tmp_path)) == 0
    assert "int8 and nf4: known bytes" in capsys.readouterr().out


def test_wrong_options() -> None:
    for timeout in (0, float("inf"), float("nan"), 1e300, -1):
        with pytest.raises(UserError, match="must be more than 0 and at most 86400 seconds"):
            doctor.run([], timeout=timeout)
    with pytest.raises(UserError, match="no such key"):
        doctor.run([*TINY, "train.steps=1"], run_dir="none")
    with pytest.raises(UserError, match=r"no engine 'zerro'.*Did you mean 'zero'"):
        doctor.run(["engine.name=zerro", "train.epochs=1"], run_dir="none")
    with pytest.raises(UserError, match="run_dir is not set"):
        doctor.run(["engine.name=zero", "train.epochs=1"])
    with pytest.raises(UserError, match=r"give one of train\.max_steps and train\.epochs"):
        doctor.run(["engine.name=zero"], run_dir="none")


def test_what_training_refuses_at_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    settings = [*TINY, "train.max_steps=2", f"run_dir={run_dir}"]
    shipped = str(ROOT / "configs" / "runs" / "commonsense_hoft.yaml")
    (empty,) = fixes(capsys, shipped, "model=tiny", f"run_dir={run_dir}")
    assert empty.startswith("rows: data.train is empty: name files")
    (run_dir / "checkpoints" / "step-000001").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.dump(of()))
    held = {"start": 1, "host": "here", "pid": os.getppid(), "machine": lease._machine(),
            "began": lease._began(os.getppid()), "job": None}  # fmt: skip
    (run_dir / "holder.json").write_text(json.dumps(held))
    other, holds = fixes(capsys, *settings, "engine=fsdp2", "train.lr=1")
    assert other.startswith(f"run config: run_dir={run_dir} holds a run with another config (")
    assert "engine.name: single there, fsdp2 now" in other and "train.lr: 0.003 there" in other
    assert holds.startswith(f"holder: run_dir={run_dir}: is in use by start 1 on here, pid ")
    (run_dir / "holder.json").unlink()
    assert fixes(capsys, *settings) == []
    five = context()
    five.ranks = Ranks(0, 5)
    with pytest.raises(UserError, match=r"train.global_batch=12 cannot be shared evenly by 5"):
        storage.batch(five)


def test_deepspeed_that_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device_type: str) -> None:
        raise RuntimeError(f"CUDA_HOME does not exist ({device_type})\nand more")

    monkeypatch.setattr(zero, "_deepspeed", fails)
    settings = [*TINY, "train.max_steps=2", f"run_dir={tmp_path / 'run'}", "engine.device=cpu"]
    (*_, finding) = fixes(capsys, *settings, "engine.name=zero")
    assert finding.startswith("deepspeed: CUDA_HOME does not exist (cpu) on rank")
    assert fixes(capsys, *settings) == []


def mount(*words: str) -> None:
    if os.geteuid() != 0 or subprocess.run(["mount", *words], check=False).returncode:
        pytest.skip("needs root to mount")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that is mounted read-only: root is stopped too."""
    folder = tmp_path / "locked"
    folder.mkdir()
    mount("--bind", str(folder), str(folder))
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_read_only_folder(
    locked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = fixes(capsys, run_dir=str(locked / "runs" / "x"))
    assert finding.startswith(f"run folder: run_dir={locked}/runs/x cannot be written: Read-only")
    assert "choose another run_dir" in finding
    monkeypatch.setenv("SCALEPEFT_CACHE", str(locked / "cache"))
    (finding,) = fixes(capsys, run_dir=str(locked.parent))
    assert finding.startswith(
        f"environment: cache folder {locked}/cache cannot be written: Read-only"
    )
    assert "set SCALEPEFT_CACHE" in finding


def test_full_disk(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fixes(capsys, run_dir=str(small))
    assert any(
        "small (tmpfs): write: No space left on device: saves would fail" in line for line in found
    )
    assert not list(small.iterdir())
    with pytest.raises(UserError, match=r"run: [34]\d\d\.\d KiB free"):
        storage.space(context(alone=True, run_dir=small / "run"))
    assert storage.existing(small / "a" / "b") == small


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(free: int, inodes: int = 1000, stored: int = 0, one: int | None = 3 << 29) -> str:
        stat = SimpleNamespace(f_bavail=free >> 12, f_frsize=4096, f_files=1, f_favail=inodes)
        monkeypatch.setattr(os, "statvfs", lambda path: stat)
        monkeypatch.setattr(storage, "checkpoint_bytes", lambda config: one)
        os.truncate(file, stored)
        try:
            return storage.space(context("train.keep_checkpoints=2", run_dir=tmp_path))
        except UserError as error:
            return f"fix: {error}"

    (file := tmp_path / "checkpoints" / "step-1" / "x").parent.mkdir(parents=True)
    file.touch()
    text = room(4 << 30)
    assert text.startswith("fix") and "needs 5.0 GiB more (2 checkpoints of 1.5 GiB" in text
    assert room(4 << 30, stored=3 << 30).endswith("a quota is not seen here")
    assert room(1 << 40).endswith("a quota is not seen here")
    assert room(1 << 20, one=None).startswith("fix")
    assert "5 inodes are too few" in room(4 << 30, inodes=5, one=1)


def test_what_a_file_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    def loses(source: Path, target: Path) -> None:
        shutil.copytree(source, target)

    for number, (rename, text) in enumerate(
        ((refuses, "Invalid cross-device link"), (loses, r"it holds \['data'\] afterwards"))
    ):
        (folder := tmp_path / str(number)).mkdir()
        with pytest.raises(OSError, match=f"x: rename of a folder: {text}: saves would fail"):
            storage.try_to_save(folder, "x", rename)
    for kind, text in (("fuse.s3fs", "copying|file by file"), ("tmpfs", "nothing in it survives")):
        monkeypatch.setattr(storage, "output_of", lambda *command, kind=kind: f"Type\n{kind}\n")
        state, found = storage.saving(context(run_dir=tmp_path))
        assert state == "warn" and f"({kind})" in found and re.search(text, found)
    monkeypatch.setattr(storage, "output_of", lambda *command: "")
    assert "atomic rename" in storage.saving(context(run_dir=tmp_path))


# Verdicts on values of nodes that are not here


def test_a_changed_byte_is_found() -> None:
    every = links.patterns()
    assert every.shape == (257, 512)
    assert len(set(every.view(torch.int16).flatten().tolist())) == 1 << 16
    assert int(every.view(torch.bfloat16).isnan().sum()) == 254
    assert links.changed(every, every.clone()) is None
    altered = every.clone()
    altered[200, 17] ^= 0x40
    was, now = int(every[200, 17]), int(altered[200, 17])
    assert links.changed(altered, every) == (
        f"1 of {every.numel()} bytes changed, the first at {200 * 512 + 17}: {was:#04x} became"
        f" {now:#04x}"
    )
    # The fault itself: a copy that quiets signaling NaNs.
    as_bf16 = every.view(torch.bfloat16)
    bits = as_bf16.view(torch.int16)
    quiet = torch.where(as_bf16.isnan(), bits | 0x40, bits).view(torch.bfloat16)
    assert "126 of" in str(links.changed(quiet, as_bf16))


def test_a_torch_that_cannot_shard_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.13 ``fully_shard`` raises for them: they pass for floats, and come out as bytes."""
    shard = fsdp.fully_shard

    def of_floats(unit: Any, **settings: Any) -> None:
        assert all(p.is_floating_point() for p in unit.parameters() if not isinstance(p, DTensor))
        shard(unit, **settings)

    monkeypatch.setattr(fsdp, "fully_shard", of_floats)
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        found = links.stored_bytes(context("engine=fsdp2", "model.quant=int8"))
    finally:
        torch.distributed.destroy_process_group()
    assert found == "all 65,536 16-bit patterns come through fsdp2's all-gather as uint8"


VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "tokenizers": "0.22",
            "safetensors": "0.5", "source": "abc"}  # fmt: skip


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.versions(context())["torch"] == torch.__version__

    def probe(*settings: str, **here: str) -> Any:
        packages = {**VERSIONS, **dict.fromkeys(machine.EXTRAS, "not installed"), **here}
        monkeypatch.setattr(provenance, "versions", lambda *names: dict(packages))
        return machine.versions(context(*settings))

    assert probe(torch="2.12.0+cpu")["torch"] == "2.12.0+cpu"
    with pytest.raises(
        UserError, match=r"torch>=2.11, here 2.9.1\+cu128: pip install 'torch>=2.11'"
    ):
        probe(torch="2.9.1+cu128")
    nf4 = ("model.quant=nf4", "train.tensorboard=true")
    with pytest.raises(
        UserError,
        match=r"model.quant=nf4 needs bitsandbytes>=0.50, here not installed: pip install"
        r" 'bitsandbytes>=0.50'; train.tensorboard=True needs tensorboard>=2.19, here 2.1: ",
    ):
        probe(*nf4, tensorboard="2.1")
    assert probe(*nf4, tensorboard="2.20", bitsandbytes="0.50")
    with pytest.raises(UserError, match=r"train\.wandb=x needs wandb, here not installed"):
        probe("train.wandb=x")


def test_values_that_differ() -> None:
    def check(**last: str) -> Any:
        values = {rank: dict(VERSIONS) for rank in range(4)}
        values[3] = {name: v for name, v in {**VERSIONS, **last}.items() if v}
        return list(compare(context(), values))

    text = "python 3.11.7, torch 2.13.0, transformers 5.23.0, tokenizers 0.22, safetensors 0.5"
    assert check() == [("ok", f"{text}, source abc")]
    mixed, *_ = check(torch="2.12.1", source="def")
    assert mixed[:2] == (
        "fix",
        "torch 2.13.0, source abc on ranks 0-1 on n1 and rank 2 on n2; torch 2.12.1, source def on"
        " rank 3 on n2",
    )
    assert (
        "source abc on ranks 0-1 on n1 and rank 2 on n2; none on rank 3" in check(source="")[0][1]
    )


def test_devices() -> None:
    gpu = {"type": "cuda", "name": "H200", "used": 1 << 30, "bf16": True}

    def check(rank: int, **other: Any) -> Any:
        values = {r: {**gpu, "uuid": str(r)} for r in range(4)}
        values[rank] |= other
        return list(machine.check_devices(context("train.precision=bf16"), values))

    assert check(0) == [("ok", "H200 on ranks 0-1 on n1 and ranks 2-3 on n2")]
    shared = check(1, uuid="0")[1]
    assert shared[0] == "fix" and "ranks 0-1 on n1 share one GPU" in shared[1]
    assert states(check(2, uuid="0")) == ["ok"], "another node's GPU"
    (names,) = check(3, name="A100")
    assert "A100 on rank 3 on n2" in names[1]
    assert "40.0 GiB of the GPU in use on rank 2 on n2" in check(2, used=40 << 30)[1][1]
    assert check(0, bf16=False)[1] == ("fix", "rank 0 on n1: no bf16", "train.precision=fp32")
    (mixed,) = check(3, type="cpu")
    assert mixed[0] == "fix" and "cuda on ranks 0-1 on n1 and rank 2 on n2; cpu on" in mixed[1]
    cpu = {0: machine.device(context("engine.device=cpu"))}
    assert states(machine.check_devices(context(), cpu))[0] == "ok"


def test_one_process_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.environment(context())[0] == "info"
    monkeypatch.setenv("SLURM_NTASKS", "16")
    state, text = machine.environment(context())
    assert state == "warn" and "a Slurm job of 16 tasks" in text


def test_the_base_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny.make(0), tmp_path / "model")
    here = storage.base(context(f"model.path={folder}"))
    assert "complete shards and a tokenizer; fingerprint " in here
    assert list(compare(context(), {0: here, 2: here})) == [("ok", here)]
    fix, *_ = compare(context(), {0: here, 2: "other"})
    assert fix[0] == "fix" and "other on rank 2 on n2" in fix[1]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        storage.base(context(f"model.path={folder}"))
    with (folder / "model.safetensors").open("r+b") as f:
        f.truncate(5000)
    with pytest.raises(UserError, match="truncated"):
        storage.base(context(f"model.path={folder}"))
    hub = context("model.path=nobody/no-such-model")
    state, text = storage.base(hub)
    assert state == "info" and "each node downloads it" in text
    found = list(compare(context(), {0: here, 2: [state, text]}))
    assert states(found) == ["ok", "info"] and found[1][1].endswith(" on rank 2 on n2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        storage.base(hub)
    assert storage.checkpoint_bytes(hub.config) is None


def test_data_and_rows(tmp_path: Path) -> None:
    row = {"instruction": "i", "output": "the correct answer is true", "answer": "true"}
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row, {**row, "instruction": "j"}, {}]))
    settings = ["data=commonsense", f"data.train={rows}"]
    assert storage.data(context(*settings)) == (
        f"data.train 1 files of {rows.stat().st_size} bytes"
    )
    with pytest.raises(UserError, match="no such file"):
        storage.data(context("data=commonsense", "data.train=/none.json"))
    with pytest.raises(UserError, match="row 3: key 'instruction' is missing"):
        storage.rows(context(*settings))
    state, text = storage.rows(context(*settings, "data.on_error=skip", f"data.valid={rows}"))
    assert state == "warn"
    assert text.startswith("2 of data.train, 2 of data.valid; 2 broken ones are left out")
    rows.write_text(json.dumps([row]))
    assert storage.rows(context(*settings)) == "1 of data.train"
    assert storage.rows(context("data=commonsense", "data.train=hf://a/b"))[0] == "info"


def test_kernels_of_the_configured_storage() -> None:
    assert machine.kernels(context("model.quant=nf4")).startswith("nf4: known bytes")
    assert machine.kernels(context())[0] == "info"
    assert machine.kernels(context(alone=True)).startswith("int8 and nf4: known bytes")


def test_words() -> None:
    assert where([3], {}) == "rank 3" and where([0, 1, 2, 5], {}) == "ranks 0, 1, 2, 5"
    assert where([0, 1, 2], HOSTS) == "ranks 0-1 on n1 and rank 2 on n2"
    assert by_value({0: "a", 1: "b"}, {}) == "a on rank 0; b on rank 1"


def test_the_report() -> None:
    found = context()
    found.findings = [Finding("a", "ok", "b")]
    assert doctor.report(found, False).splitlines() == ["ok    a             b", "nothing to fix"]
    found.findings = [Finding("a", "warn", "b"), Finding("c", "fix", "d\nd", "e")]
    assert doctor.report(found, False).splitlines() == [
        "warn  a             b",
        "FIX   c             d d -> e",
        "to fix (1 warning):",
        "  1. c: d d -> e",
    ]
    as_json = json.loads(doctor.report(found, True))
    assert not as_json["healthy"] and as_json["hosts"] == list(HOSTS.values())
    assert as_json["findings"][1] == {"check": "c", "state": "fix", "found": "d\nd", "remedy": "e"}
