"""One folder for both sides: a run's adapter in PEFT with the plug-in, PEFT's in every command."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import IDS, METHODS, adapted, logits, make_run, older_layout, sealed_again, stock
from processes import flip, rows
from safetensors.torch import load_file, save_file
from test_merge import random_llama
from torch import nn

import scalepeft
from scalepeft import cli
from scalepeft.adapters import inject as injection
from scalepeft.adapters import layout
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag
from scalepeft.eval import evaluate
from scalepeft.export import merge
from scalepeft.export import peft as export

peft = pytest.importorskip("peft")
# Of PEFT's BOFT, at its import without a compiler.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LAYERS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("base") / "base")


def fresh(base: Path) -> Any:
    """The base in memory of its own: in a mapped file a product may round otherwise."""
    model = stock(base)
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def scatter(model: nn.Module, name: str) -> None:
    """Moves the parameters with a name like this off their start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if name in key:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


def peft_folder(base: Path, folder: Path, config: Any) -> Any:
    """Writes what PEFT does of an adapter over the base; returns its model."""
    model = peft.get_peft_model(stock(base), config).eval()
    scatter(model, model.base_model.prefix)
    model.save_pretrained(str(folder))
    return model


RUNS = {
    **{
        name: METHODS[name]
        for name in ("hoft", "lora", "lora-pissa", "dora", "oft", "hadamard-after", "boft")
    },
    "hadamard-1": {"name": "hadamard", "layers": [1]},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_adapter_in_a_fresh_model_and_in_peft(name: str, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("scalepeft.integrations.peft")
    known = name if name in METHODS else "hadamard-after"
    run = make_run(tmp_path / "run", base, known, adapter=RUNS[name])
    wanted = logits(adapted(run))
    assert not torch.equal(wanted, logits(fresh(base)))
    assert torch.equal(logits(scalepeft.load_adapter(fresh(base), run / "adapter")), wanted)
    config = json.loads((run / "adapter" / layout.CONFIG).read_text())
    theirs = peft.PeftModel.from_pretrained(fresh(base), run / "adapter").eval()
    held = peft.get_peft_model_state_dict(theirs)
    assert held.keys() == load_file(run / "adapter" / layout.WEIGHTS).keys()
    if name in ("lora", "oft"):
        assert config["peft_type"] == name.upper()
    else:
        assert "import scalepeft.integrations.peft" in config["peft_type"]
    # PEFT's own OFT multiplies in another order.
    assert (logits(theirs) - wanted).abs().max() <= (1e-5 if name == "oft" else 0)
    theirs.save_pretrained(str(tmp_path / "back"))
    assert not (tmp_path / "back" / layout.ABOUT).exists()
    assert torch.equal(logits(scalepeft.load_adapter(fresh(base), tmp_path / "back")), wanted)


def test_the_older_layout_is_read(base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", base, "hoft")
    wanted = logits(adapted(run))
    older_layout(run / "adapter")
    assert layout.weights_file(run / "adapter").name == layout.OLD
    assert torch.equal(logits(adapted(run)), wanted)
    merge.run(str(run), str(tmp_path / "merged"), [], "original", "base")


OWN = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=LAYERS),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=LAYERS),
    "oft": lambda: peft.OFTConfig(
        oft_block_size=4, use_cayley_neumann=False, target_modules=LAYERS
    ),
    "oftv2": lambda: peft.OFTConfig(oft_block_size=4, target_modules=LAYERS),
    "some": lambda: peft.LoraConfig(
        r=4, target_modules=r".*\.(0|2)\..*_proj", layers_to_transform=None
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_what_peft_wrote_merges(name: str, base: Path, tmp_path: Path) -> None:
    theirs = peft_folder(base, tmp_path / "adapter", OWN[name]())
    wanted = logits(theirs)
    ours = scalepeft.load_adapter(stock(base), tmp_path / "adapter")
    assert (logits(ours) - wanted).abs().max() <= (0 if name in ("lora", "some") else 1e-5)
    if name not in ("lora", "oft"):
        return
    merge.run(str(tmp_path / "adapter"), str(tmp_path / "merged"), [], "original", "base")
    merged = stock(tmp_path / "merged").state_dict()
    for key, tensor in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=2e-7)


def test_what_peft_wrote_is_exported_and_evaluated(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    theirs = peft_folder(tiny(), folder, OWN["lora"]())
    export.run(str(folder), str(tmp_path / "lora"), [], "lora")
    exported = peft.PeftModel.from_pretrained(stock(tiny()), tmp_path / "lora").eval()
    assert (logits(exported) - logits(theirs)).abs().max() < 1e-5
    small = ["evaluate.limit=2", "evaluate.max_new_tokens=4", "train.precision=fp32"]
    assert cli.main(["evaluate", str(folder), *small]) == 2
    assert "is an adapter and no run" in capsys.readouterr().err
    assert evaluate.run(str(folder), ["data=toy", *small], "adapter", StopFlag()) == 0
    assert len(rows(folder, "eval/toy/predictions.jsonl")) == 2
    assert cli.main(["merge", str(folder), str(tmp_path / "m"), "adapter.rank=3"]) == 2
    assert "adapter.rank: cannot be changed for a merge" in capsys.readouterr().err


def tiny() -> Path:
    from scalepeft.models import tiny as made

    return made.make(0)


REFUSED = {
    "use_dora": (True, "use_dora=True"),
    "rank_pattern": ({"q_proj": 2}, "rank_pattern={'q_proj': 2}"),
    "alpha_pattern": ({"q_proj": 2}, "alpha_pattern="),
    "modules_to_save": (["lm_head"], "modules_to_save=['lm_head']"),
    "bias": ("all", "bias='all'"),
    "init_lora_weights": ("pissa", "init_lora_weights='pissa'"),
    "fan_in_fan_out": (True, "fan_in_fan_out=True"),
    "lora_bias": (True, "lora_bias=True"),
    "of_tomorrow": ([1], "of_tomorrow=[1]"),
    "peft_type": ("VERA", "peft_type=VERA: not read here; allowed: LORA"),
    "r": (0, "adapter.rank=0"),
    "lora_alpha": ("x", "adapter.alpha='x'"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_ours_is_refused_by_name(key: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(str(tmp_path))
    value, says = REFUSED[key]
    config = json.loads((tmp_path / layout.CONFIG).read_text())
    (tmp_path / layout.CONFIG).write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        scalepeft.load_adapter(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tensors(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / layout.CONFIG).write_text(json.dumps(config))
    save_file({}, tmp_path / layout.WEIGHTS)
    with pytest.raises(UserError, match="holds no tensor of a linear layer"):
        layout.read_adapter(tmp_path)


def test_a_base_without_a_name_is_asked_for(base: Path, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    scalepeft.inject(net, {"name": "lora", "rank": 2, "target_modules": ["0"]})
    scalepeft.save_adapter(net, tmp_path / "adapter")
    with pytest.raises(UserError, match="does not name its base; add model"):
        merge.run(str(tmp_path / "adapter"), str(tmp_path / "out"), [], "original", "base")
    with pytest.raises(UserError, match=r"adapter.target_modules: '0' matches no linear layer"):
        merge.run(
            str(tmp_path / "adapter"), str(tmp_path / "out"), [f"model.path={base}"],
            "original", "base",
        )  # fmt: skip


def test_trainer_saves_the_adapter_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    model = stock(base).train()
    scalepeft.inject(model, {"name": "hoft", "rank": 4, "target_modules": LAYERS})
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, save_steps=1, report_to="none",
        use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    folder = tmp_path / "out/checkpoint-2"
    assert "checkpoints that Trainer resumes come from" in capsys.readouterr().err
    assert not list(folder.glob("model*.safetensors"))
    again = scalepeft.load_adapter(stock(base), folder).eval()
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.equal(logits(again), logits(stock(base)))
    # What a sharded training gathered comes as state_dict; ranks but one write nothing.
    state = {name: p + 1 for name, p in injection.trainable(model).items()}
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "gathered", state_dict={**model.state_dict(), **state})
    found = layout.read_adapter(tmp_path / "gathered")[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_is_not_whole_is_not_saved(base: Path, tmp_path: Path) -> None:
    model = stock(base)
    with pytest.raises(UserError, match="adapter not saved: the model has none"):
        scalepeft.save_adapter(model, tmp_path / "a")
    scalepeft.inject(model, {"name": "lora", "rank": 4, "target_modules": LAYERS})
    state = dict(injection.trainable(model))
    name = next(iter(state))
    for part in (torch.empty(0), state[name][:2], state[name].to("meta"), None):
        given = {key: tensor for key, tensor in {**state, name: part}.items() if tensor is not None}
        with pytest.raises(UserError, match=f"{re.escape(name)} is not there as a whole"):
            scalepeft.save_adapter(model, tmp_path / "a", given)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"lm_head.weight trains too"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_changed_file_of_a_saved_adapter_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    scalepeft.inject(net, {"name": "goft", "target_modules": ["0"]})
    for name in (layout.WEIGHTS, layout.CONFIG, layout.ABOUT):
        folder = tmp_path / name
        scalepeft.save_adapter(net, folder)
        flip(folder / name, (folder / name).stat().st_size * 2 // 3)
        with pytest.raises(UserError, match=re.escape(f"{folder / name}: ")):
            layout.read_adapter(folder)
    sealed_again(tmp_path / layout.CONFIG)
    assert layout.read_adapter(tmp_path / layout.CONFIG)[0].name == "goft"


def test_adapters_of_experts_come_back(tmp_path: Path) -> None:
    base = random_llama(
        tmp_path / "base", "Mixtral", num_local_experts=2, num_experts_per_tok=2,
    )  # fmt: skip
    settings = {
        "name": "lora",
        "rank": 2,
        "dropout": 0,
        "target_modules": ["q_proj", "experts.down_proj"],
    }
    model = scalepeft.inject(fresh(base), settings).eval()
    scatter(model, ".adapter.")
    scalepeft.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / layout.CONFIG).read_text())
    assert config["peft_type"].startswith("SCALEPEFT_LORA: "), "PEFT's own has no experts"
    again = scalepeft.load_adapter(fresh(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_file_that_lacks_a_layer_is_noticed(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base")
    model = peft.get_peft_model(fresh(base), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "whole")
    scalepeft.load_adapter(fresh(base), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    file = tmp_path / "half" / layout.WEIGHTS
    state = {k: v for k, v in load_file(file).items() if ".layers.1." not in k}
    save_file(state, file)
    with pytest.raises(UserError, match="lacks 4 of 8 tensors"):
        scalepeft.load_adapter(fresh(base), tmp_path / "half")
    for r, says in ((2**70, "no layer can take"), (2**40, "has shape")):
        config = json.loads((tmp_path / "whole" / layout.CONFIG).read_text())
        (tmp_path / "whole" / layout.CONFIG).write_text(json.dumps({**config, "r": r}))
        with pytest.raises(UserError, match=says):
            scalepeft.load_adapter(fresh(base), tmp_path / "whole")
