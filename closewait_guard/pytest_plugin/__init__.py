"""The pytest plugin's entry point: options, markers, the fixture.

Nothing else of the guard is imported, and nothing patched, until one of them asks for it.
PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from closewait_guard._guard import Guard
    from closewait_guard.pytest_plugin._hooks import LeakHooks

__all__ = ["closewait_guard"]

_NAMES = (
    "socket_leaks",
    "socket_leaks_grace",
    "socket_leaks_ignore",
    "socket_leaks_threads",
    "socket_leaks_libraries",
    "socket_leaks_as",
    "socket_leaks_json",
    "socket_leaks_baseline",
)
_MARKERS = ("socket_leaks", "allow_socket_leaks")
_MARKER_LINES = (
    "allow_socket_leaks(reason): this test may leak sockets; a reason is required",
    "socket_leaks(mode, *, grace, ignore, threads, libraries): how this test's socket leaks are "
    "taken",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, and an ini value of the same name for each."""
    group = parser.getgroup("socket leaks", "socket leaks (closewait_guard)")
    group.addoption(
        "--socket-leaks",
        choices=("off", "warn", "fail"),
        help="what to do about tests that leak sockets (ini: socket_leaks; default: off)",
    )
    group.addoption(
        "--socket-leaks-grace",
        metavar="SECONDS",
        help="seconds that sockets have to close after a test, waited only when one is suspect "
        "(ini: socket_leaks_grace; default: 0.5)",
    )
    group.addoption(
        "--socket-leaks-ignore",
        metavar="PATTERN",
        action="append",
        help="ignore sockets with this file, function or module in their creation stack, or of the "
        "wider fixture fixture:NAME; wildcards are * and ?; repeatable (ini: "
        "socket_leaks_ignore, one per line)",
    )
    group.addoption(
        "--socket-leaks-threads",
        choices=("warn", "fail"),
        help="what to do about sockets that a thread or an event loop still uses after the test "
        "(ini: socket_leaks_threads; default: warn, at the end of the run)",
    )
    group.addoption(
        "--socket-leaks-libraries",
        choices=("warn", "fail"),
        help="what to do about idle connections in the global pool of a library, such as that of "
        "urllib3.request() (ini: socket_leaks_libraries; default: warn)",
    )
    group.addoption(
        "--socket-leaks-as",
        choices=("error", "fail"),
        help="how a test that leaks is reported: with an error at its teardown, or itself as "
        "failed (ini: socket_leaks_as; default: error)",
    )
    group.addoption(
        "--socket-leaks-json",
        metavar="PATH",
        help="write every leak to this file, one JSON object per line (ini: socket_leaks_json)",
    )
    group.addoption(
        "--socket-leaks-baseline",
        metavar="FILE",
        help="allow the leaks that this file lists, so that only new ones count (ini: "
        "socket_leaks_baseline)",
    )
    group.addoption(
        "--socket-leaks-update-baseline",
        action="store_true",
        help="write the leaks of this run to the file of --socket-leaks-baseline, and allow them",
    )
    for name in _NAMES:
        kind = "linelist" if name == "socket_leaks_ignore" else "string"
        option = "--" + name.replace("_", "-")
        parser.addini(name, f"default for {option}", type=kind, default=None)  # type: ignore[arg-type]


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks, if an option, the environment or the ini-file asks for it."""
    for line in _MARKER_LINES:
        config.addinivalue_line("markers", line)
    is_updating = config.getoption("socket_leaks_update_baseline")
    if is_updating or any(_is_given(config, name) for name in _NAMES):
        _load_without_rewriting(config)
        from closewait_guard.pytest_plugin._options import is_enabled

        if is_enabled(config):
            _register_hooks(config)


def _register_hooks(config: pytest.Config) -> LeakHooks:
    _load_without_rewriting(config)
    try:
        from closewait_guard.pytest_plugin._hooks import register_hooks
    except ImportError as error:
        from closewait_guard.exceptions import UnsupportedPythonError

        if isinstance(error, UnsupportedPythonError):
            raise pytest.UsageError(str(error)) from None
        raise

    return register_hooks(config)


def _is_given(config: pytest.Config, name: str) -> bool:
    return (
        config.getoption(name) is not None
        or f"CLOSEWAIT_GUARD_{name.upper()}" in os.environ
        or bool(config.getini(name))
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Register the hooks, if a marker or the fixture asks for it; plan each test."""
    is_registered = config.pluginmanager.has_plugin("closewait_guard_hooks")
    if _has_any(items, _MARKERS if is_registered else _MARKERS[:1]):
        _register_hooks(config).plan_tests(items)


def _has_any(items: list[pytest.Item], markers: tuple[str, ...]) -> bool:
    marks: list[pytest.Mark] = []
    # By id: hashing a node is slow, and most of many tests have the same few parents.
    parents: set[int] = set()
    for item in items:
        marks += item.own_markers
        parent = item.parent
        if parent is not None and id(parent) not in parents:
            parents.add(id(parent))
            marks += parent.iter_markers()
        if "closewait_guard" in getattr(item, "fixturenames", ()):
            return True
    return any(mark.name in markers for mark in marks)


@pytest.fixture
def closewait_guard(request: pytest.FixtureRequest) -> Guard:
    """The `Guard` that checks this test. The test fails if it leaks a socket, even with
    `--socket-leaks=off`.

    Example:
        def test_pool(closewait_guard):
            with Pool() as pool:
                pool.fetch("/")
                assert not closewait_guard.scan().leaks
    """  # noqa: D205 - pytest --fixtures shows the first paragraph
    return _register_hooks(request.config).guard_for(request.node)


_HAS_FINDER = pytest.StashKey[bool]()


class _PlainFinder:
    """Finds the modules of this package, and no others."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith("closewait_guard."):
            return PathFinder.find_spec(name, path, target)
        return None


def _load_without_rewriting(config: pytest.Config) -> None:
    """Have the rest of this package loaded as it is without pytest, until the run is over.

    pytest's own import hook parses every module of a plugin for assertions to rewrite. Here are
    none, and parsing takes as long as loading.
    """
    # A run within a test, which pytester undoes, may have loaded some of it. A second copy of the
    # others would not know the objects of the first.
    if (interruptions := sys.modules.get("closewait_guard._interruptions")) is not None:
        interruptions.restore_late()
    if config.stash.get(_HAS_FINDER, False):
        return
    config.stash[_HAS_FINDER] = True
    for place, finder in enumerate(sys.meta_path):
        if type(finder).__module__ == "_pytest.assertion.rewrite":
            ours = _PlainFinder()
            # Just before pytest's, and after every other finder.
            sys.meta_path.insert(place, ours)
            config.add_cleanup(partial(_remove, ours))
            return


def _remove(finder: _PlainFinder) -> None:
    # Tests may have put back a list of their own.
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
