"""The base on each node's own disk: read there when it is whole, brought again when it is not."""

import json
import re
import shutil
from pathlib import Path

import pytest
from disks import small_disk
from processes import ROOT, Job, adapter_bytes, call, flip, losses

from scalepeft.core.errors import UserError
from scalepeft.models import hub, staging
from scalepeft.parallel.ranks import Ranks

BASE = ROOT / "tests/data/run-2026-11-21/base"
SHARD = "model.safetensors"
PROGRAM = (str(Path(__file__).with_name("staged_ranks.py")),)
SETTINGS = (
    "data=toy data.train_size=40 adapter=hoft adapter.rank=2 adapter.target_modules=q_proj"
    " train.precision=fp32 train.global_batch=4 train.micro_batch=1 train.max_steps=2"
).split()


class Nodes:
    """Two nodes of two ranks, and runs over one base."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.stages = folder, folder / "base", folder / "stages"
        shutil.copytree(BASE, self.base)

    def start(self, name: str, *settings: str, ranks: int = 4) -> str:
        arguments = ["train", f"model.path={self.base}", *SETTINGS, "engine=ddp",
                     f"run_dir={self.folder / name}", *settings]  # fmt: skip
        codes, text = Job(ranks, arguments, {"STAGES": str(self.stages)}, PROGRAM).wait()
        assert codes == [0] * ranks, text
        return text

    def read(self, text: str) -> dict[int, set[str]]:
        """Rank -> the folders in which it read tensors, under names of this test."""
        found: dict[int, set[str]] = {}
        for rank, folder in re.findall(r"rank (\d) of n\d read [1-9]\d* in (.+)", text):
            path = Path(folder)
            where = path.parent.name if path.is_relative_to(self.stages) else path.name
            if path.is_relative_to(self.base) or path.is_relative_to(self.stages):
                found.setdefault(int(rank), set()).add(where)
            elif "copies" in folder:
                found.setdefault(int(rank), set()).add("copies")
        return found

    def staged(self, node: str) -> Path:
        (folder,) = (self.stages / node).iterdir()
        return folder


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


ON_BOTH = {0: {"n1"}, 1: {"n1"}, 2: {"n2"}, 3: {"n2"}}


def test_a_folder_that_is_no_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, name in (("here", "here"), ("auto", "~/scratch")):
        monkeypatch.setenv("SCALEPEFT_STAGE", "~/scratch")
        base = hub.Base(hub.ModelConfig(stage=setting), BASE)
        with pytest.raises(UserError, match=f"model.stage={setting}: {name} is no whole path"):
            staging.stage(base, None, Ranks(), lambda: None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_each_node_brings_the_base_once_and_again_where_it_lost_it(nodes: Nodes) -> None:
    plain = nodes.start("plain", "model.stage=off")
    assert nodes.read(plain) == {rank: {"base"} for rank in range(4)}
    assert "staged" not in plain and not nodes.stages.exists()
    first = nodes.start("first")
    assert len(re.findall(r"of the base staged on n[12] in ", first)) == 2
    assert nodes.read(first) == ON_BOTH
    held = json.loads((nodes.staged("n1") / "manifest.json").read_text())
    assert held["files"][SHARD]["bytes"] == (nodes.base / SHARD).stat().st_size
    again = nodes.start("again")
    assert "staged" not in again and nodes.read(again) == ON_BOTH
    assert len(re.findall(r"read there on n[12], from an earlier start", again)) == 2

    shutil.rmtree(nodes.staged("n2"))  # an epilog of the site's
    (nodes.staged("n1") / "manifest.json").unlink()  # for people: the base's own sums decide
    lost = nodes.start("lost")
    assert "read there on n1" in lost and "staged on n2" in lost
    assert nodes.read(lost) == ON_BOTH

    flip(nodes.staged("n1") / SHARD, 9000)
    with (nodes.staged("n2") / SHARD).open("ab") as f:
        f.write(b"\0")
    damaged = nodes.start("damaged")
    assert "staged on n1" in damaged and "staged on n2" in damaged
    assert nodes.read(damaged) == ON_BOTH
    for node in ("n1", "n2"):
        names = sorted(p.name for p in nodes.staged(node).iterdir())
        assert names == ["manifest.json", SHARD]
        assert (nodes.staged(node) / SHARD).read_bytes() == (nodes.base / SHARD).read_bytes()
    sums = set()
    for run in ("plain", "first", "again", "lost", "damaged"):
        assert losses(nodes.folder / run) == losses(nodes.folder / "plain")
        assert adapter_bytes(nodes.folder / run) == adapter_bytes(nodes.folder / "plain")
        about = json.loads((nodes.folder / run / "adapter/scalepeft.json").read_text())
        sums.add(json.dumps(about["base_model"]["sha256"]))
    assert len(sums) == 1, "what is staged is the same base"


@pytest.mark.slow
def test_a_node_without_room_reads_the_base_where_it_is(nodes: Nodes) -> None:
    (nodes.stages / "n2").mkdir(parents=True)
    with small_disk(nodes.stages / "n2", "size=64k"):
        text = nodes.start("full")
        refused = "not staged on n2, read where it is: 194.7 KiB are needed and 64.0 KiB free"
        assert text.count(refused) == 1, text
        assert "staged on n1 in " in text
        assert nodes.read(text) == {0: {"n1"}, 1: {"n1"}, 2: {"base"}, 3: {"base"}}
        assert not any((nodes.stages / "n2").iterdir()), "nothing half is left"
    (nodes.stages / "n3").write_text("a file")
    text = nodes.start("file", f"model.stage={nodes.stages / 'n3'}", ranks=2)
    assert "not staged on n1, read where it is: " in text and nodes.read(text) == {
        0: {"base"},
        1: {"base"},
    }


@pytest.mark.slow
def test_the_quantized_copy_is_staged_in_place_of_the_base(nodes: Nodes) -> None:
    copies = ["model.quant=nf4", f"model.quantized_cache={nodes.folder / 'copies'}"]
    nodes.start("plain", "model.stage=off", *copies)
    second = nodes.start("second", *copies)
    assert "quantized copy of the base read in its place" in second
    assert nodes.read(second) == {rank: {*on, "base"} for rank, on in ON_BOTH.items()}
    assert sorted(p.name for p in nodes.staged("n1").iterdir()) == [
        "manifest.json", *(f"rank-{rank:05d}.safetensors" for rank in range(4)),
    ]  # fmt: skip
    assert losses(nodes.folder / "plain") == losses(nodes.folder / "second")


@pytest.mark.full
@pytest.mark.slow
def test_two_jobs_that_start_at_once_share_what_they_bring(nodes: Nodes) -> None:
    arguments = ["train", f"model.path={nodes.base}", *SETTINGS, "engine=ddp"]
    env = {"STAGES": str(nodes.stages)}
    jobs = [Job(2, [*arguments, f"run_dir={nodes.folder / n}"], env, PROGRAM) for n in "ab"]
    ends = [job.wait() for job in jobs]
    assert [codes for codes, _ in ends] == [[0, 0], [0, 0]], ends
    assert all(nodes.read(text) == {0: {"n1"}, 1: {"n1"}} for _, text in ends), ends
    assert sorted(p.name for p in nodes.staged("n1").iterdir()) == ["manifest.json", SHARD]
    assert losses(nodes.folder / "a") == losses(nodes.folder / "b")


def test_an_evaluation_reads_what_is_staged(nodes: Nodes) -> None:
    stage = f"model.stage={nodes.stages}"
    run = f"run_dir={nodes.folder / 'run'}"
    done = call("train", f"model.path={nodes.base}", *SETTINGS, run, stage)
    assert done.returncode == 0 and " staged on " in done.stderr, done.stderr
    few = ["evaluate.limit=4", "evaluate.max_new_tokens=2"]
    done = call("evaluate", str(nodes.folder / "run"), *few)
    assert done.returncode == 0 and "from an earlier start" in done.stderr, done.stderr
