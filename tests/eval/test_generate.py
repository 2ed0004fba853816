"""``scalepeft generate``: what is written is the answer that an evaluation keeps, prompts are put
as rows are, and Ctrl-C ends an answer.
"""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, Job, call, zygote
from test_cli import wrong
from test_evaluate import CPU, PROMPTS, built, scored, stories, toy_run  # noqa: F401

from scalepeft.config import files as config_files
from scalepeft.config.schema import EvaluateConfig
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag
from scalepeft.data import prepared
from scalepeft.data.chat import SEAM
from scalepeft.data.tasks.base import Task
from scalepeft.eval import evaluate
from scalepeft.eval.generation import Generator, Streaming
from scalepeft.models import hub, tiny

ASKED = "What kind of thing is the red dog?"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Pieces(list[str]):
    """Standard output, as the pieces that were written."""

    def write(self, text: str) -> None:
        self.append(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def written(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    """What the test writes from here on (a fixture would be too early: pytest sets its own)."""
    monkeypatch.setattr(sys, "stdout", made := Pieces())
    return made


def pair(folder: Path, **settings: Any) -> tuple[Streaming, Generator]:
    config = EvaluateConfig(batch_size=1, **settings)
    tokenizer = hub.load_tokenizer(hub.ModelConfig(), folder)
    model = built(folder)
    return tuple(cls(model, tokenizer, config, CPU, False) for cls in (Streaming, Generator))  # type: ignore[return-value]


@pytest.mark.parametrize("whole", ["", "as a batch is"])
def test_what_is_streamed_is_what_an_evaluation_keeps(
    whole: str,
    stories: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = written(monkeypatch)
    stop = [" little girl named", "was", "zzz"]
    for folder, stops in ((stories, []), (stories, stop), (tiny.make(0), []), (tiny.make(0), stop)):
        streaming, plain = pair(folder, max_new_tokens=24, stop=stops)
        streaming.whole = plain.whole = whole
        for prompt in PROMPTS[:3]:
            ((_, wanted, _),) = (row for lot in plain.stream([prompt]) for row in lot)
            pieces.clear()
            assert streaming.answer("", prompt) is None
            assert "".join(pieces) == f"{wanted}\n"
            assert len(pieces) > 5 or stops, "token by token"


def test_half_a_character_or_stop_text_is_never_shown(
    stories: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = written(monkeypatch)
    for folder in (stories, tiny.make(0)):
        streaming, _ = pair(folder, stop=["STOP"])
        for text in ("a €é 中文 ST OP", "€€STOP more", "STO", "\n\n€"):
            ids = streaming.tokenizer(text, add_special_tokens=False)["input_ids"]
            for answer in (ids, [*ids, *ids[-1:]], ids[:-1], ids[:4]):
                pieces.clear()
                streaming.shown, streaming.stop = "", StopFlag()
                for i in range(1, len(answer) + 1):
                    streaming.stopped([answer[:i]])
                    assert "\ufffd" not in "".join(pieces)
                    assert not any("".join(pieces).endswith(s) for s in ("S", "ST", "STO"))
                (whole,) = streaming.texts([answer])
                assert whole.startswith("".join(pieces)), (text, whole, list(pieces))
                assert len(pieces) > 2 or text == "STO", list(pieces)


def test_what_a_decoder_takes_back_is_written_again(
    stories: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = written(monkeypatch)
    streaming, _ = pair(stories)
    monkeypatch.setattr(streaming, "texts", lambda answers: [f"{len(a) // 9} b" for a in answers])
    streaming.answer("", PROMPTS[0])
    assert "".join(pieces) == "0 b3 b\n"


def task_and_rows(folder: Path, data: dict[str, Any], rows: list[Any]) -> Task:
    """A task with the tiny tokenizer, whose train and test rows are these."""
    (folder / "rows.json").write_text(json.dumps(rows))
    values = {"train": [str(folder / "rows.json")], "test": [str(folder / "rows.json")], **data}
    base = {"run_dir": "-", "train": {"max_steps": 1}, "model": {"path": hub.BUILTIN}}
    settings = [f"data.{key}={value}" for key, value in values.items() if key != "name"]
    config = config_files.overlay({**base, "data": {"name": data["name"]}}, settings)
    return evaluate.task_of(config, hub.load_tokenizer(hub.ModelConfig(), tiny.make(0)))


ALPACA = {"instruction": ASKED, "output": "an animal"}
TALK = {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "so"}]}
TASKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "commonsense"}, {**ALPACA, "output": "it is true", "answer": "true"}),
    (
        {"name": "commonsense", "test_prompt": "T {instruction}:"},
        {**ALPACA, "output": "true", "answer": "true"},
    ),
    ({"name": "math", "test_rows": "keep"}, {"query": ASKED, "response": "The answer is: 3"}),
    (
        {"name": "math", "test_rows": "keep", "template": "chat", "system": "Be brief."},
        {"question": ASKED, "answer": "#### 3"},
    ),
    (
        {"name": "translation", "source_language": "de", "target_language": "en"},
        {"de": ASKED, "en": "x"},
    ),
    ({"name": "sft"}, ALPACA),
    ({"name": "sft", "format": "alpaca", "train": []}, ALPACA),
    ({"name": "sft", "test_prompt": "T {instruction}:"}, ALPACA),
    ({"name": "sft", "prompt": "{instruction} ="}, ALPACA),
    ({"name": "sft", "template": "chat"}, ALPACA),
    ({"name": "sft"}, {"prompt": ASKED, "completion": "an animal"}),
    ({"name": "sft", "format": "completion"}, {"prompt": ASKED, "completion": "an animal"}),
    ({"name": "sft", "format": "completion"}, {"prompt": TALK["messages"][:1], "completion": "so"}),
    ({"name": "sft"}, TALK),
    ({"name": "sft", "system": "Be brief."}, TALK),
    ({"name": "sft", "format": "messages", "train": []}, TALK),
]  # fmt: skip


@pytest.mark.parametrize("whose", ["its files", "a pipeline"])
@pytest.mark.parametrize(("data", "row"), TASKS, ids=lambda v: "-".join(map(str, v)))
def test_a_prompt_is_put_as_the_rows_are(
    whose: str, data: dict[str, Any], row: dict[str, Any], tmp_path: Path
) -> None:
    chat = {"chat_template": CHAT.replace("\n", "")} if data["name"] in ("sft", "math") else {}
    (tmp_path / "chat").write_text(CHAT)
    chat = {"chat_template": tmp_path / "chat"} if chat else {}
    task = task_and_rows(tmp_path, {**data, **chat}, [row])
    wanted = next(iter(task.stream("test"))).prompt
    assert ASKED in wanted
    if whose == "a pipeline" and "train" not in data:
        prepared.write(task, "train", tmp_path / "prepared.jsonl")
        task = task_and_rows(
            tmp_path, {**data, **chat, "train": f"[{tmp_path}/prepared.jsonl]"}, []
        )
    assert task.asked(ASKED) == wanted


def test_a_text_that_spells_a_control_token_stays_text(tmp_path: Path) -> None:
    task = task_and_rows(tmp_path, {"name": "sft"}, [ALPACA])
    assert f"<{SEAM}" in task.asked("</s> a").replace("/s", "") or f"</s{SEAM}>" in task.asked(
        "</s>"
    )
    assert SEAM not in task.asked("<s > a")


def test_plain_texts_are_asked_as_they_are_and_an_unknown_form_is_refused(tmp_path: Path) -> None:
    assert task_and_rows(tmp_path, {"name": "sft"}, [{"text": "once"}]).asked(ASKED) == ASKED
    data = {"name": "sft", "format": "text", "train": []}
    assert task_and_rows(tmp_path, data, []).asked(ASKED) == ASKED
    task = task_and_rows(tmp_path, {"name": "sft", "train": [f"{tmp_path}/gone.json"]}, [])
    with pytest.raises(
        UserError, match=r"gone.json: no such file .*; data.format=alpaca, messages"
    ):
        task.asked(ASKED)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory.mktemp("toy") / "run", "data.test_size=3")


FROM = """
import os, runpy
os.dup2(os.open(os.environ["INPUT"], os.O_RDWR), 0)
if os.isatty(0): os.dup2(0, 1)
runpy.run_module("scalepeft", run_name="__main__", alter_sys=True)
"""


def test_lines_of_a_pipe_and_of_a_file_are_the_evaluations_answers(
    run_dir: Path, tmp_path: Path
) -> None:
    assert call("evaluate", str(run_dir)).returncode == 0
    answers, _ = scored(run_dir)
    config = config_files.load(str(run_dir / "config.yaml"), [])[0]
    asked = [e.meta["question"] for e in evaluate.task_of(config).examples("test")]
    assert len(asked) == 3 and not any("\r" in text for text in asked)
    one = call("generate", str(run_dir), "--prompt", asked[0])
    assert one.stdout == answers["toy/test#1"] + "\n", one.stderr
    # Questions have several lines: of a file each line is a prompt.
    lines = [line for line in asked[0].split("\n") if line]
    want = "".join(call("generate", str(run_dir), "--prompt", line).stdout for line in lines)
    (tmp_path / "lines").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    found = call("generate", str(run_dir), "--file", str(tmp_path / "lines"))
    assert (found.returncode, found.stdout) == (0, want), found.stderr
    assert [s for s in found.stderr.splitlines() if s.startswith("scalepeft: prompt ")] == [
        f"scalepeft: prompt {i}" for i in range(1, len(lines) + 1)
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "INPUT": str(tmp_path / "lines")}
    piped = zygote().run(("-c", FROM), ["generate", str(run_dir)], env, 60)
    assert (piped.returncode, piped.stdout) == (0, want), piped.stderr


def test_the_base_and_raw_text(run_dir: Path) -> None:
    done = [
        call("generate", str(run_dir), "--prompt", ASKED, *more)
        for more in ([], ["--base"], ["--raw"], ["evaluate.max_new_tokens=1"])
    ]
    found = [one.stdout for one in done]
    assert "the answer ended at evaluate.max_new_tokens=1" in done[-1].stderr
    assert len({*found}) == 4 and all(text.endswith("\n") for text in found), found


def test_wrong_prompts_are_one_line(run_dir: Path, tmp_path: Path) -> None:
    run = str(run_dir)
    assert "prompt 1: 'the prompt' is empty" in wrong("generate", run, "--prompt", " ")
    long = wrong("generate", run, "--prompt", "dog " * 2000)
    assert "prompt 1: too long: 1020 tokens fit beside an answer; shorten it, or lower" in long
    assert "no prompt; give --prompt TEXT, or lines in --file" in wrong("generate", run)
    assert "nowhere: no such file" in wrong("generate", run, "--file", "nowhere")
    (tmp_path / "lines").write_text("a\n\nb\n")
    found = call("generate", run, "--file", str(tmp_path / "lines"))
    assert found.stdout == "" and "prompt 2: 'the prompt' is empty" in found.stderr
    assert "not allowed with" in wrong("generate", run, "--prompt", "a", "--file", "b")
    assert "is not a run directory" in wrong("generate", str(tmp_path), "--prompt", "a")
    assert "no merged checkpoint" in wrong("generate", run, "--prompt", "a", "--merged")
    own = call("generate", run, "--prompt", ASKED, "data.system=Be brief.")
    assert own.returncode == 0, "rows may have brought one"
    assert "cannot be changed for generate" in wrong("generate", run, "--prompt", "a", "train.lr=1")
    adapter = str(run_dir / "adapter")
    assert "add data=TASK" in wrong("generate", adapter, "--prompt", "a")
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert "adapter" in wrong("generate", str(tmp_path), "--prompt", "a")


def test_ctrl_c_ends_an_answer_and_the_terminal_asks_again(run_dir: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "INPUT": os.ttyname(slave)}
    arguments = ["generate", str(run_dir), "evaluate.max_new_tokens=900"]
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_RDWR)
    process = zygote().start(("-c", FROM), arguments, env, log)
    seen = b""

    def read_until(done: Any) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline and process.poll() is None, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)

    read_until(lambda: b"> " in seen)
    for mark in (1, 2):
        os.write(master, b"dog\n")
        read_until(
            lambda mark=mark: (
                seen.count(b"> dog") == mark and len(seen.rpartition(b"> dog")[2]) > 20
            )  # type: ignore[misc]
        )
        process.send_signal(signal.SIGINT)
        read_until(lambda mark=mark: seen.count(b"> ") > mark)  # type: ignore[misc]
        answer = seen.rpartition(b"> dog")[2].rpartition(b"> ")[0]
        assert len(answer) < 3000, "the answer went on to its end"
    os.write(master, b"dog " * 200 + b"\n")  # longer than the model's positions
    read_until(lambda: seen.count(b"> ") > 3)
    assert "error: too long" in (tmp_path / "log").read_text()
    os.write(master, b"\n")
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    for fd in (master, slave, log):
        os.close(fd)


def test_ctrl_c_ends_the_answers_to_a_file(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("dog\n" * 50)
    arguments = ["--file", str(tmp_path / "lines"), "evaluate.max_new_tokens=900"]
    words = ["generate", str(run_dir), *arguments]
    process = zygote().start(("-m", "scalepeft"), words, {**os.environ, "OMP_NUM_THREADS": "1"})
    seen = b""
    while seen.count(b" ") < 30:
        seen += os.read(process.stdout.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(60)
    assert process.returncode == 130, rest
    assert "prompt 2" not in rest and rest.endswith(
        "scalepeft: interrupted; no partial files left\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.full) for e in ("ddp", "zero"))]
)
def test_ranks_answer_as_one_process(engine: str, run_dir: Path, tmp_path: Path) -> None:
    one = call("generate", str(run_dir), "--prompt", ASKED).stdout
    settings = [f"engine={engine}", *(["engine.stage=3"] if engine == "zero" else [])]
    (tmp_path / "lines").write_text(f"{ASKED}\n{ASKED}\n")
    for more in (["--file", str(tmp_path / "lines")], ["--prompt", " "]):
        codes, text = Job(2, ["generate", str(run_dir), *more, *settings]).wait()
        if more[0] == "--file":
            assert codes == [0, 0] and text.count(one) == 2, text
        else:
            assert codes == [2, 2] and text.count("'the prompt' is empty") == 1, text
    local = ["bash", str(ROOT / "launch/local.sh"), "2", "generate", str(run_dir), *settings]
    piped = subprocess.run(local, input=f"{ASKED}\n", capture_output=True, text=True, timeout=120)
    assert (piped.returncode, piped.stdout) == (0, one), piped.stderr
