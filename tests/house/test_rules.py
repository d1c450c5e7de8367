"""The rules that keep the layout true: see "The layout" in CONTRIBUTING."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import closewait_guard as cwg

PACKAGE = Path(cwg.__file__).parent
ROOT = Path(__file__).parents[2]
NAME = PACKAGE.name

# From the top down. A module imports from its own layer and from those below.
LAYERS = {
    "faces": {
        "__init__",
        "__main__",
        "testing",
        "commands",
        "integrations",
        "pytest_plugin",
        "_preload",
    },
    "service": {"_api", "_monitor", "_remote"},
    "composition": {
        "_guard",
        "_pipeline",
        "_series",
        "_numbers",
        "_no_leaks",
        "_delivery",
        "_processes",
        "_signal",
        "_redact",
    },
    "output": {"reporters", "_render"},
    "holders": {"_holders"},
    "judge": {"_judge"},
    "inspect": {"_inspect"},
    "capture": {"_capture"},
    "shared": set[str](),  # Whatever else lies in the root.
}
HEIGHT = {name: -level for level, names in enumerate(LAYERS.values()) for name in names}
LOWEST = -len(LAYERS) + 1

# What imports upwards all the same, at the moment of the call.
UPWARDS = {("model", "_delivery")}  # `str(report)` is its text, wherever the report comes from.

# Output stands beside the stages: it knows values only.
UNKNOWN_TO_OUTPUT = {"_holders", "_judge", "_inspect", "_capture", "_live", "_libraries"}

FOREIGN = {
    "wrapt": {"_capture/patch"},
    "structlog": {"_structlog"},
    "rich": {"_rich"},
    "psutil": {"_processes/psutil"},
    "argcomplete": {"commands/completion"},
    "aiohttp": {"integrations/aiohttp"},
    "celery": {"integrations/celery"},
    "django": {"integrations/django"},
    "prometheus_client": {"integrations/prometheus"},
    "opentelemetry": {"integrations/opentelemetry"},
    "requests": {"commands/_leaky_shop"},
    "sentry_sdk": {"reporters/sentry"},
    "IPython": {"integrations/ipython"},
    "pytest": {"pytest_plugin"},
}

# Of several files that one package's way of extending it needs.
FOLDERS = ("pytest_plugin", "integrations/django")

# What only computes must not be able to touch the world.
OUTSIDE_WORLD = {"socket", "os", "gc", "threading", "select", "time"}
PURE = ("_judge", "_record", "_render", "_format", "model")
PURE_EXCEPT = {"_format": {"time"}}  # A date is shown in the local time zone.

MOST_ENTRIES = 45
# Besides those that have one more for each library that is known, or that plugs the guard in.
MOST_MODULES = 163
MOST_LINES = 450
MOST_LINES_OF_A_FUNCTION = 60
FEWEST_LINES = 50

# Only the experts know how to look at an object of the program without running its code.
LOOKING = ("_holders", "_libraries", "_live", "_inspect/observation", "pytest_plugin/_excuses")
EXPERTS = ("_live/objects", "_live/frames", "_live/frame_copy")
RUNS_CODE = {"isinstance", "issubclass", "getattr", "hasattr", "vars", "dir", "hash", "groupby"}
OF_CLASSES = {"__class__", "__mro__", "__qualname__", "__module__", "__name__", "__subclasses__"}


def may_be_defined_twice(name: str, homes: set[str]) -> bool:
    """One interface that several modules offer: a command, a probe, a way to see processes."""
    if name == "register":
        return all(home.startswith("integrations/") for home in homes)
    of_commands = name in ("prepare", "run") and all(home.startswith("commands/") for home in homes)
    of_platforms = homes in (
        {"_inspect/probe/linux", "_inspect/probe/portable"},
        {"_processes/linux", "_processes/psutil"},
    )
    return of_commands or of_platforms


def may_be_short(module: str) -> bool:
    """One file for each of its kind, found by its name: a library, a reporter, a command."""
    return module.startswith(
        ("_libraries/", "integrations/", "reporters/", "commands/", "_preload/sitecustomize")
    )


@cache
def modules() -> dict[str, ast.Module]:
    """By their paths in the package, without `.py`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix().removesuffix(".py")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def unit_of(module: str) -> str:
    return module.partition("/")[0]


def height_of(module: str) -> int:
    return HEIGHT.get(unit_of(module), LOWEST)


def path_of(dotted: str) -> str | None:
    """The module of ours that a dotted name means; None where it is a name within one."""
    inner = "/".join(dotted.split(".")[1:])
    for candidate in (inner, f"{inner}/__init__" if inner else "__init__"):
        if candidate in modules():
            return candidate
    return None


@cache
def imports_of(module: str) -> tuple[tuple[str, str], ...]:
    """What a module imports, lazily too: pairs of a module, and a name in it or ''."""
    found = []
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
    return tuple(found)


def is_extension(dotted: str) -> bool:
    """Whether a dotted name means a module in C, which imports nothing."""
    return (PACKAGE / "/".join(dotted.split(".")[1:])).with_suffix(".pyi").exists()


@cache
def own_imports_of(module: str) -> tuple[tuple[str, str], ...]:
    """The modules of ours that a module imports, each with the name, or '' for all of it."""
    found = []
    for source, name in imports_of(module):
        if source.partition(".")[0] != NAME:
            continue
        if is_extension(source) or is_extension(f"{source}.{name}"):
            continue
        whole = path_of(f"{source}.{name}") if name else path_of(source)
        target = whole or path_of(source)
        assert target is not None, f"{module}: {source}.{name}"
        found.append((target, "" if whole and name else name))
    return tuple(found)


@pytest.mark.parametrize("module", modules())
def test_imports_run_downwards(module):
    for target, _ in own_imports_of(module):
        if (module, target) in UPWARDS:
            continue
        assert target != "__init__", f"{module} imports the root"
        assert height_of(module) >= height_of(target), f"{module} imports {target}"
        if height_of(module) == HEIGHT["reporters"]:
            assert unit_of(target) not in UNKNOWN_TO_OUTPUT, f"{module} imports {target}"


def test_no_module_imports_itself_by_a_detour():
    graph = {module: {target for target, _ in own_imports_of(module)} for module in modules()}
    # A package's front imports its files, and they each other: never the front.
    for module, targets in graph.items():
        targets -= {module} | {target for lower, target in UPWARDS if lower == module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", modules())
def test_another_package_is_imported_by_its_front_and_no_private_name_anywhere(module):
    for target, name in own_imports_of(module):
        assert not re.match(r"_(?!_)", name), f"{module} imports {name} of {target}"
        inside = unit_of(target) == unit_of(module)
        front = "/" not in target or target.endswith("__init__") or name == ""
        private = unit_of(target).startswith("_")
        assert inside or front or not private, f"{module} imports {name} of {target}"


def test_foreign_packages_have_one_importer_each():
    importers = defaultdict(set)
    for module in modules():
        for source, _ in imports_of(module):
            package = source.partition(".")[0]
            if package not in sys.stdlib_module_names | {NAME}:
                home = next((folder for folder in FOLDERS if module.startswith(folder)), module)
                importers[package].add(home)
    assert dict(importers) == FOREIGN


@pytest.mark.parametrize("module", [name for name in modules() if unit_of(name) in PURE])
def test_what_only_computes_cannot_touch_the_world(module):
    used = {source.partition(".")[0] for source, _ in imports_of(module)}
    assert used & OUTSIDE_WORLD <= PURE_EXCEPT.get(module, set())
    assert not any(unit_of(target) == "_capture" for target, _ in own_imports_of(module))


@pytest.mark.parametrize(
    "module", [name for name in modules() if name.startswith(LOOKING) and name not in EXPERTS]
)
def test_objects_of_the_program_are_touched_by_what_runs_no_code_only(module):
    for node in ast.walk(modules()[module]):
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS_CODE, where
        if isinstance(node, ast.Attribute):
            assert node.attr != "f_locals", where
            of_type = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "type"
            assert not (of_type and node.attr in OF_CLASSES), where


def test_the_package_stays_small_enough_to_be_known():
    entries = [path for path in PACKAGE.iterdir() if path.is_file() or any(path.glob("*.py"))]
    assert len(entries) <= MOST_ENTRIES
    counted = [each for each in modules() if unit_of(each) not in ("_libraries", "integrations")]
    assert len(counted) <= MOST_MODULES


def lines_of(module: str) -> int:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")


def lengths_of_functions(module: str) -> dict[str, int]:
    return {
        f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("module", modules())
def test_files_and_functions_are_not_too_long(module):
    assert lines_of(module) <= MOST_LINES
    lengths = lengths_of_functions(module)
    assert not [name for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION]


def test_half_of_all_functions_have_at_most_ten_lines():
    lengths = sorted(
        length for module in modules() for length in lengths_of_functions(module).values()
    )
    assert lengths[len(lengths) // 2] <= 10


def test_no_file_is_a_crumb_of_its_only_user():
    importers = defaultdict(set)
    for module in modules():
        for target, _ in own_imports_of(module):
            importers[target].add(module)
    crumbs = [
        module
        for module, users in importers.items()
        if "/" in module
        and len(users) == 1
        and {unit_of(user) for user in users} == {unit_of(module)}
        and lines_of(module) < FEWEST_LINES
        and not may_be_short(module)
    ]
    assert not crumbs


def test_no_public_name_is_defined_twice():
    homes = defaultdict(set)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                homes[node.name].add(module)
    twice = {
        name: sorted(found)
        for name, found in homes.items()
        if len(found) > 1 and not name.startswith("_") and not may_be_defined_twice(name, found)
    }
    assert not twice


def test_contributing_names_every_package():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for module in modules():
        if module.endswith("/__init__"):
            assert f"{module.removesuffix('__init__')}" in text


def test_contributing_has_the_layers_from_the_top_down_with_what_is_in_each():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| layer |")[2]
    rows = re.findall(r"^\| ([\w, ]+) \| (.+) \|$", text, re.MULTILINE)
    assert [name for names, _ in rows for name in names.split(", ")] == list(LAYERS)
    for names, members in rows:
        for unit in set[str]().union(*(LAYERS[name] for name in names.split(", "))):
            assert re.search(rf"`{unit}(/|\.py)`", members) or len(names.split(", ")) > 1, unit
