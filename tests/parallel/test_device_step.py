"""A whole step of every method on a fake accelerator: all on one device, and what the host waits
for. The methods are over fp32 and NF4 by turns; with ``--full`` over both.
"""

import json
import subprocess
import sys
from typing import Any

import pytest
from families import config_of
from processes import FULL, ROOT

SETTINGS = [
    "data=toy", "engine=single", "train.global_batch=4", "train.micro_batch=2",
    "train.max_steps=2", "train.batching=padded",
]  # fmt: skip
CONFIGS = sorted(path.stem for path in (ROOT / "configs/adapters").glob("*.yaml"))
NF4 = CONFIGS if FULL else CONFIGS[1::2]
CASES = {name: [f"adapter={name}"] for name in CONFIGS if FULL or name not in NF4}
CASES |= {f"{name} nf4": [f"adapter={name}", "model.quant=nf4"] for name in NF4}
CASES |= {
    "hoft packed": ["adapter=hoft", "train.batching=packed"],
    "goft checkpointed": ["adapter=goft", "engine.activation_checkpointing=true"],
    "lora dropped out": ["adapter=lora", "adapter.dropout=0.1"],
    "dora dropped out, packed, checkpointed, nf4": [
        "adapter=dora", "adapter.dropout=0.1", "train.batching=packed", "model.quant=nf4",
        "model.double_quant=true", "engine.activation_checkpointing=true",
    ],
    "qgoft with a penalty": ["adapter=qgoft", "adapter.penalty=1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("llama")
    config = config_of("llama")
    config.num_hidden_layers = 1
    config.save_pretrained(folder)
    cases = json.dumps([[*SETTINGS, *case] for case in CASES.values()])
    program = ["-W", "ignore", str(ROOT / "tests/support/fake_device.py"), str(folder)]
    done = subprocess.run(
        [sys.executable, *program], input=cases, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_on_one_device(found: dict[str, Any], case: str) -> None:
    got = found[case]
    assert "error" not in got, got["error"]
    assert got["devices"] == ["npy"]
    assert got["launches"] > 300
    assert 1 <= got["updates"] <= 2, "one of what decays, one of what does not"
    assert got["syncs"] == {}, "the host waits"
