"""Global variables of modules: which keep idle connections in a pool, and where one is defined.

A pool that a library has made itself, or a module of the project, is not a leak of the test in
which it was first used. The source says so, and whether the value is the one from before the first
test: a client that a test has stored there is its leak.
"""

from __future__ import annotations

import ast
import functools
import gc
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from closewait_guard import _libraries
from closewait_guard._clock import TimeLimit
from closewait_guard._cpython import has_gil
from closewait_guard._holders import idle_pools, modules_of
from closewait_guard._live import (
    attributes_of,
    class_items,
    elements_of,
    is_a,
    items_of,
    module_name,
)
from closewait_guard.model import FrameKind, Observation
from closewait_guard.pytest_plugin._excuses import note_unfinished_search

__all__ = [
    "ModuleVariables",
    "Variable",
    "find_definition",
    "is_own_variable",
]


class Variable(NamedTuple):
    """A global variable that keeps a pool."""

    name: str
    is_of_library: bool

    def is_ignored(self, patterns: Iterable[str]) -> bool:
        """Whether a pattern fits it, as `variable:NAME`."""
        return any(fnmatchcase(f"variable:{self.name}", pattern) for pattern in patterns)


class ModuleVariables:
    """Finds the global variables of libraries and of the project that keep idle connections.

    Args:
        noted: By module and name, the identities of the values before the first test.
        test_files: Those of tests and their fixtures, whose variables are the tests' own.
    """

    def __init__(self, noted: Mapping[str, Mapping[str, int]], test_files: Set[str]) -> None:
        self._noted = noted
        self._test_files = test_files

    def find_keeping(self, observations: Iterable[Observation]) -> dict[int, Variable]:
        """By the serial of each connection that waits in a pool: the variable that keeps it.

        Its module gives that variable its value itself.

        Args:
            observations: Of open sockets.
        """
        idle = {key: serials for key, (serials, _) in idle_pools(observations).items()}
        if not idle:
            return {}
        libraries, others = modules_of(FrameKind.LIBRARY), modules_of(FrameKind.USER)
        project = {
            name: variables
            for name, variables in others.items()
            if variables["__file__"] not in self._test_files
        }
        of_project = _Parts(libraries.keys() | project.keys(), with_containers=True)
        of_libraries = _Parts(libraries.keys(), with_containers=False)
        return {
            **self._find_in(project, idle, of_project, is_of_library=False),
            **self._find_in(libraries, idle, of_libraries, is_of_library=True),
        }

    def _find_in(
        self,
        modules: Mapping[str, dict[str, Any]],
        idle: Mapping[int, set[int]],
        parts: _Parts,
        *,
        is_of_library: bool,
    ) -> dict[int, Variable]:
        found: dict[int, Variable] = {}
        for module, variables in modules.items():
            for name, value in items_of(variables):
                kept = parts.keys_within(value, idle)
                if kept and is_own_variable(self._noted, module, variables, name):
                    variable = Variable(f"{module}.{name}", is_of_library)
                    serials = set().union(*(idle[key] for key in kept))
                    found = dict.fromkeys(serials, variable) | found
        return found


_MAX_PARTS = 20_000
_MAX_SECONDS = 0.5
_PARTS_PER_CLOCK_READING = 64
_KNOWN = frozenset(library.name for library in _libraries.LIBRARIES)
# Of the caches of functions, which are in C.
_CACHES = functools.__name__


class _Parts:
    """What values of variables consist of: objects of some modules, and those that they have.

    What an object of a library has in a list or a dict may be the program's: only libraries that
    are known have their own there.

    Args:
        modules: The names of the modules.
        with_containers: Go into lists and dicts, classes and caches of functions as well.
    """

    def __init__(self, modules: Set[str], *, with_containers: bool) -> None:
        self._modules = modules
        self._with_containers = with_containers
        # Those in which nothing was found.
        self._empty: set[int] = set()
        self._limit = TimeLimit(_MAX_SECONDS)

    def keys_within(self, value: object, wanted: Mapping[int, object]) -> set[int]:
        """Which of the wanted objects, by identity, a value consists of."""
        waiting, seen = deque([value]), set[int]()
        for number in itertools.count():
            if not waiting:
                break
            if number == _MAX_PARTS or (
                number % _PARTS_PER_CLOCK_READING == 0 and self._limit.is_over()
            ):
                note_unfinished_search()
                break
            thing = waiting.popleft()
            if id(thing) not in seen and id(thing) not in self._empty:
                seen.add(id(thing))
                waiting += self._parts_of(thing)
        found = seen & wanted.keys()
        if not found:
            self._empty |= seen
        return found

    def _parts_of(self, thing: Any) -> list[object]:
        kind = type(thing)
        is_known = module_name(kind) in self._modules
        parts = [part for _, part in attributes_of(thing)] if is_known else []
        if self._with_containers:
            parts += _items_in(thing)
            if is_a(thing, type) and module_name(thing) in self._modules:
                parts += [value for _, value in class_items(thing)]
            if module_name(kind) == _CACHES and has_gil():
                parts += gc.get_referents(thing)
        elif is_known and (module_name(kind) or "").partition(".")[0] in _KNOWN:
            parts += [part for each in parts for part in _items_in(each)]
        return parts


def _items_in(thing: object) -> list[object]:
    return [value for _, value in items_of(thing)] or elements_of(thing)


def is_own_variable(
    noted: Mapping[str, Mapping[str, int]], module: str, variables: Mapping[str, object], name: str
) -> bool:
    """Whether a module gives one of its variables its value itself: more than a constant.

    Its source assigns or defines it, and it is the value from before the first test, unless a
    function of the module assigns it too.

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
        is_made_here = _assigns(tree, name) or any(_defines(each, name) for each in tree.body)
        return is_made_later or (is_made_here and not is_new)
    return False


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


def _declares(node: ast.AST, name: str) -> bool:
    """Whether a function has `global name`."""
    return isinstance(node, _FUNCTIONS) and any(
        isinstance(each, ast.Global) and name in each.names for each in ast.walk(node)
    )


def _defines(node: ast.AST, name: str) -> bool:
    """Whether it is the function, or the class, of that name."""
    return isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and node.name == name


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
                is_assignment = isinstance(node, _ASSIGNMENTS) and _names(node, names[end])
                if is_assignment or _defines(node, names[end]):
                    return filename, node.lineno
    return None


def _names(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(each, ast.Name) and each.id == name for each in targets)
