"""Answers in slots: the tokens of each row alone, whatever comes and goes beside it."""

import random
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from families import answers, make, stock, tokenizer
from processes import rows as read
from test_evaluate import CPU, scored, toy_run

from scalepeft.config.schema import EvaluateConfig
from scalepeft.core.preemption import StopFlag
from scalepeft.eval import evaluate, slots
from scalepeft.eval.generation import Generator
from scalepeft.eval.predictions import Predictions

ENDS = [1, 17, 33, 50, 51, 52, 53, 54, 55]
QUICK = ["llama", "qwen2", "gemma3", "mixtral", "gpt-neox", "cohere", "bloom", "opt", "qwen3.5",
         "falcon-h1"]  # fmt: skip
MORE = ["gptj", "falcon", "gemma4", "llama4-text", "gpt-oss", "deepseek-v3", "mistral-swa",
        "nemotron-h", "lfm2", "qwen2.5-vl", "gemma3-multimodal"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: stock(make(name, folder / name)))


def generator(model: Any, size: int, **settings: Any) -> Generator:
    config = EvaluateConfig(batch_size=size, max_new_tokens=40, **settings)
    found = Generator(model, tokenizer(), config, CPU, False)
    found.ends = ENDS
    return found


def asked(count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of very different lengths, and limits of their answers."""
    rng = random.Random(3)
    lengths = rng.choices([1, 2, 5, 9, 20, 33, 60, 90], k=count)
    return [rng.choices(range(60, 300), k=n) for n in lengths], rng.choices([1, 3, 20, 40], k=count)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]
)
def test_rows_in_slots_are_each_prompt_alone(name: str, model: Callable[[str], Any]) -> None:
    """Windows, tables of positions, ALiBi, states; slots where rows leave at once or in threes."""
    prompts, limits = asked(40)
    one = generator(model(name), 1)
    want = [one.generate([p], [n])[0] for p, n in zip(prompts, limits, strict=True)]
    assert len(set(map(len, want))) > 3
    for size in (7, 24):
        some = generator(model(name), size)
        assert not some.whole and answers(some, prompts, limits) == want


def test_a_row_that_has_ended_at_the_last_position_goes_no_further(
    model: Callable[[str], Any],
) -> None:
    prompts, limits = [[*range(60, 306)], *([i] * 9 for i in range(60, 75))], [10, *[30] * 15]
    some = generator(model("opt"), 16)
    some.ends = []
    assert [*map(len, answers(some, prompts, limits))] == limits


def test_few_slots_are_idle(model: Callable[[str], Any]) -> None:
    prompts, _ = asked(400)
    llama, new = model("llama"), []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: new.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    idle = {}
    for whole in (False, True):
        some, made = generator(llama, 16), []
        new.clear()
        for i in range(0, 400, 16 if whole else 400):
            part = prompts[i : i + (16 if whole else 400)]
            answer = some.generate if whole else partial(answers, some)
            made += answer(part, [40] * len(part))
        lengths = [next((i for i, t in enumerate(a) if t in ENDS), len(a) - 1) for a in made]
        idle[whole] = 1 - sum(lengths) / 16 / sum(n == 1 for n in new)
    hook.remove()
    assert idle[False] < 0.15 < 0.2 < idle[True], idle


def test_caches_whose_rows_cannot_come_and_go(model: Callable[[str], Any]) -> None:
    assert slots.obstacle(model("mamba2"), 99) == "the base keeps a cache of its own"
    assert slots.obstacle(model("minimax"), 99) == "the base keeps a cache of its own"
    stretched = model("llama-dynamic-ntk")
    assert "evaluate.max_tokens=256 rules that out" in slots.obstacle(stretched, 257)
    assert not slots.obstacle(stretched, 256)
    assert generator(stretched, 2).whole and not generator(stretched, 2, max_tokens=256).whole
    assert "over 4096 tokens" in slots.obstacle(model("phi4-mini-longrope"), 4097)
    prompts, _ = asked(3)
    want = [generator(stretched, 1).generate([p], [3])[0] for p in prompts]
    assert [a[:3] for a in generator(stretched, 3).generate(prompts, [3, 3, 3])] == want


def test_a_stopped_evaluation_keeps_what_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's predictions are those of one row at a time, however often it is stopped."""
    settings = (
        "data.test_size=40",
        "evaluate.max_new_tokens=12",
        "evaluate.stop=[werwerwerwer, small]",
    )
    one = toy_run(tmp_path / "one", *settings, "evaluate.batch_size=1")
    some = toy_run(tmp_path / "some", *settings, "evaluate.batch_size=7")
    assert evaluate.run(str(one), [], "adapter", StopFlag()) == 0
    monkeypatch.setattr(slots, "LOT_SECONDS", 0.0)
    append = Predictions.append
    for lots in (1, 4, 9):
        stop, left = StopFlag(), [lots]

        def kept(self: Predictions, rows: list[Any], stop: Any = stop, left: Any = left) -> None:
            append(self, rows)
            left[0] -= 1
            if not left[0]:
                stop.request(signal.SIGTERM)

        monkeypatch.setattr(Predictions, "append", kept)
        assert evaluate.run(str(some), [], "adapter", stop) == 75
    assert 5 < len(read(some, "eval/toy/predictions.jsonl")) < 40
    assert evaluate.run(str(some), [], "adapter", StopFlag()) == 0
    found, wanted = scored(some)[0], scored(one)[0]
    assert found == wanted and len(set(map(len, found.values()))) > 3
