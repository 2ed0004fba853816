"""Generation against stock transformers, one prompt at a time; evaluations that are killed,
stopped, spread over ranks.
"""

import json
import os
import random
import resource
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finished import adapted, make_run, stock
from processes import Job, call, rows

from scalepeft.build import build
from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.config.schema import EvaluateConfig
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag
from scalepeft.data.rows import read_rows
from scalepeft.data.tasks.base import Example
from scalepeft.eval import evaluate, generation
from scalepeft.eval.predictions import Predictions
from scalepeft.export import merge
from scalepeft.models import hub
from scalepeft.models import hub as models
from scalepeft.parallel.ranks import Ranks

CPU = torch.device("cpu")


class Generator(generation.Generator):
    def __call__(self, prompts: list[str]) -> tuple[list[str], list[bool]]:
        """The text of each prompt, and which prompts lost their beginning."""
        found = sorted(answer for lot in self.stream(prompts) for answer in lot)
        return [text for _, text, _ in found], [cut for _, _, cut in found]


WORDS = (
    "Once upon a time there was little girl named Lily who loved to play with big red ball".split()
)


PROMPTS = [
    " ".join(random.Random(i).choices(WORDS, k=length))
    for i, length in enumerate((1, 40, 7, 23, 2, 61, 12))
]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K" / "hf"


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return models.load_tokenizer(hub.ModelConfig(), stories)


@pytest.fixture(scope="module")
def ours(stories: Path) -> Any:
    """The model as ``evaluate`` builds it."""
    return built(stories)


@pytest.fixture(scope="module")
def theirs(stories: Path) -> Any:
    return stock(stories)


def built(folder: Path) -> Any:
    values = {"run_dir": "-", "model": {"path": str(folder)}, "data": {"name": "toy"}}
    config = cfg.from_dict({**values, "train": {"max_steps": 1, "precision": "fp32"}})
    base = hub.open_base(config.model, Ranks())
    return build(config, base, Ranks(), lambda: None, adapted=False).model.eval()


def alone(model: Any, tokenizer: Any, prompt: str | list[int], **settings: Any) -> str:
    """Stock generate on one unpadded prompt; with the settings of LLM-Adapters' script."""
    from transformers import GenerationConfig

    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    config = GenerationConfig(
        temperature=0.1, top_p=0.75, top_k=40, eos_token_id=2, pad_token_id=0, **settings
    )
    out = model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :]
    return str(tokenizer.decode(out, skip_special_tokens=True))


def lengths_seen(model: Any, work: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The result of ``work``, and how many tokens of a row each forward in it was given."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        return work(), seen
    finally:
        handle.remove()


@pytest.mark.parametrize("beams", [1, 4])
def test_a_padded_batch_is_each_prompt_alone(
    beams: int, ours: Any, theirs: Any, tokenizer: Any
) -> None:
    settings = EvaluateConfig(num_beams=beams, max_new_tokens=32)
    generate = Generator(ours, tokenizer, settings, CPU, False)
    (texts, cut), seen = lengths_seen(ours, lambda: generate(PROMPTS))
    kwargs = {"num_beams": beams, "max_new_tokens": 32}
    assert texts == [alone(theirs, tokenizer, p, **kwargs) for p in PROMPTS]
    assert cut == [False] * len(PROMPTS) and len(set(texts)) == len(texts)
    longest = max(len(tokenizer(p)["input_ids"]) for p in PROMPTS)
    assert seen == [longest] + [1] * 31, "each forward but the first sees one new token"


def test_every_end_token_of_the_base_ends_an_answer(
    stories: Path, ours: Any, tokenizer: Any, tmp_path: Path
) -> None:
    settings = EvaluateConfig(max_new_tokens=8)
    generate = Generator(ours, tokenizer, settings, CPU, False)
    ids = tokenizer(PROMPTS[:1])["input_ids"]
    (whole,) = generate.generate(ids, [8])
    end = next(token for token in whole[3:] if token not in whole[:3])
    folder = Path(shutil.copytree(stories, tmp_path / "model"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, end, 10**6]}))
    base = hub.Base(hub.ModelConfig(path=str(folder)), folder)
    assert base.ends == [2, end]
    generate.ends = base.ends
    texts, _ = generate(PROMPTS[:1])
    assert texts == [tokenizer.decode(whole[: whole.index(end)], skip_special_tokens=True)]
    file.unlink()
    assert hub.Base(hub.ModelConfig(path=str(folder)), folder).ends == [2]
    file.write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        _ = hub.Base(hub.ModelConfig(path=str(folder)), folder).ends


def test_generation_settings_of_the_models_files_do_not_count(
    stories: Path, ours: Any, tokenizer: Any, tmp_path: Path
) -> None:
    hostile = {
        "temperature": 2.0, "do_sample": True, "top_k": 2, "repetition_penalty": 5.0,
        "max_length": 3, "max_new_tokens": 2, "min_length": 400, "num_beams": 3, "use_cache": False,
        "eos_token_id": [2, 261, 400, 401, 402], "forced_eos_token_id": 2,
        "suppress_tokens": [403, 404, 405], "no_repeat_ngram_size": 1, "length_penalty": 9.0,
        "bad_words_ids": [[406]], "cache_implementation": "static", "num_return_sequences": 2,
        "output_scores": True, "return_dict_in_generate": True, "early_stopping": True,
    }  # fmt: skip
    folder = Path(shutil.copytree(stories, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(hostile))
    old = json.loads((folder / "config.json").read_text())  # where such settings stood once
    legacy = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "use_cache": False}
    (folder / "config.json").write_text(json.dumps({**old, **legacy}))
    model = built(folder)
    model.generation_config.update(**hostile)
    for beams in (1, 2):
        settings = EvaluateConfig(num_beams=beams, max_new_tokens=12)
        wanted = Generator(ours, tokenizer, settings, CPU, False)(PROMPTS[:3])
        generate = Generator(model, tokenizer, settings, CPU, False)
        found, seen = lengths_seen(model, lambda generate=generate: generate(PROMPTS[:3]))
        assert found == wanted and seen[1:] == [1] * 11


def test_the_head_sees_the_last_token_of_a_prompt_alone(ours: Any, tokenizer: Any) -> None:
    seen = []
    handle = ours.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    Generator(ours, tokenizer, EvaluateConfig(max_new_tokens=2), CPU, False)(PROMPTS)
    handle.remove()
    assert seen == [1, 1]


def test_stop_texts(ours: Any, theirs: Any, tokenizer: Any) -> None:
    prompt = "Once upon a time there was"
    whole = alone(theirs, tokenizer, prompt, max_new_tokens=32)
    stop = ["zzz", whole[40:46], whole[20:25], whole[30:33]]
    found = {}
    for beams in (1, 4):
        settings = EvaluateConfig(num_beams=beams, max_new_tokens=32, stop=stop)
        generate = Generator(ours, tokenizer, settings, CPU, False)
        ((text,), _), seen = lengths_seen(ours, lambda generate=generate: generate([prompt]))
        full = alone(theirs, tokenizer, prompt, num_beams=beams, max_new_tokens=32)
        assert text == full[: min((full.find(s) for s in stop if s in full), default=None)]
        found[beams] = len(seen)
    assert found[1] < 25, "greedy rows end where the text does"
    assert found[4] == 32, "beams are searched to their end"


PIECES = [
    "Question",
    ":",
    "\n",
    "###",
    " ",
    "Answer",
    "é",
    "漢字",
    "🙂",
    "Instr",
    "uction",
    "的",
    "x",
]


@pytest.mark.parametrize(
    "stop", [["Question:"], ["\n\n", "### "], ["漢字🙂"], ["Instruction", "é"]]
)
def test_a_stop_text_is_seen_with_its_last_token(stop: list[str], shared_data: Path) -> None:
    """Across the borders of tokens and of bytes, on a 32000-piece tokenizer."""
    tokenizer = models.load_tokenizer(hub.ModelConfig(), shared_data / "tokenizer" / "mistral_v1")
    rng = random.Random(stop[0])
    for _ in range(10):
        text = "".join(rng.choices(PIECES, k=30)) + stop[0]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stopped = generation.Backend(tokenizer, EvaluateConfig(stop=stop), 1000).stopped
        has = [any(s in tokenizer.decode(ids[:n]) for s in stop) for n in range(1, len(ids) + 1)]
        first = has.index(True)
        assert [stopped([ids[: n + 1]])[0] for n in range(first + 1)] == has[: first + 1]


def test_a_row_has_its_own_length_limit(ours: Any, theirs: Any, tokenizer: Any) -> None:
    *_, second, longest = sorted(len(tokenizer(p)["input_ids"]) for p in PROMPTS)
    room = second + 4
    assert longest > room
    settings = EvaluateConfig(max_new_tokens=16, max_tokens=room + 1)
    (texts, cut), seen = lengths_seen(
        ours, lambda: Generator(ours, tokenizer, settings, CPU, False)(PROMPTS)
    )
    limits = set()
    for prompt, text, was_cut in zip(PROMPTS, texts, cut, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert was_cut == (len(ids) > room)
        kept = ids if not was_cut else [ids[0], *ids[1 - room :]]
        limit = min(16, room + 1 - len(kept))
        limits.add(limit)
        assert text == alone(theirs, tokenizer, kept, max_new_tokens=limit)
    assert limits == {1, 5, 16} and len(seen) == 16


def test_a_prompt_longer_than_the_positions_loses_its_beginning(
    ours: Any, theirs: Any, tokenizer: Any
) -> None:
    long = " ".join(PROMPTS * 4)
    ids = tokenizer(long)["input_ids"]
    assert len(ids) > 520
    settings = EvaluateConfig(max_new_tokens=12)
    texts, cut = Generator(ours, tokenizer, settings, CPU, False)([PROMPTS[0], long])
    assert cut == [False, True]
    assert texts[1] == alone(theirs, tokenizer, [ids[0], *ids[-499:]], max_new_tokens=12)
    assert texts[0] == alone(theirs, tokenizer, PROMPTS[0], max_new_tokens=12)
    with pytest.raises(UserError, match="fills the model's 512 positions"):
        Generator(ours, tokenizer, EvaluateConfig(max_new_tokens=512), CPU, False)(["a"])


def test_end_of_text_as_the_first_token(ours: Any, theirs: Any, tokenizer: Any) -> None:
    def eos_in_row_1(_: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[1, :, 2] = 1e9
        return logits

    handle = ours.lm_head.register_forward_hook(eos_in_row_1)
    settings = EvaluateConfig(max_new_tokens=8)
    texts, _ = Generator(ours, tokenizer, settings, CPU, False)(PROMPTS[:3])
    handle.remove()
    wanted = [alone(theirs, tokenizer, p, max_new_tokens=8) for p in PROMPTS[:3]]
    assert texts == [wanted[0], "", wanted[2]]


def test_nothing_to_continue(ours: Any, tokenizer: Any) -> None:
    settings = EvaluateConfig(max_new_tokens=4)
    assert Generator(ours, tokenizer, settings, CPU, False)([]) == ([], [])

    class NoBos:
        bos_token_id, eos_token_id = None, 2

        def __call__(self, prompts: list[str], verbose: bool) -> dict[str, Any]:
            made = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            return {"input_ids": [ids if p else [] for ids, p in zip(made, prompts, strict=True)]}

    with pytest.raises(UserError, match="is empty, and the tokenizer puts no BOS"):
        Generator(ours, NoBos(), settings, CPU, False)(["a", ""])


def test_settings_that_cannot_be_followed() -> None:
    with pytest.raises(UserError, match="an empty text would end every answer"):
        generation.check(EvaluateConfig(stop=["a", ""]))
    with pytest.raises(UserError, match=r"max_tokens=800 with evaluate\.num_beams=4"):
        generation.check(EvaluateConfig(max_tokens=800, num_beams=4))
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        generation.check(EvaluateConfig(max_tokens=1))


def test_batches_pad_little(shared_data: Path) -> None:
    """Of all tokens that forwards of the prompts see, so many are padding."""
    tokenizer = models.load_tokenizer(hub.ModelConfig(), shared_data / "tokenizer" / "mistral_v1")
    file = next((shared_data / "llm_adapters").rglob("ARC-Challenge/test.json*"))
    texts = [row["instruction"] for _, row in read_rows(str(file))]
    examples = [Example(str(i), text, "") for i, text in enumerate(texts)]
    length = {
        e.id: len(ids) for e, ids in zip(examples, tokenizer(texts)["input_ids"], strict=True)
    }

    def share(found: list[list[Example]]) -> float:
        padded = sum(len(batch) * max(length[e.id] for e in batch) for batch in found)
        return 1 - sum(length.values()) / padded

    made = generation.batches(examples, list(length.values()), 16)
    assert sorted(e.id for batch in made for e in batch) == sorted(length)
    assert share(made) < 0.02
    assert share([examples[i : i + 16] for i in range(0, 1172, 16)]) > 0.3, "in the file's order"
    longest = [max(length[e.id] for e in batch) for batch in made]
    assert longest == sorted(longest, reverse=True)
    again = generation.batches(examples[::-1], list(length.values())[::-1], 16)
    assert made == again, "a function of the rows alone"


ASKED = {str(i): f"question {i}" for i in range(40)}


def row(name: str, text: str = "t") -> dict[str, Any]:
    return {"id": name, "prediction": text, "cut": False}


def kept(found: Predictions) -> dict[str, str]:
    return {name: held["prediction"] for name, held in found.done.items()}


def test_predictions_that_a_kill_tore_are_made_again(tmp_path: Path) -> None:
    first = Predictions(tmp_path, "toy", {"a": 1}, ASKED)
    first.append([row("1"), row("2", "ü\n\u2028")])
    broken = [
        '{"id": "3", "predic', '{"id": "4", "prediction": "old"}', '{"id": 5, "prediction": "",'
        ' "cut": false}', '{"id": "6", "prediction": null, "cut": false}', "[1]", "\xff",
    ]  # fmt: skip
    good = json.loads(first.path.read_text().splitlines()[0])
    wrong: dict[str, Any] = {"id": ["7"], "asked": 7, "prediction": None, "cut": "no"}
    broken += [json.dumps({**good, "id": "7", key: value}) for key, value in wrong.items()]
    with first.path.open("ab") as f:
        f.write("\n".join(broken).encode("latin-1"))
    again = Predictions(tmp_path, "toy", {"a": 1}, ASKED)
    assert kept(again) == {"1": "t", "2": "ü\n\u2028"}
    again.append([row("3")])
    assert [json.loads(line)["id"] for line in again.path.open()] == ["1", "2", "3"]


@pytest.mark.parametrize("torn", ["", "{"])
def test_each_prediction_is_parsed_and_held_once(
    torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {str(i): "p" for i in range(2000)}
    first = Predictions(tmp_path, "toy", {"a": 1}, asked)
    first.append([row(i, "x" * 900) for i in asked])
    parsed, loads = [], json.loads
    whole = first.path.read_bytes()
    first.path.write_bytes(whole + torn.encode())
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(len(text)), loads(text))[1])
    tracemalloc.start()
    assert len(Predictions(tmp_path, "toy", {"a": 1}, asked).done) == len(asked)
    assert tracemalloc.get_traced_memory()[1] < 2.5 * len(whole)
    tracemalloc.stop()
    assert len(parsed) <= (len(asked) + 2) * (2 if torn else 1), "twice to cut a torn line"
    assert first.path.read_bytes() == whole
    parsed.clear()
    first.append([row("1")])
    assert len(parsed) == 1, "a batch costs the settings and itself"
    assert first.path.stat().st_size - len(whole) < 200


def test_predictions_of_other_settings_never_mix(tmp_path: Path) -> None:
    first = Predictions(tmp_path, "toy", {"a": 1}, ASKED)
    first.append([row("1")])
    second = Predictions(tmp_path, "toy", {"a": 2}, ASKED)
    assert not second.done and (tmp_path / "replaced-1/toy/predictions.jsonl").is_file()
    with pytest.raises(UserError, match="another evaluation of this run has begun"):
        first.append([row("2")])
    second.append([row("9")])
    assert [json.loads(line)["id"] for line in second.path.open()] == ["9"]


def test_replaced_rows_are_answered_again_and_old_ones_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Predictions(tmp_path, "toy", {"a": 1, "batch": 2, "x": None}, ASKED)
    first.append([row(i) for i in ASKED])
    held = [json.loads(line) for line in first.path.open()]
    assert [*held[0]] == ["id", "prediction", "cut", "asked", "digest"]
    assert not capsys.readouterr().err
    bare = [{k: v for k, v in one.items() if k != "digest"} for one in held]
    other = {"prediction": "better"}
    for changed, wanted, what in (
        (bare, 40, "40 rows of an older version"),
        ([one | other for one in held[:24]] + held[24:], 16, "24 rows are damaged"),
        ([held[0], *(one | other for one in bare[1:24]), *held[24:]], 17, "23 rows are damaged"),
    ):
        first.path.write_text("".join(json.dumps(one) + "\n" for one in changed))
        again = Predictions(tmp_path, "toy", {"a": 1, "batch": 4}, ASKED)
        assert len(again.done) == wanted and what in capsys.readouterr().err
    again.append([row(i) for i in ASKED if i not in again.done])
    assert len(Predictions(tmp_path, "toy", {"a": 1}, ASKED).done) == 40
    assert not capsys.readouterr().err, "the damaged ones are gone"


def test_other_rows_keep_the_predictions_of_those_that_stay(tmp_path: Path) -> None:
    """An eighth task, or evaluate.limit taken away, costs the new rows alone."""
    first = Predictions(tmp_path, "toy", {"a": 1, "examples": "x"}, {"1": "p", "2": "q"})
    first.append([row("1"), row("2")])
    more = {"1": "p", "2": "another question", "3": "r"}
    second = Predictions(tmp_path, "toy", {"a": 1, "examples": "y"}, more)
    assert list(second.done) == ["1"], "what asks something else now is asked again"
    second.append([row("2", "new"), row("3")])
    fewer = Predictions(tmp_path, "toy", {"a": 1, "examples": "z"}, {"3": "r"})
    assert list(fewer.done) == ["3"]
    again = Predictions(tmp_path, "toy", {"a": 1, "examples": "y"}, more)
    assert kept(again) == {"1": "t", "2": "new", "3": "t"}, "and what was not asked for stays"


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    first = Predictions(tmp_path, "toy", {"a": 1}, ASKED)
    first.append([row(str(i)) for i in range(20)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (first.path.stat().st_size + 150, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*; the 20 predictions before"):
            first.append([row(str(i)) for i in range(20, 40)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    torn = first.path.read_bytes()
    assert not torn.endswith(b"\n"), "the disk took a part of the batch"
    again = Predictions(tmp_path, "toy", {"a": 1}, ASKED)
    assert list(again.done) == [str(i) for i in range(21)]


def toy_run(folder: Path, *settings: str, **more: Any) -> Path:
    """A run with an adapter on the tiny model; the toy task is its test set."""
    make_run(folder, more.pop("model", hub.BUILTIN), "hoft", **more)
    values = cfg.to_dict(config_files.load(str(folder / "config.yaml"), [])[0])
    made = config_files.overlay(values, ["evaluate.max_new_tokens=4", *settings])
    (folder / "config.yaml").write_text(cfg.dump(made))
    return folder


def scored(run_dir: Path, folder: str = "eval") -> tuple[dict[str, str], dict[str, Any]]:
    found = rows(run_dir, f"{folder}/toy/predictions.jsonl")
    assert len({r["id"] for r in found}) == len(found), "a prediction is doubled"
    scores = json.loads((run_dir / folder / "toy" / "scores.json").read_text())
    return {r["id"]: r["prediction"] for r in found}, scores


class Broken(Exception):
    pass


def test_an_evaluation_broken_off_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is generated for a row depends on the whole batch that it is in."""
    calls: list[list[str]] = []
    left = [10**9]

    class Fake:
        def close(self) -> None:
            pass

        def lengths(self, prompts: list[str]) -> list[int]:
            return list(map(len, prompts))

        def stream(self, prompts: list[str]) -> Iterator[list[tuple[int, str, bool]]]:
            if not left[0]:
                raise Broken
            left[0] -= 1
            calls.append(prompts)
            mark = sum(map(len, prompts)) % 4
            texts = [f"answer{1 + (len(p) + mark) % 4} {mark}" for p in prompts]
            yield [(i, text, False) for i, text in enumerate(texts)]

    monkeypatch.setattr(evaluate, "_generator", lambda *_: Fake())
    settings = ("data.test_size=2000", "evaluate.batch_size=10")
    whole, broken = (toy_run(tmp_path / name, *settings) for name in ("whole", "broken"))
    stop = StopFlag()
    assert evaluate.run(str(whole), [], "adapter", stop) == 0
    assert len(calls) == 200 and sum(map(len, calls)) == 2000
    calls.clear()
    rng = random.Random(7)
    for _ in range(4):
        left[0] = rng.randrange(1, 40)
        with pytest.raises(Broken):
            evaluate.run(str(broken), [], "adapter", stop)
        file = broken / "eval/toy/predictions.jsonl"
        os.truncate(file, file.stat().st_size - rng.randrange(1, 400))  # torn by a power loss
    left[0] = 10**9
    assert evaluate.run(str(broken), [], "adapter", stop) == 0
    assert scored(broken) == scored(whole)
    assert len(calls) <= 200 + 4, "one batch at most is lost each time"
    stop.request(signal.SIGTERM)
    assert evaluate.run(str(broken), ["evaluate.max_new_tokens=5"], "adapter", stop) == 75


def test_rows_with_the_same_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_files.load(str(toy_run(tmp_path / "run") / "config.yaml"), [])[0]
    task = evaluate.task_of(config)
    same = [Example("a#1", "p", "c"), Example("a#1", "q", "d")]
    monkeypatch.setattr(task, "examples", lambda split: same)
    with pytest.raises(UserError, match="2 rows have the id a#1"):
        evaluate._examples(task, None)


def test_limit_takes_the_first_rows_of_each_source() -> None:
    found = [Example(f"{s}{i}", "p", "c", {"source": s}) for i in range(3) for s in "ab"]

    class Task:
        examples = staticmethod(lambda split: found)

    assert [e.id for e in evaluate._examples(Task(), 2)] == ["a0", "b0", "a1", "b1"]  # type: ignore[arg-type]


def test_the_time_left_is_that_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 200.0, 220.0, 221.0, 260.0])  # the first batch warms up
    monkeypatch.setattr(generation, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    progress = generation.Progress(400)
    for _ in range(4):
        progress.add(40)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("80/400 rows, 2.00 rows/s, about 3 min left")  # 160 s
    assert second.endswith("160/400 rows, 2.00 rows/s, about 2 min left")


def test_the_merged_checkpoint_answers_as_the_adapter(stories: Path, tmp_path: Path) -> None:
    """NF4 base and adapter, evaluated as such, merged, and by stock code one prompt at a time."""
    run_dir = toy_run(tmp_path / "run", "evaluate.limit=4", model=stories, quant="nf4")
    with pytest.raises(UserError, match="no merged checkpoint there; scalepeft merge"):
        evaluate.run(str(run_dir), [], "merged", StopFlag())
    merge.run(str(run_dir), str(run_dir / "merged"), [], "dequantized", "fp32")
    found = {}
    for kind, folder in evaluate.FOLDERS.items():
        assert evaluate.run(str(run_dir), ["evaluate.max_new_tokens=8"], kind, StopFlag()) == 0
        found[kind], scores = scored(run_dir, folder)
        assert scores["subject"] == kind and scores["count"] == 4
    assert found["merged"] == found["adapter"] != found["base"]
    config = config_files.load(str(run_dir / "config.yaml"), [])[0]
    prompts = {e.id: e.prompt for e in evaluate._examples(evaluate.task_of(config), 4)}
    model, tokenizer = adapted(run_dir), models.load_tokenizer(hub.ModelConfig(), stories)
    wanted = {i: alone(model, tokenizer, p, max_new_tokens=8) for i, p in prompts.items()}
    assert found["adapter"] == wanted


def test_a_changed_base_is_not_scored_with_old_predictions(tmp_path: Path, stories: Path) -> None:
    base = Path(shutil.copytree(stories, tmp_path / "base"))
    run_dir = toy_run(tmp_path / "run", "evaluate.limit=2", model=base)
    evaluate.run(str(run_dir), [], "base", StopFlag())
    text = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**text, "rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match="was trained on another base"):
        evaluate.run(str(run_dir), [], "base", StopFlag())
    shutil.rmtree(run_dir / "adapter")  # without one to compare it with it is just another base
    evaluate.run(str(run_dir), [], "base", StopFlag())
    assert (run_dir / "replaced-1/eval-base/toy").is_dir()


QUICK_LOTS = (
    "import sys; from scalepeft import cli; from scalepeft.eval import slots;"
    " slots.LOT_SECONDS = 0.1; sys.exit(cli.main())"
)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_ranks_answer_as_one_process(beams: int, stories: Path, tmp_path: Path) -> None:
    """9 rows over two ranks, answers of all lengths; with beams the last batch leaves one rank
    without a row.
    """
    run_dir = toy_run(
        tmp_path / "run", "evaluate.limit=9", f"evaluate.batch_size={max(2, beams)}",
        f"evaluate.num_beams={beams}", "evaluate.max_new_tokens=24", "evaluate.stop=[' w', '.']",
        model=stories, quant="nf4", adapter={"form": "mean_difference"},  # answers of many lengths
    )  # fmt: skip
    assert evaluate.run(str(run_dir), [], "adapter", StopFlag()) == 0
    wanted = scored(run_dir)[0]
    for engine in ("ddp", "fsdp2"):
        folder = Path(shutil.copytree(run_dir, tmp_path / engine))
        shutil.rmtree(folder / "eval")
        arguments = ["evaluate", str(folder), f"engine={engine}"]
        codes, text = Job(2, arguments, program=("-c", QUICK_LOTS)).wait()
        assert codes == [0, 0], text
        assert scored(folder)[0] == wanted, engine
    assert len(set(map(len, wanted.values()))) > 4


@pytest.mark.slow
def test_killed_and_stopped_at_random_points(tmp_path: Path) -> None:
    """Real kills, of a real model, on 800 rows."""
    settings = ("data.test_size=800", "evaluate.batch_size=20", "evaluate.max_new_tokens=3")
    whole = toy_run(tmp_path / "whole", *settings)
    killed = Path(shutil.copytree(whole, tmp_path / "killed"))
    assert call("evaluate", str(whole)).returncode == 0
    rng = random.Random(time.time_ns())
    file = killed / "eval/toy/predictions.jsonl"
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        job = Job(1, ["evaluate", str(killed)], program=("-c", QUICK_LOTS))
        before = file.read_bytes().count(b"\n") if file.exists() else 0
        while not file.exists() or file.read_bytes().count(b"\n") <= before:
            assert job.ranks[0].poll() is None
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        job.kill(number)
        codes, text = job.wait()
        assert codes in ([code], [0]), text  # 0: it was at its end
        assert file.read_bytes().endswith(b"\n") or number == signal.SIGKILL
    done = call("evaluate", str(killed))
    assert done.returncode == 0 and "predictions are there already" in done.stderr
    assert scored(killed) == scored(whole)
