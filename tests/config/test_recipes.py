"""The shipped runs: rates and counts of the papers' tables, a plan each, and steps on tiny rows."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, call, losses

from scalepeft.adapters import inject
from scalepeft.cluster.plan import gpus, planning
from scalepeft.config import files
from scalepeft.config.schema import RunConfig
from scalepeft.core.errors import UserError
from scalepeft.models import shapes

RUNS = sorted(file.stem for file in (files.config_root() / "runs").glob("*.yaml"))
ORDER = ("lora", "dora", "hoft", "shoft")
HOFT = "arXiv 2505.16531"
GOFT = "arXiv 2404.04316"


def each(*few: str) -> list[Any]:
    """Every run; without --full these alone, as each takes seconds."""
    return [run if run in few else pytest.param(run, marks=pytest.mark.full) for run in RUNS]


def load(run: str, *settings: str) -> RunConfig:
    made, notes = files.load(run, list(settings))
    assert notes == []
    return made


def run_of(task: str, method: str) -> tuple[str, list[str]]:
    """The recipe of a method of the HOFT paper, and the words that choose it there."""
    kind = "lora" if method in ("lora", "dora") else "hoft"
    return f"{task}_{kind}", [f"adapter.name={method}"]


# Tables 7 to 9 of HOFT as they are printed: LoRA, DoRA, HOFT, SHOFT.
RATES = {
    ("commonsense", "llama-3.1-8b", None): "9e-5 1e-4 1e-4 2e-4",
    ("translation", "llama-2-7b", "sl"): "4e-4 4e-4 6e-4 6e-4",
    ("translation", "llama-2-7b", "de"): "3e-4 3e-4 2e-4 2e-4",
    ("translation", "llama-2-7b", "fr"): "1e-4 1e-4 1e-4 1e-4",
    ("translation", "llama-2-7b", "lv"): "4e-4 5e-4 9e-4 8e-4",
    ("translation", "llama-3.1-8b", "sl"): "8e-4 9e-4 1e-3 7e-4",
    ("translation", "llama-3.1-8b", "de"): "4e-4 4e-4 8e-4 4e-4",
    ("translation", "llama-3.1-8b", "fr"): "1e-4 1e-4 3e-4 1e-4",
    ("translation", "llama-3.1-8b", "lv"): "5e-4 5e-4 6e-4 5e-4",
    ("gsm8k", "llama-2-7b", None): "4e-4 4e-4 3e-4 3e-4",
    ("gsm8k", "llama-3.1-8b", None): "2e-4 1e-4 3e-4 4e-4",
    ("orca", "llama-2-7b", None): "1e-4 9e-5 1e-4 4e-4",
    ("orca", "llama-3.1-8b", None): "9e-5 9e-5 2e-4 2e-4",
}
# Task -> rank, modules, rows a step, epochs, warm-up, base in 4 bits; appendix A.
SET_UPS: dict[str, tuple[int, str, int, float, int, bool]] = {
    "commonsense": (16, "q k v up down", 16, 2, 100, False),
    "translation": (16, "q k v", 64, 2, 100, False),
    "gsm8k": (16, "q k v", 4, 3, 100, True),
    "orca": (16, "q k v", 4, 2, 100, True),
}


@pytest.mark.parametrize(("cell", "method"), list(product(RATES, ORDER)))
def test_rates_and_settings_of_the_hoft_paper(
    cell: tuple[str, str, str | None], method: str
) -> None:
    task, base, language = cell
    run, words = run_of(task, method)
    words += [f"recipe.base={base}"] + ([f"data.source_language={language}"] if language else [])
    made = load(run, *words)
    assert made.train.lr == float(RATES[cell].split()[ORDER.index(method)])
    rank, modules, batch, epochs, warmup, quantized = SET_UPS[task]
    low = language in ("sl", "lv")
    assert made.train.epochs == (3 if low else epochs)
    if language:
        assert made.data.train_rows == (None if low else 10_000)  # type: ignore[attr-defined]
    assert made.adapter.rank == rank  # type: ignore[attr-defined]
    assert made.adapter.target_modules == [f"{name}_proj" for name in modules.split()]
    assert (made.train.global_batch, made.train.warmup_steps) == (batch, warmup)
    assert (made.train.schedule, made.train.weight_decay) == ("linear", 0)
    assert made.model.path == {"llama-2-7b": "meta-llama/Llama-2-7b-hf",
                               "llama-3.1-8b": "meta-llama/Llama-3.1-8B"}[base]  # fmt: skip
    assert (made.model.quant, made.model.double_quant) == (
        ("nf4", True) if quantized else ("none", False)
    )
    assert made.adapter.dropout == 0.05  # type: ignore[attr-defined]
    if method in ("lora", "dora"):  # its section 4.1 alone names a start
        started = "pissa" if task == "commonsense" else "kaiming"
        assert made.adapter.start == started  # type: ignore[attr-defined]
    else:
        assert made.adapter.form == "pairs"  # type: ignore[attr-defined]


# Run, words, trained parameters, share in % as printed, where.
COUNTS: list[tuple[str, list[str], int, str | None, str]] = [
    *(
        (*run_of("commonsense", m), count, share, f"{HOFT}, Table 2")
        for m, count, share in [
            ("lora", 28_311_552, "0.35"),
            ("dora", 28_311_552 + 32 * (4096 + 2 * 1024 + 14336 + 4096), "0.36"),
            ("hoft", 28_311_552, "0.35"),
            ("shoft", 28_311_552 + 32 * (4096 + 2 * 1024 + 14336 + 4096), "0.36"),
        ]
    ),
    *(
        (run, [*words, f"recipe.base={base}"], count + scales * (m in ("dora", "shoft")), share,
         f"{HOFT}, Tables 3 and 6")
        for task, m in product(("translation", "gsm8k", "orca"), ORDER)
        for run, words in [run_of(task, m)]
        for base, count, scales, share in [
            ("llama-2-7b", 12_582_912, 32 * 3 * 4096, "0.19"),
            ("llama-3.1-8b", 9_437_184, 32 * (4096 + 2 * 1024), "0.12"),
        ]
    ),
    ("math_shoft", ["adapter.name=hoft"], 4_194_304, None, f"{HOFT}, A.4: rank 8 on q and v"),
    ("math_shoft", [], 4_194_304 + 32 * 2 * 4096, None, f"{HOFT}, A.4: rank 8 on q and v"),
    ("math_hra", [], 2_097_152, None, "HRA/llama/tune.sh: rank 8 on the inputs of q and v"),
    ("alpaca_lora", [], 16_777_216, "0.25", f"{GOFT}, Table 2"),
    ("alpaca_goft", [], 524_160, "0.007", f"{GOFT}, Table 2"),
    ("alpaca_goft", ["adapter.name=qgoft"], 2_096_640, "0.03", f"{GOFT}, Table 2"),
    ("alpaca_oft", [], 128 * 256 * 120, None, "half of a block's numbers; the table counts all"),
    ("alpaca_surm", [], 32 * 3 * 2 * 4096, None, "a circulant pair a layer: 2 d"),
    ("alpaca_hut", [], 32 * 4 * (4096 + 4096), None, "in + out a layer"),
    ("alpaca_hadamard", [], 393_216, None, "tests/adapters/test_counts.py"),
    ("peft_lora", [], 9_175_040, "0.28", "results/lora--llama-3.2-3B-rank32.json"),
    ("peft_hoft", [], 9_175_040, None, "as many as LoRA"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "words", "count", "share", "source"), COUNTS)
def test_trained_parameters_are_the_published_ones(
    run: str, words: list[str], count: int, share: str | None, source: str
) -> None:
    made = load(run, *words)
    shape = shapes.of_hub_id(made.model.path)
    assert shape is not None
    model = shapes.meta_model(shape)
    base = sum(p.numel() for p in model.parameters())
    inject.inject(model, made.adapter)
    found = sum(p.numel() for p in inject.trainable(model).values())
    assert found == count, source
    if share is not None:  # some are rounded, GOFT's 0.0078 is cut
        unit = 10.0 ** -len(share.partition(".")[2])
        assert abs(100 * found / (base + found) - float(share)) < unit, source
    if run == "peft_lora":
        assert base + found == 3_221_924_864  # num_total_params there


def test_every_recipe_is_counted() -> None:
    assert {run for run, *_ in COUNTS} | {"demo"} == set(RUNS)


def test_the_docs_list_every_recipe_as_it_is() -> None:
    def key(made: RunConfig) -> tuple[str, str, str]:
        return made.run_dir, made.model.path, made.adapter.name

    text = (ROOT / "docs/recipes.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    lines = [[cell.strip() for cell in row] for row in rows]
    counts = {key(load(run, *words)): (count, share) for run, words, count, share, _ in COUNTS}
    for command, base, lr, rank, modules, count, share, _ in lines:
        made = load(*command.strip("`").split())
        assert (base, float(lr)) == (made.model.path.split("/")[1], made.train.lr), command
        assert rank in ("", str(getattr(made.adapter, "rank", ""))), command
        assert [f"{m}_proj" for m in modules.split()] == made.adapter.target_modules, command
        counted, printed = counts[key(made)]
        assert int(count.replace(",", "")) == counted, command
        assert printed is None or share == printed, command
    assert {command.strip("`").split()[0] for command, *_ in lines} == set(RUNS) - {"demo"}
    assert len(lines) == len(COUNTS) + 3 * 2 * 4  # the languages, which have the same counts


def test_settings_of_the_other_papers() -> None:
    for method, lr in {"hoft": 1e-3, "shoft": 7e-4}.items():
        train = load("math_shoft", f"adapter.name={method}").train
        assert (train.lr, train.epochs, train.global_batch, train.schedule) == (lr, 2, 16, "linear")
    assert abs(load("math_shoft").train.warmup_steps - 0.05 * 2 * 99_500 / 16) < 1
    assert load("math_shoft").adapter.dropout == 0  # type: ignore[attr-defined]
    assert load("math_hra").adapter.penalty == 1e-4  # type: ignore[attr-defined]
    hra = load("math_hra").train
    assert (hra.lr, hra.epochs, hra.global_batch, hra.schedule) == (1e-5, 2, 32, "cosine")
    for run, method, lr in [  # Table 7 of GOFT
        ("lora", "lora", 5e-5), ("oft", "oft", 5e-5), ("goft", "goft", 1e-4),
        ("goft", "qgoft", 1e-4),
    ]:  # fmt: skip
        made = load(f"alpaca_{run}", f"adapter.name={method}")
        assert (made.train.lr, made.train.epochs, made.train.global_batch) == (lr, 1, 32 * 2)
        assert (made.train.schedule, made.train.warmup_steps) == ("cosine", 50)
        assert getattr(made.adapter, "penalty", 0.01) == 0.01
    peft = load("peft_lora")  # default_training_params.json of PEFT
    train = peft.train
    assert (train.max_steps, train.global_batch, train.eval_every) == (5000, 4, 250)
    assert (train.lr, train.weight_decay, train.max_grad_norm, train.seed) == (1e-4, 0.1, 1.0, 0)
    assert (train.schedule, train.warmup_steps, train.precision) == ("cosine", 500, "bf16")
    assert (peft.data.cutoff, peft.evaluate.max_tokens) == (768, 800)
    assert (peft.evaluate.max_new_tokens, peft.evaluate.batch_size) == (300, 50)


def test_a_base_by_name_takes_its_rate_and_other_weights_leave_it() -> None:
    made = load("gsm8k_hoft", "model=llama-2-7b", "adapter.name=shoft")
    assert (made.model.path, made.train.lr) == ("meta-llama/Llama-2-7b-hf", 3e-4)
    assert load("orca_lora", "recipe.base=llama-2-7b", "model.path=DIR").train.lr == 1e-4


@pytest.mark.parametrize(
    "words", [["adapter.name=hra"], ["recipe.base=other"], ["recipe=5"], ["recipe.rates=null"]]
)
def test_what_a_paper_has_no_rate_for_must_be_given_one(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"^train.lr: .*set it, or what \$\{...\} names"):
        load("translation_hoft", *words)
    if words == ["recipe.rates=null"]:
        assert load("translation_hoft", *words, "train.lr=3e-4").train.lr == 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("run", each("math_hra", "gsm8k_hoft"))
def test_every_recipe_can_be_planned(run: str) -> None:
    made = load(run)
    found = planning.plan(made, gpus.Options(gpu="H100", network=False))
    assert found.fits
    # fp32: a parameter, both moments, of PiSSA its start; and 4 bytes a tensor.
    each = 16 if getattr(made.adapter, "start", None) == "pissa" else 12
    for name, words, count, *_ in COUNTS:
        if name == run and load(run, *words) == made:
            assert 0 < found.step.checkpoint - each * count <= 4 * 32 * 10


ROWS: dict[str, list[dict[str, Any]]] = {
    "commonsense": [
        {"instruction": f"Is {i} even? true/false", "input": "", "output": "the correct answer is"
         f" {str(i % 2 == 0).lower()}", "answer": str(i % 2 == 0).lower()} for i in range(60)
    ],
    "math": [
        {"query": f"What is {i} plus 1?", "response": f"It is {i + 1}.\nThe answer is: {i + 1}",
         "type": "GSM_AnsAug"} for i in range(60)
    ],
    "translation": [{"sentence": f"Haus {i}", "translation": f"house {i}"} for i in range(60)],
    "sft": [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(60)],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    each("commonsense_hoft", "math_shoft", "translation_lora", "gsm8k_lora", "alpaca_hadamard",
         "peft_hoft"),
)  # fmt: skip
def test_every_recipe_learns_from_tiny_rows(run: str, tmp_path: Path) -> None:
    made = files.load(run, [])[0]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS.get(made.data.name, [])))
    words = ["data.valid_size=8"] if made.data.valid_size else []
    words += [f"data.train={rows}"] if made.data.name in ROWS else ["data.train_size=60"]
    words += ["data.valid=" + str(rows)] if made.data.valid else []
    base = ["model.path=builtin:tiny", "model.quant=none", "model.double_quant=false"]
    steps = ["train.max_steps=20", "train.warmup_steps=2", "train.global_batch=4"]
    done = call(
        "train", run, *base, *words, *steps, "engine=single", "train.micro_batch=4",
        "train.eval_every=0", "train.precision=fp32", "train.lr=3e-3", "data.cutoff=512",
        "model.pretrain_steps=0", "data.test=[]", f"run_dir={tmp_path}/run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = losses(tmp_path / "run")
    assert len(found) == 20
    assert sum(found[-4:]) < sum(found[:4])
