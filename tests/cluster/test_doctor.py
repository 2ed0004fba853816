"""``scalepeft doctor``: what is in order is called so, and what is broken is named."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Job, train

from scalepeft.build import check_batch
from scalepeft.cluster.doctor import checks as judge
from scalepeft.cluster.doctor import command as doctor
from scalepeft.cluster.doctor import filesystem as disk
from scalepeft.cluster.doctor import network as links
from scalepeft.cluster.doctor import node
from scalepeft.cluster.doctor.findings import Finding, by_value, spans, summary, where
from scalepeft.cluster.doctor.rendezvous import Meeting, Outcome
from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.models import tiny
from scalepeft.parallel import zero
from scalepeft.run import lease as holder

HOSTS = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}


NF4_FSDP2 = [*TINY, "engine=fsdp2", "model.quant=nf4", "train.max_steps=2"]


def of(*settings: str) -> config.RunConfig:
    return config_files.load(None, [*TINY, "train.max_steps=2", "run_dir=none", *settings])[0]


def states(found: list[Finding]) -> list[str]:
    return [f.state for f in found]


def report(text: str) -> dict[str, Any]:
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_three_ranks_in_order(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    codes, text = Job(3, ["doctor", *NF4_FSDP2, f"run_dir={run_dir}", "--json"]).wait()
    found = report(text)
    assert codes == [0, 0, 0] and found["healthy"] and len(found["hosts"]) == 3
    by_check: dict[str, str] = {}
    for f in found["findings"]:
        assert f["state"] in ("ok", "info") or f["check"] == "environment", f
        by_check[f["check"]] = by_check.get(f["check"], "") + f["found"]
    assert "equal on 3 ranks" in by_check["versions"]
    assert "right on 3 ranks" in by_check["links"] and "GB/s" in by_check["links"]
    assert "uneven shards on 3 ranks" in by_check["4-bit bytes"]
    assert "as other tools do" in by_check["4-bit bytes"]
    assert "ms apart" in by_check["clocks"]
    assert "nf4: known bytes" in by_check["kernels"]
    assert "all 3 ranks see the same folder" in by_check["run folder"]
    assert "2 checkpoints of" in by_check["free space"]
    assert {rank["device"]["type"] for rank in found["ranks"]} == {"cpu"}
    assert not list(tmp_path.iterdir()), "doctor leaves nothing behind"


@pytest.mark.slow
def test_ranks_that_never_come() -> None:
    alone = [Job(1, ["doctor", "--timeout", "3"], env={"WORLD_SIZE": "3", "RANK": r}) for r in "02"]
    (first,), text = alone[0].wait(60)
    assert first == 1
    assert "FIX   ranks         ranks 1-2 of 3 did not come to 127.0.0.1:" in text
    assert "within 3 s; there: rank 0 on " in text
    (last,), text = alone[1].wait(60)
    assert last == 1 and len(text.splitlines()) == 1, text
    assert "rank 2 on " in text and "does not reach rank 0 at 127.0.0.1:" in text
    assert "(Connection refused)" in text and "MASTER_ADDR" in text


@pytest.mark.slow
def test_a_wrong_clock_a_rank_that_hangs_and_one_that_dies() -> None:
    codes, text = Job(3, [], program=(str(ROOT / "tests/cluster/doctor_ranks.py"),)).wait(60)
    assert codes == [0, 0, 3], text
    assert "gloo: all-reduce, all-gather and reduce-scatter right on 3 ranks" in text
    (clocks,) = [line for line in text.splitlines() if " clocks " in line]
    assert clocks.startswith("warn") and "rank 1 on " in clocks and " is ahead of " in clocks
    assert 4990 < float(clocks.split()[2]) < 5010
    outcomes = [line for line in text.splitlines() if line.startswith("Outcome")]
    assert [("well" in o, "hangs=True" in o, "gone=True" in o) for o in outcomes] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


@pytest.mark.slow
def test_links_that_are_dead(tmp_path: Path) -> None:
    arguments = ["doctor", "--timeout", "20", "--json", "--run-dir", str(tmp_path)]
    codes, text = Job(2, arguments, env={"GLOO_SOCKET_IFNAME": "nowhere"}).wait(60)
    assert codes == [1, 1], text
    (wrong,) = [f for f in report(text)["findings"] if f["state"] == "fix"]
    assert wrong["check"] == "links" and "nowhere on ranks 0-1 on " in wrong["found"]
    assert "GLOO_SOCKET_IFNAME" in wrong["remedy"]
    # What needs no links is looked at all the same.
    assert "all 2 ranks see the same folder" in text


@pytest.mark.slow
def test_the_size_of_a_checkpoint_is_that_of_a_real_one(tmp_path: Path) -> None:
    train(1, tmp_path / "run", "train.max_steps=2", "train.save_every=1")
    (newest, *_) = sorted(tmp_path.glob("run/checkpoints/step-*"), reverse=True)
    real = sum(f.stat().st_size for f in newest.iterdir())
    guess = doctor.checkpoint_bytes(of())
    assert guess is not None and guess == pytest.approx(real, rel=0.1)
    assert disk.room(tmp_path / "run")["held"] == pytest.approx(2 * real, rel=0.01)


def test_one_process_prints_a_line_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "model.quant=int8", "train.max_steps=2", f"run_dir={tmp_path}/run"]
    assert doctor.run(doctor.Options(settings)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("nothing to fix")
    assert [line.split()[0] for line in lines[:-1]].count("FIX") == 0
    assert any("int8: known bytes" in line for line in lines)
    assert not torch.distributed.is_initialized()


def test_wrong_options() -> None:
    with pytest.raises(UserError, match="--timeout 0: must be more than 0"):
        doctor.run(doctor.Options([], timeout=0))
    for timeout in (float("inf"), float("nan"), 1e300, -1):
        with pytest.raises(UserError, match="must be more than 0 and at most 86400 seconds"):
            doctor.run(doctor.Options([], timeout=timeout))
    with pytest.raises(UserError, match="no such key"):
        doctor.run(doctor.Options([*TINY, "train.steps=1"], run_dir="none"))
    # What is wrong comes before what is absent.
    with pytest.raises(UserError, match=r"no engine 'zerro'.*Did you mean 'zero'"):
        doctor.run(doctor.Options(["engine.name=zerro"]))
    with pytest.raises(UserError, match="run_dir is not set"):
        doctor.run(doctor.Options(["engine.name=zero", "train.epochs=1"]))
    with pytest.raises(UserError, match=r"give one of train\.max_steps and train\.epochs"):
        doctor.run(doctor.Options(["engine.name=zero"], run_dir="none"))


def fixes(capsys: pytest.CaptureFixture[str], *settings: str) -> list[str]:
    """Runs doctor on one process; returns what is to fix, without the numbers."""
    wrong = doctor.run(doctor.Options(list(settings)))
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(". ", 1)[1] for line in lines if line.startswith("  ")]
    assert wrong == bool(found) and len(found) == sum(line[:3] == "FIX" for line in lines)
    return found


def test_what_training_refuses_at_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    settings = [*TINY, "train.max_steps=2", f"run_dir={run_dir}"]
    shipped = str(ROOT / "configs" / "runs" / "commonsense_hoft.yaml")
    (empty,) = fixes(capsys, shipped, "model=tiny", f"run_dir={run_dir}")
    assert empty.startswith("rows: data.train is empty: name files")
    (run_dir / "checkpoints" / "step-000001").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.dump(of()))
    held = {"start": 1, "host": "here", "pid": os.getppid(), "machine": holder._machine(),
            "began": holder._began(os.getppid()), "job": None}  # fmt: skip
    (run_dir / "holder.json").write_text(json.dumps(held))
    other, holds = fixes(capsys, *settings, "engine=fsdp2", "train.lr=1")
    assert other.startswith(f"run config: run_dir={run_dir} holds a run with another config (")
    assert "engine.name: single there, fsdp2 now" in other and "train.lr: 0.003 there" in other
    assert holds.startswith(f"holder: run_dir={run_dir}: is in use by start 1 on here, pid ")
    (run_dir / "holder.json").unlink()
    assert fixes(capsys, *settings) == []

    def odd(config: Any, world: int) -> None:
        check_batch(config, 5)

    monkeypatch.setattr(doctor, "check_batch", odd)
    (batch,) = fixes(capsys, *settings)
    assert batch.startswith("global batch: train.global_batch=12 cannot be shared evenly by 5")


def test_a_rank_that_is_gone_is_to_fix_whatever_the_check_is_about() -> None:
    class Lost(Meeting):
        def stage(self, work: Any) -> list[Outcome]:
            return [Outcome(), Outcome(error="no answer within 1 s", gone=True)]

    meeting = Lost(0, 2, torch.distributed.HashStore(), 1.0, hosts=HOSTS)
    visit = doctor.Visit(meeting, None, ".", 0)
    with pytest.raises(doctor._Gone):
        visit._stage(lambda: None, partial(judge.start, "holder", ""))
    assert [(f.check, f.found) for f in visit.findings if f.state == "fix"] == [
        ("ranks", "no answer within 1 s on rank 1 on n1")
    ]


def test_deepspeed_that_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device_type: str) -> None:
        raise RuntimeError(f"CUDA_HOME does not exist ({device_type})\nand more")

    monkeypatch.setattr(zero, "_deepspeed", fails)
    monkeypatch.setattr(node, "versions", lambda: {**VERSIONS, "deepspeed": "0.19.8"})
    settings = [*TINY, "train.max_steps=2", f"run_dir={tmp_path / 'run'}", "engine.device=cpu"]
    (finding,) = fixes(capsys, *settings, "engine.name=zero")
    assert finding.startswith("deepspeed: cannot be used: CUDA_HOME does not exist (cpu) on rank")
    assert fixes(capsys, *settings) == []
    monkeypatch.setattr(node, "versions", lambda: dict(VERSIONS))
    (missing,) = fixes(capsys, *settings, "engine.name=zero")
    assert missing.startswith("versions: engine.name=zero needs deepspeed, which is not installed")
    assert missing.endswith("pip install 'scalepeft[deepspeed]'")


@pytest.mark.slow
def test_deepspeed_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    settings = [*TINY, "engine.name=zero", "train.max_steps=2", f"run_dir={tmp_path}/run"]
    codes, text = Job(2, ["doctor", *settings, "--json"]).wait()
    found = {f["check"]: f["found"] for f in report(text)["findings"] if f["state"] == "ok"}
    assert codes == [0, 0] and "can be imported" in found["deepspeed"], text
    assert "deepspeed " in found["versions"] and "6 rows a step" in found["global batch"]


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


def test_read_only_folder(locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(doctor.Options([], run_dir=str(locked / "runs" / "x"))) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("to fix:")
    assert lines[at + 1].startswith(f"  1. run folder: run_dir={locked}/runs/x cannot be written")
    assert "Read-only file system" in lines[at + 1] and "choose another run_dir" in lines[at + 1]
    assert len(lines) == at + 2


def test_full_disk(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(doctor.Options([], run_dir=str(small))) == 1
    text = capsys.readouterr().out
    assert "No space left on device" in text and "nothing to fix" not in text
    assert not list(small.iterdir())


def test_room(small: Path) -> None:
    free = disk.room(small / "run")
    assert 0 < free["bytes"] <= 400 << 10 and free["held"] == 0
    assert disk.judge_room("x", free, None, 0).state == "fix"
    plenty = {"bytes": 1 << 40, "inodes": -1, "held": 0}
    assert disk.judge_room("x", plenty, 1 << 30, 2).state == "ok"
    tight = {"bytes": 4 << 30, "inodes": 1000, "held": 0}
    finding = disk.judge_room("x", tight, 3 << 29, 2)
    assert (
        finding.state == "fix" and "needs 5.0 GiB more (2 checkpoints of 1.5 GiB" in finding.found
    )
    assert disk.judge_room("x", {**tight, "held": 3 << 30}, 3 << 29, 2).state == "ok"
    assert "too few inodes" in disk.judge_room("x", {**tight, "inodes": 5}, 1, 2).found


def copied(source: Path, target: Path) -> None:
    """What mounts of object stores make of a rename, file by file."""

    def slowly(one: str, other: str) -> None:
        time.sleep(0.002)
        shutil.copy(one, other)

    shutil.copytree(source, target, copy_function=slowly)
    shutil.rmtree(source)


def test_a_rename_that_is_not_atomic_is_seen(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    good = disk.probe(tmp_path / "good")
    assert states(disk.judge_probe("x", {**good, "type": "ext4"})) == ["ok"]
    bad = {**disk.probe(tmp_path / "bad", rename=copied), "type": "ext4"}
    warning, _ = sorted(disk.judge_probe("x", bad), key=lambda f: f.state == "ok")
    assert warning.state == "warn" and "was seen half done" in warning.found
    assert "half-written checkpoint under its final name" in warning.found
    assert "passed over by its checksum" in warning.found


def test_what_a_file_system_refuses(tmp_path: Path) -> None:
    def refuses(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    found = disk.probe(tmp_path, rename=refuses)
    (finding,) = [f for f in disk.judge_probe("x", found) if f.state == "fix"]
    assert "rename of a folder: Invalid cross-device link: every save would fail" in finding.found
    for kind, text in (("fuse.s3fs", "copies file by file"), ("tmpfs", "nothing in it survives")):
        good = {**found, "rename of a folder": 0.1, "whole": True, "type": kind}
        (warning,) = [f for f in disk.judge_probe("x", good) if f.state == "warn"]
        assert text in warning.found


def test_the_type_of_a_mount(small: Path, tmp_path: Path) -> None:
    assert disk.file_system(small) == "tmpfs" != disk.file_system(Path("/proc"))
    assert disk.existing(small / "a" / "b") == small


def seen(**other: Any) -> Outcome:
    return Outcome({"folder": 0.0, "file": 0.0, "write": 0.0, "absent": False, **other})


def test_nodes_that_see_another_folder() -> None:
    good = [seen(), seen(), seen(), seen()]
    assert states(disk.judge_seen("x", good, HOSTS)) == ["ok"]
    (absent,) = disk.judge_seen("x", [*good[:2], seen(absent=True), seen(absent=True)], HOSTS)
    assert absent.state == "fix" and "ranks 2-3 on n2 than on rank 0's" in absent.found
    (locked,) = disk.judge_seen("x", [*good[:3], seen(write="Read-only file system")], HOSTS)
    assert locked.state == "fix" and "Read-only file system on rank 3 on n2" in locked.found
    (late,) = disk.judge_seen("x", [*good[:3], seen(file=None)], HOSTS)
    assert late.state == "warn" and "older start could write on" in late.found


def test_a_changed_byte_is_found() -> None:
    every = links.patterns(3)
    assert len(every) % 2 == 0 and len(every) % 3 and links.patterns(2).shape == (257, 512)
    assert len(set(every.view(torch.int16).flatten().tolist())) == 1 << 16
    assert int(every.view(torch.bfloat16).isnan().sum()) == 254
    assert links.changed(every, every.clone()) is None
    altered = every.clone()
    altered[200, 17] ^= 0x40
    was, now = int(every[200, 17]), int(altered[200, 17])
    text = links.changed(altered, every)
    assert text == (
        f"1 of {every.numel()} bytes changed, the first at {200 * 512 + 17}: {was:#04x} became"
        f" {now:#04x}"
    )
    # The fault itself: a copy that quiets signalling NaNs.
    as_bf16 = every.view(torch.bfloat16)
    bits = as_bf16.view(torch.int16)
    quiet = torch.where(as_bf16.isnan(), bits | 0x40, bits).view(torch.bfloat16)
    assert "126 of" in str(links.changed(quiet, as_bf16))
    assert "expected" in str(links.changed(every[1:], every))


def test_altered_bytes_are_judged() -> None:
    bad = [Outcome({"uint8": None, "bf16": None}), Outcome({"uint8": "1 of 9", "bf16": None})]
    assert states(links.judge_bytes(bad, HOSTS, True)) == ["fix", "info"]
    assert states(links.judge_bytes(bad, HOSTS, False)) == ["warn", "info"]
    other = [Outcome({"uint8": None, "bf16": "2 of 9 bytes changed"})]
    good, told = links.judge_bytes(other, HOSTS, True)
    assert good.state == "ok" and "scalepeft does not do that" in told.found
    (skipped,) = links.judge_bytes([Outcome({"uint8": None, "refused": "needs"})], HOSTS, True)
    assert skipped.state == "info" and "not tried: needs" in skipped.found


def test_whose_bytes_are_gathered() -> None:
    assert judge.shards_bytes(of("engine=fsdp2", "model.quant=int8"))
    assert not judge.shards_bytes(of("engine=fsdp2"))
    assert judge.shards_bytes(of("engine.name=zero", "model.quant=nf4"))
    assert not judge.shards_bytes(of("engine.name=zero", "engine.stage=2", "model.quant=nf4"))
    assert not judge.shards_bytes(of("engine.name=zero"))


def test_wrong_sums_and_dead_links_are_judged() -> None:
    well = Outcome({"wrong": [], "latency": 1e-4, "bandwidth": 1e9})
    wrong = Outcome({"wrong": ["all-reduce"], "latency": 1e-4, "bandwidth": 1e9})
    assert links.judge_links("links", "gloo", [well, well], HOSTS).state == "ok"
    assert "wrong sums: all-reduce on rank 1 on n1" in (
        links.judge_links("links", "gloo", [well, wrong], HOSTS).found
    )
    dead = links.judge_links("links", "nccl", [well, well, Outcome(error="timeout")], HOSTS)
    assert dead.state == "fix" and "timeout on rank 2 on n2" in dead.found
    assert "NCCL_SOCKET_IFNAME" in dead.remedy


VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "source": "abc"}


def test_versions() -> None:
    same = {r: dict(VERSIONS) for r in range(4)}
    (good,) = judge.versions(same, HOSTS, {"torch": "2.11"}, None)
    assert good.state == "ok" and "equal on 4 ranks" in good.found
    mixed = {**same, 3: {**VERSIONS, "torch": "2.12.1"}}
    (finding,) = judge.versions(mixed, HOSTS, {}, None)
    assert finding.found == (
        "torch 2.13.0 on ranks 0-1 on n1 and rank 2 on n2; torch 2.12.1 on rank 3 on n2"
    )
    checkouts = {**same, 2: {**VERSIONS, "source": "def"}}
    assert "one checkout" in judge.versions(checkouts, HOSTS, {}, None)[0].remedy
    old = {r: {**VERSIONS, "torch": "2.9.1+cu128"} for r in range(2)}
    (finding,) = judge.versions(old, HOSTS, {"torch": "2.11"}, None)
    assert finding.state == "fix" and "2.9.1+cu128 is older than 2.11" in finding.found


def test_versions_that_a_config_needs() -> None:
    here = {0: {**VERSIONS, "torch": "2.12.0+cpu"}}
    nf4 = of("model.quant=nf4", "engine=fsdp2")
    missing, old = judge.versions(here, HOSTS, {}, nf4)
    assert "model.quant=nf4 needs bitsandbytes" in missing.found
    assert "'scalepeft[quant]'" in missing.remedy
    assert "torch 2.12.0+cpu cannot shard a quantised base" in old.found
    assert states(judge.versions(here, HOSTS, {}, of("engine=fsdp2"))) == ["ok"]
    one_lacks = {0: {**VERSIONS, "bitsandbytes": "0.50"}, 1: dict(VERSIONS)}
    assert states(judge.versions(one_lacks, HOSTS, {}, None)) == ["ok", "warn"]
    assert states(judge.versions(one_lacks, HOSTS, {}, nf4)) == ["fix"]
    assert node.lower_bounds()["torch"] == "2.11"
    assert node.versions()["torch"] == torch.__version__


GPU = {
    "type": "cuda:0", "driver": "580.65.06", "name": "H200", "uuid": "a", "memory": 140 << 30,
    "free": 139 << 30, "capability": [9, 0], "bf16": True,
}  # fmt: skip


def test_devices() -> None:
    four = [Outcome({**GPU, "uuid": str(r)}) for r in range(4)]
    (good,) = judge.devices(four, HOSTS, of("train.precision=bf16"))
    assert good.state == "ok" and "capability 9.0, driver 580.65.06" in good.found

    def found(rank: int, **other: Any) -> list[Finding]:
        assert four[rank].value is not None
        changed = replace(four[rank], value={**four[rank].value, **other})
        outcomes = [*four[:rank], changed, *four[rank + 1 :]]
        return [f for f in judge.devices(outcomes, HOSTS, of("train.precision=bf16"))
                if f.state != "ok"]  # fmt: skip

    (shared,) = found(1, uuid="0")
    assert shared.state == "fix" and "ranks 0-1 on n1 share one GPU" in shared.found
    assert not found(2, uuid="0"), "another node's GPU"
    (other,) = found(3, name="A100", memory=80 << 30, free=80 << 30)
    assert other.state == "warn" and "A100 of 80.0 GiB on rank 3 on n2" in other.found
    (used,) = found(2, free=100 << 30)
    assert "40.0 GiB of the GPU in use on rank 2 on n2" in used.found
    (old,) = found(0, bf16=False)
    assert old.state == "fix" and old.remedy == "train.precision=fp32"
    assert "driver 1 on rank 1 on n1" in found(1, driver="1")[0].found
    (mixed,) = found(3, type="cpu")
    assert (
        mixed.state == "fix" and "cuda on ranks 0-1 on n1 and rank 2 on n2; cpu on" in mixed.found
    )
    (failed,) = judge.devices([*four[:3], Outcome(error="no GPU of its own")], HOSTS, None)
    assert failed.found == "no GPU of its own on rank 3 on n2"
    cpu = node.device("cpu", 0)
    assert judge.devices([Outcome({**cpu, "driver": "580.65"})], HOSTS, None)[1].state == "warn"


def test_environment() -> None:
    base = {**node.limits(), "threads": 1, "cores": 8, "open_files": 65536, "shm": 1 << 40,
            "address": "10.0.0.1", "variables": {}}  # fmt: skip

    def found(cuda: bool = False, ranks: int = 4, **other: Any) -> list[str]:
        rows = {r: dict(base) for r in range(ranks)}
        rows[ranks - 1].update(other)
        listed = judge.environment(rows, HOSTS, cuda)
        return [f"{f.state} {f.found}" for f in listed if f.state != "info"]

    assert not found()
    crowded = {r: {**base, "threads": 8} for r in range(2)}
    assert (
        "n1: 2 ranks of 8 threads on 8 cores" in judge.environment(crowded, HOSTS, False)[0].found
    )
    (few,) = found(open_files=256)
    assert few.startswith("warn open files: 256 on rank 3 on n2")
    assert not found(shm=64 << 20)
    assert "64.0 MiB free in /dev/shm on rank 3 on n2" in found(cuda=True, shm=64 << 20)[0]
    assert "means 127.0.1.1 on rank 3 on n2" in found(address="127.0.1.1")[0]
    assert not found(ranks=2, address="127.0.1.1"), "one node"
    (cache,) = found(cache_error="Read-only file system")
    assert cache.startswith("fix cache folder") and "on rank 3 on n2" in cache
    assert "a Slurm job of 16 tasks" in found(ranks=1, variables={"SLURM_NTASKS": "16"})[0]


def test_the_base_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny.make(0), tmp_path / "model")
    here = node.model(of(f"model.path={folder}"))
    assert here["state"] == "here"
    other = Outcome({**here, "fingerprint": "other"})
    nodes = [Outcome(here), Outcome(), other, Outcome()]
    differ = judge.base(nodes, HOSTS, "m")
    assert differ.state == "fix" and "other on rank 2 on n2" in differ.found
    same = judge.base([*nodes[:2], *nodes[:2]], HOSTS, "m")
    assert same.state == "ok" and "seen by 2 nodes" in same.found
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        node.model(of(f"model.path={folder}"))
    with (folder / "model.safetensors").open("r+b") as f:
        f.truncate(5000)
    with pytest.raises(UserError, match="truncated"):
        node.model(of(f"model.path={folder}"))
    hub = of("model.path=nobody/no-such-model")
    assert node.model(hub) == {"state": "absent"}
    assert "not on the nodes of rank 0" in judge.base([Outcome(node.model(hub))], HOSTS, "m").found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        node.model(hub)
    assert doctor.checkpoint_bytes(hub) is None


def test_data_on_every_node(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    here = Outcome(node.data(of("data=commonsense", f"data.train={rows}")))
    assert here.value == {"train": [1, 2]}
    assert judge.data([here, Outcome()], HOSTS).state == "ok"
    other = judge.data([here, Outcome({"train": [1, 3]})], HOSTS)
    assert other.state == "fix" and "3 bytes on rank 1 on n1" in other.found
    with pytest.raises(UserError, match="no such file"):
        node.data(of("data=commonsense", "data.train=/none.json"))


def test_rows_are_read(tmp_path: Path) -> None:
    row = {"instruction": "i", "output": "the correct answer is true", "answer": "true"}
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row, {**row, "instruction": "j"}, {}]))
    settings = ["data=commonsense", f"data.train={rows}"]
    with pytest.raises(UserError, match="row 3: key 'instruction' is missing"):
        node.rows(of(*settings))
    found = node.rows(of(*settings, "data.on_error=skip", f"data.valid={rows}"))
    assert found == {"train": [2, 1], "valid": [2, 1]}
    finding = judge.rows([Outcome(found)], HOSTS)
    assert finding.state == "warn"
    assert finding.found.startswith("2 of data.train, 2 of data.valid; 2 broken ones are left out")
    assert judge.rows([Outcome({"train": [2, 0]})], HOSTS).state == "ok"
    hub = of("data=commonsense", "data.train=hf://a/b")
    assert judge.rows([Outcome(node.rows(hub))], HOSTS).state == "info"


def test_kernels_of_the_configured_storage() -> None:
    cpu = torch.device("cpu")
    assert node.kernels(of("model.quant=nf4"), cpu) == "nf4"
    assert node.kernels(of(), cpu) is None and judge.kernels([Outcome()], HOSTS).state == "info"
    assert node.kernels(None, cpu) == "int8 and nf4"
    assert judge.kernels([Outcome(error="wrong bytes")], HOSTS).state == "fix"


def test_words() -> None:
    assert spans([3]) == "rank 3" and spans([0, 1, 2, 5]) == "ranks 0-2, 5"
    assert where([0, 1, 2], HOSTS) == "ranks 0-1 on n1 and rank 2 on n2"
    assert by_value({0: "a", 1: "b"}, {}) == "a on rank 0; b on rank 1"
    assert summary([Finding("a", "ok", "b")]) == ["nothing to fix"]
    assert summary([Finding("a", "warn", "b"), Finding("c", "fix", "d", "e")]) == [
        "to fix (1 warning):",
        "  1. c: d -> e",
    ]
