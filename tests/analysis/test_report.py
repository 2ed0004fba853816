"""scalepeft report: what it says against the files it read, and what cannot break it."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from processes import ROOT, TINY

from scalepeft.analysis.report import command as report
from scalepeft.analysis.report import figures, load, render, scores
from scalepeft.cli import main
from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core import stats
from scalepeft.core.errors import UserError
from scalepeft.core.text import visible
from scalepeft.run import provenance as started

VOID = {"meta", "img", "br", "path", "use", "rect"}


SETTINGS = [*TINY, "train.max_steps=60", "train.eval_every=20", "data.valid_size=20"]


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.pre: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "pre" in self.open:
            self.pre[-1] += data


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metric(value: float) -> dict[str, Any]:
    return {"value": value, "ci95": [value - 0.05, value + 0.05], "share": True}


def evaluated(run: Path, sub: str, value: float, rows: list[dict[str, Any]], **about: Any) -> None:
    part = {"count": len(rows), "no_answer_found": 1, "metrics": {"accuracy": metric(value)}}
    sources = dict.fromkeys(sorted({row["source"] for row in rows}), part)
    found = {**part, "headline": "accuracy", "sources": sources, "step": 60, "prompts_cut": 3}
    if len(sources) > 1:
        found["mean_of_sources"] = {"accuracy": value + 0.01}
    folder = run / sub / "toy"
    lines(folder / "scored.jsonl", rows)
    (folder / "scores.json").write_text(json.dumps(found))
    (folder / "settings.json").write_text(json.dumps({"examples": "e", "prompt": "p", **about}))


def row(number: int, source: str = "s", **more: Any) -> dict[str, Any]:
    texts = {"prompt": f"question {number}", "expected": "answer1", "prediction": f"said {number}"}
    verdict = {"extracted": "answer1", "correct": number % 2 == 0, "strict": None}
    return {"id": f"{source}#{number}", "source": source, **texts, **verdict, **more}


def make(folder: Path, *settings: str, steps: int = 60) -> Path:
    """A finished run, restarted at step 30 on one rank instead of two."""
    folder.mkdir(parents=True)
    built, _ = config_files.load(None, [*SETTINGS, *settings, f"run_dir={folder}"])
    (folder / "config.yaml").write_text(config.dump(built))
    start = {"event": "start", "startup": 5.0, "load": 10.0, "steps": steps, "engine": "ddp"}
    ranks = [{"host": "n1", "device": "Some GPU"}, {"host": "n2", "device": "Some GPU"}]
    events = [
        {**start, "time": 15.0, "launched": 0.0, "step": 0, "world_size": 2, "per_rank": ranks},
        {**start, "time": 115.0, "launched": 100.0, "step": 30, "world_size": 1, "waited": 25.0,
         "recomputed": 2.0, "recomputed_steps": 2, "per_rank": ranks[:1],
         "versions": {"torch": "9.8.7"}, "commit": "c0ffee"},
        {"event": "finished", "time": 200.0, "step": steps, "planned": False},
    ]  # fmt: skip
    lines(folder / "events.jsonl", events)
    rows = [
        {"step": i, "loss": 2 - i / steps, "lr": 1e-3, "grad_norm": 0.5, "seconds": 1.0,
         "sample_index": 4 * i, "tokens_per_second": 100.0 + i % 7, "time": 20.0 + i}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    lines(folder / "metrics.jsonl", rows)
    held = [{"step": s, "loss": 2 - s / 100, "rows": 20, "seconds": 0.1} for s in (20, 40, 60)]
    lines(folder / "validation.jsonl", held)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make(tmp_path_factory.mktemp("report") / "run")
    rows = [row(i, source) for source in ("easy", "hard") for i in range(1, 31)]
    evaluated(run, "eval", 0.7, rows)
    evaluated(run, "eval-base", 0.3, [{**r, "prediction": "base said"} for r in rows])
    return run


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are drawn, and not written out: that is what takes the time."""

    def png(plot: Callable[[], Any]) -> bytes:
        plt.close(plot())
        return b"png"

    monkeypatch.setattr(figures, "png", png)


def built(*runs: Path) -> tuple[Page, str]:
    """The page and the Markdown of runs."""
    context = render.context(load.read_all(list(runs)))
    return Page(render.render(context, "html")), render.render(context, "markdown")


def test_one_run_is_one_file_and_the_same_as_markdown(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    files = report.write(load.read_all([run]))
    names = {str(f.relative_to(run)) for f in files}
    plots = {"report/curves.png"}
    assert names == {"report.html", "report.md", *plots} and all(f.is_file() for f in files)
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 1 and "script" not in page.tags and len(text) < 700_000
    links = {name: [v for n, v in page.attributes if n == name] for name in ("href", "src", "id")}
    assert links["href"] and {link[1:] for link in links["href"]} <= set(links["id"])
    assert all(link[0] == "#" for link in links["href"]), "nothing outside the file"
    assert len(links["id"]) == len(set(links["id"]))
    inline = {f"data:image/png;base64,{b64encode((run / p).read_bytes()).decode()}" for p in plots}
    assert set(links["src"]) == inline, "the plots of the Markdown, within the file"
    assert "url(" not in text and not any(name.startswith("on") for name, _ in page.attributes)
    assert "prefers-color-scheme: dark" in text
    colors = set(re.findall(r"#[0-9a-f]{6}\b", text[text.index("</style>") :]))
    assert not colors, "a color that does not follow light and dark"
    made = (run / "report.md").read_text()
    images = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", made)
    assert set(images) == plots and all((run / i).stat().st_size > 5000 for i in images)
    for said in (page.text, made.replace("\\", "")):
        for fact in (
            "70.0%", "65.0% to 75.0%", "+0.0 percentage points", "that may be chance", "71.0%",
            "hoft rank 4", "builtin:tiny in fp32", "ddp on 2 → 1 ranks", "1 x Some GPU",
            "torch 9.8.7", "c0ffee", "3 prompts were too long", "train.lr", "recomputed steps",
            "unweighted mean of 2 sources", "Right: 10 examples", "base said",
            "prediction, answer taken: answer1", "prediction of the base, wrong",
        ):  # fmt: skip
            assert fact in said, fact
    headings = re.findall(r"^## (.*)", made, re.M)
    assert headings == ["What this is", "Scores", "Training", "Where the time went", "Settings",
                        "Examples", "Origins"]  # fmt: skip


def counted(run: Path, **more: Any) -> None:
    """The summary of a pipeline's stage prepare; ``more`` is of the training rows."""
    rows = {"rows": 1234, "tokens": 98765, "learned": 4321, "cut": 3, "cutoff": 24, "padded": 0.5}
    train = {**rows, "histogram": {"edges": [0, 8, 16, 24], "counts": [0, 1200, 34]}, **more}
    valid = {**rows, "rows": 5, "histogram": {"edges": [0, 9, 18], "counts": [4, 1]}}
    splits = {"train": {"rows": 1236, "left_out": 7}, "test": {"rows": 77, "left_out": 0}}
    held = {**splits, "test_questions_in_train": 6, "tokens": {"train": train, "valid": valid}}
    (run / "data").mkdir(exist_ok=True)
    (run / "data/summary.json").write_text(json.dumps(held))


def test_the_rows_of_a_pipeline_are_a_section(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    counted(run)
    held = load.read(run, "run")
    files = {f.name: f.read_bytes() for f in report.write([held])}
    page, made = Page(files["report.html"].decode()), files["report.md"].decode()
    assert re.findall(r"^## (.*)", made, re.M)[1:4] == ["Scores", "Data", "Training"]
    assert "#data" in [v for n, v in page.attributes if n == "href"]
    images = [v for n, v in page.attributes if n == "src"]
    inline = [b64encode(files[f"{n}.png"]).decode() for n in ("lengths", "curves")]
    assert images == [f"data:image/png;base64,{content}" for content in inline]
    assert re.findall(r"\]\((.*)\)", made) == ["report/lengths.png", "report/curves.png"]
    for row in (
        ["", "train", "valid", "test"], ["rows", "1,234", "5", "77"],
        ["broken rows left out", "7", "", "0"], ["questions that train has too", "", "", "6"],
        ["learned tokens", "4,321", "4,321", ""], ["real tokens of padded rows", "50.0%"],
    ):  # fmt: skip
        assert f"\n| {' | '.join(row)} |" in made and "".join(row) in page.text, row
        assert re.search(r" +".join(filter(None, row)), report.table(held)), row
    figure = figures.lengths(held.data)
    assert [axes.get_title() for axes in figure.axes] == ["train", "valid"]
    values, edges, _ = figure.axes[0].patches[0].get_data()  # type: ignore[attr-defined]
    assert list(values) == [0, 1200, 34] and list(edges) == [0, 8, 16, 24]
    assert [list(axes.lines[0].get_xdata()) for axes in figure.axes] == [[24, 24]] * 2
    assert figure.axes[1].get_xlabel() == "tokens a row (dashed: data.cutoff = 24)"
    held.data["train"]["cutoff"] = 4096  # a line there would press the rows into a corner
    far = figures.lengths(held.data)
    assert not far.axes[0].lines and far.axes[1].get_xlabel().endswith("(data.cutoff = 4,096)")
    plt.close(figure)
    plt.close(far)


KINDS = {"self_attn.q_proj": 1.0, "mlp.up_proj": 2.0}


def moved(run: Path, *steps: int) -> None:
    """Three layers of two kinds, the last of which moves most."""
    rows = [
        {"step": s, "layers": {
            f"model.layers.{i}.{kind}": {
                "angle": by * s + i, "distance": by / 100, "spectrum": 1e-8, "energy": -i / 1000
            } for i in range(3) for kind, by in KINDS.items()
        }} for s in steps
    ]  # fmt: skip
    lines(run / "diagnostics.jsonl", rows)


def test_how_far_layers_moved_is_a_picture(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    moved(run, 20, 40, 60)
    held = load.read(run, "run")
    files = {f.name: f.read_bytes() for f in report.write([held])}
    images = [v for n, v in Page(files["report.html"].decode()).attributes if n == "src"]
    inline = [b64encode(files[f"{n}.png"]).decode() for n in ("curves", "moved")]
    assert images == [f"data:image/png;base64,{content}" for content in inline]
    assert re.findall(r"\]\((.*)\)", files["report.md"].decode()) == [
        "report/curves.png", "report/moved.png",
    ]  # fmt: skip
    figure = figures.moved([held])
    angle, distance, spectrum, energy = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] == ["q_proj", "up_proj"]
    for axes, wanted in ((angle, [21, 41, 61]), (distance, [0.01] * 3), (energy, [-0.001] * 3)):
        assert np.allclose(axes.lines[0].get_data(), [[20, 40, 60], wanted]), "medians over layers"
    band = angle.collections[1].get_paths()[0].get_extents()
    assert np.allclose([band.x0, band.x1, band.y0, band.y1], [20, 60, 40, 122]), "least to most"
    assert spectrum.get_ylim() == (pytest.approx(0, abs=1e-8), 1e-4), "rounding looks like none"
    assert energy.get_ylim()[0] < -0.002 and angle.get_ylim()[0] == 0
    plt.close(figure)
    other = make(tmp_path / "other")
    moved(other, 10, 20)
    both = figures.moved(load.read_all([run, other]))
    assert [text.get_text() for text in both.legends[0].texts] == ["run", "other"]
    assert np.allclose(both.axes[0].lines[1].get_data(), [[10, 20], [16, 31]]), "over all layers"
    plt.close(both)


@pytest.mark.usefixtures("unsaved")
def test_damaged_measurements_are_left_out(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    moved(run, 20, 40)
    good = (run / "diagnostics.jsonl").read_text()
    bad = [
        {"step": 50}, {"step": "x", "layers": {}}, {"step": 51, "layers": [1]},
        {"step": 52, "layers": {}}, {"step": 53, "layers": {"a.q_proj": 7, "": {"angle": None}}},
        {"step": 54, "layers": {"$_<b>.q_proj": {"angle": "x", "distance": float("nan")}}},
        {"step": 55, "layers": {"a.q_proj": {"angle": 10**400, "spectrum": [1], "energy": {}}}},
    ]  # fmt: skip
    lines(run / "diagnostics.jsonl", bad)
    for text in ("", '{"step": 60, "layers": {"a.q_p'):
        with (run / "diagnostics.jsonl").open("a") as f:
            f.write(text)
        built(run)  # none that is whole
    (run / "diagnostics.jsonl").write_text((run / "diagnostics.jsonl").read_text() + "\n" + good)
    page, made = built(run)
    assert page.tags.count("img") == 2 and "report/moved.png" in made
    figure = figures.moved(load.read_all([run]))
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[20, 40]] * 2
    plt.close(figure)


@pytest.mark.usefixtures("unsaved")
def test_a_summary_without_tokens_changes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(render.time, "strftime", lambda _: "now")
    held = load.read(run, "run")
    before = render.context([held])
    lines(run / "data/summary.json", [{"train": {"rows": 3}, "said": []}])
    after = render.context([dataclasses.replace(load.read(run, "run"), status=held.status)])
    for form in ("html", "markdown"):
        assert render.render(after, form) == render.render(before, form)


HOSTILE = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)> &amp; </pre></details>",
    "fence": "```\n# not a heading\n`````\n<b>",
    "controls": "a\x00b\x1b[31mred\x7f\r\n\ttab",
    "direction": "abc\u202edcba\u2066 שלום مرحبا",
    "emoji": "👩‍👩‍👧 🇸🇮 é",
    "surrogate": "\ud83d alone",
    "long": "x" * 1_000_000,
    "lines": "y\n" * 20_000,
    "empty": "",
}


@pytest.mark.usefixtures("unsaved")
def test_what_a_model_wrote_stays_text(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "<b>$x_1$ & _run")
    rows = [
        row(2 * i + wrong, name, prompt=text, prediction=text, extracted=text[:500])
        for i, (name, text) in enumerate(HOSTILE.items())
        for wrong in (0, 1)
    ]
    evaluated(run, "eval", 0.5, rows)
    evaluated(run, "eval-base", 0.5, rows)
    page, made = built(run)
    assert not {"script", "b", "image"} & set(page.tags)
    assert all(v.startswith("data:image/png") for n, v in page.attributes if n == "src")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    shown = set(page.pre)
    for name in ("markup", "fence", "emoji"):
        assert HOSTILE[name] in shown, name
    assert "a␀b␛[31mred␡\n\ttab" in shown and "abc[U+202E]dcba[U+2066] שלום مرحبا" in shown
    assert "\ufffd alone" in shown and any(p.startswith("xxx") for p in shown)
    assert "<b>$x_1$ & _run" in page.text
    assert max(map(len, shown)) < 10_000 and len(page.text) < 700_000
    made.encode()
    fenced = re.findall(r"^(`{3,})text\n(.*?)\n\1$", made, re.S | re.M)
    assert HOSTILE["fence"] in [text for _, text in fenced]
    outside = re.sub(r"^(`{3,})text\n(.*?)\n\1$", "", made, flags=re.S | re.M)
    assert not re.search(r"<script|<b>|<img|^# not", outside, re.M)


def torn(run: Path) -> None:
    for name in ("metrics", "events", "validation"):
        with (run / f"{name}.jsonl").open("a") as f:
            f.write('{"step": 61, "lo')


def begun(run: Path) -> None:
    for name in ("metrics.jsonl", "validation.jsonl", "eval", "eval-base"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines(run / "events.jsonl", [json.loads((run / "events.jsonl").read_text().split("\n")[0])])


def older(run: Path) -> None:
    lines(run / "events.jsonl", [{"event": "start", "time": 1.0, "step": 0, "world_size": 1}])
    rows = [{"step": i, "loss": 1.0, "sample_index": i} for i in (1, 2)]
    lines(run / "metrics.jsonl", rows)
    (run / "config.yaml").write_text("adapter: {name: gone, size: 3}\ndata: {name: toy}\n")
    (run / "eval/toy/scores.json").write_text('{"accuracy": 0.5, "ci95": [0, 1]}')


def not_finite(run: Path) -> None:
    bad = [None, float("nan"), "text", 10**400]
    rows = [{"step": i, "loss": bad[i % 4], "sample_index": i} for i in range(1, 9)]
    lines(run / "metrics.jsonl", rows)
    lines(run / "validation.jsonl", [{"step": 2, "loss": None}, {"step": 4, "loss": float("inf")}])


def no_config(run: Path) -> None:
    (run / "config.yaml").write_bytes(b"\xff\xfe")


def bad_scores(run: Path) -> None:
    (run / "eval/toy/scores.json").write_text('{"metrics": {"a": 1}, "headline": "a"}')
    (run / "eval/toy/predictions.jsonl").write_text("{}\n{}\n")
    shutil.copytree(run / "eval-base/toy", run / "eval-base/toy.old-1")


def no_rows(run: Path) -> None:
    evaluated(run, "eval", 0.0, [])


def bad_checkpoint(run: Path) -> None:
    (run / "checkpoints/step-000060").mkdir(parents=True)


def torn_summary(run: Path) -> None:
    counted(run)
    (run / "data/summary.json").write_text((run / "data/summary.json").read_text()[:200])


def foreign_summary(run: Path) -> None:
    lines(run / "data/summary.json", [{"tokens": 5}])


def other_counts(run: Path) -> None:
    counted(run, rows="<b>many</b>")


def other_histogram(run: Path) -> None:
    counted(run, histogram={"edges": [0, "8"], "counts": [float("inf")]})


def no_cutoff(run: Path) -> None:
    counted(run, cutoff=None)


@pytest.mark.usefixtures("unsaved")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (torn, ["step 60 of 60", "70.0%"]),
        (begun, ["no step was made yet", "Nothing was evaluated yet"]),
        (older, ["written by another version", "not compared with the defaults", "no figures"]),
        (not_finite, ["8 steps were skipped", "step 1, 2, 3"]),
        (no_config, ["config.yaml: cannot be read", "unknown method", "70.0%"]),
        (bad_scores, ["scores.json: damaged", "2 predictions there", "30.0%"]),
        (no_rows, ["No scored rows", "must not be compared: they differ in rows"]),
        (torn_summary, ["summary.json: cannot be read", "70.0%"]),
        (foreign_summary, ["summary.json: damaged, or of another version", "70.0%"]),
        (other_counts, ["summary.json: damaged, or of another version (ValueError)", "70.0%"]),
        (other_histogram, ["summary.json: damaged, or of another version (ValueError)"]),
        (no_cutoff, ["summary.json: damaged, or of another version (ValueError)", "70.0%"]),
        (bad_checkpoint, ["step-000060 does not verify: no manifest.json"]),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_a_broken_run_is_named_and_the_rest_shown(
    damage: Callable[[Path], None], said: list[str], finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run)
    page, made = built(run)
    for text in said:
        assert text in page.text and text in made.replace("\\", ""), text
    assert "old-1" not in page.text
    report.table(load.read(run, "run"))


@pytest.mark.slow
@pytest.mark.full
def test_a_long_run_stays_small(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=200_000)
    long = load.read(run, "run")
    assert len(long.columns["step"]) == 200_000
    assert len(render.render(render.context([long]), "html")) < 1_000_000


def test_a_long_curve_loses_no_peak(finished: Path) -> None:
    steps = np.arange(200_000.0)
    values = np.random.default_rng(0).normal(2, 0.1, len(steps))
    values[[77_777, 5]] = 9.0, np.nan
    columns = dict.fromkeys(load.COLUMNS, values) | {"step": steps}
    run = dataclasses.replace(load.read(finished, "run"), columns=columns)
    figure = figures.curves([run])
    x, y = figure.axes[0].lines[0].get_data()
    plt.close(figure)
    assert np.max(y) == 9.0 and x[np.argmax(y)] == 77_777
    assert np.isfinite(y).all() and (np.diff(x) > 0).all()
    assert len(figures.png(lambda: figures.curves([run]))) < 200_000


def test_smoothing_is_a_mean_of_what_is_finite() -> None:
    values = np.random.default_rng(0).normal(size=200)
    values[[0, 50, 51, 199]] = np.nan
    means, width = figures.smooth(values)
    assert width == 5
    for i in range(200):
        window = values[max(0, i - 2) : i + 3]
        assert means[i] == pytest.approx(np.mean(window[np.isfinite(window)]))


@pytest.mark.usefixtures("unsaved")
def test_several_runs_are_compared(finished: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "run", "adapter.rank=8", "train.lr=1e-4")  # named as the first
    evaluated(other, "eval", 0.6, [row(i) for i in range(10)], examples="others")
    page, made = built(finished, other)
    assert "2 of " in page.text and " settings differ between the runs" in page.text
    assert re.findall(r"^\| (adapter\S+|train\S+) \|.*", made.replace("\\", ""), re.M) == [
        "adapter.rank", "train.lr",
    ]  # fmt: skip
    assert f"{other}, tuned: differs from" in page.text and "in rows: not to be" in page.text
    scores = re.findall(r"^\| all rows \| .*, tuned \|.*", made, re.M)
    assert len(scores) == 2 and "70.0%" in scores[0] and "60.0%" in scores[1]
    assert str(finished) in page.text and str(other) in page.text
    assert "their losses must not be compared" not in page.text
    third = make(tmp_path / "third", "train.seed=5")
    assert "their losses must not be compared" in built(finished, third)[0].text
    assert len(load.read_all([finished, finished / ".." / "run"])) == 1


@pytest.mark.usefixtures("unsaved")
def test_nothing_is_written_by_halves(finished: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"nothing is no run folder.*metrics\.jsonl"):
        report.write(load.read_all([finished, nothing]), out)
    assert not out.exists()
    (out / "report.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"report\.html: cannot be written.*--out"):
        report.write(load.read_all([finished]), out)
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]


def test_examples_are_the_same_each_time_and_of_every_source(finished: Path) -> None:
    (_, right), (_, wrong) = first = scores.choose(finished / "eval/toy")
    assert first == scores.choose(finished / "eval/toy")
    assert [r["correct"] for r in (*right, *wrong)] == [True] * 10 + [False] * 10
    for rows in (right, wrong):
        assert [r["source"] for r in rows] == ["easy", "hard"] * 5
    digest = {i: hashlib.sha256(f"easy#{i}".encode()).hexdigest() for i in range(2, 31, 2)}
    assert right[0]["id"] == f"easy#{min(digest, key=lambda i: digest[i])}"


@pytest.mark.usefixtures("unsaved")
def test_comet_is_shown_where_it_is_of_these_texts(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    place = run / "eval/toy"
    held = json.loads((place / "scores.json").read_text())
    bleu = {"value": 31.26, "ci95": [30, 32], "share": False, "signature": "BLEU|tok:13a"}
    for part in (held, *held["sources"].values()):
        part["metrics"] = {"BLEU": bleu}
    held |= {"headline": "BLEU", "mean_of_sources": {"BLEU": 31.0}}
    (place / "scores.json").write_text(json.dumps(held))
    text = built(run)[0].text
    assert "not computed" in text and "BLEU: BLEU|tok:13a" in text and "31.26 (30.00" in text
    (place / "comet").mkdir()
    for name in ("src.txt", "mt.txt", "ref.txt"):
        (place / "comet" / name).write_text(name)
    known = hashlib.sha256(b"src.txt\0mt.txt\0ref.txt").hexdigest()
    found = {"score": 85.25, "ci95": [84.0, 86.5], "rows": 60, "model": "wmt22-comet-da",
             "version": "2.2.7", "sources": {"easy": 86.0, "hard": 84.5}}  # fmt: skip
    (place / "comet.json").write_text(json.dumps({**found, "texts": known}))
    text = built(run)[0].text
    for fact in ("85.25 (84.00 to 86.50)", "86.00", "COMET: wmt22-comet-da, unbabel-comet 2.2.7"):
        assert fact in text, fact
    (place / "comet.json").write_text(json.dumps({**found, "texts": "of others"}))
    text = built(run)[0].text
    assert "comet.json: is of other translations" in text and "85.25" not in text


@pytest.mark.usefixtures("unsaved")
def test_the_command_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make(tmp_path / "other")
    assert main(["report", str(finished), str(other), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "report: " in said and said.count("steps 60, samples 240") == 2
    assert (tmp_path / "out/report.html").is_file() and not (other / "loss.png").exists()


def test_visible_text() -> None:
    assert visible("a\u2028b\x85") == "a\nb[U+0085]"
    assert render.line("1. <x> *a* [b](c)\n\n# d") == r"1\. &lt;x&gt; \*a\* \[b\](c) \# d"
    assert render.line("- a\x1b") == r"\- a␛"


def test_a_start_writes_down_what_it_ran_with() -> None:
    import torch

    found = started.versions("torch", "no-such-library")
    assert found["torch"] == torch.__version__ and found["no-such-library"] == "not installed"
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("this checkout has no git")
    assert str(started.commit()).removesuffix("+changes") == head.stdout.strip()
    assert started.device_name(torch.device("cpu"))


def test_a_paired_difference_is_that_of_the_same_rows(tmp_path: Path) -> None:
    """Against the definition; 3 rows right in the first alone, 1 in the second alone, of 20."""
    right = {"a": [1] * 13 + [0] * 7, "b": [1] * 10 + [0] * 9 + [1]}
    found = []
    for name, flags in right.items():
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {"id": f"s#{i}", "source": "s", "prompt": "", "expected": "", "prediction": "",
             "correct": bool(flag)} for i, flag in enumerate(flags)
        ]  # fmt: skip
        (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metric = {"value": sum(flags) / 20, "ci95": [0, 1], "share": True}
        held = {
            "headline": "accuracy",
            "count": 20,
            "metrics": {"accuracy": metric},
            "sources": {"s": {}},
        }
        found.append(load.Evaluation(name, "t", folder, held, {}, None))
    difference, low, high = scores.paired(*found) or (0.0, 0.0, 0.0)
    assert difference == pytest.approx(2 / 20)
    half = stats.Z * ((3 + 1 + 1 - 2**2 / 21) / 21**2) ** 0.5
    assert (low, high) == (pytest.approx(0.1 - half), pytest.approx(0.1 + half))
    (found[1].folder / "scored.jsonl").write_text("")
    assert scores.paired(*found) is None, "not the same rows"
