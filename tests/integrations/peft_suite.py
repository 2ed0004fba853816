"""PEFT's own tests, run on our configs.

    python tests/integrations/peft_suite.py [FILE ...] [PYTEST ARGUMENTS]    all of it, with counts

launch/test.sh fetches the tests of the installed peft from its source distribution; nothing of
them is in this repository. ``write`` copies the files named in ``EDITS`` and replaces a few places
of them, each of which must be there as often as is said: a peft with other tests fails loudly.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    (
        "trainable_token|trainble_token|inside_auxiliary|to_embedding_layer|resized_embedding|conv1d_emb|lora_embed",
        "embeddings are not ours",
    ),
    ("conv[123]d|[Cc]onv[123]d|_mha_|multihead", "convolutions and attention modules are not ours"),
    ("weighted_adapter|merging_adapters", "weighted adapters are LoRA's and IA3's"),
    ("dora|gralora|monteclora|pvera|_vera_|lokr|vblora|_ia3_|osf", "another method's own test"),
    (r"test_requires_grad_(?!lora|modules|follows|small|large)", "another method's own test"),
    ("TestDynamicDispatch|TestLayerRepr", "LoRA's own layer classes"),
    ("test_mixed_adapter_batches_lora_opt_timing", "a measurement of time"),
    ("lora_bias|non_finite_bias", "an argument of LoRA's own"),
    (
        r"[Mm]ixed_?[Mm]odel|rejects_duplicate_name.*True",
        "PeftMixedModel takes a closed list of PEFT's own types",
    ),
    # test_decoder_models
    ("prompt_|prefix_tuning|adalora|alora|gemma4", "another method's own test"),
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
    (
        r"(?<!and_)(?<!nor_)alpha_pattern|target_parameters|TargetedParameter",
        "LoRA's own arguments",
    ),
    (
        "TestBaseTunerGetModelConfig|test_find_minimal|test_suffix_is|test_filter_state_dict|"
        "_raises_error_hierarchy|test_no_matching_peft_module_error_hierarchy|test_vanilla_model_|"
        "test_transformer_model_without",
        "a function of PEFT's that sees no config",
    ),
    (
        "_ia3|test_loha|test_vera|containers_vera|adaption_prompt",
        "another method's own test",
    ),
    ("diffusion", "needs diffusers"),
    (r"_bnb\[", "needs a GPU"),
    ("tiny-random-gpt2-causal-all-linear", "Conv1D is not ours"),
    ("test_transformers_model$|test_transformers_model\\[", "a LoRA on the hub"),
    ("nb_params|status_with_modules_to_save|test_model_with_injected", "counts LoRA's parameters"),
    ("test_(model_)?requires_grad_(model_)?irregular", "LoRA's tensors for embeddings"),
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
                f"peft {VERSION}: tests/{self.path.name} has {what!r} {found} times, expected"
                f" {count}: other tests than tests/integrations/peft_suite.py was written for"
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
        "from peft_cases import ALL as ALL_OURS\n",
    )
    text.replace("isinstance(peft_model, StableDiffusionPipeline)", "False", 2)
    text.replace("config_cls not in (LoraConfig, ", "config_cls not in (*ALL_OURS, LoraConfig, ")
    text.replace("config_cls not in (LoraConfig,)", "config_cls not in (*ALL_OURS, LoraConfig)")


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
    # rows of one adapter are computed by themselves, which rounds otherwise than in the whole batch
    text.pattern(r"(output_mixed\[\d?::3\])\)", r"\1, atol=1e-5)", 3)
    # ranks that 2, 10 and 20 have room for, and are divided by
    text.replace('LoraConfig(target_modules=["lin0"], r=16, init_lora_weights=False)',
                 'LoraConfig(target_modules=["lin0"], r=10, init_lora_weights=False)')  # fmt: skip
    text.replace("            r=8,\n            lora_alpha=8,", "            r=2,", 2)
    text.replace('rank_pattern={"lin0": 4}', 'rank_pattern={"lin0": 10}')
    text.replace("r = 4\n        lora_alpha = 8", "r = 2\n        lora_alpha = 8")
    text.replace("rank = 64 // (i + 1)", "rank = (2, 10)[i % 2]")
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
        "        _skip_if_not_conv1d_supported(model_id, config_cls)\n",
        2,
    )


def _initialization(text: Text) -> None:
    text.stand_in("LoraConfig")
    text.replace('@pytest.fixture(scope="class")', "@pytest.fixture", 3)
    text.replace('if "lora_" in n}', 'if peft_cases.named("lora_") in n}', 2)
    text.replace(
        'missing_key = "base_model.model.model.decoder.layers.0.self_attn.v_proj.lora_A.default'
        '.weight"',
        "missing_key = peft_cases.first_key(model)",
    )
    text.replace(
        "\"<class 'peft.tuners.lora.layer.Linear'>. This",
        "f\"<class 'scalepeft.integrations.peft.{peft_cases.type_name('Linear')}'>. This",
    )


def _tuners(text: Text) -> None:
    text.replace("import diffusers\n", "")
    text.replace("from diffusers import StableDiffusionPipeline\n", "")
    text.assign("is_diffusers_ge_v040", "False")
    text.replace(
        "from parameterized import parameterized\n", "from peft_cases import parameterized\n"
    )
    text.stand_in("LoraConfig", "LoraLayer")
    # the model of the status tests, without convolutions and embeddings
    text.replace("nn.Conv2d(3, 10, 3)", "nn.Linear(10, 10)", 2)
    text.pattern(r"self.emb(\d) = nn.Embedding\(10, 10\)", r"self.emb\1 = nn.Linear(10, 10)", 2)
    text.replace('LoraConfig(target_modules=["lin0", "lin1"], r=16)',
                 'LoraConfig(target_modules=["lin0", "lin1"], r=10)')  # fmt: skip
    text.replace('"LoraModel"', 'peft_cases.type_name("Model")', 6)
    text.replace('"LORA"', "peft_cases.LoraConfig.method.upper()", 7)
    text.replace('["lora.Linear"]', "[peft_cases.layer_type()]")
    text.replace('["lora.Conv2d", "lora.Embedding", "lora.Linear", "lora.Linear"]',
                 "[peft_cases.layer_type()] * 4")  # fmt: skip
    text.pattern(r"assert isinstance\(proj.lora_[AB].*\n", 'assert "other" in proj.adapters\n', 4)
    text.pattern(r'"([\w.]*\blora_[AB]\b[\w.]*)"', r'peft_cases.named("\1")', 10)
    # ranks by pattern, on layers that have room for them
    text.replace("nn.Linear(1, 1)", "nn.Linear(96, 96)", 6)
    text.pattern(r' *assert .*scaling\["default"\] == .*\n', "", 84)
    text.pattern(r'assert ([\w.]+)\.r\["default"\]', r"assert peft_cases.rank(\1)", 84)
    text.pattern(r'LoraConfig\((\s*)target_modules="all-linear",(?=\s*rank)',
                 r'LoraConfig(\1r=8, target_modules="all-linear",', 13)  # fmt: skip
    text.pattern(r'LoraConfig\(target_modules="all-linear"\)(?=\n.*base_model\.model\n)',
                 'LoraConfig(r=8, target_modules="all-linear")', 1)  # fmt: skip


EDITS: dict[str, Callable[[Text], None]] = {
    "testing_utils.py": _utils,
    "testing_common.py": _common,
    "test_custom_models.py": _custom,
    "test_decoder_models.py": _decoder,
    "test_initialization.py": _initialization,
    "test_tuners_utils.py": _tuners,
}


def source() -> Path | None:
    """PEFT's tests of the installed version, where launch/test.sh puts them, or elsewhere."""
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
    """Fills ``home``, an HF_HOME, with tiny models of the same classes under PEFT's names."""
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


@dataclass(frozen=True)
class Case:
    """An entry of peft_exceptions.toml."""

    file: str
    match: str
    reason: str

    def covers(self, node: str) -> bool:
        """True for a node id that it means."""
        return f"/{self.file}::" in node and re.search(self.match, node) is not None


def exceptions() -> list[Case]:
    """The cases that cannot hold."""
    return [Case(**row) for row in tomllib.loads(EXCEPTIONS.read_text())["case"]]


def run(
    tests: Path, work: Path, files: Iterable[str], short: bool, arguments: Iterable[str] = ()
) -> dict[str, dict[str, str]]:
    """Outcome of each case of these files, by node id; ``short``: one case of each test."""
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
    command += [f"peft_tests/{name}" for name in files]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    assert outcomes.is_file() and done.returncode in (0, 1), (
        done.stdout[-9000:] + done.stderr[-3000:]
    )
    return json.loads(outcomes.read_text())  # type: ignore[no-any-return]


def judged(found: dict[str, dict[str, str]]) -> tuple[list[str], Counter[tuple[str, str, str]]]:
    """What contradicts the list of exceptions, and counts of (file, method, outcome)."""
    wrong, counts = [], Counter[tuple[str, str, str]]()
    listed = exceptions()
    for node, case in found.items():
        file = node.partition("::")[0].rpartition("/")[2]
        outcome = case["outcome"]
        expected = any(row.covers(node) for row in listed)
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
    columns = ("passed", "listed", "skipped")
    rows = {
        (file.removesuffix(".py"), method): [counts[file, method, c] for c in columns]
        for file, method in sorted({(file, method) for file, method, _ in counts})
    }
    rows["all", ""] = [sum(column) for column in zip(*rows.values(), strict=True)]
    cells = [["tests of", "method", *columns], ["---"] * 5]
    cells += [[*names, *map(str, numbers)] for names, numbers in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> None:
    """All of it."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    tests = source()
    if tests is None:
        raise SystemExit(f"no tests of peft {VERSION} here: bash launch/test.sh fetches them")
    files = [name for name in FILES if name in sys.argv[1:]] or FILES
    arguments = [word for word in sys.argv[1:] if word not in FILES]
    with tempfile.TemporaryDirectory() as folder:
        short = bool(os.environ.get("PEFT_SUITE_SHORT"))
        wrong, counts = judged(run(tests, Path(folder), files, short, arguments))
    print("\n\n".join(wrong), table(counts), f"{len(wrong)} contradictions", sep="\n\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
