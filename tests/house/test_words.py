"""Words that users do not read: the deny list over documents, help, hints, messages and schemas."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import closewait_guard as cwg

PACKAGE = Path(cwg.__file__).parent
ROOT = Path(__file__).parents[2]

# Each with what stands in its place.
DENIED = {
    r"tell|tells|telling|told": "report, log, print, show, notify",
    r"born|births?": "opened, created",
    r"mend|mends|mended|mending": "fix",
    r"accus\w+": "a leak, reported as a leak",
    r"guilty|culprits?|to blame": "the line that opened it",
    r"nobody\w*|somebody\w*|anybody\w*|whoever|whomever": "no one, nothing, any, those who",
    r"upon": "on",
    r"anew": "again",
    r"nought|naught": "zero",
    r"dear|dearer": "expensive, slower",
    r"but for": "except for",
    r"stolen|thief|theft": "fd reused, closed elsewhere",
    r"superseded": "replaced by a newer connection",
    r"census": "full listing of descriptors",
    r"waivers?": "allow marker",
    r"used up": "done, no longer needed",
    r"for ever": "forever",
    r"(?:is|are|was|were) no (?:leaks?|files?)(?! (?:is|are|at all)\b)": "is not a leak",
    r"closed after all": "closed late",
    r"peers? (?:has|have|had) (?:left|gone|been gone)": "the peer has closed",
    r"(?:a|each|every|one|two|first|last|next|second|third|this|that|the) looks?": "scan, check",
}
PATTERN = re.compile(
    "|".join(rf"(?P<w{number}>\b(?:{word})\b)" for number, word in enumerate(DENIED)), re.IGNORECASE
)
# Names in code, such as those that the changelog lists as renamed.
ALLOWED = re.compile(r"`[^`\s]+`")


def found_in(text: str) -> list[str]:
    """Each denied word with the words around it, and what to write."""
    text = ALLOWED.sub("", text)
    shown = []
    for match in PATTERN.finditer(text):
        instead = list(DENIED.values())[int(str(match.lastgroup)[1:])]
        around = " ".join(text[max(0, match.start() - 40) : match.end() + 30].split())
        shown.append(f"{match.group()!r} in {around!r}: write {instead}")
    return shown


DOCUMENTS = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_no_denied_word(path: Path) -> None:
    assert found_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_messages_hints_help_and_public_docstrings_use_no_denied_word(path: Path) -> None:
    found = [f"line {line}: {each}" for line, text in texts_of(path) for each in found_in(text)]
    assert found == []


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module, docstrings only where they are of public names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_public = not any(
        part.startswith("_") and part != "__init__.py" for part in path.relative_to(PACKAGE).parts
    )
    private = set(docstrings_of_others(tree, is_public=is_public))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in private:
            yield node.lineno, node.value


def docstrings_of_others(node: ast.AST, *, is_public: bool) -> Iterator[ast.AST]:
    """The docstrings that are for those who read the code."""
    for child in ast.iter_child_nodes(node):
        is_named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from docstrings_of_others(
            child, is_public=is_public and not (is_named and child.name.startswith("_"))
        )
    if not is_public and isinstance(
        node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    ):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr):
            yield first.value


def test_descriptions_of_the_schema_use_no_denied_word() -> None:
    for path in PACKAGE.rglob("*.json"):
        schema = json.loads(path.read_text(encoding="utf-8"))
        assert [each for text in descriptions(schema) for each in found_in(text)] == []


def descriptions(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from (
            schema[name] for name in ("title", "description") if isinstance(schema.get(name), str)
        )
        for value in schema.values():
            yield from descriptions(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from descriptions(value)
