"""The extension and its twin in Python do the same; without the extension, all works as well."""

from __future__ import annotations

import _socket
import _thread
import asyncio
import gc
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
import weakref

import pytest

import closewait_guard as cwg
from closewait_guard._capture import Creation, PlainContext, Recording, Registry, patch
from closewait_guard._capture.hooks import SOCKET
from closewait_guard._capture.recorder import PythonRecorder, make_recorder
from closewait_guard._capture.speedups import find_speedups, why_no_speedups

pytestmark = pytest.mark.skipif(
    find_speedups() is None, reason=f"there is no extension: {why_no_speedups()}"
)


class Twins:
    """Two registries that record the same sockets: one in C, one in Python."""

    def __init__(self, context=None, **recording):
        recording = {"stack_depth": 32, **recording}
        self.in_c, self.in_python = (
            Registry(Recording(**recording, speedups=speedups), PlainContext.of(context), 10)
            for speedups in (True, False)
        )

    def __enter__(self):
        self.in_c.subscribe()
        self.in_python.subscribe()
        return self

    def __exit__(self, *_):
        self.in_c.unsubscribe()
        self.in_python.unsubscribe()

    def creations_of(self, sock):
        return [
            Creation._make(registry._creations[sock.fileno()])
            for registry in (self.in_c, self.in_python)
        ]

    def assert_alike(self, *socks):
        """Returns what both recorded of the last."""
        for sock in socks:
            in_c, in_python = map(without_numbers, self.creations_of(sock))
            assert in_c == in_python
            assert list(map(type, in_c)) == list(map(type, in_python))
        for registry in (self.in_c, self.in_python):
            assert registry.totals()[2] == 0, "a creation failed"
        return in_c


def without_numbers(creation):
    """Without what no two recorders can have in common."""
    parent = None if creation.parent is None else without_numbers(Creation._make(creation.parent))
    assert time.time() - 60 < creation.opened_at <= time.time()
    return creation._replace(serial=0, opened_at=0.0, parent=parent)


@pytest.mark.parametrize("depth", [0, 1, 2, 32, 64, 65, 1000])
def test_both_record_the_same_calls_to_any_depth(depth):
    def deep(calls):
        return deep(calls - 1) if calls else socket.socket()

    with Twins(stack_depth=depth) as twins, deep(100) as sock:
        stack = twins.assert_alike(sock).stack
    calls = len(stack) // 2
    assert calls == depth or 101 < calls < depth


def test_both_end_a_stack_before_the_first_call_of_a_given_function():
    def outer():
        return inner()

    def inner():
        return socket.socket()

    with Twins(ends=(outer.__code__,)) as twins, outer() as sock:
        assert [code.co_name for code in twins.assert_alike(sock).stack[::2]] == ["inner"]
    # The innermost call is kept, even if it is an end.
    with Twins(ends=(inner.__code__,)) as twins, outer() as sock:
        names = [code.co_name for code in twins.assert_alike(sock).stack[::2]]
        assert names[:2] == ["inner", "outer"]


def test_both_know_what_a_socket_was_made_of():
    with Twins() as twins, socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as end:
            assert twins.assert_alike(server, client).origin is cwg.Origin.CREATED
            accepted = twins.assert_alike(end)
            assert (accepted.origin, accepted.parent.origin) == ("accepted", "created")
            with end.dup() as copy:
                assert twins.assert_alike(copy).origin is cwg.Origin.DUPLICATED
            with socket.fromfd(end.fileno(), end.family, end.type) as copy:
                assert twins.assert_alike(copy).origin is cwg.Origin.DUPLICATED
            with socket.socket(fileno=client.detach()) as again:
                assert twins.assert_alike(again).origin is cwg.Origin.DETACHED


def test_both_give_what_a_copied_listener_accepts_the_same_parents():
    with Twins() as twins, socket.create_server(("127.0.0.1", 0)) as server, server.dup() as copy:
        with socket.create_connection(copy.getsockname()), copy.accept()[0] as end:
            accepted = twins.assert_alike(end)
    assert accepted.parent.origin is cwg.Origin.DUPLICATED
    assert Creation._make(accepted.parent.parent).origin is cwg.Origin.CREATED


def test_both_record_what_an_unknown_listener_accepts():
    with socket.create_server(("127.0.0.1", 0)) as server, Twins() as twins:
        with socket.create_connection(server.getsockname()), server.accept()[0] as end:
            accepted = twins.assert_alike(end)
    assert (accepted.origin, accepted.parent) == (cwg.Origin.ACCEPTED, None)


def test_both_record_what_a_subclass_and_a_second_class_accept():
    class Listener(socket.socket):
        def accept(self):
            fd, address = self._accept()
            return type(self)(self.family, self.type, self.proto, fileno=fd), address

    with Twins() as twins, Listener() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname()), server.accept()[0] as end:
            twins.assert_alike(end)


class Number(int):
    """A descriptor that is no plain number."""


def test_both_file_a_socket_under_the_number_that_it_has():
    with Twins() as twins, socket.socket() as sock:
        with socket.socket(fileno=Number(os.dup(sock.fileno()))) as copy:
            twins.assert_alike(copy)
            assert all(type(fd) is int for fd in twins.in_c._creations)


@pytest.mark.parametrize(
    ("answer", "expected"), [({"a": 1}, {"a": 1}), ({}, {}), ({"a": object}, {"a": str(object)})]
)
def test_both_ask_the_context_provider(answer, expected):
    with Twins(context=lambda: answer) as twins, socket.socket() as sock:
        assert twins.assert_alike(sock).context == expected


def test_both_survive_a_context_provider_that_fails():
    def provider():
        raise ZeroDivisionError

    with Twins(context=provider) as twins, socket.socket() as sock:
        assert twins.assert_alike(sock).context == {}


def test_both_record_labels():
    with Twins() as twins, cwg.label("outer"), cwg.label("inner"), socket.socket() as sock:
        assert twins.assert_alike(sock).labels == ("outer", "inner")


def test_both_name_the_task_and_go_on_in_the_one_that_awaits_it():
    async def open_socket():
        return socket.socket()

    async def main():
        return await asyncio.create_task(open_socket(), name="a task")

    with Twins() as twins, asyncio.run(main()) as sock:
        assert twins.assert_alike(sock).task == "a task"


def test_both_do_without_asyncio_where_it_is_kept_from_being_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "_asyncio", None)
    monkeypatch.delitem(sys.modules, "trio", raising=False)
    with Twins() as twins, socket.socket() as sock:
        assert twins.assert_alike(sock).task is None


class Name(str):
    """The name of a thread, of a class that runs code."""

    __slots__ = ()

    def __str__(self):
        raise ZeroDivisionError


def test_both_name_the_thread():
    opened = []
    for name in ("worker", Name("worker")):
        with Twins() as twins:
            thread = threading.Thread(target=lambda: opened.append(socket.socket()))
            thread._name = name
            thread.start()
            thread.join()
            with opened.pop() as sock:
                found = twins.assert_alike(sock).thread
            assert (type(found), found) == (str, "worker")


def test_both_number_a_thread_that_has_no_name():
    opened, done = [], _thread.allocate_lock()
    done.acquire()

    def work():
        opened.append((socket.socket(), _thread.get_ident()))
        done.release()

    with Twins() as twins:
        _thread.start_new_thread(work, ())
        assert done.acquire(timeout=60)
        (sock, number), *_ = opened
        with sock:
            assert twins.assert_alike(sock).thread == f"thread-{number}"


def test_both_make_the_stacks_of_sockets_that_live_on_small():
    with Twins() as twins:
        kept = [socket.socket() for _ in range(300)]
        in_c, in_python = twins.creations_of(kept[0])
        assert len(in_c.stack) == len(in_python.stack) == 1
        assert in_c.stack[0] is in_python.stack[0]
        for sock in kept:
            sock.close()


def test_both_count_events_of_all_kinds_together():
    for recorder in (recorder_in_c(), PythonRecorder({}, {}, None, Recording(1))):
        assert [recorder.count(), recorder.count()] == [1, 2]
        with socket.socket() as sock:
            record(recorder, sock)
        assert recorder.last_serial == 3
        assert recorder.count() == 4


def record(recorder, sock):
    """As the wrapper of `__init__` does."""
    recorder.on_create(sock, None)


def recorder_in_c(creations=None, **recording):
    recorder = make_recorder(
        {} if creations is None else creations,
        {},
        None,
        Recording(**{"stack_depth": 3, **recording}),
    )
    assert type(recorder) is find_speedups().recorder
    return recorder


def test_a_failed_part_of_a_record_leaves_none_and_is_raised(monkeypatch):
    creations = {}
    recorder = recorder_in_c(creations)
    with socket.socket() as sock:
        monkeypatch.delattr(threading.current_thread(), "_name")
        with pytest.raises(AttributeError):
            record(recorder, sock)
        assert not creations
        with pytest.raises(TypeError):
            recorder.on_create(sock)
        with pytest.raises(TypeError, match=r"socket"):
            recorder.on_create(object(), None)
        assert not creations


def test_no_frame_is_kept():
    class Local:
        pass

    def open_socket():
        local = Local()
        return socket.socket(), weakref.ref(local)

    with Twins():
        sock, local = open_socket()
        gc.collect()
        assert local() is None
        sock.close()


def test_a_recorder_is_refused_what_it_cannot_use():
    make = find_speedups().recorder
    with pytest.raises(TypeError):
        make()
    with pytest.raises(TypeError):
        make.__new__(make, fields=Creation._fields)


@pytest.mark.parametrize("fields", [(), ("sock",), ("other", *Creation._fields[1:])])
def test_an_extension_that_knows_other_fields_is_refused(monkeypatch, fields):
    monkeypatch.setattr(Creation, "_fields", fields)
    with pytest.raises(ValueError, match=r"fields are known|not in"):
        recorder_in_c()


def test_recorders_are_freed_with_what_they_refer_to():
    class Provider:
        def __call__(self):
            return {}

    provider = Provider()
    provider.recorder = make_recorder({}, {}, PlainContext.of(provider), Recording(3))
    gone = weakref.ref(provider)
    del provider
    gc.collect()
    assert gone() is None


def finalizer(notify, original=_socket.socket.__del__, *, is_for_open_only=True):
    fileno = _socket.socket.fileno
    return find_speedups().finalizer(fileno, notify, original, is_for_open_only=is_for_open_only)


def test_a_finalizer_notifies_of_open_sockets_only():
    notified, finalized = [], []
    call = finalizer(notified.append, finalized.append)
    with socket.socket() as sock:
        call(sock)
        assert (notified, finalized) == ([sock], [sock])
    call(sock)
    assert (notified, finalized) == ([sock], [sock])


def test_a_finalizer_of_another_library_is_called_for_closed_sockets_too():
    notified, finalized = [], []
    call = finalizer(notified.append, finalized.append, is_for_open_only=False)
    with socket.socket() as sock:
        pass
    call(sock)
    assert (notified, finalized) == ([], [sock])


def test_what_is_raised_while_notifying_keeps_no_socket_from_being_finalized():
    finalized = []

    def notify(_):
        raise KeyboardInterrupt

    with socket.socket() as sock:
        finalizer(notify, finalized.append)(sock)
    assert finalized == [sock]


def test_a_finalizer_is_bound_as_a_function_is_and_names_what_it_wraps():
    calls = []
    call = finalizer(calls.append, calls.append)
    assert call.__wrapped__ == calls.append

    class Socket(socket.socket):
        __del__ = call

    assert Socket.__del__ is call
    with Socket() as sock:
        sock.__del__()
        assert calls == [sock, sock]
        with pytest.raises(TypeError):
            sock.__del__(1)
    with pytest.raises(TypeError):
        call()


def test_the_wrapper_of_the_finalizer_is_in_c_with_the_extension_only():
    for speedups in (True, False):
        with cwg.Guard(cwg.Settings(speedups=speedups)):
            is_in_c = isinstance(vars(SOCKET)["__del__"], find_speedups().finalizer)
            assert is_in_c is speedups
    assert not patch.is_patched()


WITHOUT = """
import socket, sys
{before}
import closewait_guard as cwg
cwg.install(grace=60)
kept = socket.socket()
assert len(cwg.scan(full=True).observations) == 1
assert cwg.scan(full=True).observations[0].record.site.lineno == kept_line, kept_line
print("closewait_guard._capture._speedups" in sys.modules)
"""


@pytest.mark.parametrize(
    ("before", "variables"),
    [
        ("", {"CLOSEWAIT_GUARD_SPEEDUPS": "0"}),
        ("sys.modules['closewait_guard._capture._speedups'] = None", {}),
        ("sys._is_gil_enabled = lambda: False", {}),
    ],
    ids=["turned off", "not there", "no GIL"],
)
def test_without_the_extension_all_works_in_python(before, variables):
    code = WITHOUT.format(before=before).replace("kept_line", "6")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str("= None" in before)], done.stderr


def test_doctor_says_which_is_in_use(monkeypatch, capsys):
    doctor = importlib.import_module("closewait_guard.__main__").main
    assert doctor(["doctor"]) == 0
    assert "Recording:    in C\n" in capsys.readouterr().out
    monkeypatch.setenv("CLOSEWAIT_GUARD_SPEEDUPS", "0")
    assert doctor(["doctor"]) == 0
    assert "in Python, with the same result but slower: the setting speedups" in (
        capsys.readouterr().out
    )


WITHOUT_MEMORY = """
import _asyncio, _testcapi, socket
from closewait_guard._capture import Recording
from closewait_guard._capture.recorder import make_recorder

class Program:
    def __init__(self, on_create, number):
        # The caller's frame is that of what calls `__init__`.
        _testcapi.set_nomemory(number, number + 1)
        try:
            on_create(sock, None)
        finally:
            _testcapi.remove_mem_hooks()

def record_from(calls, on_create, number):
    # Each call is a frame without an object, which whoever walks the stack has to make.
    return record_from(calls - 1, on_create, number) if calls else Program(on_create, number)

with socket.socket() as sock:
    for depth in (20, 70):
        on_create = make_recorder({}, {}, None, Recording(depth)).on_create
        failed = 0
        for number in range(300):
            try:
                record_from(80, on_create, number)
            except MemoryError:
                failed += 1
            except ValueError as error:
                # For the innermost frame of all, CPython gives no reason.
                assert "not deep enough" in str(error)
        print(failed > depth)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("_testcapi") is None, reason="this Python has no _testcapi"
)
def test_an_allocation_that_fails_is_raised_as_that():
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr
