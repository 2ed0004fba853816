"""The Python API: every public name, in every order, and what it refuses."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

import scalepeft
from scalepeft.core.errors import UserError

NAMES = ("adapt", "effective_weight", "inject", "load_adapter")


@pytest.mark.slow
def test_public_names_stay_functions_in_every_order_of_use() -> None:
    program = f"""
import importlib, sys
for order in {list(itertools.permutations(NAMES))!r}:
    for module in [m for m in sys.modules if m.startswith("scalepeft")]:
        del sys.modules[module]
    package = importlib.import_module("scalepeft")
    for name in (*order, *order):
        found = getattr(package, name)
        assert callable(found), (order, name, found)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_inject_twice_and_save_load(tmp_path: object) -> None:
    for _ in range(2):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        scalepeft.inject(net, {"name": "lora", "rank": 2, "target_modules": ["0"]})
        assert sum(p.requires_grad for p in net.parameters()) == 2


def test_load_adapter_compares_settings_of_an_adapter_that_is_there(tmp_path) -> None:
    import json

    from safetensors.torch import save_file

    from scalepeft.adapters import inject as injection
    from scalepeft.config import schema as config

    def net(alpha: float) -> nn.Module:
        torch.manual_seed(0)
        settings = {
            "name": "lora",
            "rank": 2,
            "alpha": alpha,
            "dropout": 0.0,
            "target_modules": ["0"],
        }
        return scalepeft.inject(nn.Sequential(nn.Linear(8, 8)), settings)

    trained = net(64)
    with torch.no_grad():
        trained[0].adapter.B.normal_()
    state = {k: v.detach() for k, v in injection.trainable(trained).items()}
    save_file(state, tmp_path / "adapter.safetensors")
    description = {"adapter": config.to_dict(trained[0].adapter.config)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(description))
    torch.manual_seed(0)
    x, plain = torch.randn(3, 8), nn.Sequential(nn.Linear(8, 8))
    torch.manual_seed(0)
    for model in (net(64), scalepeft.load_adapter(nn.Sequential(nn.Linear(8, 8)), tmp_path)):
        model[0].weight = trained[0].weight
        model[0].bias = trained[0].bias
        scalepeft.load_adapter(model, tmp_path)
        assert torch.equal(model(x), trained(x))
    with pytest.raises(UserError, match=r"alpha=64.0.*alpha=8.0"):
        scalepeft.load_adapter(net(8), tmp_path)
    with pytest.raises(UserError, match="matches no linear layer"):
        scalepeft.load_adapter(nn.Sequential(nn.ReLU()), tmp_path)
    save_file({k: v * float("nan") for k, v in state.items()}, tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        scalepeft.load_adapter(plain, tmp_path)


def test_what_cannot_be_adapted_is_named() -> None:
    with pytest.raises(UserError, match="Conv1d cannot be adapted"):
        scalepeft.adapt(nn.Conv1d(4, 4, 1), "hoft")  # type: ignore[arg-type]
    layer = scalepeft.adapt(nn.Linear(4, 4), "hoft", rank=2)
    with pytest.raises(UserError, match="already has an adapter"):
        scalepeft.adapt(layer, "lora")
    with pytest.raises(UserError, match="has no adapter"):
        scalepeft.effective_weight(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"no adapter 'hotf'\..*Did you mean 'hoft'"):
        scalepeft.adapt(nn.Linear(4, 4), "hotf")
