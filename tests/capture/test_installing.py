"""Installing changes nothing that a program can tell; uninstalling leaves the class as found."""

from __future__ import annotations

import inspect
import pickle
import socket
import ssl
import sys
import threading
from socket import socket as imported_by_name

import pytest

import closewait_guard as cwg
from closewait_guard._capture import patch
from closewait_guard.testing import connected_pair
from conftest import assert_pristine, run_apart


def test_install_is_idempotent_and_returns_the_one_guard():
    guard = cwg.install()
    try:
        assert cwg.install() is guard
        assert guard.installed
    finally:
        cwg.uninstall()
    assert_pristine()
    cwg.uninstall()


def test_a_second_install_with_other_settings_is_refused_in_one_sentence():
    cwg.install(grace=2)
    try:
        assert cwg.install(grace=2) is cwg.install()
        with pytest.raises(cwg.ConfigurationError, match="already installed"):
            cwg.install(grace=3)
        with pytest.raises(cwg.ConfigurationError, match="already installed"):
            cwg.install(reporters=[print])
    finally:
        cwg.uninstall()


def test_guards_nest_in_any_order():
    first, second = cwg.Guard().install(), cwg.Guard().install()
    socket.socket().close()
    first.uninstall()
    assert patch.is_patched()
    socket.socket().close()
    second.uninstall()
    assert_pristine()
    assert first.scan().coverage.opened == 1
    assert second.scan().coverage.opened == 2


def test_a_guard_can_be_installed_again():
    guard = cwg.Guard()
    with guard:
        pass
    with guard:
        socket.socket().close()
    assert guard.scan().coverage.opened == 1


def test_a_name_imported_before_is_seen():
    with cwg.Guard() as guard:
        imported_by_name().close()
        assert guard.scan().coverage.opened == 1


def test_sockets_older_than_the_guard_are_adopted():
    with socket.socket() as old, cwg.Guard() as guard:
        report = guard.scan(full=True)
        record = next(seen.record for seen in report.observations if seen.fd == old.fileno())
    assert record.origin is cwg.Origin.ADOPTED
    assert record.stack == ()
    assert record.opened_at is None
    assert report.coverage.adopted >= 1
    assert report.coverage.opened == 0


def test_the_class_looks_the_same_to_inspection():
    def look():
        return (
            inspect.signature(socket.socket),
            inspect.signature(socket.socket.detach),
            socket.socket.__init__.__qualname__,
            socket.socket.__init__.__doc__,
            inspect.unwrap(socket.socket.__del__),
            sorted(dir(socket.socket)),
            socket.socket.__subclasses__(),
            repr(socket.socket),
        )

    before = look()
    with cwg.Guard():
        assert look() == before


def test_errors_are_the_programs_own():
    with cwg.Guard() as guard:
        with pytest.raises(TypeError, match="takes from 1 to 5 positional arguments"):
            socket.socket(1, 2, 3, 4, 5)
        with pytest.raises(OSError, match="Bad file descriptor"):
            socket.socket(fileno=987654)
        with pytest.raises(TypeError, match="cannot pickle 'socket' object"), socket.socket() as s:
            pickle.dumps(s)
        assert guard.scan().coverage.failures == 0


def test_every_way_to_make_a_socket_works_as_before(guard):
    class Unhashable(socket.socket):
        def __eq__(self, other):
            raise AssertionError("the guard compares no sockets")

    with Unhashable() as s:
        assert guard.scan(full=True).observations[0].fd == s.fileno()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            accepted, address = server.accept()
            assert address == client.getsockname()
            with accepted, accepted.dup() as copy:
                copy.sendall(b"x")
                assert client.recv(1) == b"x"
    a, b = socket.socketpair()
    with a, b, socket.fromfd(a.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as c:
        c.sendall(b"y")
        assert b.recv(1) == b"y"
    with socket.socket(fileno=socket.socket(socket.AF_UNIX).detach()) as d:
        assert d.family == socket.AF_UNIX
    context = ssl.create_default_context()
    with context.wrap_socket(socket.socket(), server_hostname="localhost") as secure:
        assert isinstance(secure, ssl.SSLSocket)
    assert guard.scan().coverage.opened == 12
    assert guard.scan().leaks == ()


def test_timeouts_blocking_and_data_stay_untouched(probed_guard):
    with connected_pair() as (ours, theirs):
        ours.settimeout(3)
        theirs.sendall(b"data")
        for _ in range(3):
            probed_guard.scan(full=True)
        assert ours.gettimeout() == 3
        assert theirs.getblocking()
        assert ours.recv(10) == b"data"


def test_a_default_timeout_set_later_changes_no_descriptor(guard):
    a, b = socket.socketpair()
    fd = a.detach()
    b.close()
    socket.setdefaulttimeout(5)
    try:
        guard.scan()
    finally:
        socket.setdefaulttimeout(None)
    with socket.socket(fileno=fd) as again:
        assert again.getblocking()


def test_installing_from_many_threads_at_once_patches_once():
    guards = [cwg.Guard() for _ in range(8)]
    barrier = threading.Barrier(8)

    def work(guard):
        barrier.wait(10)
        for _ in range(20):
            guard.install()
            guard.uninstall()

    threads = [threading.Thread(target=work, args=(guard,)) for guard in guards]
    for thread in threads:
        thread.start()
    # Where tests before have imported many libraries, each time takes longer.
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


def test_importing_costs_neither_wrapt_nor_structlog_nor_a_patch():
    code = (
        "import sys, socket; before = dict(vars(socket.socket)); import closewait_guard;"
        "assert dict(vars(socket.socket)) == before;"
        "assert not {'wrapt', 'structlog', 'pytest', 'ssl', 'asyncio'} & set(sys.modules);"
        "closewait_guard.install(); assert 'structlog' not in sys.modules"
    )
    run_apart(code)


def test_neither_installing_nor_looking_brings_asyncio_or_ssl_into_a_program():
    code = (
        "import sys, socket, closewait_guard; closewait_guard.install(grace=0)\n"
        "one, two = socket.socketpair(); two.close()\n"
        "assert closewait_guard.render_text(closewait_guard.report()).count('leaked') > 0\n"
        "assert not {'wrapt', 'structlog', 'ssl', 'asyncio'} & set(sys.modules), sys.modules"
    )
    run_apart(code)


IMPORTED_LATE = """
import socket, sys
import closewait_guard as cwg
cwg.install(grace=0)
assert not {"ssl", "asyncio"} & set(sys.modules)
import asyncio, ssl
server = socket.create_server(("127.0.0.1", 0))
plain = socket.create_connection(server.getsockname())
tls = ssl.create_default_context().wrap_socket(
    plain, server_hostname="localhost", do_handshake_on_connect=False
)
server.accept()[0].close()
async def connect():
    return socket.create_connection(server.getsockname())
in_task = asyncio.run(connect())
server.accept()[0].close()
seen = {leak.observation.fd: leak.observation for leak in cwg.scan().findings}
wrapped, made_in_task = seen[tls.fileno()], seen[in_task.fileno()]
assert (wrapped.record.origin, wrapped.record.parent.origin) == ("wrapped", "created"), wrapped
assert wrapped.tls
assert made_in_task.record.task.startswith("Task-"), made_in_task
"""


def test_tls_and_tasks_are_seen_though_they_come_after_the_guard():
    run_apart(IMPORTED_LATE)


def test_every_public_name_is_there():
    for name in cwg.__all__:
        assert getattr(cwg, name) is not None
    assert set(cwg.__all__) <= set(dir(cwg))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        cwg.nonsense  # noqa: B018


def test_several_may_wait_for_the_import_of_one_module(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    called, found = [], list(sys.meta_path)
    for number in range(3):
        patch.CallOnImport(lambda _, number=number: called.append(number), ["waited_for"]).install()
    import waited_for

    assert sorted(called) == [0, 1, 2]
    assert waited_for.x == 1
    assert "exec_module" not in vars(waited_for.__spec__.loader)
    assert sys.meta_path == found
    del sys.modules["waited_for"]
