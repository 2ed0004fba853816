"""PEFT's own tests hold for our methods, but for the cases of peft_exceptions.toml.

Of each test one case runs, the methods by turns; with ``--full`` all of them.
"""

import re
from collections import Counter
from pathlib import Path

import peft_suite
import pytest
from processes import FULL, ROOT

PARTS = {"custom": peft_suite.FILES[:1], "others": peft_suite.FILES[1:]}
if not FULL:  # a start of each takes longer than what it runs
    PARTS = {"all": peft_suite.FILES}


@pytest.fixture(scope="module")
def pefts_tests() -> Path:
    found = peft_suite.source()
    if found is None:
        pytest.skip(f"no tests of peft {peft_suite.VERSION} here; launch/test.sh fetches them")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_pefts_own_tests_hold_for_our_methods(part: str, pefts_tests: Path, tmp_path: Path) -> None:
    found = peft_suite.run(pefts_tests, tmp_path, PARTS[part], short=not FULL)
    wrong, counts = peft_suite.judged(found)
    print(peft_suite.table(counts))
    assert not wrong, "\n\n".join(wrong)
    outcomes = Counter[str]()
    for (_, _, outcome), number in counts.items():
        outcomes[outcome] += number
    assert outcomes["passed"] >= 0.98 * (outcomes["passed"] + outcomes["listed"]), outcomes
    for file in PARTS[part]:
        passed = {method for (f, method, o) in counts if f == file and o == "passed"}
        assert passed == {"hoft", "shoft", "goft", "qgoft", "surm", "hut", "hadamard"}, file
    if FULL:
        assert_the_page_has(counts)
        for case in peft_suite.exceptions():
            if case.file in PARTS[part]:
                assert any(case.covers(node) for node in found), f"{case} names no case"


def assert_the_page_has(counts: Counter[tuple[str, str, str]]) -> None:
    """docs/integrations/peft.md says what these tests found, for the version it names."""
    page = (ROOT / "docs/integrations/peft.md").read_text()
    if f"peft {peft_suite.VERSION}" in page:
        rows = peft_suite.table(counts).splitlines()[2:-1]
        missing = [row for row in rows if row not in page]
        assert not missing, "docs/integrations/peft.md lacks\n" + "\n".join(missing)


def test_other_tests_of_peft_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "test_custom_models.py").write_text("TEST_CASES = [\n  1,\n]\nTEST_CASE = 2\n")
    text = peft_suite.Text(tmp_path / "test_custom_models.py")
    text.assign("TEST_CASES", "ours")
    assert text.text == "TEST_CASES = ours\nTEST_CASE = 2\n"
    message = re.escape("test_custom_models.py has 'TEST_CASE' 2 times, expected 1: other tests")
    with pytest.raises(SystemExit, match=message):
        text.replace("TEST_CASE", "x")
    with pytest.raises(SystemExit, match="'ALL_CONFIGS =' 0 times"):
        text.assign("ALL_CONFIGS", "ours")


def test_exceptions_and_passes_contradict() -> None:
    """A case that fails and is not listed, and one that is listed and passes, are both wrong."""
    node = "peft_tests/test_custom_models.py::TestPeftCustomModel::"
    listed = f"{node}test_parameters_after_loading_model[Vanilla MLP 4 qgoft-MLP]"
    case = {"method": "qgoft", "why": "NaN"}
    found = {f"{node}test_x[qgoft]": case, listed: case}
    wrong, counts = peft_suite.judged({k: {**v, "outcome": "failed"} for k, v in found.items()})
    assert len(wrong) == 1 and wrong[0].startswith(f"{node}test_x[qgoft] fails and is not listed")
    assert counts["test_custom_models.py", "qgoft", "listed"] == 1
    wrong, _ = peft_suite.judged({k: {**v, "outcome": "passed"} for k, v in found.items()})
    assert len(wrong) == 1 and wrong[0].startswith(f"{listed} passes, but")
