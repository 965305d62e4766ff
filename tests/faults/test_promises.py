"""Every test that docs/reliability.md names exists, and every row names one."""

import ast
import re

from conftest import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()


def functions_of(path: str) -> set[str]:
    """Names of the test functions of a file below tests/."""
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"`((?:faults/)?test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 90
    assert [f"{path}::{name}" for path, name in named if name not in functions_of(path)] == []


def test_no_row_is_without_one() -> None:
    rows = [line for line in PAGE.splitlines() if re.match(r"\| [\d-]+ \|", line)]
    numbers: list[int] = []
    for row in rows:
        first, _, last = row.split("|")[1].strip().partition("-")
        numbers += range(int(first), int(last or first) + 1)
        assert "::test_" in row, row
    assert numbers == list(range(1, 87))
