"""scalepeft push against a stand-in for the hub's HTTP API: what arrives, and what is refused."""

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from finished import make_run, older_layout, stock
from processes import ROOT, zygote

import scalepeft
from scalepeft import cli
from scalepeft.adapters import layout
from scalepeft.adapters.inject import read_adapter

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.url}/me/adapter", "name": "me/adapter"})
        if self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            yaml.safe_load(content.split("---")[1])
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/models/me/adapter/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.startswith("/api/models/me/adapter/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            url = f"{self.server.url}/me/adapter/commit/{'0' * 40}"
            return self.answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        return self.answer(404, {"error": f"no {self.path}"})

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/adapter", "modelId": "me/adapter", "siblings": []})

    def answer(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit code and stderr of ``scalepeft push`` in this process, under constants of the hub's."""

    def push(*words: object, token: str = TOKEN, **constants: object) -> tuple[int, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        for key, value in {"ENDPOINT": hub.url, **constants}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{key}", value)
        code = cli.main(["push", *map(str, words)])
        return code, capsys.readouterr().err

    return push


def evaluated(run: Path, subject: str) -> None:
    """Scores as an evaluation leaves them."""
    metric = {"value": 0.5, "ci95": [0.25, 0.75], "share": True}
    part = {"count": 8, "no_answer_found": 0, "metrics": {"accuracy": metric}}
    (run / "eval/toy").mkdir(parents=True)
    scores = {"headline": "accuracy", **part, "sources": {"": part}, "left_out": 0, "notes": []}
    (run / "eval/toy/scores.json").write_text(json.dumps(scores))
    (run / "eval/toy/settings.json").write_text(json.dumps({"subject": subject}))


def test_a_run_arrives_whole_under_its_card(hub: Hub, push: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "builtin:tiny", "hoft")
    evaluated(run, json.loads((run / "adapter" / layout.ABOUT).read_text())["sha256"])
    words = (run, "me/adapter", "--private", "--license", "llama3.1", "--base-model", "meta/tiny")
    code, said = push(*words)
    assert code == 0, said
    assert f"in me/adapter: {hub.url}/me/adapter/commit/" in said
    assert hub.made == [{"name": "adapter", "organization": "me", "visibility": "private"}]
    names = (layout.WEIGHTS, layout.CONFIG, layout.ABOUT, layout.CARD)
    assert sorted(hub.files) == sorted(names)
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content, "no path of this machine"
        (arrived / name).write_bytes(content)
    (config, state, about), (want, tensors, _) = map(read_adapter, (arrived, run / "adapter"))
    assert config == want and state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert about["base_model"]["path"] == "meta/tiny"
    _, head, body = hub.files[layout.CARD].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "meta/tiny", "license": "llama3.1", "library_name": "peft",
        "tags": ["scalepeft", "hoft"],
    }  # fmt: skip
    assert "| toy | adapter | accuracy | 50.0% | 25.0% to 75.0% | 8 |" in body
    assert "HOFT (arXiv" in body and "rank=4" in body and "1 steps of 16 rows" in body
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in body
    assert "import scalepeft.integrations.peft" in body


def test_scores_of_another_adapter_are_left_out(hub: Hub, push: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "builtin:tiny", "lora")
    evaluated(run, "f" * 64)
    code, said = push(run, "me/adapter")
    assert code == 0, said
    assert "scores of another adapter; left out" in said
    assert "others do not have the base" in said
    card = hub.files[layout.CARD].decode()
    assert "accuracy" not in card and "scalepeft.integrations.peft" not in card


def test_what_cannot_be_pushed_is_said_in_one_line(hub: Hub, push: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "builtin:tiny", "lora")
    older = make_run(tmp_path / "older", "builtin:tiny", "lora")
    older_layout(older / "adapter")
    for words, how, says in (
        ((run, "me/adapter"), {"token": "hf_wrong"}, "not pushed: HfHubHTTPError"),
        ((run, "me/adapter"), {"ENDPOINT": "http://127.0.0.1:9"}, "not pushed: ConnectError"),
        ((run, "me/adapter"), {"HF_HUB_OFFLINE": True}, "not pushed: OfflineModeIsEnabled"),
        ((run, "me/other"), {}, "me/other: not pushed: "),
        ((run, "no repo name"), {}, "no repo name: not pushed: HFValidationError"),
        ((older, "me/adapter"), {}, "in the layout of older runs"),
        ((tmp_path, "me/adapter"), {}, "adapter_config.json: no such file"),
    ):
        code, said = push(*words, **{"HF_HUB_OFFLINE": False, **how})
        assert code == 2 and "Traceback" not in said, said
        last = said.strip().splitlines()[-1]
        assert last.startswith("scalepeft: error: ") and says in last, said
    assert not hub.files


def test_the_card_of_an_adapter_from_python(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    scalepeft.inject(net, {"name": "goft", "target_modules": ["0"]})
    scalepeft.save_adapter(net, tmp_path / "adapter")
    text = (tmp_path / "adapter" / layout.CARD).read_text()
    assert re.match(r"---\nlibrary_name: peft\n", text) and "# GOFT adapter of BASE" in text


@pytest.mark.slow
@pytest.mark.full
def test_the_commands_of_the_page(
    hub: Hub, push: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    from test_docs import commands

    from scalepeft.models import tiny

    monkeypatch.chdir(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(stock(tiny.make(0)), config).save_pretrained("ADAPTER")
    row = {"instruction": "Is 2 even?", "input": "", "output": "true", "answer": "true"}
    Path("TEST").write_text(json.dumps([row] * 4))
    for words in (line.split()[1:] for line in commands(ROOT / "docs/integrations/hub.md")):
        if words[0] == "push":
            code, said = push(*words[1:])
            assert code == 0, said
        else:
            done = zygote().run(("-m", "scalepeft"), words, dict(os.environ), 120, tmp_path)
            assert done.returncode == 0, done.stderr
    assert b"me/tiny" in hub.files[layout.CONFIG]
    assert Path("merged/model.safetensors").is_file() and Path("lora").is_dir()
