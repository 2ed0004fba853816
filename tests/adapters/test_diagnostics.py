"""train.diagnose_every: each quantity against dense fp64, and a training that does not notice."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import references
import torch
from processes import TINY, Job, adapter_bytes, rows, train
from test_conformance import Variant, adapted, base_layer, scatter, stored
from test_expert_adapters import mixture
from torch import Tensor, nn

import scalepeft
from scalepeft.adapters import diagnostics
from scalepeft.adapters.base import Adapter
from scalepeft.core.errors import UserError

Dense = dict[str, Tensor]


def block_diagonal(p: Dense, config: Any) -> Tensor:
    return torch.block_diag(
        *(references.cayley(references._skew(k, config.block_size)) for k in p["K"])
    )


def dense_rotations(name: str, p: Dense, config: Any) -> list[Tensor]:
    """Every Q of a method, whole."""
    if name in ("hoft", "shoft", "hra"):
        return [references.rotation(p[key], config) for key in ("V", "U") if key in p]
    if name == "goft":
        return [references.givens(references.givens_blocks(p["p"]), len(p["p"]) + 1)]
    return [block_diagonal(p, config)] if name == "oft" else []


def dense_angle(q: Tensor) -> float:
    return math.degrees(torch.linalg.eigvals(q).angle().abs().max())


def dense_energy(w: Tensor) -> float:
    step = math.ceil(len(w) / 256)
    u = [row / row.norm() for row in w[::step]]
    return sum(2 / float((a - b).norm()) for i, a in enumerate(u) for b in u[:i])


def dense_spectrum(w: Tensor, changed: Tensor) -> float:
    before, after = (torch.linalg.svdvals(m) for m in (w, changed))
    return max(abs(float(after.norm(p) / before.norm(p)) - 1) for p in (2, 4, 8))


CASES = {
    "hoft": {"rank": 6, "form": "cayley"},
    "hoft mean": {"rank": 6, "form": "mean_difference"},
    "hoft pairs": {"rank": 6, "form": "pairs"},
    "shoft": {"rank": 6},
    "hra": {"rank": 6},
    "goft": {},
    "oft": {"block_size": 32},
    "lora": {"rank": 4, "dropout": 0.3},
}
ORTHOGONAL = ("hoft", "hra", "goft", "oft")


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (288, 320)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_quantity_is_the_dense_one(case: str, shape: tuple[int, int], kind: str) -> None:
    name = case.split()[0]
    net = adapted(name, Variant(CASES[case], lambda o, i: 0), base_layer(kind, shape, True))
    layer, adapter = net[0], net[0].adapter
    adapter.train()
    scatter(net, 0.05)
    config, w = adapter.config, stored(layer)
    p = {key: value.detach().double() for key, value in adapter.named_parameters()}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        found = diagnostics.measure(layer)
    changed, _ = references.weight(name, p, w, config)
    # Krylov's 64 dimensions of 320 that turn.
    close = 1e-3 if name in ("goft", "oft") else 1e-5
    angle = max(map(dense_angle, dense_rotations(name, p, config)), default=0.0)
    assert found["angle"] == pytest.approx(angle, rel=close)
    assert angle > 5 or name == "lora"
    assert found["distance"] == pytest.approx(float((changed - w).norm() / w.norm()), rel=1e-5)
    spectrum = dense_spectrum(w, changed)
    assert found["spectrum"] == pytest.approx(spectrum, rel=1e-3, abs=2e-6)
    assert (spectrum < 1e-12) == (name in ORTHOGONAL)
    energy = dense_energy(changed) / dense_energy(w) - 1
    assert found["energy"] == pytest.approx(energy, rel=1e-3, abs=2e-7)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert adapter.training and adapter.made is None


def test_a_start_is_no_move() -> None:
    for case, settings in CASES.items():
        name = case.split()[0]
        layer = base_layer("plain", (96, 320), False)
        net = adapted(name, Variant(settings, lambda o, i: 0), layer)
        with torch.no_grad():
            found = diagnostics.measure(net[0])
        assert found["angle"] < 1e-3, case  # of start columns that are fp32's
        assert all(abs(found[key]) < 2e-6 for key in ("distance", "spectrum", "energy")), case


@pytest.mark.parametrize("dimensions", [1, 2, 62, 1500])
def test_angles_of_a_rotation_are_those_it_was_made_of(dimensions: int) -> None:
    """From 1e-6 degrees to half a turn, in a plane or in all."""
    generator = torch.Generator().manual_seed(dimensions)
    basis = torch.linalg.qr(torch.randn(1500, 1500, generator=generator, dtype=torch.float64))[0]
    for largest in (1e-6, 1.0, 179.0):
        angles = torch.linspace(largest, largest / 9, dimensions // 2).double().deg2rad()
        c, s = angles.cos(), angles.sin()
        planes = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
        rest = torch.eye(1500 - 2 * len(angles), dtype=torch.float64)
        q = basis @ torch.block_diag(*planes, rest) @ basis.T
        found = diagnostics._angle(1500, lambda x, q=q: x @ q)
        want = largest if len(angles) else 0.0
        close = 1e-6 if dimensions < 63 else 2e-2 if largest > 90 else 2e-3
        assert found == pytest.approx(want, rel=close, abs=1e-9)
        assert found < want * (1 + 1e-6) + 1e-9, "never more than there is"


def test_oftv2_and_neumann2_drift_where_exact_forms_do_not() -> None:
    drift, pairs = {}, {"rank": 4, "form": "pairs"}
    cases = {"oft": {"block_size": 16}, "oftv2": {"block_size": 16}, "hoft": pairs}
    for name, settings in {**cases, "hoft series": {**pairs, "inverse": "neumann2"}}.items():
        layer = base_layer("plain", (64, 192), False)
        net = adapted(name.split()[0], Variant(settings, lambda o, i: 0), layer)
        scatter(net, 0.05)
        with torch.no_grad():
            drift[name] = diagnostics.measure(net[0])["spectrum"]
    assert (
        max(drift["oft"], drift["hoft"]) < 1e-6 < 1e-4 < min(drift["oftv2"], drift["hoft series"])
    )


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_experts_are_measured_each_with_its_own(kind: str) -> None:
    net = mixture("hoft", Variant({"rank": 4}, lambda o, i: 0), (192, 64), kind)
    scatter(net, 0.1)
    layer = net.layer
    with torch.no_grad():
        found = diagnostics.measure(layer)
    pairs, angles = [], []
    for e in range(layer.num_experts):
        w = layer.expert(e).weight(torch.float64)
        p = {key: value.detach()[e].double() for key, value in layer.adapter.named_parameters()}
        config = layer.adapter.config
        pairs.append((w, references.weight("hoft", p, w, config)[0]))
        angles += map(dense_angle, dense_rotations("hoft", p, config))
    w, changed = (torch.cat(each) for each in zip(*pairs, strict=True))
    assert found["angle"] == pytest.approx(max(angles), rel=1e-5)
    assert found["distance"] == pytest.approx(float((changed - w).norm() / w.norm()), rel=1e-5)
    assert found["spectrum"] < 1e-6, "the tall matrix's own would move"
    before, after = (sum(map(dense_energy, each)) for each in zip(*pairs, strict=True))
    assert found["energy"] == pytest.approx(after / before - 1, rel=1e-3)


def test_what_cannot_be_measured_is_absent() -> None:
    bent = {"structure": "circulant", "placement": "adapter"}
    net = adapted("surm", Variant(bent, lambda o, i: 0), base_layer("plain", (64, 64), False))
    scatter(net)
    with torch.no_grad():
        assert diagnostics.measure(net[0]) == {"angle": 0.0}, "no weight stands for the layer"
    net = adapted("hoft", Variant({"rank": 4}, lambda o, i: 0), base_layer("nf4", (64, 64), False))
    with torch.no_grad():
        net[0].adapter.V.fill_(torch.nan)
        assert diagnostics.measure(net[0]) == {}, "NaN is no JSON"
    zero = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(zero.weight)
    with torch.no_grad():
        found = diagnostics.measure(scalepeft.adapt(zero, "hra", rank=2))
    assert found.keys() == {"angle"}


def test_a_shift_of_the_input_turns_nothing() -> None:
    settings = {"train_norm": False, "position": "before"}
    layer = base_layer("plain", (96, 192), False)
    net = adapted("hadamard", Variant(settings, lambda o, i: 0), layer)
    scatter(net, 0.3)
    with torch.no_grad():
        assert diagnostics.measure(net[0])["angle"] < 1e-5


def test_a_method_of_ones_own_has_an_angle_by_its_input_alone() -> None:
    class Swap(Adapter):
        def declare(self) -> None:
            self.t = self.new_parameter(1)

        def transform_input(self, x: Tensor) -> Tensor:
            c, s = self.t.to(x.dtype).cos(), self.t.to(x.dtype).sin()
            a, b = x[..., :1], x[..., 1:2]
            return torch.cat([c * a - s * b, s * a + c * b, x[..., 2:]], -1)

    swap = Swap(None, 100, 100)
    swap.t.data.fill_(0.5)
    (rotation,) = swap.double().rotations()
    with torch.no_grad():
        assert diagnostics._angle(*rotation) == pytest.approx(math.degrees(0.5))


KEYS = ("angle", "distance", "spectrum", "energy")
EVERY = ["train.max_steps=6", "train.diagnose_every=4", "model.quant=nf4"]
SHOFT = ["adapter=shoft", "adapter.rank=4", "data.valid_size=20", "train.eval_every=4"]
LORA = ["adapter.name=lora", "adapter.dropout=0.3"]


def values(folder: Path) -> list[tuple[int, dict[str, dict[str, float]]]]:
    return [(row["step"], row["layers"]) for row in rows(folder, "diagnostics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], LORA], ids=["hoft", "lora"])
def test_training_is_the_same_to_the_bit(more: list[str], tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    train(1, one, *EVERY, *more)
    train(1, other, *EVERY, *more, "train.diagnose_every=0")
    assert adapter_bytes(one) == adapter_bytes(other)
    state = [(f / "checkpoints/step-000006/manifest.json").read_text() for f in (one, other)]
    files = [json.loads(text)["files"] for text in state]
    assert files[0] == files[1], "the moments too"
    assert [step for step, _ in values(one)] == [4, 6] and values(other) == []
    layers = values(one)[-1][1]
    assert len(layers) > 5 and all(set(v) == set(KEYS) for v in layers.values())
    assert all(v["distance"] > 0 for v in layers.values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(1, folder, *EVERY, *SHOFT)
    return values(folder)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "engine",
    [
        "engine=fsdp2",
        pytest.param("engine=ddp", marks=pytest.mark.full),
        pytest.param("engine=fsdp2 engine.reshard_after_forward=false", marks=pytest.mark.full),
        pytest.param("engine=zero engine.stage=3 engine.whole_below=0", marks=pytest.mark.full),
    ],
)
def test_two_ranks_measure_what_one_process_does(
    engine: str, alone: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    train(2, tmp_path / "run", *EVERY, *SHOFT, *engine.split())
    found = values(tmp_path / "run")
    assert [step for step, _ in found] == [4, 6]
    for (_, got), (_, want) in zip(found, alone, strict=True):
        assert list(got) == list(want), "in the model's order"
        for layer, numbers in want.items():
            for key, value in numbers.items():
                assert got[layer][key] == pytest.approx(value, rel=5e-3, abs=2e-6), (layer, key)


@pytest.mark.slow
def test_a_resumed_run_appends_and_cuts_what_comes_after(tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    run = ["train.max_steps=6", "train.diagnose_every=2"]
    train(1, once, *run)
    train(1, twice, *run, "train.stop_at=3", expect=75)
    log = twice / "diagnostics.jsonl"
    assert [step for step, _ in values(twice)] == [2]
    lost = json.dumps({"step": 4, "layers": {"of": {"angle": 1.0}}})
    log.write_text(log.read_text() + lost + '\n{"step": 6, "lay')
    train(1, twice, *run)
    assert values(twice) == values(once) and [s for s, _ in values(once)] == [2, 4, 6]


def test_another_pace_is_a_change_that_a_run_may_take_up(tmp_path: Path) -> None:
    from scalepeft.config import files, schema
    from scalepeft.run.folder import check_same_run

    settings = [*TINY, "train.max_steps=6", f"run_dir={tmp_path}"]
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(schema.dump(files.load(None, settings)[0]))
    other, _ = files.load(None, [*settings, "train.diagnose_every=3"])
    with pytest.raises(UserError, match=r"train.diagnose_every: 0 there, 3 now"):
        check_same_run(other, allow_changes=False)
    check_same_run(other, allow_changes=True)


@pytest.mark.parametrize("value", ["-1", "often", "1.5", "true"])
def test_a_pace_that_is_none_is_refused_in_a_line(value: str, tmp_path: Path) -> None:
    words = ["config", *TINY, "train.max_steps=6", f"run_dir={tmp_path}"]
    codes, text = Job(1, [*words, f"train.diagnose_every={value}"]).wait()
    assert codes == [2] and "train.diagnose_every" in text and "Traceback" not in text
