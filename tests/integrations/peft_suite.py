"""PEFT's own tests, run on our configs.

    python tests/integrations/peft_suite.py [PYTEST ARGUMENTS]    all of it, and a table of counts

launch/test.sh fetches the tests of the installed peft from its source distribution; nothing of them
is in this repository. ``write`` copies the files named in ``EDITS`` and replaces a few places of
them, of which each must be there as often as is said here: a new peft with other tests fails loudly.
Which tests are not run, and why, is in ``LEFT_OUT``; which cannot hold, in peft_exceptions.toml.
"""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXCEPTIONS = HERE / "peft_exceptions.toml"
VERSION = importlib.metadata.version("peft")
FILES = (
    "test_custom_models.py", "test_decoder_models.py", "test_initialization.py",
    "test_tuners_utils.py",
)  # fmt: skip

LEFT_OUT: list[tuple[str, str]] = [
    # test_custom_models
    ("trainable_token|trainble_token|embedding|embed_|_emb", "embeddings are not ours"),
    ("conv1d|conv2d|[Cc]onv|mha|multihead", "convolutions and attention modules are not ours"),
    ("weighted_adapter|merging_adapters", "weighted adapters are LoRA's and IA3's"),
    ("dora|gralora|monteclora|pvera|_vera_|lokr|vblora|_ia3_|osf", "another method's own test"),
    (r"test_requires_grad_(?!lora|modules|follows)", "another method's own test"),
    ("TestDynamicDispatch|TestLayerRepr", "LoRA's own layer classes"),
    ("test_mixed_adapter_batches_lora_opt_timing", "a measurement of time"),
    # test_decoder_models
    ("prompt|prefix|adalora|alora|gemma4", "another method's own test"),
    ("test_weighted_combination_of_adapters", "weighted adapters are LoRA's and IA3's"),
    ("test_lora_layer_replication", "an argument of LoRA's own"),
    ("test_merge_and_unload_fixes_tie", "embeddings are not ours"),
    # test_initialization
    (
        "test_initialization.py::(?!TestNoInfinite|TestCustomModelConfigWarning|TestLowCpuMemUsage|"
        "TestNamingConflictWarning|TestLoadPeftKeyMapping|test_from_pretrained_missing_keys_warning|"
        "TestLoraInitialization::test_(modules_to_save_targets_lora_layer_raises|"
        "multiple_configs_with_bias_raises|unmatched_rank_pattern|matched_pattern))",
        "the start values and arguments of PEFT's methods",
    ),
    # test_tuners_utils
    ("alpha_pattern|target_parameters|TargetedParameter", "LoRA's own arguments"),
    (
        "TestBaseTunerGetModelConfig|test_find_minimal|test_suffix_is|test_filter_state_dict|"
        "_raises_error_hierarchy|test_no_matching_peft_module_error_hierarchy|test_vanilla_model_|"
        "test_transformer_model_without",
        "a function of PEFT's that sees no config",
    ),
    ("ia3|loha|vera|adaption_prompt|prefix", "another method's own test"),
    ("diffusion", "needs diffusers"),
    ("bnb-", "needs a GPU"),
    ("test_transformers_model$|test_transformers_model\\[", "a LoRA on the hub"),
    ("nb_params", "counts LoRA's parameters"),
    ("test_requires_grad_irregular", "LoRA's tensors for embeddings"),
    ("test_prefixes_select_correct_state_dict_keys", "the names of LoRA's tensors"),
]
"""Pattern over the node id, and why those tests are not run: the first that matches counts."""


class Text:
    """The text of a file of PEFT's while it is changed."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")

    def _one_of(self, what: str, found: int, count: int) -> None:
        if found != count:
            raise SystemExit(
                f"peft {VERSION}: tests/{self.path.name} has {what!r} {found} times, expected {count}:"
                " other tests than those that tests/integrations/peft_suite.py was written for"
            )

    def replace(self, old: str, new: str, count: int = 1) -> None:
        """Exactly ``count`` times."""
        self._one_of(old, self.text.count(old), count)
        self.text = self.text.replace(old, new)

    def pattern(self, old: str, new: str, count: int) -> None:
        """The same with a regular expression."""
        self.text, found = re.subn(old, new, self.text)
        self._one_of(old, found, count)

    def assign(self, name: str, value: str) -> None:
        """Gives a variable of the module another value."""
        found = [
            node
            for node in ast.parse(self.text).body
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        ]
        self._one_of(f"{name} =", len(found), 1)
        lines = self.text.splitlines(keepends=True)
        assert found[0].end_lineno is not None
        lines[found[0].lineno - 1 : found[0].end_lineno] = [f"{name} = {value}\n"]
        self.text = "".join(lines)

    def stand_in(self, *names: str) -> None:
        """The module's names for LoRA's classes are ours."""
        line = "\nfrom .testing_utils import "
        ours = f"\nimport peft_cases\nfrom peft_cases import {', '.join(names)}"
        self.replace(line, ours + line)


def _utils(text: Text) -> None:
    text.replace("def hub_online_once(", "def _hub_online_once(")
    text.text += "\n\n@contextmanager\ndef hub_online_once(model_id):\n    yield  # offline\n"


def _common(text: Text) -> None:
    text.replace(
        "from diffusers import StableDiffusionPipeline\n",
        "from peft_cases import box as StableDiffusionPipeline\n",
    )
    text.replace("isinstance(peft_model, StableDiffusionPipeline)", "False", 2)


def _custom(text: Text) -> None:
    text.stand_in("LoraConfig")
    text.assign("TEST_CASES", "peft_cases.TEST_CASES")
    text.assign(
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES", "peft_cases.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"
    )
    text.replace(
        "diff = set(params_expected).symmetric",
        "diff = peft_cases.names(model, params_expected).symmetric",
    )
    text.replace(
        'model.lin0.lora_A["second"].weight.shape[0]', 'peft_cases.rank(model.lin0, "second")'
    )
    text.replace("module.lora_A[adapter].weight.shape[0]", "peft_cases.rank(module, adapter)")
    text.replace(
        'lin0.lora_A["default"].weight.requires_grad = False',
        'lin0.adapters["default"].requires_grad_(False)',
    )


def _decoder(text: Text) -> None:
    text.stand_in("LoraConfig")
    text.assign("ALL_CONFIGS", "peft_cases.ALL_CONFIGS")
    text.replace(
        'if "GPT2LMHeadModel" in model_id and config_cls in [',
        'if "GPT2LMHeadModel" in model_id and config_cls in [*peft_cases.ALL, ',
    )
    text.replace(
        "        if config_cls != LoraConfig:\n"
        '            pytest.skip("Mixed adapter batches not supported for this config.")\n',
        "",
        2,
    )


def _initialization(text: Text) -> None:
    text.stand_in("LoraConfig")
    text.replace('@pytest.fixture(scope="class")', "@pytest.fixture", 3)
    text.replace('if "lora_" in n}', 'if peft_cases.named("lora_") in n}', 2)
    text.replace(
        'missing_key = "base_model.model.model.decoder.layers.0.self_attn.v_proj.lora_A.default.weight"',
        "missing_key = peft_cases.first_key(model)",
    )


def _tuners(text: Text) -> None:
    text.replace("import diffusers\n", "")
    text.replace("from diffusers import StableDiffusionPipeline\n", "")
    text.assign("is_diffusers_ge_v040", "False")
    text.replace(
        "from parameterized import parameterized\n", "from peft_cases import parameterized\n"
    )
    text.stand_in("LoraConfig", "LoraLayer")


EDITS: dict[str, Callable[[Text], None]] = {
    "testing_utils.py": _utils,
    "testing_common.py": _common,
    "test_custom_models.py": _custom,
    "test_decoder_models.py": _decoder,
    "test_initialization.py": _initialization,
    "test_tuners_utils.py": _tuners,
}


def source() -> Path | None:
    """PEFT's tests of the installed version, where launch/test.sh put them."""
    default = Path(sys.prefix) / f"peft-tests-{VERSION}"
    folder = Path(os.environ.get("SCALEPEFT_PEFT_TESTS", default))
    return folder if folder.is_dir() else None


def write(tests: Path, out: Path) -> None:
    """The changed copies."""
    out.mkdir(parents=True)
    (out / "__init__.py").touch()
    for name, edit in EDITS.items():
        text = Text(tests / name)
        edit(text)
        (out / name).write_text(text.text, encoding="utf-8")


# ---- the models that the tests load from the hub, as a cache of it

SIZES = {"layers": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("CausalLM", "opt", {}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("CausalLM", "gpt2", {}),
    "hf-internal-testing/tiny-random-gpt2": ("CausalLM", "gpt2", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("CausalLM", "gptj", {}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("CausalLM", "llama", {}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("CausalLM", "llama", {}),
    "peft-internal-testing/tiny-dummy-qwen2": ("CausalLM", "qwen2", {}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("CausalLM", "gemma3", {}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("CausalLM", "mistral", {}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("CausalLM", "bloom", {"n_layer": 5}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("CausalLM", "gpt-neox", {}),
    "peft-internal-testing/tiny-random-t5": ("Seq2SeqLM", "t5", {}),
    "google/flan-t5-small": ("Seq2SeqLM", "t5", {}),
    "peft-internal-testing/opt-125m": ("CausalLM", "opt", {"num_hidden_layers": 12}),
    "bert-base-uncased": ("SequenceClassification", "bert", {}),
}
PLAIN: dict[str, dict[str, Any]] = {  # those that tests/support/families.py has not
    "t5": {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
           "num_heads": 4, "decoder_start_token_id": 0},
    "bert": {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


def hub(home: Path) -> None:
    """Fills ``home``, an HF_HOME, with tiny models of the same classes under the names of PEFT's."""
    import torch
    import transformers
    from families import config_of
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name, (task, kind, differs) in MODELS.items():
        torch.manual_seed(0)
        if kind in PLAIN:
            config = transformers.CONFIG_MAPPING[kind](**PLAIN[kind] | differs)
        else:
            config = config_of(kind)
            config = type(config)(**{**config.to_dict(), **differs})
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        model.save_pretrained(repository / "snapshots" / ("0" * 40))


# ---- running them


def exceptions() -> list[tuple[re.Pattern[str], str]]:
    """Pattern and reason of each case that cannot hold."""
    rows = tomllib.loads(EXCEPTIONS.read_text())["case"]
    return [(re.compile(row["match"]), row["reason"]) for row in rows]


def run(tests: Path, work: Path, arguments: list[str], short: bool) -> dict[str, dict[str, str]]:
    """Outcome of each case, by node id."""
    write(tests, work / "peft_tests")
    hub(work / "home")
    outcomes = work / "outcomes.json"
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "PEFT_SUITE_OUTCOMES": str(outcomes),
        "PEFT_SUITE_RULES": json.dumps([(match, False) for match, _ in LEFT_OUT]),
        "PEFT_SUITE_SHORT": "1" if short else "",
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)
    (work / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_cases", "-p", "no:cacheprovider"]
    command += ["--tb=short", "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    assert outcomes.is_file() and done.returncode in (0, 1), done.stdout[-9000:] + done.stderr[-3000:]
    return json.loads(outcomes.read_text())  # type: ignore[no-any-return]


def judged(found: dict[str, dict[str, str]]) -> tuple[list[str], Counter[tuple[str, str, str]]]:
    """What contradicts the list of exceptions, and counts of (file, method, outcome)."""
    wrong, counts = [], Counter[tuple[str, str, str]]()
    listed = exceptions()
    for node, case in found.items():
        file = node.partition("::")[0].rpartition("/")[2]
        outcome = case["outcome"]
        expected = any(pattern.search(node) for pattern, _ in listed)
        if outcome == "failed":
            outcome = "listed" if expected else "failed"
        if outcome == "failed":
            wrong.append(f"{node} fails and is not listed\n{case['why'][-3000:]}")
        if outcome == "passed" and expected:
            wrong.append(f"{node} passes, but peft_exceptions.toml says that it cannot")
        counts[file, case["method"], outcome] += 1
    return wrong, counts


def table(counts: Counter[tuple[str, str, str]]) -> str:
    """Counts by file and method, in Markdown."""
    lines = ["| tests of | method | passed | listed | skipped |", "|---|---|---|---|---|"]
    pairs = sorted({(file, method) for file, method, _ in counts})
    for file, method in pairs:
        numbers = [counts[file, method, o] for o in ("passed", "listed", "skipped")]
        lines.append(f"| {file.removesuffix('.py')} | {method} | " + " | ".join(map(str, numbers)) + " |")
    totals = [sum(n for (_, _, o), n in counts.items() if o == w) for w in ("passed", "listed", "skipped")]
    return "\n".join([*lines, "| all | | " + " | ".join(map(str, totals)) + " |"])


def main() -> None:
    """All of it."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    tests = source()
    if tests is None:
        raise SystemExit(f"no tests of peft {VERSION} here: bash launch/test.sh fetches them")
    arguments = sys.argv[1:] or [f"peft_tests/{name}" for name in FILES]
    with tempfile.TemporaryDirectory() as folder:
        short = bool(os.environ.get("PEFT_SUITE_SHORT"))
        wrong, counts = judged(run(tests, Path(folder), arguments, short))
    print("\n\n".join(wrong), table(counts), f"{len(wrong)} contradictions", sep="\n\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
