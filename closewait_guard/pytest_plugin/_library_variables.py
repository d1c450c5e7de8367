"""Where a global variable is defined, and whether its library or other code gives it its value.

The source says so, and whether it is the value from before the first test: a pool that the library
has made itself is no leak of the test in which it was first used. Any client that a test, a fixture
or an application has stored there is.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = [
    "find_definition",
    "is_own_variable",
]


def is_own_variable(
    noted: Mapping[str, Mapping[str, int]], module: str, variables: Mapping[str, object], name: str
) -> bool:
    """Whether a module gives one of its variables its value itself: more than a constant.

    Its source assigns it, and it is the value from before the first test, unless a function of the
    module assigns it too.

    Args:
        noted: By module and name, the identities of the values before the first test.
        module: The name of the module.
        variables: Those of the module.
        name: That of the variable.
    """
    known = noted.get(module, {}).get(name)
    is_new = known is not None and known != id(variables[name])
    with suppress(Exception):
        tree = ast.parse(Path(str(variables["__file__"])).read_bytes())
        functions = (each for each in ast.walk(tree) if _declares(each, name))
        is_made_later = any(_assigns(each, name) for each in functions)
        return is_made_later or (_assigns(tree, name) and not is_new)
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
        if (
            isinstance(node, _ASSIGNMENTS)
            and not isinstance(node.value, ast.Constant | None)
            and _names(node, name)
        ):
            return True
        if _assigns(node, name):
            return True
    return False


def find_definition(expression: str) -> tuple[str, int] | None:
    """The file and line where a module defines the variable that an expression begins with.

    Args:
        expression: As reports name what a module holds: `test_prices.KEPT[0].sock`.
    """
    names = expression.partition("[")[0].split(".")
    for end in range(len(names) - 1, 0, -1):
        module = sys.modules.get(".".join(names[:end]))
        with suppress(Exception):
            filename = str(vars(module)["__file__"])
            for node in ast.parse(Path(filename).read_bytes()).body:
                if isinstance(node, _ASSIGNMENTS) and _names(node, names[end]):
                    return filename, node.lineno
    return None


def _names(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(each, ast.Name) and each.id == name for each in targets)
