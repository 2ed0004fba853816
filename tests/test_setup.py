"""launch/setup.sh: what it asks pip for, when it returns at once, what it refuses.

By an interpreter that notes what it is told: nothing is installed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import ROOT

PYTHON = """\
#!/bin/bash
case "$1 $2" in
"-m venv") rm -f no-pip; mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    if [ "$3" = --version ]; then exit "$(cat no-pip 2>/dev/null || echo 0)"; fi
    echo "${*:4}" >> pip
    if [ -n "$FAILS" ]; then echo "ERROR: $FAILS"; exit 1; fi ;;
*m.version*) if [ -s pip ]; then echo "$TORCH"; else exit 1; fi ;;
esac
"""
INDEX = {"SCALEPEFT_TORCH": "cu126", "SCALEPEFT_TORCH_INDEX": "https://example.org/cu126"}


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "launch").mkdir()
        for name in ("launch/setup.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def setup(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        settings = {"PYTHON": str(self.folder / "python"), "FAILS": "", "TORCH": "2.13.0", **env}
        return subprocess.run(
            ["bash", "launch/setup.sh", *words],
            cwd=self.folder, env={**os.environ, **settings}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    def asked(self) -> list[str]:
        """What pip was asked for since the last time."""
        file = self.folder / "pip"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_venv_without_pip_is_made_again(checkout: Checkout) -> None:
    assert checkout.setup("demo").returncode == 0
    (checkout.folder / ".venv/.scalepeft-demo").unlink()
    (checkout.folder / "no-pip").write_text("1")
    assert checkout.setup("demo").returncode == 0
    assert not (checkout.folder / "no-pip").exists(), "python -m venv was called"


def test_the_demo_gets_its_own_needs_and_the_tests_the_rest(checkout: Checkout) -> None:
    assert checkout.setup("demo").returncode == 0
    (line,) = checkout.asked()
    assert line == "--constraint constraints.txt --editable .[quant]"
    assert checkout.setup("demo").returncode == 0 and not checkout.asked()
    assert checkout.setup("test").returncode == 0
    (line,) = checkout.asked()
    assert all(extra in line for extra in ("deepspeed", "lm-eval", "dev", "quant"))
    for words in ((), ("test",), ("demo",)):
        assert checkout.setup(*words).returncode == 0 and not checkout.asked()
    (checkout.folder / "constraints.txt").write_text("torch<3\n")
    assert checkout.setup("demo").returncode == 0 and checkout.asked()  # a new one


def test_the_launchers_ask_for_what_they_need() -> None:
    for name in ("demo", "test"):
        assert f"\nbash launch/setup.sh {name}\n" in (ROOT / f"launch/{name}.sh").read_text()


def test_a_pip_that_fails_says_why_and_leaves_nothing_done(checkout: Checkout) -> None:
    done = checkout.setup("demo", FAILS="No space left on device")
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert checkout.setup("demo").returncode == 0 and len(checkout.asked()) == 2  # both times


def test_a_build_of_torch_comes_first_from_the_users_index(checkout: Checkout) -> None:
    assert checkout.setup("demo", TORCH="2.13.0+cu126", **INDEX).returncode == 0
    first, second = checkout.asked()
    assert first == f"--constraint constraints.txt -i {INDEX['SCALEPEFT_TORCH_INDEX']} torch"
    assert second.endswith(".[quant]")


def test_an_index_that_gives_another_build_is_told(checkout: Checkout) -> None:
    done = checkout.setup("demo", TORCH="2.13.0+cpu", **INDEX)
    assert done.returncode == 2
    assert "torch 2.13.0+cpu is in .venv, not of cu126, which https://example.org" in done.stderr
    assert len(checkout.asked()) == 1 and not list(checkout.folder.glob(".venv/.scalepeft-*"))


def test_another_build_than_the_installed_one_is_not_passed_over(checkout: Checkout) -> None:
    assert checkout.setup("demo", TORCH="2.13.0+cpu").returncode == 0
    done = checkout.setup("demo", TORCH="2.13.0+cpu", **INDEX)
    assert done.returncode == 2 and "remove .venv" in done.stderr


@pytest.mark.parametrize(
    ("words", "env", "reason"),
    [
        (("all",), {}, "all: expected demo or test"),
        ((), {"SCALEPEFT_TORCH": "cuda"}, "SCALEPEFT_TORCH=cuda: expected cpu, or cu126"),
        ((), {"SCALEPEFT_TORCH": "cpu"}, "set both"),
        ((), {"SCALEPEFT_TORCH_INDEX": "https://example.org"}, "set both"),
    ],
)
def test_refused_in_one_line(
    checkout: Checkout, words: tuple[str, ...], env: dict[str, str], reason: str
) -> None:
    done = checkout.setup(*words, **env)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1
    assert not checkout.asked()
