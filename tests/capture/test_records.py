"""A record says how a socket was opened, and keeps nothing alive."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import pickle
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard._capture import creation
from closewait_guard._capture.creation import Creation
from closewait_guard._capture.stack import NO_STACK, capture, intern
from closewait_guard._inspect.records import kind_of, resolve
from closewait_guard.testing import connected_pair


def record_of(guard, sock):
    return next(seen.record for seen in everything(guard) if seen.fd == sock.fileno())


def everything(guard):
    report = guard.scan(full=True)
    return [*report.observations, *(leak.observation for leak in report.findings)]


def test_a_record_reports_who_when_and_where(guard):
    before = time.time()
    with socket.socket() as s:
        record = record_of(guard, s)
    assert before <= record.opened_at <= time.time()
    assert record.thread == "MainThread"
    assert record.task is None
    assert record.labels == ()
    assert record.context == {}
    assert record.origin is cwg.Origin.CREATED
    assert record.parent is None
    assert record.site.function == "test_a_record_reports_who_when_and_where"
    assert record.site.filename == __file__
    assert record.site.module == __name__
    assert record.site.source == "with socket.socket() as s:"
    assert record.site is record.stack[0]


def test_a_creation_tuple_has_the_order_of_a_creation():
    names = ("SOCK", "OBJECT_ID", "SERIAL", "ORIGIN", "PARENT", "STACK")
    places = [Creation._fields.index(name.lower()) for name in names]
    assert places == [getattr(creation, name) for name in names]
    with socket.socket() as s:
        stranger = Creation._make(creation.unknown_creation(s, -1, 7))
        assert (stranger.sock(), stranger.object_id, stranger.serial, stranger.pid) == (
            s,
            id(s),
            -1,
            7,
        )
    assert stranger.opened_at is stranger.task is stranger.parent is None
    assert (stranger.thread, stranger.labels, stranger.context) == ("", (), {})
    assert (stranger.origin, stranger.stack) == (cwg.Origin.ADOPTED, NO_STACK)


def test_the_name_of_the_thread_is_kept(guard):
    made = []
    thread = threading.Thread(target=lambda: made.append(socket.socket()), name="worker-7")
    thread.start()
    thread.join()
    with made[0] as s:
        assert record_of(guard, s).thread == "worker-7"


def test_a_thread_that_python_did_not_start_is_not_registered_by_asking(guard):
    import _thread

    made, done = [], threading.Event()

    def work():
        made.append(socket.socket())
        done.set()

    before = threading.active_count()
    _thread.start_new_thread(work, ())
    assert done.wait(10)
    assert threading.active_count() == before
    with made[0] as s:
        assert record_of(guard, s).thread.startswith("thread-")


def test_the_name_of_the_task_is_kept(guard):
    async def work():
        with socket.socket() as s:
            return record_of(guard, s)

    async def main():
        return await asyncio.create_task(work(), name="refresh-7")

    assert asyncio.run(main()).task == "refresh-7"


def test_labels_nest_follow_tasks_and_end(guard):
    @cwg.label("decorated")
    def make():
        return socket.socket()

    @cwg.label("async")
    async def make_async():
        return await asyncio.to_thread(socket.socket)

    with cwg.label("outer"), cwg.label("inner", "more"), make() as s:
        assert record_of(guard, s).labels == ("outer", "inner", "more", "decorated")
    with asyncio.run(make_async()) as s:
        assert record_of(guard, s).labels == ("async",)
    with socket.socket() as s:
        assert record_of(guard, s).labels == ()


def test_one_label_serves_many_tasks_at_once(guard):
    shared = cwg.label("shared")

    async def work(number):
        with cwg.label(f"task-{number}"), shared:
            await asyncio.sleep(0.01 * (number % 3))
            with socket.socket() as s:
                return record_of(guard, s).labels

    async def main():
        return await asyncio.gather(*(work(number) for number in range(9)))

    assert asyncio.run(main()) == [(f"task-{number}", "shared") for number in range(9)]
    with cwg.label(), socket.socket() as s:
        assert record_of(guard, s).labels == ()


def test_a_generator_cannot_be_decorated():
    with pytest.raises(TypeError, match="cannot decorate the generator"):

        @cwg.label("x")
        def generate():
            yield 1


def test_context_is_kept_plain():
    class Request:
        def __str__(self):
            return "request 7"

    request = Request()
    dead = weakref.ref(request)
    settings = cwg.Settings(context=lambda: {"request": request, "attempt": 2, "urgent": True})
    with cwg.Guard(settings) as guard, socket.socket() as s:
        record = record_of(guard, s)
        assert record.context == {"request": "request 7", "attempt": 2, "urgent": True}
        del request
        settings = None
        guard._settings = guard._registry.context = None
        gc.collect()
        assert dead() is None
        assert record.context["attempt"] == 2


def test_structlogs_bound_context_is_ready_made():
    structlog.contextvars.bind_contextvars(request_id="abc")
    try:
        with cwg.Guard(cwg.Settings(context="structlog")) as guard, socket.socket() as s:
            assert record_of(guard, s).context == {"request_id": "abc"}
    finally:
        structlog.contextvars.clear_contextvars()


def test_a_context_callable_that_fails_loses_no_creation_and_is_reported():
    def broken():
        raise RuntimeError("no request")

    with cwg.Guard(cwg.Settings(context=broken)) as guard, socket.socket() as s:
        assert record_of(guard, s).context == {}
        report = guard.scan()
    assert "the context callable failed: RuntimeError: no request" in report.coverage.notes
    assert report.coverage.failures == 0


def test_an_accepted_socket_knows_its_listener(guard):
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = record_of(guard, server)
        with socket.create_connection(server.getsockname()):
            accepted, _ = server.accept()
            with accepted:
                record = record_of(guard, accepted)
    assert record.origin is cwg.Origin.ACCEPTED
    assert record.parent == listener
    assert record.site.source == "accepted, _ = server.accept()"


def test_threads_that_wait_for_connections_at_once_each_know_their_listener(guard):
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    opened = {}

    def accept(listener):
        with listener.accept()[0] as conn:
            opened[listener] = record_of(guard, conn).parent

    threads = [threading.Thread(target=accept, args=(each,)) for each in listeners]
    for thread in threads:
        thread.start()
    for listener in reversed(listeners):
        socket.create_connection(listener.getsockname()).close()
    for thread in threads:
        thread.join()
    assert opened == {listener: record_of(guard, listener) for listener in listeners}
    for listener in listeners:
        listener.close()


def test_a_handler_that_accepts_in_the_middle_of_an_accept_changes_no_record(guard):
    with (
        socket.create_server(("127.0.0.1", 0)) as outer,
        socket.create_server(("127.0.0.1", 0)) as inner,
        socket.create_connection(inner.getsockname()),
    ):
        taken, clients = [], []

        def handle(*_):
            taken.append(inner.accept()[0])
            clients.append(socket.create_connection(outer.getsockname()))

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            taken.append(outer.accept()[0])
        finally:
            signal.signal(signal.SIGALRM, before)
        parents = [record_of(guard, sock).parent for sock in taken]
        assert parents == [record_of(guard, inner), record_of(guard, outer)]
        for sock in taken + clients:
            sock.close()


def test_an_accepted_socket_without_user_frames_is_blamed_on_its_listeners_line(guard):
    import socketserver

    handled = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            records.append(record_of(guard, self.request))
            handled.set()

    records = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with socket.create_connection(server.server_address):
            assert handled.wait(10)
        server.shutdown()
        thread.join()
    [record] = records
    assert record.origin is cwg.Origin.ACCEPTED
    assert all(frame.kind is cwg.FrameKind.STDLIB for frame in record.stack)
    assert "ThreadingTCPServer" in record.site.source


def test_a_subclass_with_a_constructor_of_its_own_keeps_the_lineage(guard):
    class Mine(socket.socket):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    with Mine() as s, s.dup() as copy:
        record = record_of(guard, copy)
        assert record.origin is cwg.Origin.DUPLICATED
        assert record.parent == record_of(guard, s)


def test_dup_and_fromfd_keep_the_lineage(guard):
    with socket.socket() as s:
        with s.dup() as copy, socket.fromfd(s.fileno(), s.family, s.type) as other:
            for duplicate in (copy, other):
                record = record_of(guard, duplicate)
                assert record.origin is cwg.Origin.DUPLICATED
                assert record.parent == record_of(guard, s)


def test_a_socketpair_is_created(guard):
    a, b = socket.socketpair()
    with a, b:
        assert record_of(guard, a).origin is cwg.Origin.CREATED
        assert record_of(guard, b).site.function == "test_a_socketpair_is_created"


def test_tls_knows_the_plain_socket(guard):
    plain = socket.socket()
    opened = record_of(guard, plain)
    with ssl.create_default_context().wrap_socket(plain, server_hostname="x") as secure:
        [seen] = [seen for seen in everything(guard) if seen.fd == secure.fileno()]
    assert seen.tls
    assert seen.record.origin is cwg.Origin.WRAPPED
    assert seen.record.parent == opened
    assert seen.record.opener == opened
    assert seen.record.site.source == "plain = socket.socket()"


def test_a_detached_descriptor_keeps_its_creation_until_it_is_closed(guard):
    import os

    s = socket.socket()
    opened = record_of(guard, s)
    fd = s.detach()
    [seen] = everything(guard)
    assert seen.fd == fd
    assert seen.record.origin is cwg.Origin.DETACHED
    assert seen.record.parent == opened
    os.close(fd)
    assert everything(guard) == []


def test_a_detached_descriptor_taken_over_keeps_the_lineage(guard):
    s = socket.socket()
    opened = record_of(guard, s)
    with socket.socket(fileno=s.detach()) as again:
        record = record_of(guard, again)
        assert record.origin is cwg.Origin.DETACHED
        assert record.parent == opened


def test_the_number_of_a_detached_descriptor_reused_starts_a_new_record(guard):
    import os

    fd = socket.socket().detach()
    os.close(fd)
    with socket.socket() as s:
        assert s.fileno() == fd
        assert record_of(guard, s).origin is cwg.Origin.CREATED
    raw = os.dup(0)
    os.close(raw)


def test_a_phantom_object_on_anothers_descriptor_leaves_no_trace(guard):
    with connected_pair() as (ours, _):
        before = record_of(guard, ours)
        phantom = socket.socket(fileno=ours.fileno())
        phantom.getsockname()
        phantom.detach()
        assert record_of(guard, ours) == before
        assert guard.scan().open_sockets == 2


def test_a_descriptor_of_unknown_creation_is_adopted_with_the_stack_of_its_taking(guard):
    import _socket

    raw = _socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with socket.socket(fileno=raw.detach()) as s:
        record = record_of(guard, s)
    assert record.origin is cwg.Origin.ADOPTED
    assert record.parent is None
    assert record.site.function.startswith("test_a_descriptor_of_unknown_creation")


def test_a_chain_of_duplicates_does_not_grow_without_bound(guard):
    sock = socket.socket()
    root = record_of(guard, sock)
    for _ in range(200):
        copy = sock.dup()
        sock.close()
        sock = copy
    with sock:
        record, length = record_of(guard, sock), 0
        while record.parent is not None:
            record, length = record.parent, length + 1
    assert length <= 20
    assert record == root


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_stack_is_as_deep_as_asked(depth):
    with cwg.Guard(cwg.Settings(stack_depth=depth)) as guard, socket.socket() as s:
        record = record_of(guard, s)
    assert len(record.stack) == depth
    assert (record.site is None) == (depth == 0)


def test_depth_0_is_said_in_the_report():
    with cwg.Guard(cwg.Settings(stack_depth=0, grace=0)) as guard, socket.socket():
        text = cwg.render_text(guard.scan())
    assert "at an unknown place: no stack is recorded with stack_depth=0" in " ".join(text.split())


def test_a_shallow_program_has_its_whole_stack(guard):
    with socket.socket() as s:
        names = [frame.function for frame in record_of(guard, s).stack]
    assert names[0] == "test_a_shallow_program_has_its_whole_stack"
    assert 10 < len(names) <= cwg.Settings().stack_depth


def test_frames_are_distinguished_by_where_their_file_lies():
    import json

    import pytest as installed

    assert kind_of(json.__file__) is cwg.FrameKind.STDLIB
    assert kind_of("<frozen importlib._bootstrap>") is cwg.FrameKind.STDLIB
    assert kind_of(installed.__file__) is cwg.FrameKind.LIBRARY
    assert kind_of(__file__) is cwg.FrameKind.USER
    assert kind_of("C:\\app\\venv\\Lib\\site-packages\\x.py") is cwg.FrameKind.LIBRARY


def test_the_site_falls_back_to_the_innermost_library_frame():
    def frame(kind, name):
        return cwg.Frame(f"{name}.py", 1, name, name, kind)

    def record(*frames, parent=None, origin=cwg.Origin.CREATED):
        return cwg.SocketRecord(1, 1, 0.0, "t", None, (), {}, origin, parent, frames)

    stdlib = frame(cwg.FrameKind.STDLIB, "socket")
    library = frame(cwg.FrameKind.LIBRARY, "urllib3")
    outer = frame(cwg.FrameKind.LIBRARY, "requests")
    user = frame(cwg.FrameKind.USER, "app")
    assert record(stdlib, library, outer).site is library
    assert record(stdlib, library, outer, user).site is user
    assert record(stdlib).site is None
    listener = record(stdlib, user)
    loop = frame(cwg.FrameKind.USER, "run_the_loop")
    accepted = record(stdlib, library, loop, parent=listener, origin=cwg.Origin.ACCEPTED)
    assert accepted.site is user
    socket_code = cwg.Frame("socket.py", 1, "accept", "socket", cwg.FrameKind.STDLIB)
    by_hand = record(socket_code, loop, parent=listener, origin=cwg.Origin.ACCEPTED)
    assert by_hand.site is loop
    unknown = record(stdlib, library, loop, parent=record(), origin=cwg.Origin.ACCEPTED)
    assert unknown.site is loop


def test_equal_stacks_share_their_memory_once_interned():
    def here():
        return [capture(sys._getframe(), 5) for _ in range(2)]

    first, second = here()
    assert len(first) == 10
    intern(first)
    intern(second)
    assert first[0] is second[0]
    assert resolve(first) is resolve(second)
    intern(NO_STACK)
    assert resolve(NO_STACK) == ()


def test_the_stacks_of_sockets_that_stay_open_are_interned(guard):
    socks = [socket.socket() for _ in range(600)]
    stacks = [creation[-1] for creation in guard._registry._creations.values()]
    assert sum(len(stack) == 1 for stack in stacks) >= 256
    for s in socks:
        s.close()


def test_a_record_keeps_nothing_alive_and_can_be_pickled(guard):
    class Thing:
        pass

    def make():
        thing = Thing()
        s = socket.socket()
        return s, weakref.ref(thing)

    s, thing = make()
    dead, record = weakref.ref(s), record_of(guard, s)
    assert thing() is None
    s.close()
    del s
    assert dead() is None
    assert pickle.loads(pickle.dumps(record)) == record


def test_context_variables_are_not_copied(guard):
    variable = contextvars.ContextVar("variable")

    class Thing:
        pass

    def make():
        thing = Thing()
        variable.set(thing)
        return socket.socket(), weakref.ref(thing)

    s, thing = contextvars.Context().run(make)
    with s:
        guard.scan()
        assert thing() is None


def test_each_creation_has_a_serial_above_those_before(guard):
    with socket.socket() as a, socket.socket() as b:
        mark = guard.mark()
        with socket.socket() as c:
            serials = [record_of(guard, s).serial for s in (a, b, c)]
    assert serials[0] < serials[1] < mark < serials[2]
    assert guard.scan().coverage.opened == 3


def test_a_script_without_any_package_is_its_own_site(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import socket, closewait_guard as cwg\n"
        "cwg.install(grace=0)\n"
        "a, b = socket.socketpair(); b.close()\n"
        "site = cwg.scan().leaks[0].observation.record.site\n"
        "print(site.filename, site.lineno, site.function, site.module)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == [str(script), "3", "<module>", "__main__"]


def test_files_that_read_alike_are_distinguished(guard):
    """Code objects compare equal whatever file they are from."""
    source = "import socket\n\n\ndef make():\n    return socket.socket()\n"
    made = []
    for filename in ("/one/pool.py", "/two/pool.py"):
        scope = {}
        exec(compile(source, filename, "exec"), scope)
        made.append(scope["make"]())
    leaks = guard.check(0).findings
    assert [leak.observation.record.site.filename for leak in leaks] == [
        "/one/pool.py",
        "/two/pool.py",
    ]
    for sock in made:
        sock.close()
