"""Imports run strictly downwards, lazy ones included; foreign packages have one importer each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import closewait_guard

PACKAGE = Path(closewait_guard.__file__).parent
NAME = PACKAGE.name

# From the top down: a module may import what stands below its own line, never beside or above.
LAYERS = [
    ["__init__", "__main__"],
    ["commands"],
    ["_preload"],
    ["_outside"],
    ["pytest_plugin", "testing"],
    ["_api"],
    ["_monitor", "_watch_async"],
    ["_rounds"],
    ["_guard"],
    ["_examiner", "_no_leaks", "_unfinished"],
    ["_history", "_lookout", "_jury"],
    ["_attribute", "_observe", "_explain", "_pools"],
    ["_succession"],
    ["_registry", "_settling"],
    ["_trend"],
    ["_rising"],
    ["_since", "_readers", "_deliver", "_population", "_redact", "_judge", "_thresholds"],
    ["_turn"],
    ["reporters"],
    ["_render", "_serial", "_examples"],
    ["_block", "_reporting"],
    ["_natives", "_recorder", "_sight"],
    [
        "_adoption",
        "_lineage",
        "_living",
        "_drops",
        "_endings",
        "_observed",
        "_sight",
        "_thefts",
        "_holders",
    ],
    ["_owners"],
    ["_records"],
    ["_birth"],
    ["_signal", "_story", "_probe"],
    ["_patch"],
    ["_output_file"],
    [
        "_context",
        "_coverage",
        "_exhaustion",
        "_census",
        "_growth",
        "_hints",
        "_labels",
        "_finalizer",
        "_pace",
        "_frames",
        "_remains",
        "_wakeup",
        "_time_limit",
    ],
    [
        "_rich",
        "_structlog",
        "_clock",
        "_decorate",
        "_descriptor",
        "_forks",
        "_heap",
        "_walk",
        "_relatives",
        "_hint_row",
        "_queues",
        "_daemons",
        "_running_frames",
        "_stack",
        "_tally",
        "_variables",
        "_whereabouts",
        "_words",
        "_wrappers",
    ],
    ["_refusals"],
    ["_interruptions", "_stream"],
    ["_lines"],
    ["integrations"],
    ["settings"],
    ["_defaults"],
    ["_setting_sources"],
    ["exceptions", "_frame_copy", "_objects", "_parse", "_pyproject"],
    ["model"],
    ["_judgements", "_socket_values", "_trusted_file"],
    ["_vocabulary"],
    ["_origin"],
]
HEIGHT = {name: -level for level, names in enumerate(LAYERS) for name in names}

FOREIGN = {
    "wrapt": {"_patch"},
    "structlog": {"_structlog"},
    "rich": {"_rich"},
    "psutil": {"_outside"},
    "argcomplete": {"commands"},
    "pytest": {"pytest_plugin"},
}
STANDARD = set(__import__("sys").stdlib_module_names)


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The file, or the folder that stands for its files."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == NAME else {str(node.module)}
    return found


def test_every_module_has_its_layer():
    assert {unit_of(path) for path in modules()} == set(HEIGHT)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_strictly_downwards(path):
    unit = unit_of(path)
    for name in imports_of(path):
        package, _, rest = name.partition(".")
        if package != NAME:
            continue
        assert rest, f"{path} imports the package root"
        target = rest.partition(".")[0]
        if target != unit:
            assert HEIGHT[unit] > HEIGHT[target], f"{unit} imports {target}"


def test_foreign_packages_have_one_importer_each():
    importers: dict[str, set[str]] = {}
    for path in modules():
        for name in imports_of(path):
            package = name.partition(".")[0]
            if package not in STANDARD | {NAME}:
                importers.setdefault(package, set()).add(unit_of(path))
    assert importers == FOREIGN


# What looks at objects of the program: only `_objects` knows how to do that without running code.
LOOKING = [
    *PACKAGE.glob("_holders/*.py"),
    *PACKAGE.glob("integrations/*.py"),
    *(PACKAGE / f"{name}.py" for name in ("_heap", "_owners", "_pools", "_readers")),
    *(PACKAGE / "pytest_plugin" / f"{name}.py" for name in ("reach", "excuses", "turns")),
]
RUNS_CODE = {"isinstance", "issubclass", "getattr", "hasattr", "vars", "dir", "hash", "groupby"}
OF_CLASSES = {"__class__", "__mro__", "__qualname__", "__module__", "__name__", "__subclasses__"}


@pytest.mark.parametrize("path", LOOKING, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_objects_of_the_program_are_touched_by_what_runs_no_code_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS_CODE, where
        if isinstance(node, ast.Attribute):
            assert node.attr != "f_locals", where
            of_type = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "type"
            assert not (of_type and node.attr in OF_CLASSES), where


def test_functions_are_short_and_files_have_one_idea():
    lengths = []
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 300, f"{path} is two things"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
                assert lengths[-1] <= 50, f"{path}: {node.name}"
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 10
