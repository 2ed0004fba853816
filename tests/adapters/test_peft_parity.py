"""Outputs and gradients equal HF PEFT's when it gets the parameters that ``to_peft`` gives."""

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.boft import layer as peft_boft
from torch import Tensor, nn

import scalepeft
from scalepeft.adapters.base import Adapter
from scalepeft.adapters.inject import trainable
from scalepeft.models.quant import Frozen

CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 4, "alpha": 12, "dropout": 0.0}),
    ("lora", {"rank": 4, "alpha": 12, "dropout": 0.0, "rslora": True}),
    ("dora", {"rank": 4, "alpha": 12, "dropout": 0.0}),
    *(
        (name, {"rank": 4, "alpha": 12, "dropout": 0.0, "rslora": rslora, "start": "pissa"})
        for name, rslora in (("lora", False), ("lora", True), ("dora", False))
    ),
    ("oft", {"block_size": 4}),
    ("oftv2", {"block_size": 8}),
    ("boft", {"block_size": 4, "factors": 1}),
    ("boft", {"block_size": 4, "factors": 3}),
    ("hra", {"rank": 6, "form": "pairs"}),
    ("hra", {"rank": 6, "form": "mean_difference"}),
    ("ia3", {"feedforward_modules": []}),
    ("ia3", {"target_modules": ["down_proj"]}),
    ("hira", {"rank": 3}),
    ("surm", {"structure": "circulant", "init_std": 0.5, "scaling": 0.7}),
]


def nets(name: str, settings: dict[str, Any], bias: bool) -> tuple[nn.Sequential, Any]:
    """(ours, PEFT's with the same parameters), away from the start."""
    target = settings.get("target_modules", ["proj"])[0]
    torch.manual_seed(0)
    theirs = nn.Sequential()
    theirs.add_module(target, nn.Linear(32, 24, bias=bias))
    mine = copy.deepcopy(theirs)
    scalepeft.inject(mine, {"name": name, "target_modules": [target], **settings})
    with torch.no_grad():
        for p in trainable(mine).values():
            p.add_(torch.randn_like(p) * 0.2)
    fields, tensors = mine[0].adapter.to_peft(Frozen(mine[0]))
    kind = fields.pop("peft_type")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=[target], **fields)
    theirs = peft.get_peft_model(theirs, config)
    state = {f"base_model.model.{target}.{key}": value for key, value in tensors.items()}
    assert peft.get_peft_model_state_dict(theirs).keys() == state.keys()
    loaded = peft.set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    return mine, theirs


def their_gradients(model: Any) -> dict[str, Tensor]:
    """By the names of ``to_peft``."""
    found = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            key = key.replace(".default", "").split(".", 3)[3]
            found[key.removesuffix(".weight") if "magnitude" in key else key] = p.grad
    return found


def pulled_back(adapter: Adapter, base: Frozen, theirs: dict[str, Tensor], name: str) -> Tensor:
    """PEFT's gradient as one of our parameter ``name``.

    ``to_peft`` is affine in each parameter, so its Jacobian is the change for a change of 1.
    """
    adapter = copy.deepcopy(adapter).double()
    parameter = dict(adapter.named_parameters())[name].data
    start = adapter.to_peft(base)[1]
    start = {key: value.clone() for key, value in start.items()}
    result = torch.zeros_like(parameter)
    for i in range(parameter.numel()):
        before = parameter.view(-1)[i].item()
        parameter.view(-1)[i] = before + 1
        moved = adapter.to_peft(base)[1]
        result.view(-1)[i] = sum(
            ((moved[key] - start[key]) * theirs[key].double()).sum() for key in start
        )
        parameter.view(-1)[i] = before
    return result


@pytest.mark.parametrize(
    ("name", "settings", "bias"),
    [
        pytest.param(
            name, settings, bias, id=f"{name}-{'-'.join(map(str, settings.values()))}-{bias}"
        )
        for name, settings in CASES
        for bias in (True, False)
        # PEFT scales a bias with the output; here it is added last, as everywhere (see IA3).
        if not (bias and name == "ia3" and "target_modules" not in settings)
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_equals_hf_peft(
    name: str, settings: dict[str, Any], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT takes several butterfly factors with its CUDA extension alone: stand in for that.
    blocks = SimpleNamespace(
        apply=lambda r: torch.stack([torch.block_diag(*factor) for factor in r])
    )
    monkeypatch.setattr(peft_boft, "FastBlockDiag", blocks)
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    mine, theirs = nets(name, settings, bias)
    x = torch.randn(2, 5, 32)
    ours, peers = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = mine(ours), theirs(peers)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    base = nn.functional.linear(x, mine[0].weight, mine[0].bias)
    assert (want - base).abs().max() > 1e-2 * want.abs().max(), "PEFT's adapter does nothing"
    got.square().sum().backward()
    want.square().sum().backward()
    x_grad = peers.grad
    if name == "surm":
        # C3A's own backward correlates where it should convolve; its merged weight is right.
        layer = next(m for m in theirs.modules() if hasattr(m, "c3a_kernel"))
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        x_grad = 2 * want.detach() @ merged.detach()
    assert (ours.grad - x_grad).abs().max() <= 1e-5 * x_grad.abs().max()
    grads = their_gradients(theirs)
    for key, p in mine[0].adapter.named_parameters():
        if key in mine[0].adapter.kept:
            continue
        reference = pulled_back(mine[0].adapter, Frozen(mine[0]), grads, key)
        assert (p.grad - reference).abs().max() <= 1e-5 * reference.abs().max(), key
