"""lm-eval on a run folder against a direct computation; our side of the vLLM backend against a
stand-in.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from finished import adapted, make_run, stock
from processes import Job, rows
from test_merge import random_llama

from scalepeft.config import files as config_files
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.preemption import StopFlag
from scalepeft.eval import evaluate, vllm
from scalepeft.export import merge
from scalepeft.models import hub
from scalepeft.models import hub as models


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K" / "hf"


def run_of(folder: Path, model: Path, method: str = "hoft", **settings: Any) -> Path:
    make_run(folder, model, method, **settings)
    values = cfg.to_dict(config_files.load(str(folder / "config.yaml"), [])[0])
    small = ["evaluate.limit=4", "evaluate.max_new_tokens=8", "evaluate.batch_size=3"]
    (folder / "config.yaml").write_text(cfg.dump(config_files.overlay(values, small)))
    return folder


def predictions(run_dir: Path, subject: Any, *settings: str) -> dict[str, str]:
    assert evaluate.run(str(run_dir), list(settings), subject, StopFlag()) == 0
    found = rows(run_dir, f"{evaluate.FOLDERS[subject]}/toy/predictions.jsonl")
    return {row["id"]: row["prediction"] for row in found}


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 16
    stop: list[str] | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] = field(default_factory=list)


@dataclass
class BeamSearchParams:
    beam_width: int
    max_tokens: int
    ignore_eos: bool = False


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """Takes the calls that vLLM takes, with vLLM's refusals, and answers with stock transformers
    and PEFT.
    """

    made: list["LLM"] = []  # noqa: RUF012

    def __init__(
        self, *, model: str, tokenizer: str, dtype: str, max_model_len: int, seed: int,
        tensor_parallel_size: int, enable_lora: bool = False, max_lora_rank: int = 16,
        max_logprobs: int = 20, model_impl: str = "auto",
    ) -> None:  # fmt: skip
        assert dtype == "float32" and tensor_parallel_size == 1 and seed == 0
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        self.model, self.folder, self.lora = stock(Path(model)), Path(model), None
        self.tokenizer = models.load_tokenizer(hub.ModelConfig(), Path(tokenizer))
        self.limits = (max_model_len, max_logprobs, max_lora_rank if enable_lora else 0)
        self.model_impl, self.ended = model_impl, 0
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._end))
        LLM.made.append(self)

    def _end(self) -> None:
        self.ended += 1

    def _with(self, lora: LoRARequest | None) -> Any:
        if lora is None:
            return self.model
        import peft

        rank = json.loads((Path(lora.lora_path) / "adapter_config.json").read_text())["r"]
        assert rank <= self.limits[2] and lora.lora_int_id > 0
        if self.lora is None:
            self.lora = peft.PeftModel.from_pretrained(self.model, lora.lora_path).eval()
        return self.lora

    def _one(self, prompt: Any, lora: Any, tokens: int, ends: list[int], beams: int) -> list[int]:
        from transformers import GenerationConfig

        ids = prompt["prompt_token_ids"]
        assert len(ids) > 0 and len(ids) + tokens <= self.limits[0]
        config = GenerationConfig(
            max_new_tokens=tokens, eos_token_id=ends, pad_token_id=0, num_beams=beams
        )
        out = self._with(lora).generate(input_ids=torch.tensor([ids]), generation_config=config)
        return list(map(int, out[0, len(ids) :]))

    def generate(
        self, prompts: Any, sampling_params: list[SamplingParams], *, use_tqdm: bool,
        lora_request: LoRARequest | None,
    ) -> list[Any]:  # fmt: skip
        found = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert params.temperature == 0.0
            ends = list(params.stop_token_ids)
            if not params.ignore_eos:  # as vLLM does
                told = json.loads((self.folder / "generation_config.json").read_text())
                ends += told["eos_token_id"] if isinstance(told["eos_token_id"], list) else []
            ids = self._one(prompt, lora_request, params.max_tokens, ends, 1)
            for n in range(1, len(ids)):
                if any(s in self.tokenizer.decode(ids[:n]) for s in params.stop or []):
                    ids = ids[:n]
                    break
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]))
        return found

    def beam_search(
        self, prompts: Any, params: BeamSearchParams, lora_request: LoRARequest | None
    ) -> list[Any]:
        assert 2 * params.beam_width <= self.limits[1]
        return [
            SimpleNamespace(
                sequences=[
                    SimpleNamespace(
                        tokens=prompt["prompt_token_ids"]
                        + self._one(prompt, lora_request, params.max_tokens, [2], params.beam_width)
                    )
                ]
            )
            for prompt in prompts
        ]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[LLM]:
    """A module ``vllm`` of the same call signatures. It proves our side alone."""
    pytest.importorskip("peft")
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    modules["vllm.sampling_params"] = ModuleType("vllm.sampling_params")
    vars(modules["vllm"]).update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=dict)
    vars(modules["vllm.lora.request"]).update(LoRARequest=LoRARequest)
    vars(modules["vllm.sampling_params"]).update(BeamSearchParams=BeamSearchParams)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "made", [])
    return LLM.made


VLLM = "evaluate.backend=vllm"


@pytest.mark.parametrize("more", [("evaluate.stop=er",), ("evaluate.num_beams=3",)])
def test_stand_in_for_vllm_answers_as_our_own_generator(
    more: tuple[str, ...], stand_in: list[LLM], stories: Path, tmp_path: Path
) -> None:
    run_dir = run_of(tmp_path / "run", stories)
    wanted = predictions(run_dir, "adapter", *more)
    assert predictions(run_dir, "adapter", VLLM, *more) == wanted
    assert len(stand_in) == 1 and stand_in[0].limits[2] == 8, "HOFT of rank 4: a LoRA of rank 8"
    assert stand_in[0].ended == 1, "before COMET or the exit, with the GPU's memory"
    (export,) = (run_dir / "exported-lora").iterdir()
    before = (export / "adapter_config.json").stat().st_mtime_ns
    assert predictions(run_dir, "base", VLLM, *more) == predictions(run_dir, "base", *more)
    predictions(run_dir, "adapter", VLLM, *more, "evaluate.max_new_tokens=7")
    assert (export / "adapter_config.json").stat().st_mtime_ns == before, "exported once"


def test_stand_in_for_vllm_on_a_merged_4_bit_run(
    stand_in: list[LLM], stories: Path, tmp_path: Path
) -> None:
    run_dir = run_of(tmp_path / "run", stories, "goft", quant="nf4")
    merge.run(str(run_dir), str(run_dir / "merged"), [], "dequantized", "fp32")
    hostile = {"eos_token_id": [2, 511], "temperature": 1.0, "max_new_tokens": 1}
    (run_dir / "merged" / "generation_config.json").write_text(json.dumps(hostile))
    (run_dir / "merged" / "manifest.json").unlink()  # of the one that was replaced
    wanted = predictions(run_dir, "merged", "evaluate.max_tokens=40")
    assert predictions(run_dir, "merged", VLLM, "evaluate.max_tokens=40") == wanted
    assert len(stand_in) == 1 and any(wanted.values())


@pytest.mark.parametrize(("architecture", "used"), [("Qwen3", "transformers"), ("Llama", "auto")])
def test_biases_that_vllm_may_leave_out(
    architecture: str,
    used: str,
    stand_in: list[LLM],
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """test_vllm.py shows that vLLM's own Qwen3 does, and its Llama does not."""
    base = random_llama(tmp_path / "base", architecture)
    run_dir = run_of(tmp_path / "run", base, "hadamard-after", tokenizer=str(stories))
    merge.run(str(run_dir), str(run_dir / "merged"), [], "original", "fp32")
    said = "vllm serve --model-impl transformers" in capsys.readouterr().err
    assert said == (used == "transformers")
    predictions(run_dir, "merged", VLLM)
    assert [llm.model_impl for llm in stand_in] == [used]
    hoft = run_of(tmp_path / "hoft", base, "hoft", tokenizer=str(stories))
    merge.run(str(hoft), str(hoft / "merged"), [], "original", "fp32")
    assert "model-impl" not in capsys.readouterr().err


def test_where_vllm_does_not_apply(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    plain = run_of(tmp_path / "plain", stories)
    with pytest.raises(UserError, match="pip install vllm in an environment with a GPU"):
        predictions(plain, "base", VLLM)
    goft = run_of(tmp_path / "goft", stories, "goft")
    config = config_files.load(str(goft / "config.yaml"), [VLLM])[0]
    with pytest.raises(UserError, match=r"needs the adapter as a LoRA: .* not W plus a matrix"):
        vllm.exported(config, "0" * 64)
    assert not list((goft / "exported-lora").iterdir())
    with pytest.raises(UserError, match="in 2 processes: vLLM spreads over the GPUs by itself"):
        vllm.check(config, "adapter", 2)
    quantised = config_files.overlay(cfg.to_dict(config), ["model.quant=nf4"])
    with pytest.raises(UserError, match="held as nf4, vLLM would load another one"):
        vllm.check(quantised, "adapter", 1)
    with pytest.raises(UserError, match="pip install vllm"):
        vllm.check(quantised, "merged", 1)


QUESTIONS = [
    {"q": "Once upon a time there was a", "choices": ["little girl", "stone", "ball"], "gold": 0},
    {"q": "Lily went to the park and", "choices": ["saw a dog", "ate"], "gold": 1},
    {"q": "The cat", "choices": ["was happy", "xyz"], "gold": 0},
]


TASKS = {
    "choose_local": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
    },
    "continue_local": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "x",
        "generation_kwargs": {"until": [" a", "."], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def continued(model: Any, tokenizer: Any, text: str, until: list[str]) -> str:
    """Stock greedy generation of 24 tokens, up to the first of ``until``."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=24, eos_token_id=2, pad_token_id=0)
    found = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return str(found[: min((found.find(s) for s in until if s in found), default=None)])


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    whole = tokenizer(context + continuation)["input_ids"]
    begin = len(tokenizer(context)["input_ids"])
    logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return float(sum(logs[i - 1, whole[i]] for i in range(begin, len(whole))))


def write_tasks(folder: Path) -> None:
    """Task files over a local data file: no network."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        whole = {"task": name, "test_split": "test", "dataset_path": "json", **task}
        text = json.dumps({**whole, "dataset_kwargs": kwargs})  # JSON is YAML
        (folder / f"{name}.yaml").write_text(text)


def command(folder: Path, out: str, *model_args: str) -> list[str]:
    return [
        "run", "--model", "scalepeft", "--tasks", *TASKS, "--include_path", str(folder),
        "--output_path", str(folder / out), "--log_samples", "--batch_size", "2", "--model_args",
        *model_args,
    ]  # fmt: skip


def check_samples(out: Path, run_dir: Path, stories: Path) -> None:
    """What lm-eval wrote for each row, against likelihoods and texts computed one by one."""
    found = []
    for name in TASKS:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        read = [json.loads(line) for line in file.read_text().splitlines()]
        found.append(sorted(read, key=lambda row: row["doc_id"]))
    model, tokenizer = adapted(run_dir), models.load_tokenizer(hub.ModelConfig(), stories)
    for row, chosen, made in zip(QUESTIONS, *found, strict=True):
        wanted = [likelihood(model, tokenizer, row["q"], f" {c}") for c in row["choices"]]
        values = [float(answers[0][0]) for answers in chosen["resps"]]
        assert values == pytest.approx(wanted, abs=1e-4)
        assert chosen["acc"] == (wanted.index(max(wanted)) == row["gold"])
        assert made["resps"][0][0] == continued(model, tokenizer, row["q"], [" a", "."])


@pytest.mark.slow
def test_lm_eval_on_a_run_folder(
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    from scalepeft.integrations import lm_eval as hook

    # Else it reads all of lm-eval's own thousands of task files.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    run_dir = run_of(tmp_path / "run", stories, quant="nf4")
    write_tasks(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lm-eval", *command(tmp_path, "out", f"run_dir={run_dir}")])
    assert hook.main() == 0
    check_samples(tmp_path / "out", run_dir, stories)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    about = json.loads(results.read_text())["config"]
    assert about["run_dir"] == str(run_dir) and about["model_quant"] == "nf4"

    for given, message in (
        ({"subject": "adaptor"}, "subject=adaptor: allowed are adapter, merged, base"),
        ({"engine": "fsdp2"}, "each process must hold the whole model"),
        ({"max_lenght": 9}, "max_lenght: not known. Did you mean 'max_length'"),
        ({"adapter.rank": 9}, "adapter.rank: cannot be changed for an evaluation"),
        ({"device": "mps"}, "engine.device='mps'"),
    ):
        with pytest.raises(UserError, match=message):
            hook.ScalepeftLM(str(run_dir), **given)
    monkeypatch.setattr(sys, "argv", ["lm-eval", *command(tmp_path, "out", f"run_dir={tmp_path}")])
    assert hook.main() == 2
    said = capsys.readouterr().err
    assert "scalepeft: error: " in said and "is not a run directory" in said


RANK = """
import functools, sys, lm_eval.tasks as tasks
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
from scalepeft.integrations import lm_eval
sys.exit(lm_eval.main())
"""


@pytest.mark.multiprocess
@pytest.mark.full
def test_lm_eval_on_two_ranks(stories: Path, tmp_path: Path) -> None:
    """Three rows, which do not divide."""
    pytest.importorskip("lm_eval")
    run_dir = run_of(tmp_path / "run", stories, quant="nf4")
    write_tasks(tmp_path)
    arguments = command(tmp_path, "out", f"run_dir={run_dir}", "engine=ddp")
    codes, text = Job(2, arguments, program=("-c", RANK), fresh=True).wait(150)
    assert codes == [0, 0], text
    check_samples(tmp_path / "out", run_dir, stories)
