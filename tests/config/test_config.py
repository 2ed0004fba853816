"""Config: who wins over whom, and one useful line for every mistake."""

import dataclasses
import datetime
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

import scalepeft
from scalepeft.config import changes, command
from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.core.fields import Decides, marks_of

BASE = ["run_dir=runs/x", "train.max_steps=10"]


SHIPPED = sorted(  # papers/ is included by files of runs/
    path
    for path in config_files.config_root().rglob("*.yaml")
    if path.parent.name not in ("accelerate", "papers")
)


def write(file: Path, values: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return file


def load(*settings: str, path: Path | None = None) -> config.RunConfig:
    return config_files.load(str(path) if path else None, [*BASE, *settings])[0]


def error(*settings: str, path: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(*settings, path=path)
    message = str(caught.value)
    assert "\n" not in message, f"more than one line: {message}"
    return message


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configs/ folder of the test's own."""
    root = tmp_path / "configs"
    write(root / "adapters/lora.yaml", {"adapter": {"name": "lora", "rank": 5, "alpha": 7}})
    write(root / "adapters/hoft.yaml", {"adapter": {"name": "hoft", "rank": 6}})
    write(root / "models/small.yaml", {"model": {"path": "/models/small", "quant": "nf4"}})
    monkeypatch.setattr(config_files, "config_root", lambda: root)
    return root


def test_precedence_is_defaults_includes_file_command_line(tmp_path: Path) -> None:
    train = {"lr": 1.0, "seed": 1, "warmup_steps": 1, "max_steps": 7}
    write(tmp_path / "below.yaml", {"train": train})
    write(tmp_path / "next.yaml", {"train": {"seed": 2, "warmup_steps": 2}})
    over = {"include": ["below", "next"], "train": {"warmup_steps": 3, "max_steps": 8}}
    path = write(tmp_path / "run.yaml", over)
    got = load("train.max_steps=9", path=path).train
    assert got.global_batch == config.TrainConfig().global_batch
    assert (got.lr, got.seed, got.warmup_steps, got.max_steps) == (1.0, 2, 3, 9)


def test_the_last_setting_on_the_command_line_wins() -> None:
    assert load("train.lr=1", "train.lr=2").train.lr == 2


def test_a_section_chosen_by_name_replaces_the_files_whole_section(shipped: Path) -> None:
    mine = {"adapter": {"name": "hoft", "rank": 8, "target_modules": ["q_proj"], "init_norm": 2.0}}
    path = write(shipped.parent / "run.yaml", mine)
    got = load("adapter=lora", path=path).adapter
    default = config.config_class("adapter", "lora")().target_modules
    assert (got.name, got.rank, got.alpha, got.target_modules) == ("lora", 5, 7, default)


def test_a_section_by_name_drops_what_stands_left_of_it_and_keeps_what_stands_right(
    shipped: Path,
) -> None:
    got = load("adapter.rank=99", "adapter=lora", "adapter.alpha=3").adapter
    assert (got.rank, got.alpha) == (5, 3)


def test_a_section_by_name_in_a_file_replaces_the_includes_section(shipped: Path) -> None:
    write(shipped.parent / "below.yaml", {"adapter": {"name": "hoft", "inverse": "neumann2"}})
    path = write(shipped.parent / "run.yaml", {"include": "below", "adapter": "lora"})
    assert load(path=path).adapter == load("adapter=lora").adapter


@pytest.mark.parametrize("name", [{"name": "hoft"}, {}])
def test_another_adapter_name_over_foreign_keys_is_refused_and_says_what_to_take(
    tmp_path: Path, name: dict[str, str]
) -> None:
    held = {**name, "rank": 4, "inverse": "neumann2", "init_norm": 2.0}
    path = write(tmp_path / "run.yaml", {"adapter": held})
    message = error("adapter.name=lora", path=path)
    assert "adapter.init_norm=2.0: no such key of lora" in message
    assert "adapter=lora replaces the whole section" in message
    write(path, {"adapter": {**name, "rank": 4}})
    got, notes = config_files.load(str(path), [*BASE, "adapter.name=lora"])
    assert (got.adapter.name, got.adapter.rank, notes) == ("lora", 4, [])


def test_a_setting_given_with_the_new_name_must_belong_to_it(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {"adapter": {"name": "hoft"}})
    assert "adapter.inverse=exact" in error("adapter.name=lora", "adapter.inverse=exact", path=path)


def test_the_same_adapter_name_drops_nothing(tmp_path: Path) -> None:
    held = {"name": "hoft", "inverse": "neumann2", "form": "pairs"}
    path = write(tmp_path / "run.yaml", {"adapter": held})
    got, notes = config_files.load(str(path), [*BASE, "adapter.name=hoft"])
    assert (got.adapter.inverse, notes) == ("neumann2", [])


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("train.warmup_stesp=3", ["train.warmup_stesp=3", "'warmup_steps'", "Allowed: max_steps"]),
        ("adapter.rnak=4", ["adapter.rnak=4", "of hoft", "'rank'", "target_modules"]),
        ("trian.lr=3", ["trian.lr", "'trian'", "'train'", "adapter, engine"]),
        ("adapter.name=hotf", ["'hotf'", "'hoft'", "lora"]),
        ("engine.name=fsdp", ["'fsdp'", "'fsdp2'", "single"]),
        ("data.name=commonsens", ["'commonsens'", "'commonsense'", "toy"]),
        ("train.lr=fast", ["train.lr='fast'", "number"]),
        ("train.lr=true", ["train.lr=true", "number"]),
        ("train.lr=.inf", ["train.lr='.inf'", "number"]),
        ("train.max_steps=true", ["train.max_steps=true", "number"]),
        ("train.max_steps=10.5", ["train.max_steps=10.5", "integer"]),
        ("train.tensorboard=maybe", ["train.tensorboard='maybe'", "boolean"]),
        ("train.wandb=on", ["train.wandb=True", "string"]),
        ("data.train=[[1]]", ["data.train.0=[1]", "string"]),
        ("adapter.target_modules=[]", ["adapter.target_modules=[]", "at least 1"]),
        ("train.global_batch=0", ["train.global_batch=0", "greater than or equal to 1"]),
        ("train.beta1=1", ["train.beta1=1", "less than 1"]),
        ("train.lr=-1e-4", ["train.lr='-1e-4'", "greater than 0"]),
        ("train.seed=2147483648", ["train.seed=2147483648", "less than 2147483648"]),
        ("train.keep_checkpoints=1", ["train.keep_checkpoints=1", "2"]),
        ("train.schedule=cosin", ["train.schedule='cosin'", "'linear', 'cosine' or 'constant'"]),
        ("model.quant=fp4", ["model.quant='fp4'", "'none', 'nf4' or 'int8'"]),
        ("adapter.rank=1", ["adapter.rank=1", "greater than or equal to 2"]),
        ("train=3", ["train", "section", "train.KEY=VALUE"]),
        ("train.lr", ["'train.lr'", "section.key=value"]),
        ("train.lr.x=3", ["'train.lr.x=3'", "section.key=value"]),
        (".lr=3", ["'.lr=3'", "section.key=value"]),
    ],
)
def test_a_mistake_is_one_line_with_path_value_and_what_is_allowed(
    setting: str, parts: list[str]
) -> None:
    message = error(setting)
    assert [p for p in parts if p not in message] == [], message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["train.epochs=1"], ["train.max_steps", "train.epochs", "not both"]),
        (["train.max_steps=null"], ["train.max_steps", "train.epochs"]),
        (["train.stop_at=10"], ["train.stop_at=10", "train.max_steps=10"]),
        (
            ["train.eval_every=2", "data=commonsense"],
            ["train.eval_every", "data.valid", "data.valid_size"],
        ),
        (["data.valid=a", "data.valid_size=3"], ["data.valid", "data.valid_size", "not both"]),
        (["model.double_quant=true"], ["model.double_quant=true", "model.quant=nf4", "none"]),
        (["model.path=/m", "model.pretrain_steps=5"], ["model.pretrain_steps", "/m"]),
        (["model.tokenizer=/t"], ["model.tokenizer", "builtin:tiny"]),
    ],
)
def test_settings_that_cannot_take_effect_together_are_refused(
    settings: list[str], parts: list[str]
) -> None:
    message = error(*settings)
    assert [p for p in parts if p not in message] == [], message


def test_the_neighbouring_combinations_are_allowed() -> None:
    load("train.warmup_steps=10", "train.stop_at=9", "train.eval_every=2", "data.valid_size=3")
    load("train.max_steps=null", "train.epochs=0.5", "model.quant=nf4", "model.double_quant=true")


def test_run_dir_is_demanded() -> None:
    with pytest.raises(UserError, match="run_dir is not set"):
        config_files.load(None, ["train.max_steps=3"])
    with pytest.raises(UserError, match=r"run_dir=\{'a': 'b'\}: expected the name of one folder"):
        config.from_dict({"run_dir": {"a": "b"}, "train": {"max_steps": 3}})


def test_an_unknown_shipped_section_file_is_named_with_its_neighbour(shipped: Path) -> None:
    message = error("adapter=lroa")
    assert all(part in message for part in ("'lroa'", "'lora'", "hoft, lora"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trian: {lr: 1}", ["trian", "'train'", "Allowed"]),
        ("train: {lrr: 1}", ["train.lrr=1", "'lr'"]),
        ("train: 3", ["train", "3"]),
        ("train: {lr: .inf}", ["train.lr=inf", "finite number"]),
        ("train: {warmup_steps: true}", ["train.warmup_steps=true", "number"]),
        ("- train", ["run.yaml", "must hold keys", "list", "adapter, engine"]),
        ("train: {lr: 1", ["run.yaml: cannot be read", "line 1"]),
        ("train: {lr: 1}\ntrain: {seed: 1}", ["run.yaml", "duplicate key train", "line 2"]),
        ("train:\n  lr: 1\n  lr: 2", ["run.yaml", "duplicate key lr", "line 3"]),
        ("include: nowhere", ["run.yaml", "'nowhere'", "no such file"]),
        ("include: 5", ["run.yaml", "'5'", "no such file"]),
        ("include: [run]", ["run.yaml", "includes itself"]),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = error(path=write(tmp_path / "run.yaml", text))
    assert [p for p in parts if p not in message] == [], message


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run_dir: \xff\xfe")
    assert "run.yaml: cannot be read" in error(path=path)


def test_a_cycle_over_two_files_is_named_and_a_diamond_is_none(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"include": "b"})
    write(tmp_path / "b.yaml", {"include": "a"})
    message = error(path=tmp_path / "a.yaml")
    assert all(part in message for part in ("a.yaml includes itself", "b.yaml"))
    write(tmp_path / "root.yaml", {"train": {"lr": 3.0}})
    write(tmp_path / "left.yaml", {"include": "root"})
    write(tmp_path / "right.yaml", {"include": "root"})
    path = write(tmp_path / "top.yaml", {"include": ["left", "right"]})
    assert load(path=path).train.lr == 3


def test_a_missing_config_file_is_named_with_what_lists_the_shipped_ones(tmp_path: Path) -> None:
    message = error(path=tmp_path / "nowhere.yaml")
    assert "nowhere.yaml" in message
    assert "scalepeft init --list" in message


def test_an_include_of_a_shipped_file_and_a_name_without_suffix(shipped: Path) -> None:
    write(shipped.parent / "elsewhere/run.yaml", {"include": "adapters/lora", "model": "small"})
    got = load(path=shipped.parent / "elsewhere/run")
    assert (got.adapter.name, got.adapter.rank, got.model.quant) == ("lora", 5, "nf4")


def test_values_mean_what_the_user_typed() -> None:
    got = load(
        "train.lr=1e-4",
        "train.eps=1.0e-6",
        "adapter.target_modules=q_proj, v_proj",
        "data.train=a.json,b.json",
        "data.prompt={instruction}",
        "model.path=/m",
        "model.revision=0123",
        "train.wandb=1.10",
    )
    assert (got.train.lr, got.train.eps) == (1e-4, 1e-6)
    assert got.adapter.target_modules == ["q_proj", "v_proj"]
    assert got.data.train == ["a.json", "b.json"]
    assert got.data.prompt == "{instruction}"
    assert (got.model.revision, got.train.wandb) == ("0123", "1.10")
    assert load("adapter.target_modules=[k_proj]").adapter.target_modules == ["k_proj"]
    assert load("run_dir=2024").run_dir == "2024"


def test_floats_in_exponent_form_and_comma_lists_in_a_file(tmp_path: Path) -> None:
    text = "train: {lr: 2e-5}\nadapter: {target_modules: 'q_proj,v_proj'}"
    got = load(path=write(tmp_path / "run.yaml", text))
    assert (got.train.lr, got.adapter.target_modules) == (2e-5, ["q_proj", "v_proj"])


def test_null_unsets_a_value_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {"train": {"stop_at": 5}})
    assert load(path=path).train.stop_at == 5
    assert load("train.stop_at=null", path=path).train.stop_at is None


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["adapter.name=lora", "adapter.alpha=1e-5", "adapter.target_modules=q_proj"],
        ["engine.name=fsdp2", "data.prompt=é {instruction}: 'x' # \"y\"", "train.lr=1e-300"],
        ["data.name=commonsense", "data.train=a,b", "model.path=/m", "model.revision=0123"],
    ],
)
def test_the_resolved_config_round_trips(settings: list[str]) -> None:
    made = load(*settings)
    again = config.from_dict(yaml.safe_load(config.dump(made)))
    assert again == made
    assert [type(getattr(again, s)) for s in config.SECTIONS] == [
        type(getattr(made, s)) for s in config.SECTIONS
    ]
    assert changes.differences(config.to_dict(made), config.to_dict(again)) == {}


def test_overlay_changes_just_what_it_is_given() -> None:
    made = load("train.lr=2e-3", "adapter.rank=4")
    changed = config_files.overlay(config.to_dict(made), ["evaluate.limit=5", "data.test=a"])
    expected = {"evaluate.limit": (None, 5), "data.test": ([], ["a"])}
    different = {
        f"{s}.{f.name}": (getattr(getattr(made, s), f.name), getattr(getattr(changed, s), f.name))
        for s in config.SECTIONS[1:]
        for f in dataclasses.fields(getattr(made, s))
        if getattr(getattr(made, s), f.name) != getattr(getattr(changed, s), f.name)
    }
    assert different == expected


def test_differences_tell_harmless_from_harmful() -> None:
    old = config.to_dict(load())
    new = config.to_dict(
        load(
            "train.lr=5", "train.micro_batch=2", "adapter.rank=2", "engine.name=ddp",
            "evaluate.limit=3", "train.stop_at=4", "run_dir=elsewhere", "train.max_steps=20",
        )
    )  # fmt: skip
    got = changes.differences(old, new)
    harmful = {key for key in got if not changes.is_harmless(key)}
    assert harmful == {"train.lr", "adapter.rank"}
    assert got["train.lr"] == (1e-4, 5.0)
    assert {"engine.name", "train.micro_batch", "train.max_steps"} <= got.keys() - harmful
    assert not {"evaluate.limit", "train.stop_at", "run_dir"} & got.keys()


# key -> what another value of it means: resume (free, harmless or another run), whether evaluate
# and merge take it, whether a comparison trains and scores again, and which stages of a pipeline
# are done again by it alone (those after them follow from their outputs).
MEANING = {
    "run_dir": ("free", "", "", ""),
    "pipeline.merge": ("free", "", "", ""),
    "train.stop_at": ("free", "", "", ""),
    "train.save_every": ("harmless", "", "", ""),
    "train.tensorboard": ("harmless", "", "", ""),
    "train.micro_batch": ("harmless", "", "", ""),
    "engine.activation_checkpointing": ("harmless", "evaluate", "", ""),
    "engine.compile": ("harmless", "evaluate", "", ""),
    "engine.kernels": ("harmless", "evaluate", "", ""),
    "engine.device": ("harmless", "evaluate merge", "", ""),
    "train.max_steps": ("harmless", "", "train", ""),
    "data.on_error": ("harmless", "evaluate", "train score", "prepare evaluate"),
    "data.train": ("harmless", "", "", "prepare"),  # by content
    "data.workers": ("harmless", "", "", ""),
    "data.cache": ("harmless", "evaluate", "", ""),
    "model.path": ("harmless", "evaluate merge", "", ""),
    "model.revision": ("harmless", "evaluate merge", "", ""),
    "model.quant": ("other", "", "train", "train"),
    "model.tokenizer": ("other", "", "train", "train"),
    "data.cutoff": ("other", "", "train", "prepare train"),
    "data.tokenize": ("other", "", "train", "prepare train"),
    "data.prompt": ("other", "", "train", "prepare train"),
    "data.source_language": ("other", "", "train score", "prepare train evaluate"),
    "train.lr": ("other", "", "train", "train"),
    "train.precision": ("other", "evaluate", "train score", "train evaluate"),
    "adapter.rank": ("other", "", "train", "train"),
    "data.test": ("free", "evaluate", "", "prepare"),
    "data.test_prompt": ("free", "evaluate", "score", "prepare evaluate"),
    "data.bleu_tokenizer": ("free", "evaluate", "score", "evaluate"),
    "data.protocol": ("free", "evaluate", "score", "evaluate"),
    "evaluate.backend": ("free", "evaluate", "score", "evaluate"),
    "evaluate.limit": ("free", "evaluate", "score", "evaluate"),
    "evaluate.batch_size": ("free", "evaluate", "", ""),
}
OTHER = {  # values that are none of LANGUAGES' config
    "data.train": ["b"], "data.test": ["b"], "data.test_prompt": "{source}",
    "data.prompt": "{source}",
    "data.bleu_tokenizer": "intl", "data.protocol": None, "data.on_error": "skip",
    "data.source_language": "fr", "data.tokenize": "apart", "data.cache": "c",
    "engine.device": "cpu",
    "model.path": "/m", "model.revision": "r", "model.tokenizer": "/t", "model.quant": "nf4",
    "train.precision": "fp32", "evaluate.backend": "vllm", "pipeline.merge": "none",
    "train.tensorboard": True, "engine.activation_checkpointing": True, "run_dir": "other",
    "engine.compile": "blocks", "engine.kernels": "off",
}  # fmt: skip


@pytest.mark.parametrize("key", MEANING)
def test_what_a_change_of_a_key_means(key: str) -> None:
    from scalepeft import pipeline
    from scalepeft.analysis.compare.cells import cell_inputs

    languages = ["data.source_language=de", "data.target_language=en", "data.train=a"]
    made = load("data=translation", *languages)
    values = config.to_dict(made)
    section, _, name = key.partition(".")
    if name:
        values[section][name] = OTHER.get(key, 7)
    else:
        values[key] = OTHER[key]
    object.__setattr__(changed := dataclasses.replace(made), "run_dir", values["run_dir"])
    if name:  # no check stands in the way of a single key
        held = dataclasses.replace(getattr(made, section))
        object.__setattr__(held, name, values[section][name])
        object.__setattr__(changed, section, held)
    resume = "other"
    if not changes.differences(config.to_dict(made), config.to_dict(changed)):
        resume = "free"
    elif changes.is_harmless(key):
        resume = "harmless"
    uses = {"evaluate": changes.for_evaluation(), "merge": changes.for_export()}
    allowed = [use for use, listed in uses.items() if changes.matches_key(key, listed)]
    files = {"base": "f", "train": "f", "test": "f"}
    old, new = (cell_inputs(c, files) for c in (made, changed))
    again = ["train"] if old["training"] != new["training"] else []
    for inputs in (old, new):
        del inputs["evaluation"]["training"]
    again += ["score"] if old["evaluation"] != new["evaluation"] else []
    stages = [
        stage
        for stage in ("prepare", "train", "evaluate")
        if pipeline.settings_of(stage, made) != pipeline.settings_of(stage, changed)
    ]
    assert (resume, " ".join(allowed), " ".join(again), " ".join(stages)) == MEANING[key]


Marked = Annotated[int, Decides.ROWS]


def test_every_field_says_what_it_decides() -> None:

    classes = [cls for _, cls in config.every_class()]
    assert len(classes) > 20
    bare = [f"{c.__name__}.{k}" for c in classes for k, marks in marks_of(c).items() if not marks]
    assert bare == []

    new = dataclasses.make_dataclass("New", [("unmarked", int, 3), ("marked", Marked, 3)])
    assert marks_of(new) == {"unmarked": frozenset(), "marked": frozenset({Decides.ROWS})}


@pytest.mark.parametrize(
    ("text", "settings", "run_dir", "prompt"),
    [
        ("run_dir: '${oc.env:SCRATCH}/${run_name}'\nrun_name: try", [], "/scratch/try", None),
        ("run_dir: 'r/${adapter.name}-${train.lr}'", ["adapter=lora"], "r/lora-0.0003", None),
        ("run_dir: x", ["run_dir=${oc.env:SCRATCH}/y"], "/scratch/y", None),
        ("run_dir: x", ["data.prompt=$5 {instruction} $ { \\n"], "x", "$5 {instruction} $ { \\n"),
        ("run_dir: x", ["data.prompt=\\${input}"], "x", "${input}"),
        ("run_dir: x\ndata: {prompt: '\\${input} {x}'}", [], "x", "${input} {x}"),
        ("run_dir: x", ["data.prompt=\\\\${run_dir}"], "x", "\\x"),
    ],
)
def test_interpolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    text: str, settings: list[str], run_dir: str, prompt: str | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("SCRATCH", "/scratch")
    path = write(tmp_path / "run.yaml", text)
    made, _ = config_files.load(str(path), ["train.max_steps=1", *settings])
    assert made.run_dir == run_dir
    assert prompt is None or made.data.prompt == prompt
    # Text with ${ in a resolved config is text: as a file, and under further settings.
    again, _ = config_files.load(str(write(tmp_path / "again.yaml", config.dump(made))), [])
    assert again == made
    assert config_files.overlay(config.to_dict(made), ["train.seed=0"]) == made


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("run_dir=${nope}", ["run_dir", "'nope' not found", "oc.env:NAME"]),
        ("run_dir=${oc.env:NO_SUCH}", ["run_dir", "NO_SUCH"]),
        ("data.prompt=a ${b", ["data.prompt", "\\${"]),
        ("data.prompt=${data.prompt}", ["data.prompt", "Recursive"]),
    ],
)
def test_an_interpolation_that_fails_is_one_line(setting: str, parts: list[str]) -> None:
    message = error(setting)
    assert [p for p in parts if p not in message] == [], message


def test_a_former_spelling_is_the_same_setting(tmp_path: Path) -> None:
    assert load("data.tokenise=together").data.tokenize == "together"
    path = write(tmp_path / "run.yaml", {"data": {"tokenise": "together"}})
    made = load(path=path)
    assert made.data.tokenize == "together"
    assert load("data.tokenize=apart", path=path).data.tokenize == "apart"
    write(path, {"data": {"tokenise": "together", "tokenize": "apart"}})
    assert "data.tokenise are one setting" in error(path=path)
    old = config.to_dict(made)
    old["data"]["tokenise"] = old["data"].pop("tokenize")
    assert config.from_dict(old) == made


def test_a_shipped_config_is_named_without_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made, _ = config_files.load("commonsense_hoft", [])
    shipped, _ = config_files.load(
        str(config_files.config_root() / "runs/commonsense_hoft.yaml"), []
    )
    assert made == shipped
    write(tmp_path / "commonsense_hoft.yaml", {"run_dir": "mine", "train": {"max_steps": 1}})
    assert config_files.load("commonsense_hoft", [])[0].run_dir == "mine"


def test_configs_are_shipped() -> None:
    assert {"models/tiny.yaml", "tasks/toy.yaml"} <= {
        str(p.relative_to(config_files.config_root())) for p in SHIPPED
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_yaml_loads_and_its_adapter_can_be_made(path: Path) -> None:
    sections = {folder: section for section, folder in config_files.FOLDERS.items()}
    folder = str(path.relative_to(config_files.config_root()).parent)
    if folder in ("runs", "recipes"):
        made, notes = config_files.load(str(path), ["run_dir=x"])
    else:
        made, notes = config_files.load(None, [*BASE, f"{sections[folder]}={path.stem}"])
    assert all(n.startswith(f"{sections[folder]}={path.stem} also sets train.") for n in notes)
    settings = {k: v for k, v in dataclasses.asdict(made.adapter).items() if k != "target_modules"}
    layer = scalepeft.adapt(nn.Linear(4096, 1024, device="meta"), **settings)
    parameters = list(layer.adapter.parameters())
    assert parameters
    assert all(p.is_meta and p.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("name", ["hoft", "shoft", "hra"])
def test_yaml_files_have_the_form_that_learns_best(name: str) -> None:
    made = load(f"adapter={name}")
    form = "mean_difference" if name == "hra" else "cayley"
    assert (made.adapter.form, made.train.lr) == (form, 2e-4)
    if name == "hra":
        return
    series = [f"adapter={name}", "adapter.inverse=neumann2"]
    assert load(*series, "adapter.form=pairs").adapter.form == "pairs"
    assert "adapter.form=cayley: inverse=neumann2 is the series" in error(*series)
    for said in (error(*series), error(f"adapter.name={name}", "adapter.inverse=neumann2")):
        assert said.endswith("set adapter.inverse=exact, or adapter.form=pairs")


@pytest.mark.parametrize(
    ("run", "lr"), [("commonsense_hoft", 1e-4), ("translation_hoft", 8e-4), ("math_shoft", 7e-4)]
)
def test_the_papers_set_ups_keep_the_papers_form_and_rate(run: str, lr: float) -> None:
    made, _ = config_files.load(run, [])
    assert (made.adapter.form, made.train.lr) == ("pairs", lr)


def test_a_run_from_before_a_new_key_can_be_continued(tmp_path: Path) -> None:
    from scalepeft.run.folder import check_same_run

    settings = [f"run_dir={tmp_path}", "train.max_steps=5", "adapter=hoft"]
    built, _ = config_files.load(None, settings)
    older = config.to_dict(built)
    del older["adapter"]["layers"]
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    check_same_run(built, allow_changes=False)
    other, _ = config_files.load(None, [*settings, "adapter.layers=0,3"])
    with pytest.raises(UserError, match=r"adapter.layers: all there, \[0, 3\] now"):
        check_same_run(other, allow_changes=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**older, "adapter": {"name": "x"}}))
    with pytest.raises(UserError, match=r"config.yaml: no adapter 'x'.*restore it"):
        check_same_run(built, allow_changes=False)


def test_the_reference_is_that_of_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/reference.md").read_text()
    assert page == command.reference_page(), "scalepeft config --reference > docs/reference.md"
    described = re.findall(r"^\| `[\w.]+` \|.*\|  \|$", page, re.M)
    assert described == [], "keys without a line under Attributes:"
    assert "| `train.keep_checkpoints` | int >= 2 | `2` |" in page
    assert "| `train.max_steps` | int >= 1 or null | `null` |" in page
    assert "| `train.seed` | int >= 0, < 2147483648 | `0` |" in page
    assert '| `adapter.layers` | `all` or list of int | `"all"` |' in page


@pytest.mark.parametrize("value", ["off", "0", "[]", "7"])
def test_a_section_of_a_file_holds_keys(value: str, tmp_path: Path) -> None:
    """YAML reads ``off`` as false: what was included must not go with it."""
    file = tmp_path / "run.yaml"
    file.write_text(f"adapter: {value}\n")
    with pytest.raises(UserError, match="adapter is a section, not"):
        config_files.load(str(file), [])


@pytest.mark.parametrize("key", ["no", "0", "off"])
def test_a_key_that_yaml_reads_as_false_is_no_such_key(key: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"train:\n  {key}: 1\n")
    with pytest.raises(UserError, match="no such key"):
        config_files.load(str(file), ["model=tiny", "data=toy", "run_dir=r", "adapter=hoft"])


def test_a_date_in_a_stored_config_is_text() -> None:
    stored = {"model": {"path": "x", "revision": datetime.date(2024, 1, 1)}}
    merged = config_files.overlay({**stored, "run_dir": "r", "train": {"max_steps": 1}}, [])
    assert merged.model.revision == "2024-01-01"


def test_types_that_an_extension_may_have() -> None:
    assert command._type(TypeAdapter(Any).json_schema()) == "any"
    assert command._type(TypeAdapter(tuple[int, int]).json_schema()) == "array"


def test_the_config_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(["demo", "train.lr=0.5"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["lr"] == 0.5
    assert config.from_dict(printed) == config_files.load("demo", ["train.lr=0.5"])[0]
    command.run([], "evaluate")
    text = capsys.readouterr().out
    assert "evaluate.limit" in text and "train.lr" not in text
    with pytest.raises(UserError, match=r"'evalute'.*'evaluate'"):
        command.run([], "evalute")


def test_the_toy_task_has_held_out_rows_of_its_own() -> None:
    from scalepeft.data.tasks.toy import Toy

    made = load("data=toy", "train.eval_every=2").data
    texts = {s: {e.prompt for e in Toy(made).examples(s)} for s in ("train", "valid", "test")}
    assert len(texts["valid"]) > 50
    assert not texts["valid"] & (texts["train"] | texts["test"])
    assert Toy(made).examples("valid") == Toy(made).examples("valid")
