"""vLLM itself, on the CPU, answers as transformers does: every method that merges, HOFT as a LoRA.

It lies in an environment of its own (launch/vllm.sh), in which scripts and commands are started.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import stock
from processes import ROOT, call, rows
from test_docs import SHORT, commands, desk  # noqa: F401
from transformers import AutoTokenizer

from scalepeft.export import merge
from scalepeft.export import peft as export
from scalepeft.models import tiny

PYTHON = ROOT / ".venv-vllm/bin/python"


pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm here: launch/vllm.sh makes it"),
]


NO_MERGE = {"surm_adapter"}  # not affine
SETTINGS = {"hut": ["adapter.shift=true"], "hoft": ["adapter.rank=4"]}


METHODS = sorted({file.stem for file in (ROOT / "configs/adapters").glob("*.yaml")} - NO_MERGE)


PROMPTS = [[0, 5, 6, 7], [0, 300, 20], [0, 67, 68, 69, 70, 400, 401]]


def in_vllm(*arguments: str, timeout: float = 900, **env: str) -> str:
    """What a command of .venv-vllm prints; it must end well, and nothing may complain."""
    variables = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **env,
    }  # fmt: skip
    done = subprocess.run(
        [str(PYTHON), *arguments], env=variables, capture_output=True, text=True, timeout=timeout,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "Traceback" not in printed, printed
    return printed


def random_model(folder: Path, architecture: str = "Llama", tokenizer: Path | None = None) -> Path:
    """Two layers with heads of 64, of which vLLM takes no fewer than 32, and tiny's tokenizer."""
    import transformers

    folder.mkdir()
    for file in (tokenizer or tiny.make(0)).glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    kind = getattr(transformers, f"{architecture}Config")
    config = kind(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=32000 if tokenizer else 768,
        max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.save_pretrained(folder)
    return folder


def trained(folder: Path, model: Path, method: str, *settings: str) -> Path:
    done = call(
        "train", f"model.path={model}", "data=toy", f"adapter={method}",
        *SETTINGS.get(method, []),
        "data.train_size=60", "data.valid_size=4", "data.test_size=12", "train.precision=fp32",
        "train.epochs=null", "train.max_steps=8", "train.warmup_steps=0", "train.lr=1e-2",
        "train.global_batch=8", "train.micro_batch=4", f"run_dir={folder}", *settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@torch.no_grad()
def tokens(model: Any) -> list[list[int]]:
    """16 greedy tokens of each prompt by transformers; </s> is a token like others."""
    from transformers import GenerationConfig

    found, greedy = [], GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)
    model.generation_config = greedy
    for ids in PROMPTS:
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
        found.append(out[0, len(ids) :].tolist())
        assert len(found[-1]) == 16
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("vllm") / "base")


@pytest.fixture(scope="module")
def hoft(base: Path) -> Path:
    return trained(base.parent / "hoft", base, "hoft")


@pytest.fixture(scope="module")
def served(base: Path, hoft: Path) -> dict[str, list[list[list[int]]]]:
    """Name -> the tokens of transformers, and of vLLM; and those of vLLM's own Qwen3."""
    peft = pytest.importorskip("peft")
    folder = base.parent
    wanted = {"base": tokens(stock(base))}
    jobs: dict[str, Any] = {"base": {"model": str(base)}}
    runs = {
        name: hoft if name == "hoft" else trained(folder / name, base, name) for name in METHODS
    }
    qwen = random_model(folder / "qwen3-base", "Qwen3")
    runs["qwen3"] = trained(folder / "qwen3", qwen, "hadamard")
    for name, run_dir in runs.items():
        merge.run(str(run_dir), str(run_dir / "merged"), [], "original", "base")
        wanted[name] = tokens(stock(run_dir / "merged"))
        jobs[name] = {"model": str(run_dir / "merged")}
    wanted["qwen3 by vLLM's own class"] = wanted["qwen3"]
    jobs["qwen3 by vLLM's own class"] = jobs["qwen3"]
    jobs["qwen3"] = {**jobs["qwen3"], "model_impl": "transformers"}
    some = ["adapter.target_modules=[q_proj,down_proj]", "adapter.layers=[1]"]
    for name, run_dir in (("lora of hoft", hoft), ("lora of some layers", folder / "some")):
        if run_dir != hoft:
            trained(run_dir, base, "hoft", *some)
        export.run(str(run_dir), str(run_dir / "lora"), [], "lora")
        wanted[name] = tokens(peft.PeftModel.from_pretrained(stock(base), run_dir / "lora").eval())
        jobs[name] = {"model": str(base), "lora": str(run_dir / "lora")}
    for file, value in (("jobs", jobs), ("prompts", PROMPTS)):
        (folder / f"{file}.json").write_text(json.dumps(value))
    files = (folder / f"{name}.json" for name in ("jobs", "prompts", "out"))
    in_vllm(str(ROOT / "tests/integrations/vllm_tokens.py"), *map(str, files))
    told = json.loads((folder / "out.json").read_text())
    return {name: [wanted[name], told[name]] for name in jobs}


LORAS = ["lora of hoft", "lora of some layers"]


@pytest.mark.parametrize("name", ["base", *METHODS, "qwen3", *LORAS])
def test_vllm_tells_the_tokens_of_transformers(
    name: str, served: dict[str, list[list[list[int]]]]
) -> None:
    wanted, told = served[name]
    assert told == wanted
    assert name == "base" or wanted != served["base"][0], "the adapter must show"


def test_hoft_as_lora_tells_what_it_tells_merged(
    served: dict[str, list[list[list[int]]]],
) -> None:
    assert served["lora of hoft"][1] == served["hoft"][1]


def test_biases_that_vllms_own_class_leaves_out(
    served: dict[str, list[list[list[int]]]],
) -> None:
    """The reason for merge's line and for ``model_impl``: it loads, and says something else."""
    wanted, told = served["qwen3 by vLLM's own class"]
    assert told != wanted


def predictions(run_dir: Path, folder: str) -> dict[str, str]:
    file = f"{folder}/toy/predictions.jsonl"
    return {row["id"]: row["prediction"] for row in rows(run_dir, file)}


@pytest.mark.parametrize("processes", ["0", "1"], ids=["engine inside", "engine's own process"])
@pytest.mark.parametrize("subject", ["adapter", "merged"])
def test_evaluate_with_vllm_is_evaluate(
    subject: str, processes: str, hoft: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(hoft, run_dir)
    shutil.rmtree(run_dir / "merged", ignore_errors=True)
    merge.run(str(run_dir), str(run_dir / "merged"), [], "original", "base")
    command = ["evaluate", str(run_dir), "evaluate.max_new_tokens=12"]
    command += ["--merged"] * (subject == "merged")
    folder = {"adapter": "eval", "merged": "eval-merged"}[subject]
    assert call(*command).returncode == 0
    wanted = predictions(run_dir, folder)
    shutil.rmtree(run_dir / folder)
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": processes}
    in_vllm("-m", "scalepeft", *command, "evaluate.backend=vllm", **variables)
    assert predictions(run_dir, folder) == wanted
    assert len(wanted) == 12 and len(set(wanted.values())) > 1


def page_commands(name: str) -> list[str]:
    return commands(ROOT / f"docs/integrations/{name}.md")


def shell(folder: Path, *lines: str) -> str:
    """What the lines print, run in ``folder`` as a page's reader would."""
    variables = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=folder, env=variables, capture_output=True,
        text=True, timeout=900, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def server(folder: Path, command: str, port: int) -> Iterator[None]:
    """``vllm serve`` from when it answers to the end of the block."""
    log = (folder / "serve.log").open("w")
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            printed = (folder / "serve.log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, printed
            time.sleep(1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_the_commands_of_the_page(desk: Path) -> None:  # noqa: F811
    """The served LoRA's text is the merged checkpoint's in transformers."""
    (desk / ".venv-vllm").symlink_to(PYTHON.parents[1])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    *lines, serve, ask = [c.replace("8000", str(port)) for c in page_commands("vllm")]
    short = " ".join(map(shlex.quote, [*SHORT, "evaluate.limit=4", "train.lr=1e-2"]))
    shell(desk, *(f"{line} {short}" if " train " in line else line for line in lines))
    run_dir = desk / "runs/commonsense_hoft"
    for folder in ("eval", "eval-merged"):
        assert len(rows(run_dir, f"{folder}/commonsense/predictions.jsonl")) == 4
    with server(desk, serve, port):
        answer = json.loads(shell(desk, ask))
    model, tokenizer = stock(run_dir / "merged"), AutoTokenizer.from_pretrained(desk / "MODEL")
    prompt = tokenizer("Is 4 even?", return_tensors="pt").input_ids
    ids = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    assert answer["model"] == "tuned"
    assert answer["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)


LLAMA_CPP = ROOT / ".venv-vllm/llama.cpp"
"""Its source, with the converter."""


READ = """
import json, sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
for prompt in json.loads(sys.argv[2]):
    told = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        told.append(token)
        if len(told) == 16:
            break
    print(json.dumps(told))
"""  # keys and values in fp32: by default they are rounded to fp16


@pytest.mark.skipif(not LLAMA_CPP.exists(), reason="no llama.cpp: launch/llama-cpp.sh builds it")
@pytest.mark.parametrize("method", ["hoft", "goft", "hut", "hadamard"])
def test_llama_cpp_tells_the_tokens_of_transformers(
    method: str, shared_data: Path, tmp_path: Path
) -> None:
    """By the commands of its page; of a shift the biases, too."""
    base = random_model(tmp_path / "base", tokenizer=shared_data / "tokenizer/mistral_v1")
    trained(tmp_path / "RUN", base, method)
    (tmp_path / ".venv-vllm").symlink_to(PYTHON.parents[1])
    assert shell(tmp_path, *page_commands("llama-cpp")).strip()
    wanted = tokens(stock(tmp_path / "merged"))
    assert wanted != tokens(stock(base)), "the adapter must show"
    told = in_vllm("-c", READ, str(tmp_path / "merged.gguf"), json.dumps(PROMPTS))
    lines = [line for line in told.splitlines() if line.startswith("[") and line.endswith("]")]
    assert [json.loads(line) for line in lines] == wanted
