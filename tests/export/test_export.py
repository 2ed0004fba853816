"""scalepeft export: HF PEFT computes what the adapter computed; refusals leave nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import adapted, distance, logits, make_run, sealed_again, stock
from safetensors.torch import load_file, save_file
from test_merge import DAMAGES, TINY, random_llama
from torch import nn

from scalepeft.adapters import inject as injection
from scalepeft.core.errors import UserError
from scalepeft.core.files import sealed
from scalepeft.core.preemption import StopFlag
from scalepeft.eval import evaluate
from scalepeft.export import peft as export

pytest.importorskip("peft")


# Of PEFT's BOFT, at its import without a compiler.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


PEFT = {
    "lora": "LORA", "rslora": "LORA", "dora": "LORA", "oft": "OFT", "oftv2": "OFT", "boft": "BOFT",
    "hra": "HRA", "ia3": "IA3", "hira": "HIRA", "surm-circulant": "C3A", "lora-pissa": "LORA",
    "dora-pissa": "LORA",
}  # fmt: skip


LORA = ["hoft", "hra", "lora", "rslora", "lora-pissa"]


EVERY = [*((m, "peft") for m in PEFT), *((m, "lora") for m in LORA)]


def run(run_dir: Path, out: Path, format: str, *settings: str) -> Path:
    export.run(str(run_dir), str(out), list(settings), format)
    return out


def refused(run_dir: Path, out: Path, format: str, *settings: str) -> str:
    """The message of an export that must not write anything."""
    with pytest.raises(UserError) as caught:
        run(run_dir, out, format, *settings)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob("*partial*"))
    return str(caught.value)


def in_peft(base: Any, folder: Path) -> Any:
    """The base with the exported adapter in HF PEFT; every tensor of the file must find a place."""
    import peft

    model = peft.PeftModel.from_pretrained(base, folder).eval()
    held = peft.get_peft_model_state_dict(model)
    assert held.keys() == load_file(folder / "adapter_model.safetensors").keys()
    return model


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K" / "hf"


@pytest.mark.parametrize(("method", "format"), EVERY)
def test_peft_computes_the_same(method: str, format: str, stories: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", stories, method)
    out = run(run_dir, tmp_path / "out", format)
    ours, theirs = adapted(run_dir), in_peft(stock(stories), out)
    wanted = logits(ours)
    assert distance(wanted, logits(stock(stories))) > 0.1, "the adapter must show"
    # fp32: the logits reach 20, so that one rounding of them is 2e-6
    assert distance(wanted, logits(theirs)) < 1e-5 * wanted.abs().max()
    # the exported numbers alone: evaluated in fp64
    assert distance(logits(ours.double()), logits(theirs.double())) < 1e-5
    config = config_of(out)
    assert config["peft_type"] == (PEFT[method] if format == "peft" else "LORA")
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(stories)
    short = {"boft": ["q_proj"], "hra": ["q_proj", "v_proj"]}
    short["ia3"] = ["down_proj", "k_proj", "v_proj"]
    default = ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == short.get(method, default)


@pytest.mark.parametrize(("method", "format"), EVERY)
def test_some_blocks_and_modules(method: str, format: str, tmp_path: Path) -> None:
    targets = ["q_proj"] if method == "boft" else ["q_proj", "down_proj", "k_proj"]
    adapter = {"layers": [1, 3], "target_modules": targets}
    run_dir = make_run(tmp_path / "run", TINY, method, adapter=adapter)
    out = run(run_dir, tmp_path / "out", format)
    config = config_of(out)
    expected = {
        f"model.layers.{i}.{'mlp' if t == 'down_proj' else 'self_attn'}.{t}"
        for i in (1, 3)
        for t in targets
    }
    assert set(config["target_modules"]) == expected
    base = Path(config["base_model_name_or_path"])
    wanted = logits(adapted(run_dir))
    assert distance(wanted, logits(stock(base))) > 1e-4
    assert distance(wanted, logits(in_peft(stock(base), out))) < 1e-5


def test_targets_are_short_where_all_of_a_name_are_adapted(tmp_path: Path) -> None:
    patterns = ["q_proj", "model.layers.2.mlp.*"]
    adapter = {"target_modules": patterns}
    run_dir = make_run(tmp_path / "run", TINY, "lora", adapter=adapter)
    out = run(run_dir, tmp_path / "out", "peft")
    mlp = [f"model.layers.2.mlp.{m}_proj" for m in ("down", "gate", "up")]
    assert config_of(out)["target_modules"] == [*mlp, "q_proj"]


@pytest.mark.parametrize("method", LORA)
def test_a_lora_has_the_rank_it_says_and_scaling_1(method: str, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, method)
    out = run(run_dir, tmp_path / "out", "lora")
    rank = {"hoft": 8, "lora-pissa": 8}.get(method, 4)
    config = config_of(out)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert tensor.dtype == torch.float32
        assert rank == tensor.shape[0 if name.endswith("lora_A.weight") else 1]


@pytest.mark.parametrize("storage", [{"quant": "nf4"}, {"quant": "int8"}])
def test_a_lora_is_made_of_the_weight_that_training_saw(
    storage: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    """B A + W_nf4 is the adapted weight: PEFT on the dequantized base gives the same logits."""
    from scalepeft.adapters import inject as injection
    from scalepeft.models.quant import Frozen

    run_dir = make_run(tmp_path / "run", stories, "hoft", **storage)
    out = run(run_dir, tmp_path / "out", "lora")
    ours, base = adapted(run_dir), stock(stories)
    wanted = logits(ours)
    layers = dict(base.named_modules())
    plain = logits(in_peft(stock(stories), out))
    for name, layer in ours.named_modules():
        if hasattr(layer, "weight_scale"):
            layers[name].weight.data = Frozen(layer).weight(torch.float32)
    assert any(True for _ in injection.adapted_layers(ours))
    assert distance(wanted, logits(in_peft(base, out))) < 1e-5 * wanted.abs().max()
    assert distance(wanted, plain) > 1e-2


@pytest.mark.parametrize("method", [m for m in PEFT if m != "boft"])
def test_a_model_with_biases(method: str, tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base", attention_bias=True, mlp_bias=True)
    run_dir = make_run(tmp_path / "run", base, method)
    if method == "ia3":
        assert "IA3 scales a layer's bias too" in refused(run_dir, tmp_path / "out", "peft")
        return
    out = run(run_dir, tmp_path / "out", "peft")
    wanted = logits(adapted(run_dir))
    assert distance(wanted, logits(in_peft(stock(base), out))) < 1e-5 * wanted.abs().max()


REFUSED = {
    ("hoft", "peft"): ["HF PEFT has no method", "HOFT", "scalepeft merge or --format lora"],
    ("shoft", "peft"): ["HF PEFT has no method", "SHOFT", "scalepeft merge"],
    ("goft", "peft"): ["HF PEFT has no method", "GOFT"],
    ("qgoft", "peft"): ["HF PEFT has no method", "QGOFT"],
    ("surm-toeplitz", "peft"): ["HF PEFT has no method", "SURM", "with these settings"],
    ("surm", "peft"): ["HF PEFT has no method", "SURM"],  # kronecker on layers that are not square
    ("hut-rank1-shift", "peft"): ["HF PEFT has no method", "HUT"],
    ("hadamard-after", "peft"): ["HF PEFT has no method", "Hadamard"],
    ("shoft", "lora"): ["SHOFT", "W' - W has full rank", "use scalepeft merge"],
    ("dora", "lora"): ["DoRA", "W' - W has full rank", "scalepeft merge or --format peft"],
    ("goft", "lora"): ["GOFT", "W' - W has full rank"],
    ("surm-circulant", "lora"): ["SURM", "W' - W has full rank"],
    ("hadamard-before", "lora"): ["Hadamard", "W' - W has full rank"],
    ("hut-rank2", "lora"): ["HUT", "W' - W has full rank"],
    ("oft", "lora"): ["OFT", "W' - W has full rank"],
}


@pytest.mark.parametrize(("method", "format"), REFUSED)
def test_methods_without_a_place(method: str, format: str, tmp_path: Path) -> None:
    # a block that stories and tiny both have
    adapter = {"layers": [1]} if method.startswith("hut") else {}
    run_dir = make_run(tmp_path / "run", TINY, method, adapter=adapter)
    message = refused(run_dir, tmp_path / "out", format)
    for part in (f"--format {format}", *REFUSED[method, format]):
        assert part in message, message


def test_what_can_neither_merge_nor_be_exported(tmp_path: Path) -> None:
    settings = {"placement": "adapter", "target_modules": ["o_proj"], "structure": "circulant"}
    run_dir = make_run(tmp_path / "run", TINY, "surm", adapter=settings)
    assert "keep the adapter" in refused(run_dir, tmp_path / "out", "peft")
    message = refused(run_dir, tmp_path / "out", "lora")
    assert "not affine in x" in message
    assert "keep the adapter" in message
    assert "scalepeft merge" not in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter(damage: str, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    break_it, expected = DAMAGES[damage]
    break_it(run_dir / "adapter")
    message = refused(run_dir, tmp_path / "out", "lora")
    for part in expected:
        assert part in message, message


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "hoft")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(UserError, match="is there already"):
        run(run_dir, out, "lora")
    assert [f.read_text() for f in out.iterdir()] == ["precious"]


def test_another_base_and_a_moved_one(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base")
    run_dir = make_run(tmp_path / "run", base, "hoft")
    other = random_llama(tmp_path / "other", num_hidden_layers=1)
    message = refused(run_dir, tmp_path / "out", "lora", f"model.path={other}")
    assert "was trained on another base" in message
    moved = base.rename(tmp_path / "moved")
    out = run(run_dir, tmp_path / "out", "lora", f"model.path={moved}")
    assert config_of(out)["base_model_name_or_path"] == str(moved)


def test_settings_that_an_export_cannot_take(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "lora")
    message = refused(run_dir, tmp_path / "out", "peft", "adapter.rank=2")
    assert "adapter.rank: cannot be changed for an export" in message


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        save_file(*arguments)
        raise OSError(28, "No space left on device")

    run_dir = make_run(tmp_path / "run", TINY, "lora")
    monkeypatch.setattr(export, "save_file", full)
    message = refused(run_dir, tmp_path / "out", "peft")
    assert "No space left on device" in message
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_only_the_weights_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalepeft.export.streaming import Streamed

    reads: list[Any] = []
    held = Streamed.held
    monkeypatch.setattr(Streamed, "held", lambda self, m: (reads.append(m), held(self, m))[1])
    for method, count in (("lora", 0), ("hoft", 20)):
        reads.clear()
        run(make_run(tmp_path / method, TINY, method), tmp_path / f"{method}-out", "lora")
        assert len(reads) == count


@pytest.mark.parametrize(("rank", "says"), [(10**12, "has shape [4, "), (10**18, "no layer can")])
def test_shapes_of_a_strangers_adapter_are_compared_before_anything_is_allocated(
    rank: int, says: str, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "lora")
    for name in ("config.yaml", "adapter/scalepeft.json"):
        text = (run_dir / name).read_text()
        (run_dir / name).write_text(re.sub(r'(rank"?: )4\b', rf"\g<1>{rank}", text))
    sealed_again(run_dir / "adapter")
    assert says in refused(run_dir, tmp_path / "out", "lora")
    with pytest.raises(UserError, match=re.escape(says)):
        evaluate.run(str(run_dir), [], "adapter", StopFlag())
    model = nn.ModuleDict({f"{part}_proj": nn.Linear(64, 64) for part in "qkv"})
    config = {"name": "lora", "rank": 4, "target_modules": ["q_proj"]}
    state = {f"q_proj.adapter.{k}": torch.zeros(4, 64) for k in "AB"}
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / "adapter/adapter.safetensors")
    about = {"adapter": {**config, "rank": rank}}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=re.escape(says)):
        injection.load_adapter(model, tmp_path / "adapter")


def test_an_edited_adapter_config_is_seen(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", TINY, "lora")
    file = run_dir / "adapter/scalepeft.json"
    about = json.loads(file.read_text())
    assert run(run_dir, tmp_path / "one", "lora").is_dir()
    file.write_text(json.dumps({**sealed(about), "step": 2}))
    assert "its digest differs" in refused(run_dir, tmp_path / "two", "lora")
