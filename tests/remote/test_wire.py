"""A message comes through whole, in time, from the right process, or one sentence says why not."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard._remote import Listener, MessageSocket, Peer, RemoteError
from closewait_guard._remote.wire import MAX_BYTES


@pytest.fixture
def listener(tmp_path):
    with Listener(str(tmp_path / "control")) as listener:
        yield listener


@pytest.fixture
def open_folder():
    """One that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="wire-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def ends(listener):
    """A connection of ours, and the accepted one."""
    with MessageSocket.to(listener.path, 1) as ours, listener.accept(1) as accepted:
        yield ours, accepted


@pytest.fixture
def raw(listener):
    """A plain socket that sends what it likes, and the connection that reads it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(listener.path)
        with listener.accept(1) as accepted:
            yield sock, accepted


def test_a_message_comes_through_both_ways(ends):
    ours, accepted = ends
    ours.send({"request": "réport\n"}, 1)
    assert accepted.receive(1) == {"request": "réport\n"}
    accepted.send({"report": [1, None]}, 1)
    assert ours.receive(1) == {"report": [1, None]}


def test_one_of_many_megabytes_comes_through(ends):
    ours, accepted = ends
    message = {"text": "x" * 8_000_000}
    thread = threading.Thread(target=accepted.send, args=(message, 10))
    thread.start()
    assert ours.receive(10) == message
    thread.join()


def test_both_ends_see_the_other_process(ends):
    for end in ends:
        assert end.peer == end.require_peer(pid=os.getpid()) == Peer(os.getpid(), os.geteuid())


def test_another_user_or_process_than_the_expected_one_is_refused(ends):
    with pytest.raises(RemoteError, match=f"process {os.getpid()} belongs to user .* not the exp"):
        ends[0].require_peer(users={4242})
    with pytest.raises(RemoteError, match=f"process {os.getpid()} is connected, instead of proc"):
        ends[0].require_peer(pid=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_another_user_is_refused(open_folder):
    path = open_folder / "control"
    with Listener(str(path)) as listener:
        path.chmod(0o777)
        code = f"""if True:
            import os, socket
            os.setgid(54321); os.setuid(54321)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect({str(path)!r})
            print(sock.recv(1))
        """
        with subprocess.Popen([sys.executable, "-c", code]) as other:
            with listener.accept(10) as accepted, pytest.raises(RemoteError) as caught:
                accepted.require_peer()
            other.wait()
    assert str(caught.value) == (
        f"process {other.pid} belongs to user 54321, which is neither this user nor root"
    )


def test_an_end_that_says_nothing_is_waited_for_no_longer_than_allowed(ends):
    began = time.perf_counter()
    with pytest.raises(RemoteError, match=r"^the other process did not answer within 0.1 s$"):
        ends[0].receive(0.1)
    assert 0.1 <= time.perf_counter() - began < 5


def test_an_end_that_sends_bit_by_bit_gets_no_more_time_for_that(raw):
    sock, accepted = raw
    should_end = threading.Event()

    def drip():
        while not should_end.wait(0.02):
            sock.send(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(RemoteError, match=r"did not answer within 0.2 s"):
            accepted.receive(0.2)
    finally:
        should_end.set()
        thread.join()


def test_an_end_that_does_not_read_is_waited_for_no_longer_than_allowed(ends):
    with pytest.raises(RemoteError, match=r"did not answer within 0.1 s"):
        ends[0].send({"text": "x" * 8_000_000}, 0.1)


def test_a_message_that_is_too_large_is_refused_by_both_ends(raw, ends):
    sock, accepted = raw
    sock.send(b"x" * 5000)
    with pytest.raises(RemoteError, match="the other process sent more than 4,096 bytes"):
        accepted.receive(1, at_most=4096)
    with pytest.raises(RemoteError, match="the message is larger than 16,000,000 bytes"):
        ends[0].send("x" * MAX_BYTES, 1)


@pytest.mark.parametrize(
    "sent",
    [b"\n", b"{\n", b"[1]\n", b"null\n", b"\xff{}\n", b"[" * 50_000 + b"\n", b"1" * 9999 + b"\n"],
)
def test_what_is_no_message_is_refused(raw, sent):
    sock, accepted = raw
    sock.sendall(sent)
    with pytest.raises(RemoteError, match="sent something other than a JSON object"):
        accepted.receive(5)


def test_what_follows_a_message_is_left_alone(raw):
    sock, accepted = raw
    sock.sendall(b'{"a": 1}\nrest')
    assert accepted.receive(1) == {"a": 1}


@pytest.mark.parametrize("sent", [b"", b'{"report": '])
def test_an_end_that_closes_early_is_said_to_have(raw, sent):
    sock, accepted = raw
    sock.sendall(sent)
    sock.close()
    closed = "the other process closed the connection before its message was complete"
    with pytest.raises(RemoteError, match=closed):
        accepted.receive(1)
    with pytest.raises(RemoteError, match=closed):
        accepted.send({}, 1)


def test_an_end_that_the_program_has_closed_is_neither_used_nor_closed(ends, tmp_path):
    ours, _ = ends
    fd = ours.fileno()
    os.close(fd)
    with (tmp_path / "theirs").open("wb") as theirs:
        os.dup2(theirs.fileno(), fd)
        for use in (lambda: ours.send({}, 1), lambda: ours.receive(1), lambda: ours.peer):
            with pytest.raises(RemoteError, match="closed by the program itself"):
                use()
        ours.close()
        os.fstat(fd)
        os.close(fd)
    assert (tmp_path / "theirs").read_bytes() == b""


def test_nothing_listens_at_a_path(tmp_path):
    with pytest.raises(RemoteError, match=r"cannot connect to .*: No such file or directory"):
        MessageSocket.to(str(tmp_path / "none"), 1)
    with pytest.raises(RemoteError, match="AF_UNIX path too long"):
        Listener(f"/tmp/{'x' * 200}")


def test_a_listener_leaves_nothing_behind_and_removes_only_its_own_file(tmp_path):
    path = tmp_path / "control"
    with Listener(str(path)) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert listener.is_reachable
        with pytest.raises(RemoteError, match="Address already in use"):
            Listener(str(path))
    assert not path.exists()
    with Listener(str(path)) as listener:
        path.unlink()
        assert not listener.is_reachable
        path.write_bytes(b"")
    assert path.exists()


def test_a_default_timeout_of_the_program_does_not_count(listener):
    socket.setdefaulttimeout(0.01)
    try:
        with MessageSocket.to(listener.path, 1) as ours, listener.accept(1) as accepted:
            timer = threading.Timer(0.1, accepted.send, ({"a": 1}, 1))
            timer.start()
            assert ours.receive(5) == {"a": 1}
            timer.join()
    finally:
        socket.setdefaulttimeout(None)


def test_a_guard_takes_no_end_for_a_socket_of_the_program(listener):
    with cwg.Guard() as guard:
        before = guard.scan(full=True)
        with MessageSocket.to(listener.path, 1), listener.accept(1):
            report = guard.scan(full=True)
            native = [each for each in report.observations if each.record.origin == "native"]
        with closing(socket.socket(socket.AF_UNIX)) as theirs:
            theirs.connect(listener.path)
    assert native == []
    assert report.open_sockets == before.open_sockets
    assert report.findings == ()
