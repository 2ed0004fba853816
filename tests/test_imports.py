"""Who may import whom (architecture.md), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import scalepeft

PACKAGE = Path(scalepeft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
BASES = {"scalepeft", "scalepeft.lookup", "scalepeft.quant"}
PROTOCOLS = {
    "scalepeft.adapters.base", "scalepeft.parallel.base", "scalepeft.parallel.mesh",
    "scalepeft.tasks.base", "scalepeft.tasks.rows", "scalepeft.config",
}  # fmt: skip
TOP = {
    f"scalepeft.{name}"
    for name in ("train", "evaluate", "pipeline", "plan", "doctor", "bench", "report", "cli")
}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(f): f for f in FILES}


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports anywhere, also inside functions and by importlib."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import in line {node.lineno}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name in MODULES}
            found |= modules if len(modules) == len(names) else {*modules, str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            (argument,) = node.args
            if isinstance(argument, ast.Constant):
                found.add(str(argument.value))
    return found


IMPORTS = {name: imports_of(file) for name, file in MODULES.items()}


def own(name: str) -> set[str]:
    return {i for i in IMPORTS[name] if i == "scalepeft" or i.startswith("scalepeft.")}


def within(folder: str) -> list[str]:
    return [m for m in MODULES if m.startswith(f"scalepeft.{folder}.")]


def users_of(library: str) -> set[str]:
    return {m for m, found in IMPORTS.items() if library in {i.split(".")[0] for i in found}}


def test_the_walk_sees_what_there_is() -> None:
    assert {"scalepeft.quant", "scalepeft.adapters.hoft", "scalepeft.parallel.fsdp2"} <= set(
        MODULES
    )
    assert "scalepeft.adapters.hoft" in own("scalepeft.adapters.shoft")
    assert "scalepeft.config" in own("scalepeft.injection")
    assert "scalepeft.tiny" in own("scalepeft.models"), "imports inside functions count"


def test_every_import_of_our_own_exists() -> None:
    assert {i for m in MODULES for i in own(m)} <= set(MODULES)


def test_adapters_and_engines_never_meet() -> None:
    for name in [*within("adapters"), "scalepeft.adapters"]:
        assert not [i for i in own(name) if i.startswith("scalepeft.parallel")], name
    for name in [*within("parallel"), "scalepeft.parallel"]:
        assert not [i for i in own(name) if i.startswith("scalepeft.adapters")], name


@pytest.mark.parametrize("name", [m for m in within("adapters") if not m.endswith(".base")])
def test_an_adapter_needs_its_base_and_one_sibling_at_most(name: str) -> None:
    siblings = own(name) - {"scalepeft.lookup", "scalepeft.adapters.base"}
    assert all(s.startswith("scalepeft.adapters.") for s in siblings), siblings
    assert len(siblings) <= 1, siblings


@pytest.mark.parametrize("name", [m for m in within("parallel") if not m.endswith("mesh")])
def test_an_engine_needs_the_base_of_engines_alone(name: str) -> None:
    allowed = {"scalepeft.lookup", "scalepeft.parallel.base", "scalepeft.parallel.mesh"}
    assert own(name) <= allowed


@pytest.mark.parametrize("name", within("tasks"))
def test_a_task_needs_tasks_alone(name: str) -> None:
    assert all(i == "scalepeft.lookup" or i.startswith("scalepeft.tasks.") for i in own(name))


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_protocols_import_only_what_lies_below(name: str) -> None:
    assert own(name) <= BASES | PROTOCOLS


def test_the_lowest_layer_imports_nothing_of_ours() -> None:
    assert own("scalepeft.lookup") == set()
    assert own("scalepeft.quant") <= {"scalepeft.lookup"}
    assert own("scalepeft.preemption") <= {"scalepeft.lookup"}


@pytest.mark.parametrize(
    "name",
    ["injection", "models", "data", "checkpoint", "tensorfiles", "preemption", "merge", "loss"],
)
def test_the_middle_never_imports_the_top(name: str) -> None:
    assert not own(f"scalepeft.{name}") & {*TOP, *within("integrations")}


def test_no_module_but_main_imports_the_command_line() -> None:
    assert {m for m in MODULES if "scalepeft.cli" in own(m)} == {"scalepeft.__main__"}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("bitsandbytes", {"scalepeft.quant"}),
        ("deepspeed", {"scalepeft.parallel.zero"}),
        ("peft", {"scalepeft.bench", "scalepeft.integrations.peft"}),
        ("vllm", {"scalepeft.integrations.vllm"}),
        ("lm_eval", {"scalepeft.integrations.lm_eval"}),
    ],
)
def test_a_library_is_imported_in_one_place(library: str, allowed: set[str]) -> None:
    assert users_of(library) <= allowed


def test_bitsandbytes_is_found_by_the_walk() -> None:
    assert users_of("bitsandbytes") == {"scalepeft.quant"}


def test_imports_among_modules_have_no_cycle() -> None:
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in own(name) - {"scalepeft"}:
                walk(other, (*above, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


@pytest.mark.parametrize("module", ["scalepeft", "scalepeft.cli", "scalepeft.preemption"])
def test_signals_can_be_taken_over_before_torch_is_loaded(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]"
