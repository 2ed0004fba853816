"""``scalepeft doctor --against-transformers``: both losses of a base, from its folder alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make, stock
from processes import call
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from scalepeft.cluster.doctor import against, command
from scalepeft.core.errors import UserError

LINE = re.compile(
    r"base: loss \d+\.\d{4}, transformers \d+\.\d{4}, largest logit difference \d\.\de[-+]\d\d"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(name, folder / name) for name in ("llama", "qwen3-moe", "qwen3.5")}


@torch.no_grad()
def right(folder: Path) -> float:
    """The mean cross-entropy that the issue defines, by stock transformers alone."""
    ids = torch.tensor([[5 + (7919 * i) % (320 - 10) for i in range(64)]])
    logits = stock(folder)(input_ids=ids).logits[0]
    return F.cross_entropy(logits[:-1], ids[0, 1:]).item()


def compare(folder: Path, *settings: str) -> int:
    return command.run([f"model.path={folder}", *settings], against_transformers=True)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_base_that_is_read_right(
    name: str, precision: str, quant: str, bases: Any, capfd: Any
) -> None:
    folder = bases[name]
    assert compare(folder, f"train.precision={precision}", f"model.quant={quant}") == 0
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    assert LINE.fullmatch(line), line
    if quant == "none":
        theirs = float(line.split("transformers ")[1].split(",")[0])
        assert theirs == pytest.approx(right(folder), rel=1e-4 if precision == "fp32" else 1e-2)
    else:
        assert re.search(r"transformers' model holds the nf4 values of \d+ layers", err)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_a_base_of_bitsandbytes(quant: str, bases: Any, tmp_path: Path, capfd: Any) -> None:
    """Whose own forward is in bf16 on a CPU: what it holds is compared, not that."""
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        bases["llama"], quantization_config=asked, dtype=torch.bfloat16
    )
    folder = shutil.copytree(bases["llama"], tmp_path / "base")
    model.save_pretrained(folder)
    assert compare(folder, f"model.quant={quant}") == 0  # in bf16
    capfd.readouterr()
    code = compare(folder, "train.precision=fp32", f"model.quant={quant}")
    out, err = capfd.readouterr()
    if quant == "int8":  # its values are others, and transformers' are not replaced by them
        assert code == 1
    else:
        assert code == 0, err
        ours, theirs = re.findall(r"(?:loss|transformers) ([\d.]+)", out)
        assert ours == theirs


def test_the_command_needs_a_base_alone(bases: Any, tmp_path: Path) -> None:
    done = call("doctor", f"model.path={bases['llama']}", "--against-transformers")
    assert done.returncode == 0, done.stderr
    assert LINE.fullmatch(done.stdout.strip())
    assert not list(tmp_path.iterdir())
    done = call(
        "doctor", "commonsense_hoft", f"model.path={bases['llama']}", "--against-transformers"
    )
    assert done.returncode == 0, done.stderr
    assert LINE.fullmatch(done.stdout.strip())


def test_a_difference_ends_with_1(bases: Any, monkeypatch: Any, capfd: Any) -> None:
    theirs = against._theirs
    monkeypatch.setattr(against, "_theirs", lambda *given: theirs(*given) / 8)
    assert compare(bases["llama"], "train.precision=fp32") == 1
    out, err = capfd.readouterr()
    assert LINE.fullmatch(out.strip())
    assert "they differ by more than 1.0e-04" in err


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_the_first_blocks_of_a_base_that_does_not_fit(
    name: str, bases: Any, monkeypatch: Any, capfd: Any
) -> None:
    size = (bases[name] / "model.safetensors").stat().st_size
    monkeypatch.setattr(against, "_room", lambda device: int(1.2 * size) - 50_000)
    before = sorted(bases[name].iterdir())
    assert compare(bases[name], "train.precision=fp32") == 0
    out, err = capfd.readouterr()
    assert "the first 1 of 2 blocks are compared" in err
    assert abs(float(out.split("transformers ")[1].split(",")[0]) - right(bases[name])) > 1e-3
    assert sorted(bases[name].iterdir()) == before
    monkeypatch.setattr(against, "_room", lambda device: 1000)
    with pytest.raises(UserError, match="too little for one of its blocks"):
        compare(bases[name])


def broken(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if kind == "unknown family":
        config["model_type"] = "nobodys"
    elif kind == "a stray tensor":
        tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(64)
    elif kind == "a missing tensor":
        del tensors["model.norm.weight"]
    elif kind == "an empty file":
        tensors = {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, file, {"format": "pt"})
    if not tensors:
        file.write_bytes(b"")


@pytest.mark.parametrize(
    "kind", ["unknown family", "a stray tensor", "a missing tensor", "an empty file"]
)
def test_a_base_that_is_refused_ends_with_2(kind: str, tmp_path: Path) -> None:
    broken(make("llama", tmp_path / "base"), kind)
    done = call("doctor", f"model.path={tmp_path / 'base'}", "--against-transformers")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "error: " in line] == [
        done.stderr.splitlines()[-1]
    ]


def test_it_is_for_one_process_and_has_no_run_folder(bases: Any, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="takes neither --run-dir"):
        command.run([f"model.path={bases['llama']}"], "x", against_transformers=True)
    with pytest.raises(UserError, match="--timeout"):
        command.run([f"model.path={bases['llama']}"], timeout=9, against_transformers=True)
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for key, value in {**launched, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="one process"):
        compare(bases["llama"])
