"""Before the first socket nothing of the guard is loaded; after it the hook is gone."""

from __future__ import annotations

import socket
import sys
import threading
import time
from importlib import import_module

import pytest

from closewait_guard._capture.hooks import SOCKET
from closewait_guard.pytest_plugin import _lazy_start
from closewait_guard.pytest_plugin._lazy_start import FirstSocketHook


@pytest.fixture
def found(monkeypatch):
    # What this process has imported for other tests is not what a run begins with.
    monkeypatch.setattr(_lazy_start, "_NATIVE_DRIVERS", ())
    found, finders = vars(SOCKET)["__init__"], sys.meta_path.copy()
    yield found
    SOCKET.__init__ = found
    sys.meta_path[:] = finders


def test_it_calls_back_once_and_is_gone(found):
    calls = []

    def note():
        calls.append(vars(SOCKET)["__init__"] is found)

    hook = FirstSocketHook(note, note)
    hook.install()
    socket.socket().close()
    assert calls == [False, True]
    assert vars(SOCKET)["__init__"] is found
    socket.socket().close()
    assert calls == [False, True]


@pytest.mark.parametrize("is_imported", [False, True])
def test_the_import_of_a_driver_whose_sockets_are_made_in_c_counts_as_one(
    found, monkeypatch, tmp_path, is_imported
):
    (tmp_path / "driver_in_c.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "driver_in_c", raising=False)
    monkeypatch.setattr(_lazy_start, "_NATIVE_DRIVERS", ("driver_in_c",))
    if is_imported:
        import_module("driver_in_c")
    calls, finders = [], sys.meta_path.copy()
    FirstSocketHook(lambda: calls.append("loaded"), lambda: calls.append("begun")).install()
    assert calls == ["loaded", "begun"] * is_imported
    import_module("driver_in_c")
    assert calls == ["loaded", "begun"]
    assert vars(SOCKET)["__init__"] is found
    assert sys.meta_path == finders


def test_sockets_of_other_threads_wait_until_it_has_begun_and_those_of_the_loading_do_not(found):
    order, is_loading = [], threading.Event()

    def load():
        is_loading.set()
        # What is loaded makes a socket itself.
        socket.socket().close()
        time.sleep(0.2)
        order.append("loaded")

    def other():
        is_loading.wait(10)
        socket.socket().close()
        order.append("other")

    FirstSocketHook(load, lambda: order.append("begun")).install()
    thread = threading.Thread(target=other)
    thread.start()
    socket.socket().close()
    thread.join()
    assert order == ["loaded", "begun", "other"]
    assert vars(SOCKET)["__init__"] is found


def test_a_socket_does_not_wait_for_ever_for_what_is_loaded(found, monkeypatch):
    monkeypatch.setattr(_lazy_start, "_MAX_SECONDS_TO_LOAD", 0.05)
    waited = []

    def other():
        socket.socket().close()
        waited.append(True)

    def load():
        thread = threading.Thread(target=other)
        thread.start()
        # As where the other thread is importing what is loaded.
        thread.join(10)

    FirstSocketHook(load, lambda: waited.append(False)).install()
    socket.socket().close()
    assert waited == [True, False]


def test_it_is_removed_without_a_trace(found):
    hook = FirstSocketHook(lambda: pytest.fail("nothing was opened"), lambda: None)
    hook.install()
    hook.remove()
    assert vars(SOCKET)["__init__"] is found
    socket.socket().close()


def test_a_failure_to_load_is_raised_nowhere_and_loading_is_tried_again(found):
    tries = []

    def load():
        tries.append(1)
        if len(tries) == 1:
            raise ImportError("a mocked file system")

    FirstSocketHook(load, lambda: None).install()
    for expected in (1, 2, 2):
        socket.socket().close()
        assert len(tries) == expected
    assert vars(SOCKET)["__init__"] is found


def test_what_stops_a_test_stops_it_while_the_guard_is_loaded(found):
    def load():
        raise KeyboardInterrupt

    hook = FirstSocketHook(load, lambda: None)
    hook.install()
    with pytest.raises(KeyboardInterrupt):
        socket.socket()
    hook.remove()
    assert vars(SOCKET)["__init__"] is found


def test_a_patch_over_it_stays_and_calls_what_it_found_once(found):
    made, calls = [], []
    hook = FirstSocketHook(lambda: calls.append(1), lambda: None)
    hook.install()
    ours = vars(SOCKET)["__init__"]

    def theirs(self, *given, **named):
        made.append(1)
        ours(self, *given, **named)

    SOCKET.__init__ = theirs
    for _ in range(2):
        socket.socket().close()
    assert (made, calls) == ([1, 1], [1])
    assert vars(SOCKET)["__init__"] is theirs
    SOCKET.__init__ = ours
    hook.remove()
    assert vars(SOCKET)["__init__"] is found


def test_the_first_socket_has_its_line_and_its_origin(suite):
    [line] = suite.findings("def test_it(): keep(socket.socketpair()[0])\n")
    [first, second] = line["report"]["findings"]
    for leak in (first, second):
        record = leak["observation"]["record"]
        assert record["origin"] == "created"
        assert record["stack"][0]["function"] == "socketpair"
        assert record["stack"][-1]["function"] == "test_it"
