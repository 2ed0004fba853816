"""Our configs in the place of PEFT's own in PEFT's tests: a plugin of the pytest that runs them.

``peft_suite.py`` writes the test files; they take their parameter lists, and the stand-ins for
``LoraConfig`` and ``LoraLayer``, from here.
"""

import inspect
import json
import os
import re
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import scalepeft.integrations.peft as plugin

SEVEN = ("HOFT", "SHOFT", "GOFT", "QGOFT", "SURM", "HUT", "Hadamard")
CONFIGS: dict[str, Any] = {name.lower(): getattr(plugin, f"{name}Config") for name in SEVEN}
ALL = tuple(CONFIGS.values())
RANKED = ("hoft", "shoft", "hut")
SMALL: dict[str, dict[str, Any]] = {name: {"r": 2} for name in RANKED}  # divides 10, 20 and 2
START: dict[str, dict[str, Any]] = {**SMALL, "hut": {"r": 1}}  # for layers of any size
MLP_CASES: dict[str, dict[str, Any]] = {
    "1": {"target_modules": "lin0"},
    "2": {"target_modules": ["lin0"]},
    "3": {"target_modules": ["lin1"]},
    "4": {"target_modules": ["lin0", "lin1"]},
    "5": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
}
OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "hoft": {"r": 4, "form": "cayley"},
    "shoft": {"r": 4, "form": "cayley"},
    "goft": {"scale": True},
    "qgoft": {"penalty": 0.0},
    "surm": {"structure": "kronecker", "scaling": 0.5},
    "hut": {"r": 1},
    "hadamard": {"position": "before"},
}


TEST_CASES = [
    (f"Vanilla MLP {number} {method}", "MLP", CONFIGS[method], {**SMALL.get(method, {}), **case})
    for method in CONFIGS
    for number, case in {
        **MLP_CASES,
        "6": {"target_modules": ["lin0"], **OTHER_SETTINGS[method]},
    }.items()
]
ALL_CONFIGS = [
    (cls, {"task_type": "CAUSAL_LM", "target_modules": None, **SMALL.get(method, {}), **more})
    for method, cls in CONFIGS.items()
    # Two adapters of rank 2 may answer a tiny model's prompts alike.
    for more in ([{"r": 8}] if method == "hoft" else [{}])
]
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    (
        f"{method} {name}",
        method,
        CONFIGS[method],
        {"target_modules": ["lin0"], "init_weights": False, **SMALL.get(method, {})},
        {"target_modules": [second], "init_weights": False, **SMALL.get(method, {})},
    )
    for method in CONFIGS
    for name, second in (("Same", "lin0"), ("Different", "lin1"))
]


class _Later:
    """A config of a parameter list: made once the test's method is known."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings


class LoraConfig:
    """Makes the config of the method that is being tested, from LoRA's arguments."""

    method = ""

    def __new__(cls, **settings: Any) -> Any:
        if not LoraConfig.method:
            return _Later(settings)
        ours = CONFIGS[LoraConfig.method]
        settings["init_weights"] = settings.pop("init_lora_weights", True)
        if "rank_pattern" in settings and LoraConfig.method not in RANKED:
            del settings["rank_pattern"]
        alien = {"lora_alpha", "lora_dropout", "alpha_pattern", "r"} - {
            f.name for f in fields(ours)
        }
        kept = {key: value for key, value in settings.items() if key not in alien}
        return ours(**{**START.get(LoraConfig.method, {}), **kept})


def _ours(value: Any) -> Any:
    if isinstance(value, _Later):
        return LoraConfig(**value.settings)
    return value


class _Ours(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, plugin.Layer)


class LoraLayer(metaclass=_Ours):
    """``isinstance(x, LoraLayer)``: x is a layer of the plug-in."""


def box() -> str:
    """The attribute that holds a layer's adapters."""
    return f"{LoraConfig.method}_adapter"


def named(text: str) -> str:
    """A name of PEFT's test, with our box for LoRA's two."""
    return re.sub("lora_[AB]?", box(), text)


def names(model: torch.nn.Module, expected: tuple[str, ...]) -> set[str]:
    """The parameters that ``expected`` names, all of an adapter's for LoRA's A and B."""
    heads = {named(re.sub(r"(lora_[AB]\.\w+)\.weight", r"\1.", text)) for text in expected}
    return {n for n, _ in model.named_parameters() if any(n.startswith(h) for h in heads)}


def layer_type() -> str:
    """What PEFT's status calls a layer of ours."""
    return f"{LoraConfig.method}.{type_name('Linear')}"


def type_name(end: str) -> str:
    """The plug-in's class of the method, Linear or Model."""
    return CONFIGS[LoraConfig.method].__name__.removesuffix("Config") + end


def rank(layer: Any, adapter: str = "default") -> int:
    """The rank of a layer's adapter, from its tensors where they have it."""
    made = layer.adapters[adapter]
    return int(made.config.rank if LoraConfig.method == "hut" else made.U.shape[1])


def first_key(model: torch.nn.Module) -> str:
    """A tensor of the first adapted layer of ``state_dict``."""
    return next(n for n, _ in model.named_parameters() if f".{box()}." in n)


class parameterized:
    """The one function of the package ``parameterized`` that the tests use."""

    @staticmethod
    def expand(rows: list[Any]) -> Any:
        """One test for each row."""

        def decorate(test: Any) -> Any:
            arguments = [n for n in inspect.signature(test).parameters if n != "self"]
            return pytest.mark.parametrize(arguments, rows)(test)

        return decorate


# ---- hooks


def _method_of(values: dict[str, Any]) -> str:
    """The method of a test's parameters; empty where none tells."""
    if "method" in values:
        return str(values["method"])
    return next((m for v in values.values() for m, c in CONFIGS.items() if v is c), "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test written with LoRA runs with each method."""
    lists = [m.args[1] for m in metafunc.definition.iter_markers("parametrize")]
    if any(v in ALL for values in lists for row in values for v in _flat(row)):
        return
    metafunc.fixturenames.insert(0, "method")
    ranked = re.search("rank", metafunc.function.__name__)
    metafunc.parametrize("method", RANKED if ranked else list(CONFIGS))


def _flat(row: Any) -> tuple[Any, ...]:
    return tuple(getattr(row, "values", row)) if isinstance(row, (tuple, list)) else (row,)


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Leaves the selected tests, and no rows of other methods; in a short run one case of each."""
    rules = [(re.compile(match), run) for match, run in json.loads(os.environ["PEFT_SUITE_RULES"])]
    chosen = []
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        item.user_properties.append(("method", _method_of(values)))
        runs = next((run for match, run in rules if match.search(item.nodeid)), True)
        if runs and not any(_theirs(v) for v in values.values()):
            chosen.append(item)
    if os.environ.get("PEFT_SUITE_SHORT"):
        chosen = _one_each(chosen)
    left_out = [item for item in items if item not in set(chosen)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def _theirs(value: Any) -> bool:
    """True for a config, or its class, of another method in a list that we share."""
    cls = value if isinstance(value, type) else type(value)
    return cls.__module__.startswith("peft.") and cls.__name__.endswith("Config")


def _one_each(items: list[Any]) -> list[Any]:
    """One case of each test, the methods by turns."""
    groups = defaultdict(list)
    for item in items:
        groups[item.nodeid.partition("[")[0]].append(item)
    chosen = []
    for number, group in enumerate(groups.values()):
        able = [i for i in group if "gpt2" not in i.nodeid.lower()] or group
        by_method = defaultdict(list)
        for item in able:
            by_method[dict(item.user_properties)["method"]].append(item)
        mine = list(by_method.values())[number % len(by_method)]
        chosen.append(mine[number // len(CONFIGS) % len(mine)])
    return chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """The method of this test; the configs that its parameters promise."""
    torch.manual_seed(0)
    LoraConfig.method = dict(item.user_properties).get("method", "")
    if hasattr(item, "callspec"):
        for name, value in item.callspec.params.items():
            item.callspec.params[name] = _ours(value)


class Outcomes:
    """What became of each case, for the test that started this pytest."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of a test's three reports counts."""
        method = dict(report.user_properties).get("method", "")
        known = self.found.setdefault(report.nodeid, {"method": str(method), "outcome": "passed"})
        if report.outcome != "passed" and known["outcome"] == "passed":
            known["outcome"] = report.outcome
            known["why"] = str(report.longreprtext if report.failed else report.longrepr)

    def pytest_sessionfinish(self) -> None:
        """Writes them."""
        Path(os.environ["PEFT_SUITE_OUTCOMES"]).write_text(json.dumps(self.found))


def pytest_configure(config: pytest.Config) -> None:
    """Registers what writes the outcomes."""
    config.addinivalue_line("markers", "bitsandbytes: as PEFT marks them")
    config.pluginmanager.register(Outcomes(), "outcomes")
