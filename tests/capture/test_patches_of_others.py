"""Others patch sockets too, before us and after us: each goes on as if it were alone."""

from __future__ import annotations

import socket
from unittest import mock

import pytest
import wrapt

import closewait_guard as cwg
from closewait_guard._capture import patch
from closewait_guard._capture.hooks import SOCKET
from closewait_guard.pytest_plugin._lazy_start import FirstSocketHook
from conftest import run_apart


def test_a_patch_of_another_library_over_ours_stays_and_ours_records_nothing():
    guard = cwg.Guard().install()
    ours = socket.socket.__init__

    def theirs(self, *args, **kwargs):
        ours(self, *args, **kwargs)

    socket.socket.__init__ = theirs
    try:
        assert "test_patches_of_others hides" in " ".join(guard.scan().coverage.notes)
        guard.uninstall()
        assert socket.socket.__init__ is theirs
        with pytest.warns(ResourceWarning):
            socket.socket()
        assert guard.scan().coverage.opened == 0
    finally:
        socket.socket.__init__ = ours
    assert patch.is_patched(), "ours is back, and silent"
    with cwg.Guard() as again:
        assert socket.socket.__init__ is ours
        socket.socket().close()
        assert again.scan().coverage.opened == 1


def test_a_guard_over_a_silent_wrapper_counts_each_creation_once():
    first = cwg.Guard().install()
    ours = socket.socket.__init__
    theirs = mock.create_autospec(ours, side_effect=ours)

    def passing_on(self, *args, **kwargs):
        theirs(self, *args, **kwargs)

    socket.socket.__init__ = passing_on
    try:
        first.uninstall()
        with cwg.Guard() as second:
            socket.socket().close()
            assert second.scan().coverage.opened == 1
        assert socket.socket.__init__ is passing_on
    finally:
        socket.socket.__init__ = ours
    with cwg.Guard():
        pass


def test_a_patch_that_was_there_before_sees_the_arguments_as_they_were_given():
    original, seen = socket.socket.__init__, []

    def theirs(self, *args, **kwargs):
        seen.append((args, kwargs))
        original(self, *args, **kwargs)

    socket.socket.__init__ = theirs
    try:
        with cwg.Guard() as guard:
            socket.socket(socket.AF_INET, type=socket.SOCK_DGRAM).close()
            assert guard.scan().coverage.opened == 1
        assert socket.socket.__init__ is theirs
    finally:
        socket.socket.__init__ = original
    assert seen == [((socket.AF_INET,), {"type": socket.SOCK_DGRAM})]


def test_mock_patch_and_autospec_work_as_before():
    with cwg.Guard() as guard:
        with mock.patch("socket.socket") as fake:
            socket.socket(1, 2, 3)
        fake.assert_called_once_with(1, 2, 3)
        spec = mock.create_autospec(socket.socket)
        spec(socket.AF_INET, socket.SOCK_STREAM).close()
        with pytest.raises(TypeError):
            spec(1, 2, 3, 4, 5)
        assert guard.scan().coverage.opened == 0


def test_installing_while_the_name_is_mocked_patches_the_class_itself():
    with mock.patch("socket.socket"):
        guard = cwg.Guard().install()
    try:
        socket.socket().close()
        assert guard.scan().coverage.opened == 1
    finally:
        guard.uninstall()


def test_a_class_that_has_taken_the_place_of_ours_is_reported(guard, monkeypatch):
    class Cooperative:
        pass

    monkeypatch.setattr(socket, "socket", Cooperative)
    notes = guard.scan().coverage.notes
    assert any(note.endswith("which has taken the place of socket.socket") for note in notes)
    assert "Cooperative" in " ".join(notes)


@pytest.fixture
def wrapped_by_wrapt(monkeypatch):
    """What tracing libraries do. Tells which method was called, of what, with which arguments."""
    calls = []

    def wrapper(name):
        def note(wrapped, instance, args, kwargs):
            calls.append((name, type(instance), args, kwargs))
            return wrapped(*args, **kwargs)

        return note

    for name in ("__init__", "accept", "detach", "makefile"):
        found = wrapt.FunctionWrapper(getattr(SOCKET, name), wrapper(name))
        monkeypatch.setattr(SOCKET, name, found, raising=False)
    yield calls
    monkeypatch.undo()


def use_sockets():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            accepted, _ = server.accept()
            client.makefile("rb", buffering=0).close()
            socket.socket(fileno=accepted.detach()).close()


def test_wrappers_that_were_there_before_get_the_arguments_that_they_get_without_us(
    wrapped_by_wrapt,
):
    def observe():
        wrapped_by_wrapt.clear()
        use_sockets()
        # Each time the kernel may choose other numbers.
        return [(name, of, [*kwargs], len(args)) for name, of, args, kwargs in wrapped_by_wrapt]

    before = observe()
    found = dict(vars(SOCKET))
    with cwg.Guard() as guard:
        assert observe() == before
        opened = guard.scan().coverage.opened
    assert dict(vars(SOCKET)) == found
    assert opened == 4
    assert {of for _, of, *_ in before} == {SOCKET}


@pytest.mark.parametrize("works", [True, False])
def test_wrappers_under_the_plugins_hook_get_the_socket(wrapped_by_wrapt, works):
    def load():
        if not works:
            raise ImportError

    hook = FirstSocketHook(load, lambda: None)
    hook.install()
    try:
        socket.socket(socket.AF_INET).close()
    finally:
        hook.remove()
    assert wrapped_by_wrapt == [("__init__", SOCKET, (socket.AF_INET,), {})]


def test_the_stack_and_origin_of_a_creation_are_known_under_others_wrappers(wrapped_by_wrapt):
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname()):
                accepted, _ = server.accept()
            [leak] = guard.scan().findings
            accepted.close()
    assert leak.observation.record.origin == "accepted"
    functions = [frame.function for frame in leak.observation.record.stack]
    assert functions[:2] == ["socket.accept", "wrapped_by_wrapt.<locals>.wrapper.<locals>.note"]
    assert functions[2].startswith("test_the_stack_and_origin")
    assert wrapped_by_wrapt


def test_a_mock_in_place_of_a_method_is_called_as_without_us(monkeypatch):
    fake = mock.Mock()
    monkeypatch.setattr(SOCKET, "makefile", fake)
    with cwg.Guard(), socket.socket() as sock:
        assert sock.makefile("rb", buffering=0) is fake.return_value
    fake.assert_called_once_with("rb", buffering=0)
    assert SOCKET.makefile is fake
    monkeypatch.undo()


PATCHED_BEFORE_THE_IMPORT = """
import functools, socket
def patched(original):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        calls.append((original.__name__, len(args) + len(kwargs)))
        return original(*args, **kwargs)
    return wrapper
calls = []
for name in ("__init__", "accept", "makefile"):
    setattr(socket.socket, name, patched(getattr(socket.socket, name)))
import closewait_guard as cwg
guard = cwg.install(grace=0)
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
accepted, _ = server.accept()
client.close()
[leak] = cwg.scan().findings
assert leak.observation.record.origin == "accepted", leak.observation.record
# The server's family and type; those of the client and its protocol; the four of accept().
assert [number for name, number in calls if name == "__init__"] == [3, 4, 5], calls
"""


def test_those_that_patch_before_we_are_imported_are_seen_through():
    run_apart(PATCHED_BEFORE_THE_IMPORT)
