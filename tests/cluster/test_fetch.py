"""scalepeft fetch from a hub on loopback, and runs of what it brought where no network is."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from disks import small_disk
from hub_server import HubServer, serving
from processes import ROOT, call, flip, losses
from pyarrow import parquet

from scalepeft import cli
from scalepeft.core.errors import UserError
from scalepeft.data import tables
from scalepeft.models import hub as models
from scalepeft.parallel.ranks import Ranks

BASE = ROOT / "tests/data/run-2026-11-21/base"
MODEL, SET, TABLE = "models/org/base", "datasets/org/rows", "datasets/org/table"
ROWS = [
    {"instruction": f"Is {i} {'even' if i % 3 else 'odd'}?", "input": "", "answer": "true",
     "output": "the correct answer is true"}
    for i in range(40)
]  # fmt: skip
# Whatever a process asks of the network, but for sockets in the file system, ends it.
FORBIDDING = """\
import os, sys
def forbid(event, args):
    if event == "socket.getaddrinfo" or (
        event in ("socket.connect", "socket.sendto") and not isinstance(args[1], (str, bytes))
    ):
        os.write(2, f"the network was asked: {event} {args}\\n".encode())
        os._exit(99)
sys.addaudithook(forbid)
"""


def packed(rows: list[dict[str, Any]]) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), made)
    return made.getvalue()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        server.put_folder(MODEL, BASE)
        server.put(SET, {"data/train-00000-of-00001.parquet": packed(ROWS[:24])}, "v1")
        server.put(SET, {"data/train-00000-of-00001.parquet": packed(ROWS)})
        lines = [",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]
        server.put(TABLE, {"rows.csv": "\n".join(lines).encode()})
        yield server


def run(*commands: list[str], **env: str) -> list[tuple[int, str]]:
    """Exit code and output of each command of ``scalepeft``, all in one new Python: HF_* are read
    at import.
    """
    code = "import sys, json\nfrom scalepeft import cli\nfor words in json.loads(sys.argv[1]):"
    code += "\n    print(end=f'\\0{cli.main(words)}\\0', flush=True)"
    held = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=ROOT, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        env={**held, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env},
    )  # fmt: skip
    assert "Traceback" not in done.stdout and done.returncode == 0, done.stdout
    said = done.stdout.split("\0")
    return [(int(code), text) for text, code in zip(said[::2], said[1::2], strict=False)]


TRAIN = (
    "data=commonsense data.duplicates=keep adapter=hoft adapter.rank=2 train.precision=fp32"
    " adapter.target_modules=q_proj train.global_batch=4 train.micro_batch=2 train.max_steps=3"
).split()


@pytest.mark.slow
def test_a_run_without_a_network_is_the_run_over_local_files(
    hub: HubServer, tmp_path: Path
) -> None:
    home = tmp_path / "hf"
    tokenizer = {p.name: p.read_bytes() for p in BASE.glob("tokenizer*")}
    hub.put("models/org/words", tokenizer | {"config.json": (BASE / "config.json").read_bytes()})
    hub.put(MODEL, {p.name: p.read_bytes() for p in BASE.iterdir()} | {"pytorch_model.bin": b"x"})
    taken = ["model.path=org/base", "model.tokenizer=org/words", "data.train=hf://org/rows@v1",
             "data.valid=hf://org/table"]  # fmt: skip
    names = [
        "model.path=org/base",
        "model.tokenizer=org/words",
        "hf://org/rows@v1",
        "hf://org/table",
    ]
    fetch = ["fetch", *TRAIN, "--out", str(home)]
    later = ["model.path=org/base", "data.train=hf://org/rows"]  # then the cache's newest is main
    (code, said), (code_later, _) = run([*fetch, *taken], [*fetch, *later], HF_ENDPOINT=hub.url)
    assert (code, code_later) == (0, 0), said
    assert f"export HF_HOME={home} HF_HUB_OFFLINE=1" in said
    listed = json.loads((home / tables.FETCHED).read_text())["fetched"]
    assert list(listed) == [*names, "hf://org/rows"]
    for name, entry in list(listed.items())[:4]:
        assert f"{name}: commit {entry['commit']}, {len(entry['files'])} files" in said
    commits = [hub.refs[r]["main"] for r in (MODEL, "models/org/words")] + [hub.refs[SET]["v1"]]
    assert [entry["commit"] for entry in listed.values()][:3] == commits
    assert not [n for n, _ in hub.sent if n.endswith(".bin")], "what a run does not read"

    hub.shutdown()
    hub.server_close()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/sitecustomize.py").write_text(FORBIDDING)
    away = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.url,
            "PYTHONPATH": f"{tmp_path / 'lib'}:{ROOT}"}  # fmt: skip
    more = ["train.eval_every=3"]
    refused = (
        (["model.path=org/base", "model.revision=v9"], "model.path=org/base at revision v9: not f"),
        (["model.path=org/else"], "model.path=org/else: not fetched, and HF_HUB_OFFLINE is set"),
        (
            ["model.path=org/base", "model.tokenizer=org/else"],
            "model.tokenizer=org/else: not fetch",
        ),
        (
            ["model.path=org/base", "data.train=hf://org/rows@v2"],
            "hf://org/rows@v2: cannot be read",
        ),
    )
    train = ["train", *TRAIN, *taken]
    none = [f"run_dir={tmp_path / 'no'}", "data.valid=[]"]
    done, *others = run(
        [*train, *more, f"run_dir={tmp_path / 'away'}"],
        *([*train, *none, *words] for words, _ in refused), **away,
    )  # fmt: skip
    assert done[0] == 0, done[1]
    for (code, said), (_, says) in zip(others, refused, strict=True):
        assert code == 2 and says in said and "run scalepeft fetch with these" in said, said
    for name, rows in (("v1", ROWS[:24]), ("all", ROWS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    near = [f"model.path={BASE}", f"data.train={tmp_path / 'v1.json'}",
            f"data.valid={tmp_path / 'all.json'}"]  # fmt: skip
    here = call("train", *TRAIN, *near, *more, f"run_dir={tmp_path / 'near'}")
    assert here.returncode == 0, here.stderr
    assert losses(tmp_path / "away") == losses(tmp_path / "near")
    valid = [(tmp_path / n / "validation.jsonl").read_text().split(', "seconds')[0]
             for n in ("away", "near")]  # fmt: skip
    assert valid[0] == valid[1]


@pytest.mark.slow
def test_a_changed_byte_is_found_and_mended(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    taken = ["data=commonsense", "model.path=org/base", "data.train=hf://org/rows@v1"]
    fetch = ["fetch", *taken, "--out", str(home)]
    check = ["fetch", "--check", str(home)]
    (_, said), (code, checked) = run(fetch, check, HF_ENDPOINT=hub.url)
    assert code == 0, said + checked
    assert checked.splitlines() == ["ok    model.path=org/base: 6 files",
                                    "ok    hf://org/rows@v1: 2 files"]  # fmt: skip
    (weights,) = home.glob("hub/models--org--base/snapshots/*/model.safetensors")
    (rows,) = home.glob("datasets/org___rows/**/*.arrow")
    flip(weights.resolve(), 9000)
    rows.write_bytes(rows.read_bytes()[:-1])
    done = call("fetch", "--check", str(home))
    first, second = done.stdout.splitlines()
    assert done.returncode == 1 and f"{weights.relative_to(home)} has changed" in first
    assert f"remove {weights.resolve()} and fetch again" in first
    assert f"{rows.relative_to(home)} has " in second and f"remove {rows.parent} and" in second
    weights.resolve().unlink()
    shutil.rmtree(rows.parent)
    more = ["fetch", *taken, "data.test=hf://org/rows", "--check"]
    _, (code, said) = run(fetch, more, HF_ENDPOINT=hub.url, HF_HOME=str(home))
    assert code == 1 and [line[:5] for line in said.splitlines()] == ["ok   ", "ok   ", "FIX  "]
    assert "FIX   hf://org/rows: not fetched" in said


READING = """\
import sys
from scalepeft.data import rows
for source in sys.argv[1:]:
    print(source, len(list(rows.read_rows(source))), rows.content(source))
"""


@pytest.mark.slow
@pytest.mark.full
def test_sets_of_every_kind_are_the_same_without_a_network(hub: HubServer, tmp_path: Path) -> None:
    hub.put(SET, {"default/train/0000.parquet": packed(ROWS[:11])}, tables.CONVERTED)
    converted = f"hf://org/rows@{tables.CONVERTED}:default:train"
    counts = {"hf://org/rows@v1": 24, "hf://org/rows": 40, "hf://org/rows::train[:7]": 7}
    counts |= {converted: 11, "hf://org/table": 40}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url}
    words = ["fetch", "data=commonsense", f"data.train={','.join(counts)}"]
    ((code, said),) = run(words, **env)
    assert code == 0, said
    seen = []
    for offline in ("0", "1"):
        seen.append(
            subprocess.run(
                [sys.executable, "-c", READING, *counts], text=True, capture_output=True, cwd=ROOT,
                env={**env, "HF_HUB_OFFLINE": offline}, check=True, timeout=120,
            ).stdout
        )  # fmt: skip
        hub.files.clear()  # nothing more to be had there
    assert seen[0] == seen[1]
    assert [int(line.split()[1]) for line in seen[1].splitlines()] == list(counts.values())


@pytest.fixture
def fetch(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:  # fmt: skip
    """Exit code and stderr of a fetch of models in this process, under constants of the hub's."""

    def fetch(*words: str, **constants: object) -> tuple[int, str]:
        home = tmp_path / "hf"
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
        given: dict[str, Any] = {"HF_HUB_CACHE": home / "hub", "ENDPOINT": hub.url, **constants}
        form = f"{given['ENDPOINT']}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for key, value in {**given, "HUGGINGFACE_CO_URL_TEMPLATE": form}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{key}", value)
        return cli.main(["fetch", *words]), capsys.readouterr().err

    return fetch


def test_a_transfer_that_broke_off_goes_on(hub: HubServer, fetch: Any) -> None:
    hub.cut["model.safetensors"] = 50_000
    code, said = fetch("model.path=org/base")
    assert code == 0, said
    assert [name for name, _ in hub.sent].count("model.safetensors") == 2
    before = len(hub.sent)
    assert fetch("model.path=org/base")[0] == 0
    assert len(hub.sent) == before, "what is there comes no second time"
    assert fetch("--check")[0] == 0


def test_what_cannot_be_fetched_is_said_in_one_line(
    hub: HubServer, fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put_folder("models/org/closed", BASE)
    hub.gated.add("models/org/closed")
    damaged = {p.name: p.read_bytes() for p in BASE.iterdir()}
    damaged["model.safetensors"] = damaged["model.safetensors"][:-9]
    hub.put("models/org/cut", damaged)
    for words, how, says in (
        (("model.path=org/none",), {}, "model.path=org/none: no such folder here, and the downl"),
        (("model.path=org/base", "model.revision=v9"), {}, "org/base at revision v9: no such fol"),
        (("model.path=org/closed",), {}, "for a gated one, hf auth login"),
        (("model.path=org/cut",), {}, "model.safetensors: truncated or damaged"),
        (("model.path=org/base",), {"ENDPOINT": "http://127.0.0.1:9"}, "the download from the hub"),
        (("model=tiny",), {}, "nothing of the hub is named"),
        ((), {}, "nothing of the hub is named"),
        (("--check",), {}, "nothing of the hub is named, nor listed in"),
        (("model.path=org/base", "model.path=./x"), {}, "model.path=./x: no such folder"),
    ):
        code, said = fetch(*words, **{"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url, **how})
        assert code == 2 and "Traceback" not in said, said
        last = said.strip().splitlines()[-1]
        assert last.startswith("scalepeft: error: ") and says in last, said
    assert not (tmp_path / "hf" / tables.FETCHED).exists()
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    code, said = fetch("model.path=org/base")
    assert code == 2 and "HF_HUB_CACHE is set: a job would look there" in said
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said = fetch("model.path=org/base")
    assert code == 2 and "HF_HUB_OFFLINE is set: unset it here" in said


def test_two_at_once_list_what_both_brought(
    fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalepeft.cluster import fetch as fetching

    listed, bring = tmp_path / "hf" / tables.FETCHED, fetching._model

    def meanwhile(*words: Any) -> Any:
        found = bring(*words)
        listed.write_text('{"fetched": {"model.path=org/else": {"files": {}}}}')
        return found

    monkeypatch.setattr(fetching, "_model", meanwhile)
    assert fetch("model.path=org/base")[0] == 0
    held = json.loads(listed.read_text())["fetched"]
    assert list(held) == ["model.path=org/else", "model.path=org/base"]


def test_a_full_disk_is_said_in_one_line(fetch: Any, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with small_disk(tmp_path / "hf", "size=100k"):
        code, said = fetch("model.path=org/base")
        assert code == 2 and "No space left on device" in said.strip().splitlines()[-1], said
        assert not (tmp_path / "hf" / tables.FETCHED).exists()


def test_the_token_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scalepeft.cluster import fetch

    for name in ("HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fetch._home(str(tmp_path / "hf")) == tmp_path / "hf"
    assert os.environ["HF_TOKEN_PATH"] == str(tmp_path / "cache/huggingface/token")


def test_a_base_that_is_not_there_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model.path=org/none: not fetched, and HF_HUB_OFFLINE is"):
        models.open_base(models.ModelConfig(path="org/none"), Ranks())
