"""`demo`: a program that leaks on purpose, the server that it talks to, and the report."""

from __future__ import annotations

import argparse
import importlib.util
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Self

from closewait_guard._stream import write_if_possible
from closewait_guard.commands._output import FINE, say

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = [
    "PriceServer",
]


_DESCRIPTION = """\
Leak sockets in common ways against a local server and print the report. With
requests installed, the report shows its connection pool: responses that were
not read, and an idle connection that is not a leak. Takes about three seconds."""
_EPILOG = """\
exit status: 0 printed, 2 usage error
example:     closewait-guard demo"""

_PAUSE = 0.4
_GRACE = 0.2
_FAREWELL = """\
Read the program that leaks:       closewait-guard demo --source
Check what runs on this machine:   closewait-guard scan
Find the line in your program:     closewait-guard run -- python app.py
"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("--source", action="store_true", help="print the program that leaks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Leak, scan, report, and leave nothing behind."""
    source = Path(__file__).with_name("_leaky_shop.py")
    if arguments.source:
        say(source.read_text(encoding="utf-8"), end="")
        return FINE
    from dataclasses import replace

    from closewait_guard._render import render_report
    from closewait_guard._stream import layout_of

    with tempfile.TemporaryDirectory(prefix="closewait-guard-") as folder:
        # Out of this package, whose own calls are left out of every report.
        copy = Path(folder, "shop.py")
        copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        report = replace(_report_of(_load(copy)), command="demo")
        say(render_report(report, layout_of(sys.stdout)._replace(directory=folder)))
    say(_FAREWELL, end="")
    return FINE


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _report_of(program: ModuleType) -> Report:
    import warnings

    from closewait_guard._guard import Guard
    from closewait_guard.settings import Settings

    # What is dropped is in the report.
    warnings.simplefilter("ignore", ResourceWarning)
    with Guard(Settings(grace=_GRACE)) as guard, PriceServer() as server:
        for way in _progress(program.WAYS):
            program.WAYS[way](server.address)
            time.sleep(_PAUSE)
        time.sleep(_GRACE)
        report = guard.scan()
        program.close_down()
    return report


def _progress(ways: Collection[str]) -> Iterator[str]:
    """Each way in turn: with a bar on a terminal, if there is rich to draw it."""
    if not sys.stderr.isatty():
        yield from ways
        return
    from closewait_guard.exceptions import MissingExtraError

    try:
        from closewait_guard._rich import progress
    except MissingExtraError:
        progress = _named
    yield from progress("leaking", ways)


def _named(what: str, items: Collection[str]) -> Iterator[str]:
    for item in items:
        write_if_possible(f"{what}: {item}\n")
        yield item


# How long it waits for a request, and looks whether it is to stop, in seconds.
_PATIENCE = 0.1
_CATALOGUE = b"a chair, a table, a lamp\n" * 800


class PriceServer:
    """Over loopback, in a thread of its own, while the block lasts."""

    def __enter__(self) -> Self:
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_PATIENCE)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, name="price-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(_PATIENCE)
                _answer(connection)


def _answer(connection: socket.socket) -> None:
    try:
        request = connection.recv(4096)
    except OSError:
        # It asks nothing: like any server, this one does not wait forever.
        return
    body = _CATALOGUE if b"/catalogue" in request else b"42"
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body)
