"""The eight commonsense tasks: published prompts byte for byte, raw rows, traps, gold answers."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from processes import call
from tokenized import tokenize

from scalepeft.config import files as config_files
from scalepeft.config import schema as config
from scalepeft.core.errors import UserError
from scalepeft.data import token_file
from scalepeft.data.tasks.commonsense import Commonsense, CommonsenseConfig
from scalepeft.eval import score_files as score
from scalepeft.eval import scores

SETS = {
    "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "winogrande": 1267, "ARC-Easy": 2376,
    "ARC-Challenge": 1172, "openbookqa": 500, "hellaswag": 10042,
}  # fmt: skip


def task(protocol: str = "clean", **settings: Any) -> Commonsense:
    values = {"name": "commonsense", "protocol": protocol, **settings}
    found = config.from_dict({"run_dir": "x", "train": {"max_steps": 1}, "data": values})
    assert isinstance(found.data, CommonsenseConfig)
    return Commonsense(found.data)


def file_of(shared: Path, name: str) -> Path:
    kind = "test.reconstructed" if name == "hellaswag" else "test"
    return shared / f"llm_adapters/dataset/{name}/{kind}.json.gz"


def rows_of(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as f:
        found: list[dict[str, str]] = json.load(f)
    return found


def published(instruction: str, output: str | None) -> str:
    """``generate_prompt`` as it stands in finetune.py (with output) and commonsense_evaluate.py of
    github.com/AGI-Edgerunners/LLM-Adapters, whose source indentation is part of the prompt.
    """
    if output is not None:
        return f"""Below is an instruction that describes a task. Write a response that appropriately completes the request.  

                ### Instruction:
                {instruction}
                
                ### Response:
                {output}"""  # noqa: E501, W291, W293
    return f"""Below is an instruction that describes a task. Write a response that appropriately completes the request. 

                ### Instruction:
                {instruction}

                ### Response:
                """  # noqa: E501, W291


ROW = {
    "instruction": "Please answer: {x}?\n\nAnswer format: true/false", "input": "",
    "output": "the correct answer is true", "answer": "true",
}  # fmt: skip


def test_llm_adapters_prompts_are_the_published_ones_byte_for_byte() -> None:
    chosen = task("llm-adapters")
    trained = chosen.example(ROW, "f#1", "train")
    assert trained.prompt + trained.completion == published(ROW["instruction"], ROW["output"])
    asked = chosen.example(ROW, "f#1", "test")
    assert asked.prompt == published(ROW["instruction"], None)
    assert chosen.example(ROW, "f#1", "valid").prompt == trained.prompt


def test_llm_adapters_settings_are_the_published_ones() -> None:
    found = config.from_dict({
        "run_dir": "x", "train": {"max_steps": 1},
        "data": {"name": "commonsense", "protocol": "llm-adapters"},
    })  # fmt: skip
    assert (found.data.train_on, found.data.cutoff, found.data.tokenize) == ("all", 256, "together")
    assert (found.evaluate.num_beams, found.evaluate.max_new_tokens) == (4, 32)
    assert config.deviations(found) == {}
    other = config_files.overlay(config.to_dict(found), ["data.cutoff=512", "evaluate.num_beams=1"])
    assert config.deviations(other) == {"data.cutoff": (256, 512), "evaluate.num_beams": (4, 1)}
    clean = config_files.overlay(
        {"run_dir": "x", "train": {"max_steps": 1}}, ["data.name=commonsense"]
    )
    assert (clean.data.train_on, clean.data.cutoff, clean.evaluate.num_beams) == (
        "response", 512, 1,
    )  # fmt: skip


def test_the_prompts_end_is_tokenised_as_documented(shared_data: Path) -> None:
    """16 spaces are one token at the end of an evaluation prompt; in training the last of them goes
    with the first word, so that training sees 15 spaces (one piece in LLaMA's vocabulary, two in
    this one) and ``▁the``.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizer/mistral_v1")
    chosen = task("llm-adapters")
    trained = tokenize([chosen.example(ROW, "f#1", "train")], tokenizer, chosen.config)
    pieces = tokenizer.convert_ids_to_tokens(trained.tokens.tolist())
    assert pieces[0] == "<s>" and pieces[-1] == "</s>" and int(trained.label_start[0]) == 1
    at = len(pieces) - 1 - pieces[::-1].index("▁the")
    line = pieces[len(pieces) - 1 - pieces[::-1].index("<0x0A>") + 1 : at]
    assert "".join(line) == "▁" * 15 and pieces[at + 1] == "▁correct"
    asked = tokenizer(chosen.example(ROW, "f#1", "test").prompt)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(asked)[-2:] == ["<0x0A>", "▁" * 16]
    # The clean protocol: the very tokens that generation starts from, the response alone learned.
    chosen = task()
    trained = tokenize([chosen.example(ROW, "f#1", "train")], tokenizer, chosen.config)
    asked = tokenizer(chosen.example(ROW, "f#1", "test").prompt)["input_ids"]
    start = int(trained.label_start[0])
    assert trained.tokens[:start].tolist() == asked
    learned = tokenizer.decode(trained.tokens[start:].tolist())
    assert learned == "the correct answer is true</s>"


ORIGINALS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"question": "is ice cold", "passage": "Ice is.", "label": 1},
        "Please answer the following question with true or false, question: is ice cold?\n\n"
        "Answer format: true/false",
        "true",
    ),
    (
        {"goal": "Cool tea", "sol1": "wait", "sol2": "boil it", "label": 0},
        "Please choose the correct solution to the question: Cool tea\n\nSolution1: wait\n\n"
        "Solution2: boil it\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    (
        {
            "context": "Tracy resisted.", "question": "What before?", "answerA": "a plan",
            "answerB": "go home", "answerC": "go away", "label": "3",
        },
        "Please choose the correct answer to the question: Tracy resisted. What before?\n\n"
        "Answer1: a plan Answer2: go home Answer3: go away\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    (
        {
            "activity_label": "Roof", "ctx": "A man is on a roof. he", "label": "3",
            "endings": ["sits.", "is ripping.", "holds.", "starts."],
        },
        "Please choose the correct ending to complete the given sentence: Roof: A man is on a roof."
        " he\n\nEnding1: sits. Ending2: is ripping. Ending3: holds. Ending4: starts.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    (
        {"sentence": "S so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: S so"
        " _ won.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2",
        "option2",
    ),
    (
        {
            "question": "Which?", "answerKey": "2",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
        },
        "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b"
        " Answer3: c\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    (
        {
            "question_stem": "The sun is", "answerKey": "D",
            "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
        },
        "Please choose the correct answer to the question: The sun is\n\nAnswer1: a Answer2: b"
        " Answer3: c Answer4: d\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "instruction", "answer"), ORIGINALS)
def test_original_rows_become_llm_adapters_rows(
    row: dict[str, Any], instruction: str, answer: str
) -> None:
    same = {"instruction": instruction, "output": f"the correct answer is {answer}"}
    same |= {"input": "", "answer": answer}
    assert task("llm-adapters").example(row, "f#1", "train") == task("llm-adapters").example(
        same, "f#1", "train"
    )
    if "passage" in row:
        assert "\nIce is.\n\nPlease answer" in task().example(row, "f#1", "test").prompt


def test_original_rows_give_the_published_instructions(shared_data: Path) -> None:
    """The texts above are the published ones: each begins and ends as some row of its set."""
    names = "boolq piqa social_i_qa hellaswag winogrande ARC-Easy openbookqa".split()
    for name, (_, instruction, _) in zip(names, ORIGINALS, strict=True):
        published = {row["instruction"] for row in rows_of(file_of(shared_data, name))}
        begin = instruction.split(":")[0] + ":"
        between = " " if name == "winogrande" else "\n\n"
        end = between + instruction[instruction.index("Answer format") :]
        assert instruction.endswith(end)
        fits = [p for p in published if p.startswith(begin) and p.endswith(end)]
        assert len(fits) > len(published) * (0.9 if "answer1" not in end else 0.001), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": -1}, "public test splits"),
        ({"label": None}, "'label' is None"),
        ({"goal": ""}, "'goal' is empty"),
        ({"sol1": ["x"]}, "'sol1' must be text, not list"),
    ],
)
def test_broken_original_rows_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        task().example({**ORIGINALS[1][0], **changes}, "f#1", "train")


def test_an_output_that_says_another_answer_is_a_broken_row() -> None:
    with pytest.raises(UserError, match="'output' says false, 'answer' true"):
        task().example({**ROW, "output": "the correct answer is false"}, "f#1", "train")


def test_hellaswag_at_cutoff_256_loses_two_thirds_of_its_responses(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizer/mistral_v1")
    chosen = task("llm-adapters", train=[str(file_of(shared_data, "hellaswag"))])
    examples = random.Random(0).sample(chosen.examples("train"), 1000)
    tokens = tokenize(examples, tokenizer, chosen.config)
    assert 620 <= tokens.lost <= 720, "67 % in protocols.md"
    assert tokens.dropped == 0
    (line,) = token_file.cut_rows(tokens, chosen.config, "train")
    assert f"{tokens.lost} of them lost their whole response and teach their prompt alone" in line
    clean = task(train=[str(file_of(shared_data, "hellaswag"))], cutoff=256)
    tokens = tokenize([clean.example(r, "f#1", "train") for r in
                            rows_of(file_of(shared_data, "hellaswag"))[5000:5200]],
                           tokenizer, clean.config)  # fmt: skip
    assert tokens.dropped == tokens.lost > 100, "with no token to learn a row is left out"
    assert int((tokens.offsets.diff() - tokens.label_start).min()) >= 1


def test_duplicates_go_before_the_held_out_rows_are_taken(tmp_path: Path) -> None:
    """WinoGrande's sizes hold each other's rows."""
    xs = [{**ROW, "instruction": f"row {i}"} for i in range(10)]
    xl = [{**ROW, "instruction": f"row {i}"} for i in range(30)]
    for name, rows in (("xs", xs), ("xl", xl)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    both = [str(tmp_path / "xs.json"), str(tmp_path / "xl.json")]
    chosen = task("llm-adapters", train=both, test=both)
    assert len(chosen.examples("train")) == 30 and chosen.repeated == 10
    assert len(chosen.examples("test")) == 40 and chosen.repeated == 0, "tests stay as they are"
    kept = task("llm-adapters", train=both, duplicates="keep")
    assert len(kept.examples("train")) == 40


@pytest.mark.parametrize(
    ("prediction", "answer", "extracted"),
    [
        ("the correct answer is answer2", "answer1", "answer2"),
        ("answer1 or answer2", "answer1", "answer1"),
        ("it is true that answer3", "answer3", "answer3"),
        ("True", "true", None),
        ("falsetrue", "true", "false"),
        ("solution1/solution2", "solution2", "solution1"),
        ("answer6", "answer5", None),
        ("", "ending1", None),
        ("ending5", "ending1", None),
    ],
)
def test_the_first_word_of_the_questions_kind_counts(
    prediction: str, answer: str, extracted: str | None
) -> None:
    row = {**ROW, "output": f"the correct answer is {answer}", "answer": answer}
    found = task().score(prediction, task().example(row, "f#1", "test"))
    assert (found.extracted, found.correct) == (extracted, extracted == answer)


@pytest.mark.parametrize("name", SETS)
def test_gold_answers_score_all_and_shuffled_ones_chance(shared_data: Path, name: str) -> None:
    file = file_of(shared_data, name)
    chosen = task(test=[str(file)])
    examples = chosen.examples("test")
    assert len(examples) == SETS[name]
    gold = [e.completion for e in examples]
    assert all(chosen.score(text, e).correct for text, e in zip(gold, examples, strict=True))
    random.Random(0).shuffle(gold)
    right = sum(bool(chosen.score(t, e).correct) for t, e in zip(gold, examples, strict=True))
    low, high = (0.45, 0.56) if name in ("boolq", "piqa", "winogrande") else (0.2, 0.37)
    assert low < right / len(gold) < high


@pytest.fixture
def references(tmp_path: Path) -> Path:
    rows = [{**ROW, "instruction": f"row {i}", "answer": a, "output": f"the correct answer is {a}"}
            for i, a in enumerate(["true", "false", "true"])]  # fmt: skip
    (tmp_path / "ref.json").write_text(json.dumps(rows))
    return tmp_path / "ref.json"


def scored(references: Path, content: str, *more: str) -> tuple[int, str]:
    file = references.with_name("out.txt")
    file.write_bytes(content.encode(errors="surrogateescape"))
    done = call("score", "--task", "commonsense", "--predictions", str(file), "--references",
                str(references), *more)  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_score_reads_lines_objects_and_ids(references: Path) -> None:
    ids = [f"{references.parent.name}/ref.json#{i}" for i in (3, 1, 2)]
    by_id = [{"id": i, "prediction": w} for i, w in zip(ids, ("true", "true", "true"), strict=True)]
    for content, right in (
        ("true\nfalse\ntrue\n", 3),
        ("true\r\nfalse\r\ntrue", 3),
        (json.dumps(["true", "true", "true"]), 2),
        ("".join(json.dumps(row) + "\n" for row in by_id), 2),
        (json.dumps([{"output_pred": w, "output": "x"} for w in ("true", "false", "")]), 2),
    ):
        code, text = scored(references, content, "--json", "--out", str(references.parent / "out"))
        assert code == 0, text
        found = json.loads((references.parent / "out/scores.json").read_text())
        assert found == json.loads(text)
        assert found["metrics"]["accuracy"]["value"] == right / 3, content
    lines = (references.parent / "out/scored.jsonl").read_text().splitlines()
    assert [json.loads(line)["correct"] for line in lines] == [True, True, False]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("true\nfalse\n", "has 2 predictions"),
        ("", "is empty"),
        ('[{"prediction": 1}, "a", "b"]', "row 1: 'prediction' must be text, not int"),
        ('{"x": "true"}\n', "row 1: no key prediction, output_pred"),
        ('"true"\n{broken\n', "row 2: broken JSON"),
        ("true\n\udcff\ntrue\n", "row 2: the text is not valid UTF-8"),
    ],
)
def test_score_names_what_is_wrong(references: Path, content: str, said: str) -> None:
    code, text = scored(references, content)
    assert code == 2 and said in text and len(text.splitlines()) == 1, text


def test_ids_of_other_references_are_refused(references: Path) -> None:
    """predictions.jsonl is not in the order of its rows: order must never be taken for it."""
    rows = [{"id": f"cluster/test.json#{i}", "prediction": w}
            for i, w in ((3, "true"), (1, "true"), (2, "false"))]  # fmt: skip
    code, text = scored(references, "".join(json.dumps(row) + "\n" for row in rows))
    assert code == 2 and "its ids (cluster/test.json#3, ...) are not those of" in text
    rows[0]["id"] = None
    code, text = scored(references, "".join(json.dumps(row) + "\n" for row in rows))
    assert code == 2 and "are not those of" in text


def test_the_mean_of_the_tasks_comes_first(tmp_path: Path) -> None:
    """As in the papers; a large task does not outweigh the others."""
    for name, count in (("large", 40), ("small", 10)):
        rows = [{**ROW, "instruction": f"{name} {i}"} for i in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    chosen = task(test=[str(tmp_path / "large.json"), str(tmp_path / "small.json")])
    examples = chosen.examples("test")
    said = {e.id: "true" if "large.json" in e.id else "false" for e in examples}
    found, _ = scores.summarize(chosen, examples, said)
    assert found["metrics"]["accuracy"]["value"] == 0.8
    name, metric = scores.first(found)
    assert name == "mean accuracy of 2" and metric["value"] == 0.5
    # Agresti and Coull by hand: 42 of 44 and 2 of 14.
    half = 1.959964 * (42 / 44 * 2 / 44 / 44 / 4 + 2 / 14 * 12 / 14 / 14 / 4) ** 0.5
    assert metric["ci95"] == pytest.approx([0.5 - half, 0.5 + half])
    one, _ = scores.summarize(chosen, examples[:5], said)
    assert scores.first(one)[0] == "accuracy"


def test_score_ends_a_prediction_where_evaluate_does(references: Path) -> None:
    said = '"true\\n### Response: false"\n"### Response: false"\n"true"\n'
    for more, first in (([], "true\n"), (["evaluate.stop=[]"], "true\n### Response: false")):
        setting = ["data.protocol=llm-adapters", *more]
        out = references.with_name("out")
        code, text = scored(references, said, "--out", str(out), *setting)
        assert code == 0, text
        rows = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
        assert rows[0]["prediction"] == first
        assert rows[1]["correct"] is bool(more), "nothing is before the stop text"


def test_settings_that_score_does_not_look_at_are_refused(references: Path) -> None:
    code, text = scored(references, "true\nfalse\ntrue\n", "data.prompt=x")
    assert code == 2 and "decides nothing in score" in text


def test_score_refuses_a_row_twice_and_rows_without_a_prediction(references: Path) -> None:
    ids = [f"{references.parent.name}/ref.json#{i}" for i in (1, 2, 2)]
    rows = [score.Prediction("true", i, n) for n, i in enumerate(ids, 1)]
    options = score.Options("commonsense", "out", "ref", None, [], None, None, False)
    examples = task(test=[str(references)]).examples("test")
    with pytest.raises(UserError, match=r"row 3: id .*#2 appears in row 2 already"):
        score.match(rows, examples, options, 0)
    with pytest.raises(
        UserError, match=r"1 of 3 rows of ref have no prediction, the first is .*#3"
    ):
        score.match(rows[:2], examples, options, 0)
    with pytest.raises(UserError, match="2 broken rows were left out"):
        score.match([score.Prediction("true", None, 1)], examples, options, 2)
