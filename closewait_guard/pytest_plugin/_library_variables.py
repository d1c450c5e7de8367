"""Whether a library gives a global variable of its own module the value that it has, or other code.

The source says so: a pool that the library has made itself is no leak of the test in which it was
first used. Any client that a test, a fixture or an application has stored there is.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from pathlib import Path

__all__ = [
    "is_own_variable",
]


def is_own_variable(filename: str, name: str) -> bool:
    """Whether the source of a module gives a global variable its value: more than a constant.

    Otherwise other code has stored something there.
    """
    with suppress(Exception):
        tree = ast.parse(Path(filename).read_bytes())
        functions = (each for each in ast.walk(tree) if _declares(each, name))
        return any(_assigns(scope, name) for scope in (tree, *functions))
    return False


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


def _declares(node: ast.AST, name: str) -> bool:
    """Whether a function has `global name`."""
    return isinstance(node, _FUNCTIONS) and any(
        isinstance(each, ast.Global) and name in each.names for each in ast.walk(node)
    )


def _assigns(scope: ast.AST, name: str) -> bool:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, _ASSIGNMENTS) and not isinstance(node.value, ast.Constant | None):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(each, ast.Name) and each.id == name for each in targets):
                return True
        if _assigns(node, name):
            return True
    return False
