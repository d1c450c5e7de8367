"""The page of promises names the tests that prove them: each is there, and no attack is missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "promises.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def rows():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("| ") and "`tests/" in line]


def functions_of(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_tests_that_are_there():
    assert rows()
    for row in rows():
        for path, name in NAMED.findall(row):
            assert (ROOT / path).is_file(), row
            assert not name or name in functions_of(path), row


def test_every_file_of_attacks_proves_a_promise():
    named = {path for row in rows() for path, _ in NAMED.findall(row)}
    files = {f"tests/adversarial/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert files - {f"tests/adversarial/{Path(__file__).name}"} <= named
