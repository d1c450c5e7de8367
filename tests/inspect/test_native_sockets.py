"""Sockets that no socket object is known for: found, probed, named by who holds them."""

from __future__ import annotations

import _socket
import array
import asyncio
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import reduction, resource_sharer

import psycopg
import psycopg2
import pycurl
import pytest
import sqlalchemy
import uvloop

import closewait_guard as cwg
from closewait_guard.testing import connected_pair
from findings import are_of_a_pool_for_each_call, findings_of, findings_of_async
from servers import postgres, web


@pytest.fixture(scope="module")
def postgres_port():
    with postgres() as port:
        yield port


def hang_up_postgres(port):
    with psycopg.connect(host="127.0.0.1", port=port, user="postgres") as admin:
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where pid <> pg_backend_pid() and backend_type = 'client backend'"
        )


def dsn(port):
    return f"host=127.0.0.1 port={port} user=postgres"


def receive_number():
    """A descriptor that comes as a number, and the other end of its connection."""
    sender, receiver = socket.socketpair()
    with sender, receiver, connected_pair() as (ours, theirs):
        fds = array.array("i", [ours.fileno()])
        sender.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        _, control, _, _ = receiver.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
        [number] = array.array("i", control[0][2])
        return number, theirs.dup()


def test_a_descriptor_that_came_as_a_number_is_found_with_state_and_peer(guard):
    fd, theirs = receive_number()
    report = guard.scan(full=True)
    [seen] = [seen for seen in report.observations if seen.fd == fd]
    assert seen.record.origin is cwg.Origin.NATIVE
    assert seen.state is cwg.State.ESTABLISHED
    assert report.coverage.native == 1
    text = " ".join(cwg.render_text(report).split())
    assert "Not covered: where 1 socket without a socket object was opened (by C" in text
    name = "{}:{}".format(*theirs.getsockname())
    theirs.close()
    [leak] = findings_of(guard, cwg.Verdict.LEAKED)
    assert (leak.observation.fd, leak.observation.peer) == (fd, name)
    assert leak.observation.state is cwg.State.CLOSE_WAIT
    assert leak.observation.record.opened_at is not None
    text = " ".join(cwg.render_text(guard.scan()).split())
    assert "opened by a C extension, or received as a file descriptor" in text
    os.close(fd)
    report = guard.scan(full=True)
    assert report.leaks == ()
    assert report.coverage.native == 0


def by_dup(sock):
    return socket.socket(fileno=os.dup(sock.fileno()))


def by_message(sock):
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [sock.fileno()])
        return socket.socket(fileno=socket.recv_fds(receiver, 1, 1)[1][0])


def by_handle(sock):
    sender, receiver = multiprocessing.Pipe()
    with sender, receiver:
        reduction.send_handle(sender, sock.fileno(), os.getpid())
        return socket.socket(fileno=reduction.recv_handle(receiver))


def by_pickle(sock):
    try:
        return pickle.loads(bytes(reduction.ForkingPickler.dumps(sock)))
    finally:
        resource_sharer.stop()


HANDED_OVER = pytest.mark.parametrize("hand_over", [by_dup, by_message, by_handle, by_pickle])


@HANDED_OVER
def test_what_was_handed_over_within_the_process_names_its_maker(guard, hand_over):
    with connected_pair() as (ours, theirs), hand_over(ours) as copy:
        theirs.close()
        fd = copy.fileno()
        leaks = findings_of(guard, cwg.Verdict.LEAKED, count=2)
        [leak] = [leak for leak in leaks if leak.observation.fd == fd]
        record = leak.observation.record
        assert record.origin is cwg.Origin.DUPLICATED
        assert hand_over.__name__ in [frame.function for frame in record.stack]
        assert record.parent == guard_record(guard, ours)
        place = os.path.relpath(record.parent.site.filename), record.parent.site.lineno
        text = " ".join(cwg.render_text(guard.scan()).split())
        assert "duplicated from the socket opened at {}:{}".format(*place) in text


@HANDED_OVER
def test_what_was_handed_over_by_a_socket_that_is_closed_says_who_took_it_over(guard, hand_over):
    with connected_pair() as (ours, theirs), hand_over(ours) as copy:
        ours.close()
        theirs.close()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        record = leak.observation.record
        assert leak.observation.fd == copy.fileno()
        assert record.origin is cwg.Origin.ADOPTED
        assert record.parent is None
        text = " ".join(cwg.render_text(guard.scan()).split())
        how = "received by multiprocessing" if hand_over is by_pickle else "came as a number"
        assert f"{how}: where it was opened is unknown" in text
        assert "opened elsewhere; taken over at " in text
        assert f":{record.site.lineno} in {hand_over.__name__}()" in text
        assert " opened at " not in text


def test_a_copy_that_is_a_mere_number_names_the_socket_it_was_made_of(guard):
    with connected_pair() as (ours, theirs):
        number = os.dup(ours.fileno())
        theirs.close()
        leaks = findings_of(guard, cwg.Verdict.LEAKED, count=2)
        [leak] = [leak for leak in leaks if leak.observation.fd == number]
        assert leak.observation.record.origin is cwg.Origin.NATIVE
        assert leak.observation.record.parent == guard_record(guard, ours)
        text = " ".join(cwg.render_text(guard.scan()).split())
        assert "a copy, as a mere number, of the socket opened at" in text
        os.close(number)


def guard_record(guard, sock):
    seen = (finding.observation for finding in guard.scan().findings)
    return next(each.record for each in seen if each.fd == sock.fileno())


def test_a_bare_c_socket_is_found(guard):
    with socket.create_server(("127.0.0.1", 0)) as server:
        sockets = {"bare": _socket.socket()}
        sockets["bare"].connect(server.getsockname())
        server.accept()[0].close()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.observation.record.origin is cwg.Origin.NATIVE
        # The collector does not know such an object before Python 3.12.
        assert [holder.rpartition(": ")[2] for holder in leak.holders] == ["sockets['bare']"] * (
            sys.version_info >= (3, 12)
        )
        sockets["bare"].close()
    assert guard.scan(full=True).coverage.native == 0


@pytest.mark.parametrize("library", [psycopg, psycopg2], ids=lambda library: library.__name__)
def test_a_connection_of_libpq_is_attributed_and_held(guard, postgres_port, library):
    before = library.connect
    guard.attribute(library.__name__)

    def connect():
        return library.connect(dsn(postgres_port))

    db = {"main": connect()}
    hang_up_postgres(postgres_port)
    [leak] = findings_of(guard, cwg.Verdict.LEAKED)
    record = leak.observation.record
    assert record.origin is cwg.Origin.NATIVE
    assert record.site.function.endswith("connect")
    assert record.opened_at == pytest.approx(time.time(), abs=30)
    assert leak.observation.peer == f"127.0.0.1:{postgres_port}"
    assert leak.holders[0].endswith("db['main']")
    assert "connection.close()" in leak.hint
    db.pop("main").close()
    assert guard.scan(full=True).coverage.native == 0
    guard.uninstall()
    assert library.connect == before


STARTED_WITH = """
import _socket
import closewait_guard as cwg
cwg.install()
fds = [_socket.socket().detach() for _ in range(2)]
report = cwg.scan(full=True)
print(report.coverage.native, report.coverage.earlier)
print(cwg.render_text(report))
"""


def test_sockets_that_the_program_was_started_with_are_not_said_to_be_of_c_extensions():
    inherited = socket.socketpair()
    with inherited[0], inherited[1]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", STARTED_WITH],
            pass_fds=[each.fileno() for each in inherited],
            capture_output=True,
            text=True,
            check=True,
        )
    counts, _, text = done.stdout.partition("\n")
    text = " ".join(text.split())
    native, earlier = map(int, counts.split())
    assert earlier >= 2
    assert native - earlier == 2
    assert (
        f"where {earlier} sockets without a socket object were opened before install() (inherited "
        "when the program started, or opened by C extensions)"
    ) in text
    assert (
        "; where 2 sockets without a socket object were opened (by C extensions, see attribute(),"
        in text
    )


def test_where_attributed_sockets_were_opened_is_covered(guard, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "receive_number", receive_number)
    guard.attribute(f"{__name__}:receive_number")
    fd, theirs = receive_number()
    with theirs:
        coverage = guard.scan(full=True).coverage
        assert (coverage.native, coverage.attributed) == (1, 1)
        assert not [note for note in coverage.notes if "socket object" in note]
    os.close(fd)


def test_asynchronous_psycopg_is_attributed_too(guard, postgres_port):
    guard.attribute("psycopg")

    async def connect():
        return await psycopg.AsyncConnection.connect(dsn(postgres_port))

    async def main():
        mine = await connect()
        other = socket.socket()
        await asyncio.to_thread(hang_up_postgres, postgres_port)
        [leak] = await findings_of_async(guard, cwg.Verdict.LEAKED)
        assert leak.observation.record.site.function.endswith("connect")
        assert "'mine' of" in leak.holders[0]
        await mine.close()
        other.close()

    asyncio.run(main())


def test_sqlalchemy_idle_is_stale_and_checked_out_is_leaked(guard, postgres_port):
    engine = sqlalchemy.create_engine(
        f"postgresql+psycopg://postgres@127.0.0.1:{postgres_port}/postgres", pool_size=3
    )
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("select 1"))
    hang_up_postgres(postgres_port)
    [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
    assert not stale.is_leak
    assert "SQLAlchemy QueuePool: idle in the pool (at most 13)" in stale.holders[-1]
    assert "pool_pre_ping" in stale.hint
    engine.dispose()
    taken = engine.connect()
    hang_up_postgres(postgres_port)
    [leak] = findings_of(guard, cwg.Verdict.LEAKED)
    assert leak.observation.checkout.max_size == 13
    assert "'taken' of" in leak.holders[0]
    assert "engine.connect()" in leak.hint
    taken.invalidate()
    taken.close()
    engine.dispose()


def test_an_engine_for_each_call_is_leaked(guard, postgres_port):
    address = f"postgresql+psycopg://postgres@127.0.0.1:{postgres_port}/postgres"
    engines = [sqlalchemy.create_engine(address, pool_size=1, max_overflow=0) for _ in range(25)]
    for engine in engines:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("select 1"))
    hang_up_postgres(postgres_port)
    leaks = findings_of(guard, cwg.Verdict.LEAKED, 25)
    are_of_a_pool_for_each_call(leaks, "engine.dispose()")
    for engine in engines:
        engine.dispose()


# Each opens connections in threads of its own, and must not be in a process that forks.
FOREIGN = {
    "grpc": """
import grpc
channel = grpc.insecure_channel(f"127.0.0.1:{port}")
coming = grpc.channel_ready_future(channel)
end = channel.close
""",
    "zmq": """
import zmq
context = zmq.Context()
link = context.socket(zmq.DEALER)
link.connect(f"tcp://127.0.0.1:{port}")
end = context.destroy
""",
}
FOREIGN_FRAME = """
import socket, time
import closewait_guard as cwg

def natives():
    seen = guard.scan(full=True).observations
    return [each for each in seen if each.record.origin is cwg.Origin.NATIVE]

def wait_for(wanted):
    deadline = time.monotonic() + 60
    while len(natives()) != wanted:
        assert time.monotonic() < deadline, natives()
        time.sleep(0.05)

with cwg.Guard() as guard, socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    {}
    with server.accept()[0]:
        wait_for(1)
        [seen] = natives()
        print(seen.state, seen.peer.rpartition(":")[2] == str(port), seen.record.site)
    end()
    wait_for(0)
"""


@pytest.mark.parametrize("library", FOREIGN)
def test_what_other_native_libraries_open_is_found_with_state_and_peer(library):
    script = FOREIGN_FRAME.format(textwrap.indent(FOREIGN[library], "    ").strip())
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "ESTABLISHED True None\n", done.stderr


def test_a_curl_handle_that_keeps_its_connection_is_attributed(guard):
    guard.attribute("pycurl")

    def make(url):
        curl = pycurl.Curl()
        curl.setopt(curl.URL, url)
        curl.setopt(curl.WRITEFUNCTION, lambda _: None)
        return curl

    with web() as server:
        handle = make(server.url)
        assert isinstance(handle, pycurl.Curl)
        handle.perform()
        server.hang_up()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.observation.record.site.function.endswith("make")
        assert "'handle' of" in leak.holders[0]
        assert "curl.close()" in leak.hint
        handle.close()


def test_uvloop_streams_are_attributed_and_held(guard):
    guard.attribute("uvloop")

    async def main(port):
        async def connect():
            return await asyncio.open_connection("127.0.0.1", port)

        reader, writer = await connect()
        writer.write(b"GET /partial HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.transport.pause_reading()
        [leak] = await findings_of_async(guard, cwg.Verdict.LEAKED)
        assert leak.observation.record.origin is cwg.Origin.NATIVE
        assert leak.observation.record.site.function.endswith("connect")
        assert any("'writer' of" in holder or "'reader' of" in holder for holder in leak.holders)
        assert "writer.wait_closed()" in leak.hint
        writer.close()
        await writer.wait_closed()

    with web() as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(server.port))
    assert_no_leaks(guard)


def assert_no_leaks(guard):
    assert guard.scan(full=True).leaks == (), cwg.render_text(guard.scan())


def test_what_uvloop_accepts_is_found_with_its_protocol(guard):
    async def main():
        writers = []

        async def handle(reader, writer):
            writer.transport.pause_reading()
            writers.append(writer)

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()):
            while not writers:
                await asyncio.sleep(0.01)
        [leak] = await findings_of_async(guard, cwg.Verdict.LEAKED)
        assert leak.observation.record.origin is cwg.Origin.NATIVE
        assert "'writers' of" in leak.holders[0] or "writers[0]" in leak.holders[0]
        writers[0].close()
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_pipe_end_of_multiprocessing_keeps_its_creation_and_names_the_connection(guard):
    def make():
        return multiprocessing.Pipe()

    mine, theirs = make()
    theirs.close()
    [leak] = findings_of(guard, cwg.Verdict.LEAKED)
    assert leak.observation.record.origin is cwg.Origin.DETACHED
    assert leak.observation.record.site.function.endswith("make")
    assert "'mine' of" in leak.holders[0]
    mine.close()


def test_two_threads_that_open_at_once_are_distinguished_by_their_results(guard, postgres_port):
    guard.attribute("psycopg")
    made = {}

    def first():
        made["first"] = psycopg.connect(dsn(postgres_port))

    def second():
        made["second"] = psycopg.connect(dsn(postgres_port))

    for _ in range(5):
        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        openers = {
            seen.fd: seen.record.site.function.rpartition(".")[2]
            for seen in guard.scan(full=True).observations
            if seen.record.origin is cwg.Origin.NATIVE and seen.record.site
        }
        for name, connection in made.items():
            assert openers[connection.fileno()] == name
            connection.close()


def test_any_callable_can_be_attributed_and_a_failure_passes_unchanged(guard):
    module = sys.modules[__name__]
    guard.attribute(f"{__name__}:receive_number", f"{__name__}:receive_number")
    fd, theirs = module.receive_number()
    [seen] = [seen for seen in guard.scan(full=True).observations if seen.fd == fd]
    assert seen.record.site.function.startswith("test_any_callable")
    os.close(fd)
    theirs.close()
    guard.attribute(f"{__name__}:failing")
    with pytest.raises(ZeroDivisionError):
        module.failing()


def failing():
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "name",
    [
        "nowhere:connect",
        "os:nothing",
        "os:sep",
        "psycopg2.extensions:connection.cursor",
        "json",
        "",
    ],
)
def test_what_cannot_be_attributed_is_refused_in_one_sentence(guard, name):
    with pytest.raises(cwg.ConfigurationError, match=f"attribute\\({name!r}\\): ") as caught:
        guard.attribute(name)
    assert "\n" not in str(caught.value)


def test_attribute_wants_an_installed_guard():
    with pytest.raises(cwg.ConfigurationError, match="install"):
        cwg.attribute("psycopg")


def test_no_leaks_refuses_native_sockets_of_a_client_and_attributed_ones_once(guard, postgres_port):
    for attributed in (False, True):
        if attributed:
            guard.attribute("psycopg")
        with pytest.raises(cwg.SocketLeakError) as failed:
            with guard.no_leaks(grace=0):
                connection = psycopg.connect(dsn(postgres_port))
        connection.close()
        [found] = failed.value.report.findings
        assert (found.observation.owner is None) is attributed
        assert "no_leaks_refuses_native" in str(failed.value)


def test_a_listing_is_not_made_again_while_it_takes_too_much_of_the_time(guard, monkeypatch):
    import closewait_guard._descriptors as listing

    calls = []

    def slow(_):
        calls.append(1)
        time.sleep(0.05)
        return {}

    monkeypatch.setattr(listing, "sockets_besides", slow)
    for _ in range(5):
        guard.scan(full=True)
    for _ in range(20):
        guard.scan()
    assert len(calls) == 5


def test_standard_streams_that_are_sockets_are_no_leaks():
    code = """
        import time
        import closewait_guard as cwg
        cwg.install(grace=0)
        time.sleep(0.2)
        assert cwg.scan(full=True).leaks == ()
        """
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdin=theirs, stderr=subprocess.PIPE
        )
        theirs.close()
        ours.shutdown(socket.SHUT_RDWR)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
