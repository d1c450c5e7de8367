"""Before the first socket nothing of the guard is loaded; after it the hook is gone."""

from __future__ import annotations

import socket

import pytest

from closewait_guard._capture.hooks import SOCKET
from closewait_guard.pytest_plugin._lazy_start import FirstSocketHook


@pytest.fixture
def found():
    found = vars(SOCKET)["__init__"]
    yield found
    SOCKET.__init__ = found


def test_it_calls_back_once_and_is_gone(found):
    calls = []
    hook = FirstSocketHook(lambda: calls.append(vars(SOCKET)["__init__"] is found))
    hook.install()
    socket.socket().close()
    assert calls == [True]
    assert vars(SOCKET)["__init__"] is found
    socket.socket().close()
    assert calls == [True]


def test_it_is_removed_without_a_trace(found):
    hook = FirstSocketHook(lambda: pytest.fail("nothing was opened"))
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

    FirstSocketHook(load).install()
    for expected in (1, 2, 2):
        socket.socket().close()
        assert len(tries) == expected
    assert vars(SOCKET)["__init__"] is found


def test_what_stops_a_test_stops_it_while_the_guard_is_loaded(found):
    def load():
        raise KeyboardInterrupt

    hook = FirstSocketHook(load)
    hook.install()
    with pytest.raises(KeyboardInterrupt):
        socket.socket()
    hook.remove()
    assert vars(SOCKET)["__init__"] is found


def test_a_patch_over_it_stays_and_calls_what_it_found_once(found):
    made, calls = [], []
    hook = FirstSocketHook(lambda: calls.append(1))
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
