"""Triton kernels: the plain forms' bits in its interpreter, code for GPUs, and what stands in."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, adapter_bytes

from scalepeft.config import files as config_files
from scalepeft.core import kernels
from scalepeft.core.errors import UserError


@pytest.fixture
def triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if importlib.util.find_spec("triton") is None:
        assert not os.environ.get("CI"), "no triton (pip install '.[dev]')"
        pytest.skip("no triton (pip install '.[dev]')")


def python(*words: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    """Of a process of its own: Triton reads the variable at its import."""
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=env, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
def test_kernels_give_the_plain_forms_bits() -> None:
    done = python("-W", "ignore", "tests/core/interpreted_kernels.py")
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 149
    assert not {case: wrong for case, wrong in found.items() if wrong}
    assert done.stderr == ""


COMPILED = """
import json, re, sys, triton
from triton.backends.compiler import GPUTarget
from scalepeft.core import triton_kernels

def ptx(name, kind, capability, const):
    function = getattr(triton_kernels, name)
    types = dict(weight="*u8", scale="*u8", values="*fp32", keys="*i64", positions="*i64")
    types |= dict(rows="*" + kind, x="*" + kind, y="*" + kind, salt="i64", factor="fp32")
    names = function.arg_names
    signature = {n: "constexpr" if n in const else types.get(n, "i32") for n in names}
    values = {(names.index(n),): value for n, value in const.items()}
    wide = [(i,) for i, n in enumerate(names) if signature[n][0] == "*" or n == "features"]
    source = triton.compiler.ASTSource(
        function, signature, values, {i: [["tt.divisibility", 16]] for i in wide}
    )
    options = {"enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made.asm["ptx"]

found = {}
for kind in ("fp32", "bf16", "fp16"):
    for capability in (80, 90):
        for double in (False, True):
            found[f"decode {kind} {capability} {double}"] = ptx(
                "_decode", kind, capability, dict(DOUBLE=double, TILE=32))
        for flag in (False, True):
            const = dict(KEYED=flag, PLACED=flag, TOKENS=32, FEATURES=256)
            found[f"drop {kind} {capability} {flag}"] = ptx("_drop", kind, capability, const)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
def test_kernels_compile_for_gpus_as_they_are_to_round() -> None:
    """Needs no GPU: ptxas comes with Triton. A fused ``low + code * step`` would round once."""
    found: dict[str, str] = json.loads(python("-c", COMPILED, interpret=False).stdout)
    assert len(found) == 24
    for case, ptx in found.items():
        assert not re.search(r"\bfma\.", ptx), case
        assert re.search(r"st\.global\.v4", ptx), case
        rounds = set(re.findall(r"cvt\.rn\.(b?f16)(?:x2)?\.f32", ptx))
        assert rounds == {"fp32": set(), "bf16": {"bf16"}, "fp16": {"f16"}}[case.split()[1]], case


FALLS_BACK = """
import sys, torch
if {missing}:
    sys.modules["triton"] = None
from scalepeft.adapters.base import Dropout, drop
from scalepeft.models import quant
fmt = quant.NF4(double=True)
stored = fmt.encode(torch.randn(4, 128))
dropout = Dropout(0.3, "a").train()
dropout.keys = torch.tensor([8, 9])
for _ in range(2):
    got = fmt.decode(*stored, 128, torch.bfloat16)
    assert torch.equal(got, fmt.plain(*stored, 128, torch.bfloat16))
    x = torch.randn(2, 5, 64).bfloat16()
    assert torch.equal(dropout(x), drop(x, dropout.keys, None, dropout._salt, 0.3))
"""


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("missing", "why"),
    [(False, "its values are not those of the plain form"), (True, "import of triton halted")],
)
def test_a_kernel_that_cannot_be_used(missing: bool, why: str) -> None:
    """The interpreter cuts fp32 off where bf16 is to be rounded: a kernel with other bits."""
    said = python("-c", FALLS_BACK.format(missing=missing)).stderr.splitlines()
    assert len(said) == 2, "one line for each kernel"
    for line, kernel in zip(said, ("decode NF4(double=True)", "drop"), strict=True):
        assert line.startswith(f"scalepeft: the Triton kernel {kernel} torch.bfloat16 is not used")
        assert why in line


def test_a_cpu_takes_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x, never = torch.ones(2), lambda *_: pytest.fail("compared")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.find("drop", x, never) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_enabled", True)
    kernels.allow(False)
    assert kernels.find("drop", x, never) is None


def test_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scalepeft.parallel.base import Engine
    from scalepeft.parallel.ranks import Ranks

    monkeypatch.setattr(kernels, "_enabled", True)
    keys: list[Any] = ["data=toy", "train.max_steps=1", "engine=single", f"run_dir={tmp_path}"]
    for more, enabled in (["engine.kernels=off"], False), ([], True):
        config, _ = config_files.load(None, [*keys, *more])
        Engine(config.engine, Ranks())
        assert kernels._enabled == enabled
    with pytest.raises(UserError, match=r"engine.kernels=.*'auto' or 'off'"):
        config_files.load(None, [*keys, "engine.kernels=true"])


@pytest.mark.usefixtures("triton")
def test_the_end_of_a_command_that_loaded_triton() -> None:
    """Its binding lists what the interpreter's end leaves, thirty lines of it."""
    code = "import triton; from scalepeft import cli; cli.main(['status', '/nowhere'])"
    assert "nanobind" not in python("-c", code).stderr


@pytest.mark.full
@pytest.mark.usefixtures("triton")
def test_a_training_with_kernels_is_one_without(tmp_path: Path) -> None:
    settings = (
        "train", "model=tiny", "model.quant=nf4", "model.double_quant=true", "data=toy",
        "adapter=lora", "adapter.dropout=0.1", "engine=single", "engine.device=cpu",
        "engine.activation_checkpointing=true", "train.precision=fp32", "train.max_steps=1",
        "train.global_batch=2", "train.micro_batch=1",
    )  # fmt: skip
    for way in ("auto", "off"):
        more = f"engine.kernels={way}", f"run_dir={tmp_path / way}"
        done = python("-m", "scalepeft", *settings, *more)
        assert "nanobind" not in done.stderr
    assert adapter_bytes(tmp_path / "auto") == adapter_bytes(tmp_path / "off")
