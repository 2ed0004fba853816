"""scalepeft compare: the same chances for every method, its arithmetic, its cells."""

import hashlib
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import adapter_bytes, call, losses, rows, zygote
from safetensors.torch import load_file

from scalepeft import arguments
from scalepeft.adapters import sizing
from scalepeft.analysis.compare import cells, design, table
from scalepeft.analysis.compare import command as compare
from scalepeft.cli import main
from scalepeft.core import stats
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag, Stopping
from scalepeft.models import shapes
from scalepeft.run import lease

RUN = [
    "model=tiny", "data=toy", "data.train_size=200", "data.valid_size=16", "train.precision=fp32",
    "train.global_batch=4", "train.max_steps=4", "train.max_nonfinite=2",
]  # fmt: skip


def test_the_interval_is_students() -> None:
    # s = sqrt(5 / 3), t(3) = 3.18245 of any table: 3.18245 * 1.29099 / 2 = 2.05426
    mean, half = stats.mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(2.05426, abs=1e-5)
    assert stats.mean_interval([0.25]) == (0.25, None)
    for freedom, t in ((1, 12.706), (2, 4.303), (30, 2.042), (40, 2.021), (60, 2.0), (120, 1.98)):
        assert stats.t975(freedom) == pytest.approx(t, abs=6e-4)


def test_rates_are_given_or_factors() -> None:
    assert design.parse_rates("1e-3, 1e-4", 7.0) == [1e-4, 1e-3]
    assert design.parse_rates("x0.3,x1,x3", 1e-3) == [3e-4, 1e-3, 3e-3]
    for wrong in ("", "a", "x1,1e-3", "0", "-1", "inf", "1e-3,0.001"):
        with pytest.raises(UserError, match="--lrs"):
            design.parse_rates(wrong, 1e-3)


def test_what_has_no_size_key_keeps_its_size_and_says_so() -> None:
    base = shapes.meta_model("mini")
    names = ["lora", "goft", "hadamard", "surm_kronecker", "oft"]
    given = [design.read_method(n) for n in names]
    given.append(design.Method("bad", {"name": "oft", "block_size": 7}, 1.0, [1.0]))
    found = {m.label: design.fit_method(base, m, 25_600) for m in given}
    assert found["lora"].parameters == 25_600 and found["lora"].size == "rank=4"
    for name in ("goft", "hadamard", "surm_kronecker"):
        assert found[name].size == "its own size"
        assert found[name].parameters == sizing.count_parameters(
            base, design.read_method(name).adapter
        )
    assert found["hadamard"].parameters == 2 * 3 * 256  # scale, shift and norm of two blocks
    assert found["bad"].parameters == found["oft"].parameters, "any block size can be replaced"
    kept = design.fit_method(base, given[-1], None)
    assert "block_size" in kept.refused
    assert design.fit_method(base, given[0], None).size == "as configured"


def test_the_rate_falls_with_the_root_of_the_size(tmp_path: Path) -> None:
    base = shapes.meta_model("mini")
    file = tmp_path / "two.yaml"
    file.write_text("adapter: {name: oft, block_size: 2}\ntrain: {lr: 0.01}\n")
    for name, target, size, lr in (
        ("lora", 25_600, 4, 8.49e-4), ("lora", 6_400, 1, 1.7e-3), ("hoft", 25_600, 4, 4e-4),
        ("goft", 25_600, None, 1e-3), (str(file), 25_600, 16, 3.54e-3),
    ):  # fmt: skip
        method = design.fit_method(base, design.read_method(name), target, "x0.5,x2")
        assert size in (None, method.adapter.get("rank"), method.adapter.get("block_size")), name
        assert method.usual_lr == pytest.approx(lr, rel=2e-3), name
        assert method.rates == pytest.approx([0.5 * lr, 2 * lr], rel=2e-3), name
        given = design.fit_method(base, design.read_method(name), target, "3e-4")
        assert given.rates == [3e-4], "what is given stays"
        own = design.fit_method(base, design.read_method(name), None, "x1")
        assert own.rates == [design.read_method(name).usual_lr]


def swept(*found: float | str) -> dict[float, dict[str, Any]]:
    """The results of the rates 1, 2, 3: a loss, or a state."""
    results = [
        {"state": "done", "loss": f} if isinstance(f, float) else {"state": f, "reason": "x"}
        for f in found
    ]
    return dict(zip([1.0, 2.0, 3.0], results, strict=True))


def test_the_rate_of_the_lowest_loss_is_chosen_and_an_edge_is_named() -> None:
    method = design.Method("m", {}, 2.0, [1.0, 2.0, 3.0])
    for found, lr, edge in (
        ((0.5, 0.4, 0.6), 2.0, ""), ((0.3, 0.4, 0.6), 1.0, "lowest"),
        ((0.5, 0.4, 0.3), 3.0, "highest"), ((0.5, 0.4, "failed"), 2.0, ""),
    ):  # fmt: skip
        remark = f"best rate is the {edge} of the sweep: widen it" if edge else ""
        assert cells.choose(method, swept(*found)) == {"lr": lr, "remark": remark}
    assert cells.choose(method, swept("failed", "failed", "failed"))["state"] == "failed"
    for state in ("missing", "broke"):
        assert cells.choose(method, swept(0.5, 0.4, state)) == {
            "state": "missing",
            "reason": "the sweep lacks lr 3 (x)",
        }
    assert cells.choose(design.Method("m", {}, 2.0, [7.0]), {}) == {"lr": 7.0, "remark": ""}


def test_the_difference_is_taken_seed_by_seed() -> None:
    def cell(method: str, seed: int, loss: float | None) -> dict[str, Any]:
        state = "done" if loss is not None else "failed"
        return {"method": method, "seed": seed, "state": state, "loss": loss}

    theirs = [cell("lora", 1, 1.0), cell("lora", 2, 2.0), cell("lora", 3, 3.0)]
    ours = [cell("hoft", 1, 0.9), cell("hoft", 2, 1.8), cell("hoft", 3, None)]
    found = table.difference("lora", "hoft", [*theirs, *ours])
    # -0.1 and -0.2: s = 0.0707107, 12.706 * 0.0707107 / sqrt(2) = 0.6353; unpaired it would be 5.7
    assert found == {
        "mean": pytest.approx(-0.15), "ci": pytest.approx(0.6353, abs=1e-4), "seeds": 2,
    }  # fmt: skip
    assert table.difference("lora", "lora", theirs) is None


@pytest.mark.parametrize(
    ("code", "said", "found"),
    [
        (2, "scalepeft: error: data.cutoff=9 is bad\n", ("failed", "data.cutoff=9 is bad")),
        (1, "x\nFloatingPointError: not finite\n", ("failed", "diverged: not finite")),
        (1, "Traceback\nOSError: gone\n", ("broke", "exit code 1: OSError: gone")),
        (-9, "", ("broke", "killed by SIGKILL (out of memory?)")),
        (1, "", ("broke", "exit code 1: printed nothing")),
    ],
)
def test_why_a_cell_failed(code: int, said: str, found: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("scalepeft: error: of an earlier start\n" + said)
    assert cells.failure_reason(code, tmp_path / "log", 38) == found


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--methods", "hotf"], "Did you mean 'hoft'"),
        (["--methods", "hoft,hoft"], "hoft appears twice"),
        (["--methods", "none.yaml"], "no config file none.yaml"),
        ([], "--methods is missing"),
        (["--methods", "hoft", "--lrs", "x1,1e-3"], "--lrs x1,1e-3"),
        (
            ["--methods", "hoft", "--seeds", "0"],
            "--seeds 0: Input should be greater than or equal to 1",
        ),
        (
            ["--methods", "hoft", "--budget", "time"],
            "argument --budget: invalid choice: 'time'",
        ),
        (
            ["--methods", "hoft", "--budget", "memory"],
            "argument --budget: invalid choice: 'memory'",
        ),
        (["--methods", "hoft", "--budget", "steps", "--rank", "4"], "--rank has no effect"),
        (["--methods", "hoft", "--cell", "4", "--table"], "one of --cell and"),
        (["--methods", "hoft", "--reference", "goft", "--rank", "4"], "goft has no rank"),
        (["--methods", "hoft", "adapter.rank=4"], "--methods FILE.yaml"),
        (["--methods", "hoft", "adapter=lora"], "a comparison takes --methods"),
        (["--methods", "hoft", "train.lr=1"], "a comparison takes --lrs"),
        (["--methods", "hoft", "data.valid_size=0"], "set data.valid=FILES, or data.valid_size"),
        (["--methods", "hoft", "train.stop_at=2"], "no cell could finish"),
        (["--methods", "hoft", "--out", "a=b"], "reads as a setting"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(["compare", *RUN, *words, *out]))
    line = capsys.readouterr().err
    assert text in line and line.count("scalepeft: error: ") == 1
    assert not (tmp_path / "out").exists()


def options_of(words: list[str]) -> compare.Options:
    values = vars(arguments.parse(words, None))
    return compare.Options.of({k: v for k, v in values.items() if k not in ("command", "debug")})


def test_a_folder_without_a_comparison_and_options_without_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--out", str(tmp_path)]) == 2
    assert "design.json: no such file" in capsys.readouterr().err
    assert main(["compare", "--out", str(tmp_path), "--seeds", "5"]) == 2
    assert "--seeds: only with the config and --methods" in capsys.readouterr().err


def test_what_all_methods_share_and_what_is_each_ones_own() -> None:
    words = [
        *RUN,
        "train.schedule=cosine",
        "adapter.target_modules=q_proj",
        "--methods",
        "lora,goft",
    ]
    found = compare.prepare(options_of(["compare", *words, "--out", "o"]))
    config = {m.label: found.config(m, m.rates[0], 7) for m in found.methods}
    # The reference's rank 16 is half of lora.yaml's: 3e-4 * sqrt(2).
    for label, usual in (("lora", 4.24e-4), ("goft", 1e-3)):
        assert config[label].adapter.target_modules == ["q_proj"]
        assert config[label].train.schedule == "cosine" and config[label].train.seed == 7
        assert config[label].train.lr == pytest.approx(0.3 * usual)
        assert config[label].train.eval_every == design.AT_THE_END
    assert found.seeds == [1, 2, 3] and found.sweep_seed == 0
    sweep, then = cells.sweep(found), cells.reported(found)
    words = compare.arguments(found)
    assert words["sweep"] == [f"--cell={i}" for i in range(6)] and len(sweep) == len(then) == 6
    assert words["seeds"] == [f"--cell={i}" for i in range(6, 12)] and words["table"] == ["--table"]
    assert {c.seed for c in sweep}.isdisjoint(c.seed for c in then)


def result_of(points: list[tuple[str, int, float, float, float]]) -> dict[str, Any]:
    rows = [
        {
            "method": m, "parameters": p, "seconds": s, "loss": y, "loss_ci": ci, "steps": 60,
            "lr": 1e-3, "memory": "resident", "tokens_per_second": 5e3, "peak_memory": 2**29,
            "difference": None, "notes": [], "size": "",
        }
        for m, p, s, y, ci in points
    ]  # fmt: skip
    found = {"methods": rows, "budget": "the same steps", "devices": ["1 x CPU"], "cells": []}
    return {**found, "versions": {"torch": "2"}, "date": "2026-11-21", "sweep": []}


def warm(arguments: list[str], log: Path, stop: StopFlag) -> int:
    """``cells.run_child`` by the tests' warm process."""
    done = zygote().run(("-m", "scalepeft"), arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, 120)
    with log.open("a") as f:
        f.write(done.stdout + done.stderr)
    return done.returncode


class Child:
    """In place of ``cells.run_child``: leaves at once what a training or an evaluation leaves."""

    def __init__(self, out: Path) -> None:
        self.out, self.ran, self.codes = out, list[str](), dict[str, list[int]]()
        self.said = "OSError: gone"

    def __call__(self, arguments: list[str], log: Path, stop: StopFlag) -> int:
        folder = log.parent
        name = str(folder.relative_to(self.out / "cells"))
        self.ran.append(" ".join([arguments[0], name, *arguments[2:]]))
        with log.open("a") as f:
            f.write(f"{self.said}\n")
        if codes := self.codes.get(name):
            return codes.pop(0)
        if arguments[0] == "evaluate":
            if (folder / "eval").is_dir():  # under other settings: scalepeft evaluate keeps both
                (folder / "eval/toy").rename(folder / f"eval/toy.old-{time.monotonic_ns()}")
            (folder / "eval" / "toy").mkdir(parents=True)
            metric = {"accuracy": {"value": 0.5, "share": True}}
            found = {"headline": "accuracy", "metrics": metric}
            (folder / "eval/toy/scores.json").write_text(json.dumps(found))
            return 0
        (folder / "config.yaml").write_text(Path(arguments[1]).read_text())
        # Better the higher the rate, so that a rate that was never tried would be missed.
        loss = 1.0 / float(re.findall("lr=(.*),", name)[0])
        per_rank = [{"device": "CPU"}]
        files = {
            "metrics": {"step": 4, "seconds": 1.0, "tokens_per_second": 10.0},
            "validation": {"step": 4, "loss": loss, "rows": 16},
            "events": {
                "event": "start", "time": 1.0, "parameters": 8, "world_size": 1,
                "versions": {"torch": "2"}, "per_rank": per_rank,
            },
        }  # fmt: skip
        for file, row in files.items():
            (folder / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
        return 0


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    found = Child(tmp_path / "out")
    monkeypatch.setattr(cells, "run_child", found)
    return found


def start(fake: Child, *words: str) -> int:
    """``scalepeft compare`` of one method at two rates; returns the exit code."""
    fake.ran.clear()
    given = ["--methods", "lora", "--budget", "steps", "--lrs", "1,2", "--seeds", "1"]
    words = ("compare", *RUN, *given, "--out", str(fake.out), *words)
    return compare.run(options_of(list(words)), StopFlag())


def test_a_crash_in_the_sweep_is_tried_again_and_chooses_no_rate(
    fake: Child, capsys: pytest.CaptureFixture[str]
) -> None:
    best, other, reported = "lora/lr=2,seed=0", "lora/lr=1,seed=0", "lora/lr=2,seed=1"
    fake.codes[best] = [-9]
    assert start(fake) == 1
    assert [word.split()[1] for word in fake.ran] == [other, best], "and no seed"
    assert "lora lr=2,seed=0: no rate is chosen without" in capsys.readouterr().err
    fake.codes[best] = [-9]
    assert start(fake, "--cell", "1") == 1, "a task of the sweep's array"
    with pytest.raises(
        UserError, match=r"lora chosen lr,seed=1: the sweep lacks lr 2 \(killed by SIGKILL"
    ):
        start(fake, "--cell", "2")
    with pytest.raises(UserError, match=r"no method has a result: .*lr 2 \(killed"):
        start(fake, "--table")
    assert start(fake) == 0
    assert [word.split()[1] for word in fake.ran] == [best, reported]
    assert "among 1,2 under seed 0" in capsys.readouterr().out
    page = (fake.out / "compare.md").read_text()
    assert page.startswith("# lora\n\n") and "\n|---|---:|" in page and "\n| lora | " in page
    assert (
        "task toy, 16 held-out rows." in page and "\n* **lora**: best rate is the highest" in page
    )


def test_a_cell_that_another_start_holds_is_left_alone(fake: Child) -> None:
    folder = fake.out / "cells/lora/lr=2,seed=0"
    folder.mkdir(parents=True)
    other = os.getppid()
    held = {"start": 1, "host": "h", "pid": other, "job": None}
    held |= {"machine": lease._machine(), "began": lease._began(other)}
    (folder / "holder.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=f"in use by start 1 on h, pid {other}"):
        start(fake)
    assert not (fake.out / "design.json").exists(), "nor another design written"
    (folder / "holder.json").unlink()
    assert start(fake, "--cell", "0") == 0
    (folder / "holder.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match="in use by start 1"):
        start(fake)
    assert fake.ran == [] and not (folder / "training.begun.json").exists()


def test_cells_of_an_older_version_are_set_aside(
    fake: Child, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fake.out / "cells/lora/lr=2,seed=0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {}")
    (folder / "cell.json").write_text('{"hash": "1", "state": "done", "loss": 0.1}')
    (fake.out / "design.json").write_text('{"methods": [], "seconds": null}')
    assert start(fake) == 0 and len(fake.ran) == 3
    assert (folder.parent / "replaced-1/lr=2,seed=0/cell.json").is_file()
    assert "of an older version" in capsys.readouterr().err


def test_what_changes_no_result_trains_nothing_again(fake: Child, tmp_path: Path) -> None:
    assert start(fake) == 0 and len(fake.ran) == 3
    for words in (
        ["train.save_every=1", "train.micro_batch=2", "train.eval_every=2", "data.workers=1"],
        [f"data.cache={tmp_path}", "engine.device=cpu", "evaluate.batch_size=2"],
        ["evaluate.max_new_tokens=5"],  # nothing is evaluated
    ):
        assert start(fake, *words) == 0 and fake.ran == [], words
    scored = "evaluate lora/lr=2,seed=1"
    assert start(fake, "--evaluate") == 0 and len(fake.ran) == 1
    assert fake.ran[0].startswith(scored), "no cell of the sweep"
    assert start(fake, "--evaluate", "evaluate.batch_size=2") == 0 and fake.ran == []
    assert start(fake, "--evaluate", "evaluate.limit=3") == 0
    assert len(fake.ran) == 1 and fake.ran[0].startswith(scored)
    assert " evaluate.limit=3 " in fake.ran[0]
    assert start(fake) == 0 and fake.ran == [], "without the score"
    fake.codes["lora/lr=2,seed=1"] = [1]
    with pytest.raises(UserError, match="seed 1: exit code 1: OSError: gone"):
        start(fake, "--evaluate", "evaluate.limit=4")
    assert start(fake, "--evaluate", "evaluate.limit=4") == 0
    assert len(fake.ran) == 1 and fake.ran[0].startswith(scored), "a crash there trains nothing"
    for words in (["train.max_steps=5"], ["data.train_size=100"], ["train.seed=7"]):
        assert start(fake, *words) == 0 and len(fake.ran) == 3, words
        assert all(word.startswith("train ") for word in fake.ran)


def test_files_count_by_content_and_a_failure_by_all_there_is(fake: Child, tmp_path: Path) -> None:
    def own(file: Path, *words: str) -> int:
        data = ["data=commonsense", f"data.train={file}", "data.valid_size=2"]
        return start(fake, *data, *words)

    first, moved = tmp_path / "a.json", tmp_path / "b.json"
    rows = [
        {"instruction": f"1 + 1 of {i}?", "input": "", "answer": "true", "output": "true"}
        for i in range(6)
    ]
    first.write_text(json.dumps(rows))
    moved.write_bytes(first.read_bytes())
    assert own(first) == 0 and len(fake.ran) == 3
    assert own(moved) == 0 and fake.ran == []
    moved.write_text(moved.read_text().replace("1 + 1", "1 + 2"))
    assert own(moved) == 0 and len(fake.ran) == 3
    assert own(first, "data.on_error=skip") == 0 and len(fake.ran) == 3, "it decides the rows"
    fake.codes["lora/lr=2,seed=0"] = [2]
    fake.said = "scalepeft: error: no room"
    prompt = "data.prompt={instruction}"
    assert own(first, prompt) == 0 and len(fake.ran) == 3
    assert own(first, prompt) == 0 and fake.ran == [], "a mistake would come again"
    assert own(first, prompt, "train.micro_batch=2") == 0
    again = [f"train lora/lr=2,seed={seed} --resume-with-changes" for seed in (0, 1)]
    assert fake.ran == again, "tried under another config, it was the better rate"


def summary(*rows: tuple[str, float, int]) -> dict[str, Any]:
    found = result_of([(m, 8, 1.0, loss, 0.1) for m, loss, _ in rows])
    for row, (_, _, have) in zip(found["methods"], rows, strict=True):
        row |= {"seeds": list(range(have)), "wanted": 3}
    return found


def test_a_method_that_lost_a_seed_says_so_and_stands_behind() -> None:
    _, *found = table.body(summary(("a", 0.1, 2), ("b", 0.3, 3), ("c", 0.2, 3)), "lora")
    assert [row[0] for row in found] == ["c", "b", "a (2 of 3 seeds)"]


def test_without_the_reference_there_is_no_column_of_differences() -> None:
    names = ["hoft", "shoft"]
    methods = [design.Method(n, {}, 1.0, [1.0]) for n in names]
    values = {"train": {"global_batch": 4}, "data": {"valid_size": 16}}
    given = design.Design(values, methods, "x1", 0, [1, 2], "steps", None, "lora", True, {})
    found = summary(("hoft", 0.1, 3), ("shoft", 0.2, 3))
    for row in found["methods"]:
        row |= {"metric": "accuracy", "score": 0.5, "score_ci": 0.1, "share": True}
    header, *body = table.body(found, "lora")
    assert header[3:5] == ["held-out loss", "accuracy"]
    assert {len(row) for row in body} == {len(header)} and body[0][4] == "50.00 ± 10.00 %"
    said = table.render(found, given, "terminal")
    assert "the reference, lora, is not among the methods" in said
    assert "holds less of it" in said and "the interval of a score is over the seeds alone" in said
    found["methods"][0]["difference"] = {"mean": 0.1, "ci": None, "seeds": 1}
    del found["methods"][1]["loss"]
    header, *body = table.body(found, "lora")
    assert header[4] == "less lora's" and {len(row) for row in body} == {len(header)}
    assert body[0][4] == "+0.1000" and set(body[1][2:]) == {"-"}


def test_the_table_of_an_empty_folder_says_what_lacks(fake: Child) -> None:
    with pytest.raises(UserError) as found:
        start(fake, "--table")
    text = "0 of 1 seeds; the sweep lacks lr 1 (not run yet), lr 2 (not run yet)"
    assert str(found.value) == f"no method has a result: {text}"


def compared(folder: Path, budget: str, losses: dict[str, list[float]]) -> None:
    """A compare.json of lora and others with these losses under the seeds 1 and 2."""
    names = list(losses)
    parameters = {name: 100 * (i + 1) for i, name in enumerate(names)}
    methods = [
        design.Method(n, {"name": n.partition("-")[0]}, 1.0, [1.0], parameters[n], "rank=4")
        for n in names
    ]
    values = {
        "model": {"path": "base"}, "data": {"name": "toy", "valid_size": None},
        "train": {"max_steps": 20, "global_batch": 8},
    }  # fmt: skip
    given = design.Design(values, methods, "x1", 0, [1, 2], budget, 100, "lora", False, {})

    class Known(cells.Runner):
        def result(self, cell: cells.Cell) -> dict[str, Any]:
            loss = losses[cell.method][cell.seed - 1]
            return {
                "state": "done", "lr": 0.5, "loss": loss, "rows": 16, "steps": 20, "seconds": 1.0,
                "tokens_per_second": 9.0, "peak_memory": None, "memory": "resident", "ranks": 1,
                "device": "CPU", "versions": {"torch": "2"}, "parameters": parameters[cell.method],
                "digest": f"{cell.seed}:{cell.method}".encode().hex(), "wall": 1.0,
            }  # fmt: skip

    folder.mkdir(parents=True)
    compare._finish(Known(folder, given, StopFlag()))


def test_the_league_is_what_its_comparisons_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared(tmp_path / "all/a", "parameters", {"lora": [1.0, 2.0], "hut": [1.3, 2.1]})
    compared(tmp_path / "all/b", "parameters", {"lora": [3.0, 3.2], "hut": [2.5, 2.7]})
    sizes = {"lora": [1.0, 1.1], "lora-2": [0.9, 0.8]}
    compared(tmp_path / "all/c", "steps", sizes)
    assert main(["compare", "--league", str(tmp_path / "all"), "--out", str(tmp_path / "d")]) == 0
    page = (tmp_path / "d/league.md").read_text()
    # a: 0.3 and 0.1, s = 0.141421, 12.706 * s / sqrt(2) = 1.2706. b: twice -0.5. Mean: below zero.
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows[:4] == [
        "| method | a | b |",
        "|---|---:|---:|",
        "| hut | +0.2000 ± 1.2706 | **-0.5000** ± 0.0000 |",
        "| lora | 1.5000 | 3.1000 |",
    ]
    for line in (
        "| hut | 200 | 0.5 | 1.7000 ± 5.0825 | +0.2000 ± 1.2706 |",
        "| lora-2 | 200 | 0.5 | 0.8500 ± 0.6353 | -0.2000 ± 1.2706 |",
        f"| lora-2 | 0.5 | 0.9000 `{b'1:lo'.hex()}` | 0.8000 `{b'2:lo'.hex()}` |",
    ):
        assert line in rows, page
    assert "20 steps of 8 rows" in page
    for name in ("league.png", "league-sizes.png"):
        assert f"]({name})" in page
        assert (tmp_path / "d" / name).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["compare", "--league", str(tmp_path), "--out", str(tmp_path / "d")]) == 2
    assert "no */compare.json in it" in capsys.readouterr().err
    older = json.loads((tmp_path / "all/a/compare.json").read_text())
    for cell in older["cells"]:  # of a comparison from before there were digests
        del cell["digest"]
    (tmp_path / "all/a/compare.json").write_text(json.dumps(older))
    assert main(["compare", "--league", str(tmp_path / "all"), "--out", str(tmp_path / "d")]) == 0
    assert "| hut | 0.5 | 1.3000 `-` | 2.1000 `-` |" in (tmp_path / "d/league.md").read_text()
    (tmp_path / "design.json").write_text(json.dumps(older["design"]))
    text = table.render(older, design.Design.read(tmp_path / "design.json"), "markdown")
    assert "* hut: 1 `-` 1.3000; 2 `-` 2.1000" in text
    (tmp_path / "all/a/compare.json").write_text("{}")
    assert main(["compare", "--league", str(tmp_path / "all"), "--out", str(tmp_path / "d")]) == 2
    assert "a/compare.json: no result of a comparison; run" in capsys.readouterr().err
    (tmp_path / "all/a/compare.json").write_text("{")
    assert main(["compare", "--league", str(tmp_path / "all"), "--out", str(tmp_path / "d")]) == 2
    assert "compare.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):  # it sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    script = ModuleType("__main__")  # of a user who calls scalepeft.cli.main at its top level
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text("raise SystemExit(8)")
    monkeypatch.setitem(sys.modules, "__main__", script)
    log, stop = tmp_path / "log", StopFlag()
    run = [*RUN, "adapter=lora", "train.max_steps=100000", f"run_dir={tmp_path}/run"]
    assert cells.run_child(["config", *run], log, stop) == 0
    assert sys.modules["__main__"] is script
    assert "builtin:tiny" in log.read_text(), "what it prints goes to its log"
    assert cells.run_child(["config", *run, "model=none"], log, stop) == 2
    state, reason = cells.failure_reason(2, log, 0)
    assert state == "failed" and "none" in reason
    with ThreadPoolExecutor() as pool:
        for number, end in ((signal.SIGKILL, -9), (signal.SIGTERM, "stops")):
            ending = pool.submit(cells.run_child, ["train", *run], log, stop)
            deadline = time.monotonic() + 60
            held = tmp_path / f"run/holder-{1 + (end == 'stops')}.json"
            while not held.is_file() and time.monotonic() < deadline:
                time.sleep(0.05)
            pid = json.loads(held.read_text())["pid"]
            assert pid != os.getpid() and os.getsid(pid) == pid
            if end == "stops":
                server = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if server != os.getpid():  # a signal to a process group ends it too
                    os.kill(server, number)
                    time.sleep(0.5)
                    assert not ending.done()
                stop.signal = number
                with pytest.raises(Stopping):
                    ending.result()
            else:
                os.kill(pid, number)
                assert ending.result() == end
    assert held.read_text() == "{}\n", "saved and given back"


@pytest.mark.slow
def test_a_comparison_in_which_some_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "run_child", warm)
    lora = "adapter: {name: lora, rank: 4, target_modules: [q_proj]}\ntrain: {lr: 1.0e+30}\n"
    (tmp_path / "wild.yaml").write_text(lora)
    odd = "adapter: {name: oft, block_size: 7}\ntrain: {lr: 1.0e-3}\n"
    (tmp_path / "odd.yaml").write_text(odd)
    methods = f"hoft,lora,{tmp_path}/wild.yaml,{tmp_path}/odd.yaml"
    out = tmp_path / "out"
    words = ["compare", *RUN, "--methods", methods, "--budget", "steps", "--lrs", "x1,x10"]
    words += ["--seeds", "2", "--out", str(out)]
    stop = StopFlag()

    def run(*more: str) -> str:
        assert compare.run(options_of([*words, *more]), stop) == 0
        return capsys.readouterr().out

    printed = run()
    found = json.loads((out / "compare.json").read_text())
    method = {row["method"]: row for row in found["methods"]}
    for label in ("hoft", "lora"):
        own = [c for c in found["cells"] if c["method"] == label]
        assert [c["seed"] for c in own] == [1, 2]
        folders = [out / "cells" / label / f"lr={c['lr']:g},seed={c['seed']}" for c in own]
        held_out = [rows(f, "validation.jsonl")[-1]["loss"] for f in folders]
        assert [c["loss"] for c in own] == held_out
        assert method[label]["loss"] == pytest.approx(sum(held_out) / 2)
        files = [f / "adapter/adapter_model.safetensors" for f in folders]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        assert [c["digest"] for c in own] == digests and len(set(digests)) == 2
        tensors = load_file(folders[0] / "adapter" / "adapter_model.safetensors")
        assert method[label]["parameters"] == sum(t.numel() for t in tensors.values())
        sweep = {c["lr"]: c["loss"] for c in found["sweep"] if c["method"] == label}
        assert own[0]["lr"] == min(sweep, key=sweep.__getitem__)
        assert own[0]["peak_memory"] > 50 * 2**20 and own[0]["memory"] == "resident"
    assert "loss" not in method["wild"] and "loss" not in method["odd"]
    assert "diverged: loss or gradient was not finite" in " ".join(method["wild"]["notes"])
    assert "not run: " in method["odd"]["notes"][0] and "block_size" in method["odd"]["notes"][0]
    gap = [a["loss"] - b["loss"] for a, b in zip(*(
        [c for c in found["cells"] if c["method"] == m] for m in ("hoft", "lora")
    ), strict=True)]  # fmt: skip
    assert method["hoft"]["difference"]["mean"] == pytest.approx(sum(gap) / 2)
    assert re.search(rf"hoft +{method['hoft']['parameters']:,} +0.002 ", printed)
    assert "best rate is the highest of the sweep" in printed
    page = (out / "compare.md").read_text()
    assert "| hoft |" in page and f" 2 `{own[1]['digest'][:8]}`" in page

    def nothing(*_: object) -> int:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cells, "run_child", nothing)
    assert run() == printed
    words = ["compare", "--out", str(out)]
    assert run() == printed, "the folder alone knows what is compared"
    monkeypatch.setattr(cells, "run_child", warm)
    words = ["compare", *RUN, "--methods", "lora", "--budget", "steps", "--lrs", "1e-3"]
    words += ["--out", str(out), "--seeds", "1"]
    run("data.train_size=100")
    run("data.train_size=120")
    kept = list(out.glob("cells/lora/replaced-*/lr=*/training.json"))
    assert len(kept) == 1, "a changed config sets a cell aside"


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.full
def test_killed_and_stopped_it_ends_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ["train.max_steps=40", "train.save_every=2"]
    words = ["compare", *RUN, *steps, "--methods", "hoft", "--lrs", "3e-3", "--seeds", "1"]
    name = "cells/hoft/lr=0.003,seed=1"
    folder = tmp_path / "disturbed" / name

    def start(at_step: int) -> Any:
        process = zygote().start(
            ("-m", "scalepeft"), [*words, "--out", str(tmp_path / "disturbed")], dict(os.environ)
        )
        deadline = time.monotonic() + 120
        file = folder / "metrics.jsonl"
        while not file.is_file() or len(file.read_bytes().splitlines()) < at_step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    start(5).send_signal(signal.SIGKILL)
    os.kill(json.loads((folder / "holder-1.json").read_text())["pid"], signal.SIGKILL)
    stopped = start(15)
    stopped.send_signal(signal.SIGTERM)
    text, _ = stopped.communicate(60)
    assert stopped.returncode == 75, text
    assert "the same command goes on" in text
    assert (folder / "holder-2.json").read_text() == "{}\n", "the child has saved and ended"
    done = call(*words, "--out", str(tmp_path / "disturbed"))
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(cells, "run_child", warm)
    options = options_of([*words, "--out", str(tmp_path / "whole")])
    assert compare.run(options, StopFlag()) == 0
    assert losses(folder) == losses(tmp_path / "whole" / name)
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole" / name)
    ends = [json.loads((tmp_path / w / "compare.json").read_text()) for w in ("disturbed", "whole")]
    assert ends[0]["cells"][0]["loss"] == ends[1]["cells"][0]["loss"]
    starts = [e for e in rows(folder, "events.jsonl") if e["event"] == "start"]
    assert len(starts) == 3, "killed, stopped, ended"


@pytest.mark.slow
def test_answers_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "run_child", warm)
    words = ["compare", *RUN, "--methods", "lora", "--budget", "steps", "--evaluate"]
    words += ["--lrs", "1e-3", "--seeds", "1", "--out", str(tmp_path)]
    words += ["data.test_size=8", "evaluate.max_new_tokens=4"]
    assert compare.run(options_of(words), StopFlag()) == 0
    (file,) = tmp_path.glob("cells/lora/lr=*/eval/toy/scores.json")
    share = json.loads(file.read_text())["metrics"]["accuracy"]["value"]
    (method,) = json.loads((tmp_path / "compare.json").read_text())["methods"]
    assert method["metric"] == "accuracy" and method["score"] == share
    assert f"{100 * share:.2f} %" in capsys.readouterr().out
    (holder,) = tmp_path.glob("cells/lora/lr=*/holder*.json")
    assert holder.read_text() == "{}\n"
