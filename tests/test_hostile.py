"""Whatever a file, a name or an argument holds: one printable line, exit code 2, no wait."""

import importlib
import multiprocessing.synchronize  # noqa: F401  another user could not import it
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import zygote

from scalepeft.analysis.report import load
from scalepeft.cli import main
from scalepeft.cluster.plan import gpus
from scalepeft.core import files
from scalepeft.core.errors import UserError
from scalepeft.core.files import kept_digest
from scalepeft.core.log import say
from scalepeft.core.text import plain
from scalepeft.data import token_file
from scalepeft.data.tasks.toy import Toy, ToyConfig
from scalepeft.models import tiny
from scalepeft.models.hub import ModelConfig, load_tokenizer
from scalepeft.models.weights import Weights
from scalepeft.run import goodput, lease, status

DEEP = "[" * 100_000
LONG = "9" * 5000


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with, which is all it says."""
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert code == 2, said
    (line,) = said.splitlines()
    assert line.startswith("scalepeft: error: ") and len(line) <= 300 and plain(line), line
    return line


FILES = {
    "nested": ("[" * 5000, "cannot be read"),
    "digits": (f"train: {{max_steps: {LONG}}}", "5000 digits"),
    "timestamp": ("run_dir: !!timestamp x", "cannot be read"),
    "keys": ("adapter:\n" + "".join(f"  k{i}: 1\n" for i in range(20_000)), "more than 2000 keys"),
    "resolved": ("# resolved: each ${ below is text\n" + "[" * 5000, "cannot be read"),
    "include": (f"include: {'a' * 5000}", "no such file beside it"),
    "control": ("x: \x1b[31m", "characters are not allowed"),
    "name": ('"\\e[31m\\n": {}', "no section"),
    "run_dir": ('run_dir: "a\\nid"', "run_dir=a id: has control characters"),
    "bidi": ('model: {path: "a\\u202eb"}', "model.path=a[U+202E]b: has control characters"),
    "list": ('data: {train: [a, "b\\u0085"]}', "data.train=b"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_config_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, reason = FILES[name]
    Path("c.yaml").write_text(text)
    more = [] if "run_dir" in text else ["run_dir=x"]
    assert reason in one_line(["config", "c.yaml", *more, "train.epochs=1"], capsys)


ARGUMENTS = {
    "file": (["a" * 5000], "no config file aaa"),
    "digits": (["train.max_steps=" + LONG], "train.max_steps='999"),
    "data": (["data=../runs/demo"], "no data config '../runs/demo'"),
    "section": (["data=" + "a" * 5000], "no data config 'aaa"),
    "key": (["\x1b[31m.x=1"], "no section"),
    "path": (["model.path=a\x7fb"], "model.path=a\u2421b: has control characters"),
    "bytes": (["run_dir=a\udcff"], "run_dir=a\ufffd: has control characters, or is not UTF-8"),
}


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_a_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, reason = ARGUMENTS[name]
    more = [] if name == "file" else ["run_dir=x", "train.epochs=1"]
    assert reason in one_line(["config", *more, *words], capsys)


def test_what_looks_like_a_date_is_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("2026-13-45", "2026-02-30", "2026-02-28", "!!timestamp x", "[" * 5000)
    for name in names:
        words = ["config", f"run_dir={name}", f"model.path={name}", "train.epochs=1"]
        assert main([*words, "data=commonsense", f"data.train={names[0]}"]) == 0
        said = capsys.readouterr().out
        assert said.count(name) >= 2 and f"- '{names[0]}'" in said


@pytest.mark.parametrize("length", [300, 5000])
def test_names_that_no_disk_takes(length: int, capsys: pytest.CaptureFixture[str]) -> None:
    name = ("n" * length) if length < 500 else "/tmp/" + "n/" * (length // 2)
    for words in (
        ["train", "model=tiny", "data=toy", "train.max_steps=1", f"run_dir={name}"],
        ["train", f"model.path={name}", "data=toy", "train.max_steps=1", "run_dir=runs/never"],
        ["evaluate", name], ["report", name], ["merge", name, "out"],
    ):  # fmt: skip
        one_line(words, capsys)
    assert not Path("runs/never").exists()


@pytest.mark.parametrize("name", ["a\udcffb", "a\nb", "a\x1b[31mb"])
def test_a_folder_on_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["report", name], ["evaluate", name], ["status", name], ["merge", "a", name]):
        assert "a name with control characters, or not UTF-8" in one_line(words, capsys)


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    settings = ["model=tiny", "data=toy", "train.max_steps=1", f"run_dir={tmp_path}/run"]
    env = {k: v for k, v in os.environ.items() if k != "SCALEPEFT_CACHE"}
    env |= {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = zygote().run(("-m", "scalepeft"), ["train", *settings], env, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].endswith("Not a directory; set SCALEPEFT_CACHE=FOLDER")


RECORDS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": lambda run: load.read(run, "x").problems[0],
    "adapter/adapter_config.json": lambda run: load.read(run, "x").problems[0],
    "eval/toy/scores.json": lambda run: load.read(run, "x").problems[0],
    "holder-1.json": lambda run: str(lease._read(run / "holder-1.json")),
    "events.jsonl": lambda run: str(status.status(run)["state"]),
    "metrics.jsonl": lambda run: str(goodput.lost_since(run, 0, 1.0)),
    "gpu.json": lambda run: gpus.measured(run / "gpu.json"),
    "model.safetensors.index.json": lambda run: Weights(run),
}


@pytest.mark.parametrize("kind", ["deep", "digits", "fifo", "zeros"])
@pytest.mark.parametrize("name", list(RECORDS))
def test_a_record_of_a_run(name: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "events.jsonl").touch()
    if kind == "fifo":
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        if name not in ("metrics.jsonl", "events.jsonl", "holder-1.json"):
            (tmp_path / "metrics.jsonl").touch()
    else:
        file.write_text({"deep": DEEP, "digits": f'{{"time": {LONG}}}', "zeros": "\0" * 9999}[kind])
    try:
        said = RECORDS[name](tmp_path)
    except (UserError, IndexError) as error:
        said = str(error).removeprefix(str(tmp_path))
    assert len(said.replace(str(tmp_path), "")) <= 300 and plain(said), said


def test_lines_of_any_length_and_numbers_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LINE_BYTES", 1000)
    good, file = b'{"step": 1}\n', tmp_path / "m.jsonl"
    file.write_bytes(good + b"x" * 200_000 + b"\n" + good)
    for newest_first in (False, True):
        found = list(files.lines_of(file, newest_first))
        assert sum(map(len, found)) == file.stat().st_size
        assert sum(map(len, filter(lambda line: line == good, found))) == 2 * len(good)
    assert max(map(len, files.lines_of(file))) == 1000
    for step in ("1e400", "NaN", "true", "1" + "0" * 400):
        assert files.read_line(f'{{"step": {step}}}'.encode(), "step") is None


def test_a_line_for_the_user_holds_no_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    say("name \x1b[31m\x07\u202e")
    assert capsys.readouterr().err == "scalepeft: name \u241b[31m\u2407[U+202E]\n"


def as_user(user: int, work: Callable[[], Any]) -> str:
    """What ``work`` returns in a process of another user, of the group 4242 too."""
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        os.setgroups([4242])
        os.setgid(user)
        os.setuid(user)
        os.umask(0o022)
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end) as f:
        return f.read()


@pytest.mark.skipif(os.getuid() != 0, reason="takes a second user")
def test_a_cache_that_a_group_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second user reads what the first made, and leaves alone what he may not replace."""
    # As root, whose files the others may not read; a base that is cached already imports nothing.
    importlib.import_module("transformers.models.llama.modeling_llama")
    shard = tiny.make(0) / "model.safetensors"
    config = ToyConfig(train_size=20)
    tokenizer = load_tokenizer(ModelConfig(), shard.parent)

    def work() -> list[Path]:
        folder = tiny.make(0)
        split = token_file.split_file(Toy(config), "train", tokenizer, [])
        return [folder, split, kept_digest(Path("/etc/passwd"))]

    work()
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        cache = Path(above) / "cache"
        cache.mkdir()
        os.chown(cache, 0, 4242)
        cache.chmod(0o3770)
        monkeypatch.setenv("SCALEPEFT_CACHE", str(cache))
        first = as_user(5001, work)
        assert first.startswith("[PosixPath"), first
        made = list(cache.rglob("*"))
        assert {path.parent.name for path in made} >= {"models", "tokens", "digests"}
        for path in made:
            about = path.stat()
            assert (about.st_uid, about.st_gid) == (5001, 4242), path
            assert about.st_mode & (0o3070 if path.is_dir() else 0o060) in (0o3070, 0o060), path
        before = {path: path.stat().st_ino for path in made}
        (cache / "tokens" / "old.tmp").touch()
        os.utime(cache / "tokens" / "old.tmp", (1, 1))
        assert as_user(5002, work) == first
        assert {path: path.stat().st_ino for path in made} == before, "nothing was made anew"
        (tokens,) = (cache / "tokens").glob("*.safetensors")
        os.truncate(tokens, 100)
        said = as_user(5002, work)
        assert said.startswith("UserError: data.cache: ") and "set data.cache=FOLDER" in said
        assert as_user(5001, work) == first
