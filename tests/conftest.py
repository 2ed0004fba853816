"""Options of the test command, the order of tests, and fixtures that all tests share."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import FULL, SHARED
from zygote import read_at_import


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="whole products, more kills and rounds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``full``; the longest first."""
    if not FULL:
        left_out = [item for item in items if item.get_closest_marker("full")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("full")]
    # A slow test that begins last would keep everybody waiting.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda i: (not i.get_closest_marker("slurm"), -slow[i.path], str(i.path)))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of built-in models and tokens for the session, away from the user's."""
    old = os.environ.get("SCALEPEFT_CACHE")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "scalepeft-cache"
    os.environ["SCALEPEFT_CACHE"] = str(folder)
    yield
    if old is None:
        del os.environ["SCALEPEFT_CACHE"]
    else:
        os.environ["SCALEPEFT_CACHE"] = old


@pytest.fixture(autouse=True)
def _variables() -> Iterator[None]:
    """Libraries set variables as they are used (torch's compiler), with which the ranks of later
    tests could not come from the warm process.
    """
    before = read_at_import(dict(os.environ))
    yield
    for key in read_at_import(dict(os.environ)).keys() - before.keys():
        del os.environ[key]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A command that ran in this process leaves signals ignored, which no shell of a later test
    could trap then.
    """
    yield
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            default = number == signal.SIGINT and signal.default_int_handler
            signal.signal(number, default or signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; tests that need it skip where it is not, and CI fails on the
    skip.
    """
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED
