"""The pytest plugin's front door: options, and the one question whether anybody asks for it.

Nothing of the guard is imported, and nothing patched, until somebody does. PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from closewait_guard._guard import Guard

__all__ = ["closewait_guard"]

_NAMES = ("socket_leaks", "socket_leaks_grace", "socket_leaks_ignore", "socket_leaks_json")
_MARKERS = ("socket_leaks", "allow_socket_leaks")
_MARKER_LINES = (
    "allow_socket_leaks(reason): this test may leak sockets; a reason is required",
    "socket_leaks(mode, *, grace, ignore): how this test's socket leaks are taken",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and an ini value of the same name for each."""
    group = parser.getgroup("socket leaks", "socket leaks (closewait_guard)")
    group.addoption(
        "--socket-leaks",
        choices=("off", "warn", "fail"),
        help="what to do about tests that leak sockets (ini: socket_leaks; default: off)",
    )
    group.addoption(
        "--socket-leaks-grace",
        metavar="SECONDS",
        help="time that sockets have to close after a test, spent only when one is suspect "
        "(ini: socket_leaks_grace; default: 0.5)",
    )
    group.addoption(
        "--socket-leaks-ignore",
        metavar="PATTERN",
        action="append",
        help="accuse no socket with this file, function or module in its creation stack; "
        "wildcards are * and ?; may be given several times (ini: socket_leaks_ignore, one a line)",
    )
    group.addoption(
        "--socket-leaks-json",
        metavar="PATH",
        help="write every leak found to this file, one JSON object a line (ini: socket_leaks_json)",
    )
    for name in _NAMES:
        kind = "linelist" if name == "socket_leaks_ignore" else "string"
        option = "--" + name.replace("_", "-")
        parser.addini(name, f"default for {option}", type=kind, default=None)  # type: ignore[arg-type]


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Begin, if an option, the environment or the ini-file asks for it."""
    for line in _MARKER_LINES:
        config.addinivalue_line("markers", line)
    if any(_is_given(config, name) for name in _NAMES):
        from closewait_guard.pytest_plugin.begin import begin, wanted

        if wanted(config):
            begin(config)


def _is_given(config: pytest.Config, name: str) -> bool:
    return (
        config.getoption(name) is not None
        or f"CLOSEWAIT_GUARD_{name.upper()}" in os.environ
        or bool(config.getini(name))
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin, if a marker or the fixture asks for it; note what is asked for each test."""
    has_begun = config.pluginmanager.has_plugin("closewait_guard_watch")
    asking = _MARKERS if has_begun else _MARKERS[:1]
    parents: dict[int, bool] = {}
    if any(_asks(item, asking, parents) for item in items):
        from closewait_guard.pytest_plugin.begin import begin

        begin(config).plan(items)


def _asks(item: pytest.Item, markers: tuple[str, ...], parents: dict[int, bool]) -> bool:
    return (
        "closewait_guard" in getattr(item, "fixturenames", ())
        or (bool(item.own_markers) and _has(item, markers))
        or _inherits(item.parent, markers, parents)
    )


def _inherits(
    node: pytest.Collector | None, markers: tuple[str, ...], known: dict[int, bool]
) -> bool:
    """Asked once of each class and module, whose tests are many."""
    asks = known.get(id(node))
    if asks is None:
        asks = node is not None and (_has(node, markers) or _inherits(node.parent, markers, known))
        known[id(node)] = asks
    return asks


def _has(node: pytest.Item | pytest.Collector, markers: tuple[str, ...]) -> bool:
    return any(mark.name in markers for mark in node.own_markers)


@pytest.fixture
def closewait_guard(request: pytest.FixtureRequest) -> Guard:
    """The `Guard` that watches this test. The test fails if it leaks a socket, even with
    `--socket-leaks=off`.

    Example:
        def test_pool(closewait_guard):
            with Pool() as pool:
                pool.fetch("/")
                assert not closewait_guard.scan().accused
    """  # noqa: D205 - pytest --fixtures shows the first paragraph
    from closewait_guard.pytest_plugin.begin import begin

    return begin(request.config).watched(request.node)
