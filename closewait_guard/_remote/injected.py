"""What runs inside a process that is attached to: it loads the guard, has it answer, and leaves.

Its source is run as text, by any Python, in a thread of its own: it imports nothing of the package
before it has loaded that from where the caller has it. Signal handlers do not run in that thread,
and what it raises reaches no one. What the standard library has loaded for it stays loaded: another
thread may have got it meanwhile.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["begin"]


_PACKAGE = "closewait_guard"
# On the package that is loaded for a visit: in which process.
_VISITED = "_visited_process"


def begin(package: str, address: str, order: Mapping[str, object]) -> None:
    """Answer the caller from a thread of its own, or here if none can be started.

    Args:
        package: The folder of the caller's package.
        address: The path of the socket that the caller listens at.
        order: What to do; see `inside.py`.
    """
    import _thread

    start = _thread.start_new_thread
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None:
        # A green thread would have all others wait.
        start = gevent.get_original("_thread", "start_new_thread")
    has_thread = type(start).__name__ == "builtin_function_or_method"
    try:
        start(_answer, (package, address, {**order, "has_thread": has_thread}))
    except RuntimeError:
        _answer(package, address, {**order, "has_thread": False})


def _answer(package: str, address: str, order: Mapping[str, object]) -> None:
    from _thread import get_ident
    from time import perf_counter

    began, importing = perf_counter(), _heal_children()

    def say(message: Mapping[str, object]) -> None:
        _send(address, {**message, "seconds": perf_counter() - began})

    def is_over(work: Callable[[], Mapping[str, object] | None]) -> bool:
        """Do some of what is wanted; say the answer if there is one by then."""
        importing.add(get_ident())
        try:
            try:
                answer = work()
            except BaseException as error:
                answer = {"error": _sentence(error)}
            if answer is not None:
                say(answer)
        except BaseException:
            # The caller has gone, and nothing else is there to be told.
            _remove_folder(address.rpartition("/")[0])
        importing.discard(get_ident())
        if order["has_thread"]:
            _forget_thread()
        return answer is not None

    def obey() -> Mapping[str, object] | None:
        say({"event": "begun"})
        return _obey(package, order, say, is_over)

    is_over(obey)


def _heal_children() -> set[int]:
    """Have each forked child give up the imports that threads are in the middle of.

    It has none of these threads, and would wait for them forever when it imports the same.

    Returns:
        The threads, for the caller to add and to discard.
    """
    import os

    threads = set[int]()

    def give_up() -> None:
        try:
            locks = vars(sys.modules["_frozen_importlib"])["_module_locks"] if threads else {}
            for name, reference in list(locks.items()):
                if getattr(reference(), "owner", None) in threads:
                    del locks[name]
                    for each in list(sys.modules):
                        if type(each) is str and (each == name or each.startswith(f"{name}.")):
                            del sys.modules[each]
            threads.clear()
        except Exception:
            return

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=give_up)
    return threads


def _forget_thread() -> None:
    """Remove what libraries keep of a thread that they have not started."""
    threading, gevent = sys.modules.get("threading"), sys.modules.get("gevent._hub_local")
    try:
        if threading is not None:
            # `current_thread()` has made it, and forgets it with the thread from 3.13 on only.
            active, ident = vars(threading).get("_active", {}), threading.get_ident()
            if type(active.get(ident)).__name__ == "_DummyThread":
                del active[ident]
        if gevent is not None and (hub := gevent.get_hub_if_exists()) is not None:
            # That of this thread, which keeps descriptors.
            hub.destroy(destroy_loop=True)
    except BaseException:
        return


def _sentence(error: BaseException) -> str:
    ours = any(each.__name__ == "CloseWaitGuardError" for each in type(error).__mro__)
    return str(error) if ours else f"{type(error).__name__}: {error}"


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


def _remove_folder(folder: str) -> None:
    """Remove what a caller that was killed has left behind."""
    import os

    try:
        for place, folders, files in os.walk(folder, topdown=False):
            for name in files:
                os.unlink(f"{place}/{name}")  # noqa: PTH108 - pathlib is slow to load
            for name in folders:
                os.rmdir(f"{place}/{name}")  # noqa: PTH106
        os.rmdir(folder)  # noqa: PTH106
    except OSError:
        return


def _obey(
    package: str,
    order: Mapping[str, object],
    say: Callable[[Mapping[str, object]], None],
    is_over: Callable[[Callable[[], Mapping[str, object] | None]], bool],
) -> Mapping[str, object] | None:
    from os import getpid

    visited = vars(sys.modules.get(_PACKAGE, sys)).get(_VISITED)
    if visited == getpid():
        raise RuntimeError("it is being asked already, by another command: try again")
    if visited is not None:
        # A fork has copied what another visit had loaded by then, and not its thread.
        _unload()
    is_visit = _PACKAGE not in sys.modules
    goes_on = False
    try:
        if is_visit:
            _load(package)
        from importlib import import_module

        # Of the program's own package, if it has imported that.
        inside = import_module(f"{_PACKAGE}._remote.inside")
        order = {**order, "is_visit": is_visit}
        answer: Mapping[str, object] | None = inside.obey(order, say, is_over, _leave)
        goes_on = answer is None
        return answer
    finally:
        if is_visit and not goes_on:
            _leave()


def _load(package: str) -> None:
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


def _leave() -> None:
    """Take out what was loaded, unless the program uses it by now, or a guard stays."""
    if f"{_PACKAGE}._api" in sys.modules:
        vars(sys.modules[_PACKAGE]).pop(_VISITED, None)
    else:
        _unload()


def _unload() -> None:
    folders = tuple(vars(sys.modules.get(_PACKAGE, sys)).get("__path__", ()))
    for name in list(sys.modules):
        if type(name) is str and (name == _PACKAGE or name.startswith(f"{_PACKAGE}.")):
            del sys.modules[name]
    for path in list(sys.path_importer_cache):
        if path.startswith(folders):
            del sys.path_importer_cache[path]
