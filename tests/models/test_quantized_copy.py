"""The quantized copy of a base: read in the base's place, whole or not at all, by any ranks."""

import json
import shutil
from pathlib import Path

import pytest
from processes import ROOT, Job, adapter_bytes, call, losses, rows

from scalepeft.models import quantized_copy

BASE = ROOT / "tests/data/run-2026-11-21/base"
SETTINGS = (
    "data=toy data.train_size=40 adapter=hoft adapter.rank=2 adapter.target_modules=q_proj,v_proj"
    " train.precision=fp32 train.global_batch=4 train.micro_batch=2 train.max_steps=2"
).split()
READ = "quantized copy of the base read"
KEPT = "quantized copy of the base kept"


class Place:
    """A base, a folder for copies, and runs over them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.cache = folder, folder / "base", folder / "copies"
        shutil.copytree(BASE, self.base)

    def start(self, name: str, *settings: str, ranks: int = 1) -> str:
        """Trains RUN; returns what is printed."""
        arguments = ["train", f"model.path={self.base}", "model.quant=nf4", *SETTINGS,
                     f"model.quantized_cache={self.cache}", f"run_dir={self.folder / name}",
                     *settings]  # fmt: skip
        if ranks == 1:
            done = call(*arguments)
            assert done.returncode == 0, done.stderr
            return done.stderr
        codes, text = Job(ranks, arguments).wait()
        assert codes == [0] * ranks, text
        return text

    def read(self, name: str) -> int:
        """Bytes that the ranks of a run's last start read."""
        started = [r for r in rows(self.folder / name, "events.jsonl") if "per_rank" in r]
        return sum(rank["bytes_read"] for rank in started[-1]["per_rank"])

    @property
    def copy(self) -> Path:
        (found,) = self.cache.iterdir()
        return found

    def same(self, *names: str) -> None:
        first, *others = (self.folder / name for name in names)
        for other in others:
            assert losses(other) == losses(first)
            assert adapter_bytes(other) == adapter_bytes(first)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "storage",
    [
        "model.quant=nf4",
        *(
            pytest.param(f"model.{s}", marks=pytest.mark.full)
            for s in ("double_quant=true", "quant=int8")
        ),
    ],
)
def test_the_next_start_reads_the_copy(place: Place, storage: str) -> None:
    assert KEPT in place.start("first", storage)
    manifest = json.loads((place.copy / "manifest.json").read_text())
    assert list(manifest["files"]) == ["rank-00000.safetensors"]
    text = place.start("second", storage)
    assert f"{place.copy}: " in text
    assert READ in text
    assert KEPT not in text
    assert place.read("second") < 0.75 * place.read("first")  # the embedding is the larger part
    place.same("first", "second")
    assert READ in call("evaluate", str(place.folder / "first")).stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("engine=fsdp2", marks=pytest.mark.full),
        pytest.param("engine=ddp", marks=pytest.mark.full),
        "engine=zero engine.stage=3",
    ],
)
def test_any_engine_reads_what_another_wrote(place: Place, engine: str) -> None:
    if "zero" in engine:
        pytest.importorskip("deepspeed")
    place.start("alone", "model.quantized_cache=off")
    assert not place.cache.exists()
    assert KEPT in place.start("two", *engine.split(), ranks=2)
    assert sorted(json.loads((place.copy / "manifest.json").read_text())["files"]) == [
        "rank-00000.safetensors", "rank-00001.safetensors",
    ]  # fmt: skip
    assert READ in place.start("one")
    place.same("alone", "one")
    text = place.start("again", *engine.split(), ranks=2)
    assert READ in text
    assert KEPT not in text
    place.same("two", "again")
    assert place.read("again") < place.read("two")


@pytest.mark.slow
def test_other_bases_and_storages_have_copies_of_their_own(place: Place) -> None:
    place.start("first")
    assert KEPT in place.start("second", "model.double_quant=true")
    with (place.base / "model.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\1")
    assert KEPT in place.start("third")
    assert len(list(place.cache.iterdir())) == 3


@pytest.mark.parametrize(
    "fault",
    [
        "flip",
        *(pytest.param(f, marks=pytest.mark.full) for f in ("header", "cut", "gone", "manifest")),
        pytest.param("none", marks=pytest.mark.full),
    ],
)
def test_a_damaged_copy_is_passed_over_and_made_anew(place: Place, fault: str) -> None:
    place.start("first")
    file, manifest = place.copy / "rank-00000.safetensors", place.copy / "manifest.json"
    data = bytearray(file.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif fault == "header":
        data[30] ^= 1
        file.write_bytes(data)
    elif fault == "cut":
        file.write_bytes(data[:-5])
    elif fault == "gone":
        file.unlink()
    elif fault == "manifest":
        manifest.write_text(manifest.read_text()[:-40])
    else:
        manifest.unlink()
    text = place.start("second")
    assert text.count("quantized copy passed over") == 1
    assert KEPT in text
    place.same("first", "second")
    text = place.start("third")
    assert READ in text
    assert "passed over" not in text
    place.same("first", "third")


@pytest.mark.slow
def test_two_ranks_of_which_one_finds_damage_go_on(place: Place) -> None:
    place.start("first", "engine=fsdp2", ranks=2)
    file = place.copy / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    text = place.start("second", "engine=fsdp2", ranks=2)
    assert text.count("quantized copy passed over") == 1
    assert KEPT in text
    place.same("first", "second")
    assert READ in place.start("third", "engine=fsdp2", ranks=2)


def test_a_disk_that_refuses_costs_a_line(place: Place) -> None:
    place.cache.write_text("a file")
    text = place.start("first")
    assert text.count("no quantized copy is kept: ") == 1
    assert "model.quantized_cache=FOLDER or off" in text


def test_leftovers_of_killed_starts_go(place: Place) -> None:
    import os

    for name, age in (("old.tmp-1", 2 * quantized_copy.LEFTOVER_SECONDS), ("new.tmp-2", 0)):
        folder = place.cache / name
        folder.mkdir(parents=True)
        past = folder.stat().st_mtime - age
        os.utime(folder, (past, past))
    place.start("first")
    assert not (place.cache / "old.tmp-1").exists()
    assert (place.cache / "new.tmp-2").is_dir()


def test_where_copies_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    large, folder_of = 2 << 30, quantized_copy.folder_of
    monkeypatch.setenv("SCALEPEFT_CACHE", str(tmp_path))
    assert folder_of("auto", large) == tmp_path / "quantized"
    assert folder_of("auto", 1000) is None
    assert folder_of("off", large) is None
    assert folder_of(str(tmp_path / "x"), 1000) == tmp_path / "x"
    assert folder_of(str(tmp_path / "x"), 0) is None
    monkeypatch.delenv("SCALEPEFT_CACHE")
    assert folder_of("auto", large) is None


@pytest.mark.slow
def test_experts_are_in_the_copy(place: Place) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    held = json.loads((place.base / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    (place.base / "model.safetensors").unlink()
    config = MixtralConfig(**{key: held[key] for key in keys}, **sizes, **more)
    MixtralForCausalLM(config).save_pretrained(place.base)
    assert KEPT in place.start("first", "engine=fsdp2", ranks=2)
    assert READ in place.start("second", "engine=fsdp2", ranks=2)
    place.same("first", "second")
    assert place.read("second") < 0.5 * place.read("first")
