"""docs/layout.md names what is there, and follows a socket through the calls that it takes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import closewait_guard as cwg

PACKAGE = Path(cwg.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "layout.md").read_text(encoding="utf-8")
REFERENCES = list(dict.fromkeys(re.findall(r"`([\w/]+\.py)::([\w.]+)`", PAGE)))
PATHS = list(dict.fromkeys(re.findall(r"(?<![\w/.])(\w[\w/]*(?:\.py\b|\.json\b|/))(?!\w)", PAGE)))
# One socket's way: the first column of the tables before the questions.
WAY = re.findall(r"^\| `([\w/]+\.py)::([\w.]+)` \|", PAGE.partition("## Where is")[0], re.MULTILINE)
QUESTIONS = re.findall(
    r"^\| (?!question|-)(.+?) \| (.+?) \|$", PAGE.partition("## Where is")[2], re.MULTILINE
)

# Calls in the package, one a line, while a socket is opened, left by its peer, and reported.
TRACE = """
import io, os, socket, sys, threading, time
import closewait_guard as cwg
from closewait_guard import reporters

package = os.path.dirname(cwg.__file__) + os.sep
calls = []

def record(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package):
        path = code.co_filename[len(package):].replace(os.sep, "/")
        calls.append(f"{path}::{code.co_qualname.replace('.<locals>', '')}")

with socket.create_server(("127.0.0.1", 0)) as server:
    threading.setprofile(record)
    sys.setprofile(record)
    # In Python, where each step can be followed.
    cwg.install(grace=0, speedups=False, reporters=[reporters.text(io.StringIO())])
    kept = socket.create_connection(server.getsockname())
    sys.setprofile(None)
    server.accept()[0].close()
    kept.recv(1)
    sys.setprofile(record)
    cwg.report()
    sys.setprofile(None)
    threading.setprofile(None)
    print(*calls, sep="\\n")
"""


@cache
def names_in(path: str) -> frozenset[str]:
    """What a file defines: `function`, `Class.method`, `Class.attribute`, `outer.inner`."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    return frozenset(_names(tree, ""))


def _names(parent: ast.AST, prefix: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
            yield from _names(node, f"{prefix}{node.name}.")
            if isinstance(node, ast.ClassDef):
                yield from (f"{prefix}{node.name}.{name}" for name in _attributes_of(node))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + each.id for each in targets if isinstance(each, ast.Name))
        else:
            yield from _names(node, prefix)


def _attributes_of(cls: ast.ClassDef) -> set[str]:
    """What its methods assign to `self`."""
    return {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


@cache
def homes_of(name: str) -> list[str]:
    """The files that define a name, whatever stands before its last dot."""
    last = name.rpartition(".")[2]
    paths = (path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py")))
    return [
        f"{path}::{found}"
        for path in paths
        for found in sorted(names_in(path))
        if found.rpartition(".")[2] == last
    ]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_the_page_is_there(path):
    in_folders = [*PACKAGE.rglob(path.rstrip("/"))] if "/" not in path.rstrip("/") else []
    found = (PACKAGE / path).exists() or (Path(__file__).parents[2] / path).exists() or in_folders
    assert found, f"docs/layout.md names {path}, which is gone"


@pytest.mark.parametrize("reference", ["::".join(pair) for pair in REFERENCES])
def test_every_name_of_the_page_is_in_its_file(reference):
    path, _, name = reference.partition("::")
    assert (PACKAGE / path).exists(), f"docs/layout.md: {path} is gone; now {homes_of(name)}"
    assert name in names_in(path), (
        f"docs/layout.md: {path} has no {name}; elsewhere {homes_of(name)}; "
        f"it has {sorted(each for each in names_in(path) if '.' not in each or name in each)}"
    )


def test_every_folder_of_the_package_is_on_the_page():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        assert f"{folder.name}/" in PAGE, folder.relative_to(PACKAGE)


def test_each_question_has_one_answer():
    assert len(QUESTIONS) >= 30
    for question, answer in QUESTIONS:
        assert re.fullmatch(r"`[\w/.]+(::[\w.]+)?`", answer), (question, answer)
        path = answer.strip("`").partition("::")[0]
        # What is in C is not where the package is installed.
        places = (PACKAGE / path, Path(__file__).parents[2] / PACKAGE.name / path)
        assert any(place.exists() for place in places), (question, answer)


@pytest.mark.skipif(sys.platform != "linux", reason="the page follows a socket on Linux")
def test_a_socket_goes_through_the_functions_of_the_page_in_their_order():
    assert len(WAY) > 20
    # On a busy machine the time for finding out who holds a socket may be over before the answer.
    for _ in range(3):
        if (missing := first_step_out_of_order(calls_of_one_socket())) is None:
            return
    pytest.fail(missing)


def calls_of_one_socket() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def first_step_out_of_order(calls: list[str]) -> str | None:
    before = "the beginning"
    for path, name in WAY:
        step = f"{path}::{name}"
        if step not in calls:
            return f"docs/layout.md: {step} is not called after {before}; what is: {calls[:40]}"
        del calls[: calls.index(step) + 1]
        before = step
    return None
