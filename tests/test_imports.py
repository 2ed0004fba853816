"""Imports go one way (docs/architecture.md), read from the source."""

import ast
import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import scalepeft
from scalepeft import arguments
from scalepeft.core.launch import importing

PACKAGE = Path(scalepeft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A room imports rooms to its left alone; rooms in one group do not import each other.
ORDER = (
    "core < parallel < data < models < adapters < config < run, build < export, trainer"
    " < train, eval < analysis < pipeline < cluster < integrations < arguments < cli < __main__"
)
FLOOR = {
    room.strip(): floor for floor, rooms in enumerate(ORDER.split("<")) for room in rooms.split(",")
}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(f): f for f in FILES}


def room(module: str) -> str:
    return module.split(".")[1]


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
    """The scalepeft modules that a module imports; the package itself gives names of any."""
    return {i for i in IMPORTS[name] if i.startswith("scalepeft.")}


def within(folder: str) -> list[str]:
    return [m for m in MODULES if m.startswith(f"scalepeft.{folder}.")]


def users_of(library: str) -> set[str]:
    return {m for m, found in IMPORTS.items() if library in {i.split(".")[0] for i in found}}


def test_the_walk_sees_what_there_is() -> None:
    assert {"scalepeft.models.quant", "scalepeft.parallel.fsdp2"} <= set(MODULES)
    assert "scalepeft.adapters.methods.hoft" in own("scalepeft.adapters.methods.shoft")
    assert "scalepeft.models.tiny" in own("scalepeft.models.hub"), "inside functions counts too"


def test_every_import_of_our_own_exists() -> None:
    assert {i for m in MODULES for i in own(m)} <= set(MODULES)


@pytest.mark.parametrize("name", [m for m in MODULES if m != "scalepeft"])
def test_imports_go_one_way(name: str) -> None:
    here = room(name)
    upward = {i for i in own(name) if room(i) != here and FLOOR[room(i)] >= FLOOR[here]}
    assert not upward, f"order: {ORDER}"


def test_rooms_and_modules_are_those_of_the_order() -> None:
    assert {room(m) for m in MODULES if m != "scalepeft"} == set(FLOOR)
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("name", within("adapters.methods"))
def test_a_method_needs_the_protocol_and_one_sibling_at_most(name: str) -> None:
    siblings = {i for i in own(name) if i.startswith("scalepeft.adapters.")}
    assert len(siblings - {"scalepeft.adapters.base"}) <= 1, siblings
    assert all(room(i) in ("core", "adapters") for i in own(name))


@pytest.mark.parametrize(
    "name", [m for m in within("parallel") if not m.endswith(("ranks", "rendezvous"))]
)
def test_an_engine_needs_the_base_of_engines_alone(name: str) -> None:
    others = {i for i in own(name) if room(i) != "core"}
    assert others <= {"scalepeft.parallel.base", "scalepeft.parallel.ranks"}


@pytest.mark.parametrize("name", within("data.tasks"))
def test_a_task_needs_data_alone(name: str) -> None:
    assert all(room(i) in ("core", "data") for i in own(name))


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("bitsandbytes", {"scalepeft.models.quant"}),
        ("deepspeed", {"scalepeft.parallel.zero"}),
        ("triton", {"scalepeft.core.triton_kernels"}),
        (
            "peft",
            {
                f"scalepeft.{m}"
                for m in (
                    "analysis.bench.entries",
                    "analysis.bench.contender",
                    "integrations.peft",
                    "integrations.peft_layer",
                )
            },
        ),
        ("trl", {"scalepeft.analysis.bench.contender"}),
        ("vllm", {"scalepeft.eval.vllm"}),
        ("lm_eval", {"scalepeft.integrations.lm_eval"}),
    ],
)
def test_a_library_is_imported_in_one_place(library: str, allowed: set[str]) -> None:
    assert users_of(library) <= allowed


def test_bitsandbytes_is_found_by_the_walk() -> None:
    assert users_of("bitsandbytes") == {"scalepeft.models.quant"}


def test_imports_among_modules_have_no_cycle() -> None:
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in own(name):
                walk(other, (*above, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


def loaded(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has after ``code``."""
    code = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit as e:\n    assert not e.code, e\nprint()"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    heavy = {"torch", "transformers", "bitsandbytes", "torch._inductor.compile_fx", "sympy"}
    heavy |= {"torch.distributed.tensor", "scipy", "datasets"}
    return heavy & {*done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("module", ["scalepeft", "scalepeft.cli", "scalepeft.core.preemption"])
def test_signals_can_be_taken_over_before_torch_is_loaded(module: str) -> None:
    assert loaded(f"import {module}") == set()


RUN = str(Path(__file__).parent / "data" / "run-2026-11-21" / "finished")
WORDS = [["--help"], ["--version"], *([c, "--help"] for c in arguments.COMMANDS), ["status", RUN]]


@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(words[:2]).replace(RUN, "RUN"))
def test_help_version_and_status_load_no_torch(words: list[str]) -> None:
    assert loaded(f"from scalepeft import cli; sys.exit(cli.main({words}))") == set()


def test_settings_load_torch_alone_and_nf4_no_compiler() -> None:
    config = ["config", "demo", "model.quant=nf4", "engine=fsdp2"]
    assert loaded(f"from scalepeft import cli; sys.exit(cli.main({config}))") == {"torch"}
    encode = "quant.NF4().encode(torch.ones(1, 64)); quant._kernels()"
    code = f"import torch; before = torch.compile; from scalepeft.models import quant; {encode}"
    assert loaded(f"{code}; assert torch.compile is before") == {"torch", "bitsandbytes"}


def test_imports_and_the_end_look_for_no_garbage() -> None:
    code = """
import atexit, gc, sys
full = []
gc.callbacks.append(lambda phase, about: full.append(1) if about["generation"] == 2 else None)
frozen = lambda: gc.get_freeze_count() > 100_000
atexit.register(lambda: print(len(full), frozen() != ("triton" in sys.modules)))  # which lists it
from scalepeft import cli
cli.main(["methods", "--model", "mini"])
assert gc.isenabled() and "transformers.models.llama.modeling_llama" in sys.modules
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.splitlines()[-1] == "0 True"


def test_the_collector_is_left_as_it_was_found() -> None:
    with importing():
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), importing():
        importlib.import_module("scalepeft.absent")
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 70, node.name


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=str)
def test_a_rooms_init_holds_its_docstring_alone(file: Path) -> None:
    docstring, *code = ast.parse(file.read_text()).body
    assert isinstance(docstring, ast.Expr)
    if file.parent == PACKAGE:  # hands on the public names
        assert len(code) <= 5
    else:
        assert not code
