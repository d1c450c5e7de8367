"""What runs inside a process that is attached to: one scan, by a guard that is not left there.

Its source is run as text, by any Python, in a thread of its own: it imports nothing of the package
before it has loaded that from where the caller has it. Signal handlers do not run in that thread,
and what it raises reaches no one. What the standard library has loaded for it stays loaded: another
thread may have got it meanwhile.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["begin"]


_PACKAGE = "closewait_guard"
# On the package that is loaded for a visit: in which process.
_VISITED = "_visited_process"


def begin(package: str, address: str, thresholds: Mapping[str, object]) -> None:
    """Answer the caller from a thread of its own, or here if none can be started.

    Args:
        package: The folder of the caller's package.
        address: The path of the socket that the caller listens at.
        thresholds: Settings for the scan, where the program has no guard of its own.
    """
    import _thread

    start = _thread.start_new_thread
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None:
        # A green thread would have all others wait.
        start = gevent.get_original("_thread", "start_new_thread")
    try:
        start(_answer_and_end, (package, address, thresholds))
    except RuntimeError:
        _answer(package, address, thresholds)


def _answer_and_end(package: str, address: str, thresholds: Mapping[str, object]) -> None:
    _answer(package, address, thresholds)
    try:
        _forget_thread()
    except BaseException:
        return


def _forget_thread() -> None:
    """Remove what libraries keep of a thread that they have not started."""
    threading, gevent = sys.modules.get("threading"), sys.modules.get("gevent._hub_local")
    if threading is not None:
        # `current_thread()` has made it, and forgets it with the thread from Python 3.13 on only.
        active, ident = vars(threading).get("_active", {}), threading.get_ident()
        if type(active.get(ident)).__name__ == "_DummyThread":
            del active[ident]
    if gevent is not None and (hub := gevent.get_hub_if_exists()) is not None:
        # That of this thread, which keeps descriptors.
        hub.destroy(destroy_loop=True)


def _answer(package: str, address: str, thresholds: Mapping[str, object]) -> None:
    try:
        _send(address, {"event": "begun"})
        try:
            answer = _scan(package, thresholds)
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _send(address, answer)
    except BaseException:
        # The caller has gone, and nothing else is there to be told.
        return


def _send(address: str, message: Mapping[str, object]) -> None:
    """Send a message over a connection of its own, to this user's process or root's."""
    import _socket
    import json
    import os
    import struct

    # Not the socket class that the program may have replaced.
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.settimeout(10.0)
        sock.connect(address)
        credentials = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        if struct.unpack("iII", credentials)[1] in (0, os.geteuid()):
            sock.sendall(json.dumps(message).encode() + b"\n", _socket.MSG_NOSIGNAL)
    finally:
        sock.close()


def _scan(package: str, thresholds: Mapping[str, object]) -> dict[str, object]:
    from os import getpid
    from time import perf_counter

    began = perf_counter()
    visited = vars(sys.modules.get(_PACKAGE, sys)).get(_VISITED)
    if visited == getpid():
        raise RuntimeError("it is being asked already, by another command: try again")
    if visited is not None:
        # A fork has copied what another visit had loaded by then, and not its thread.
        _unload(package)
    if _PACKAGE in sys.modules:
        # The program's own, with all that its guard has recorded.
        from importlib import import_module

        report = import_module(f"{_PACKAGE}._api").scan()
        data = import_module(f"{_PACKAGE}._render").to_dict(report)
    else:
        try:
            data = _scan_as_visitor(package, thresholds)
        finally:
            _unload(package)
    return {"report": data, "seconds": perf_counter() - began}


def _scan_as_visitor(package: str, thresholds: Mapping[str, object]) -> object:
    from importlib import import_module
    from importlib.util import module_from_spec, spec_from_file_location
    from os import getpid

    # Found without `sys.path`, where all other imports would look too.
    spec = spec_from_file_location(
        _PACKAGE, f"{package}/__init__.py", submodule_search_locations=[package]
    )
    assert spec is not None and spec.loader is not None  # noqa: PT018, S101 - for the types
    module = module_from_spec(spec)
    setattr(module, _VISITED, getpid())
    sys.modules[_PACKAGE] = module
    spec.loader.exec_module(module)
    settings = import_module(f"{_PACKAGE}.settings").Settings(**thresholds)
    guard = import_module(f"{_PACKAGE}._guard").Guard(settings)
    try:
        return import_module(f"{_PACKAGE}._render").to_dict(guard.scan())
    finally:
        guard.uninstall()


def _unload(package: str) -> None:
    """Take out what was imported from the caller's folder."""
    used = sys.modules.get(f"{_PACKAGE}._api")
    if used is not None:
        # The program has imported the package meanwhile, and uses it.
        return
    for name in list(sys.modules):
        if type(name) is str and (name == _PACKAGE or name.startswith(f"{_PACKAGE}.")):
            del sys.modules[name]
    for path in list(sys.path_importer_cache):
        if path.startswith(package):
            del sys.path_importer_cache[path]
