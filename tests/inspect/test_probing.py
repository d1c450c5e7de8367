"""What the kernel says becomes the right verdict, with each probe, and the look leaves no trace."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time

import pytest

import closewait_guard as cwg
from closewait_guard._capture.dropped import FinalSnapshot
from closewait_guard._inspect import probe
from closewait_guard._inspect.probe import endpoint_of, endpoint_of_snapshot, linux, portable
from closewait_guard._inspect.probe.base import select as untouched
from closewait_guard.testing import connected_pair, half_closed_pair

GRACE = 0.05
needs_dates = pytest.mark.skipif(
    not hasattr(socket, "TCP_KEEPIDLE") or os.name != "posix", reason="asks the kernel of Linux"
)


def wait():
    time.sleep(GRACE * 2.5)


def verdicts(report):
    return sorted(leak.verdict for leak in report.findings)


def only(report):
    [leak] = report.findings
    return leak


def scan_within_the_grace_time(guard, act):
    """A report from no later than the grace time after an act, however busy the machine is."""
    for _ in range(50):
        begun = time.monotonic()
        act()
        report = guard.scan()
        if time.monotonic() - begun < GRACE:
            return report
    raise AssertionError("the machine is too busy")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_peer_that_has_closed_makes_a_leak(probed_guard, host):
    with connected_pair(host) as (ours, theirs):
        address = ours.getpeername()
        theirs.close()
        select.select([ours], [], [], 5)
        wait()
        leak = only(probed_guard.scan())
    seen = leak.observation
    assert leak.verdict is cwg.Verdict.LEAKED
    assert leak.is_leak
    assert leak.replaced_by is None
    assert seen.state is cwg.State.CLOSE_WAIT
    assert seen.connection is cwg.Connection.PEER_CLOSED
    assert seen.family == ("AF_INET" if host == "127.0.0.1" else "AF_INET6")
    assert seen.type == "SOCK_STREAM"
    assert seen.peer == (f"{host}:{address[1]}" if host == "127.0.0.1" else f"[::1]:{address[1]}")
    assert seen.unread == 0
    assert not seen.tls
    assert not seen.close_called


@pytest.mark.parametrize("probe", ["linux", "portable"])
def test_nothing_is_a_leak_within_the_grace_time(probe):
    with cwg.Guard(cwg.Settings(grace=60, probe=probe)) as guard:
        with half_closed_pair(), socket.socket():
            report = guard.scan()
    assert report.leaks == ()
    assert set(verdicts(report)) <= {cwg.Verdict.CLOSING}


def test_the_kernel_dates_the_fin_even_before_the_guard():
    with half_closed_pair(b"12345") as (ours, _):
        time.sleep(0.3)
        with cwg.Guard(cwg.Settings(grace=0.1)) as guard:
            seen = only(guard.scan()).observation
    assert seen.record.origin is cwg.Origin.ADOPTED
    assert 0.25 <= seen.peer_closed_for <= 10
    assert seen.evidence is cwg.Evidence.TCP_INFO
    assert seen.unread == 5
    assert seen.last_received_for >= 0.25
    assert seen.inode


def test_unread_bytes_are_counted_and_not_consumed(guard):
    with half_closed_pair(b"unread") as (ours, _):
        wait()
        assert only(guard.scan()).observation.unread == 6
        assert ours.recv(100) == b"unread"
        assert ours.recv(100) == b""


@needs_dates
def test_of_a_leak_that_nothing_has_happened_to_only_tcp_info_is_asked_again(guard, monkeypatch):
    asked = []
    for name in ("_getsockopt", "unread", "unsent"):
        ask = getattr(linux, name)
        monkeypatch.setattr(
            linux, name, lambda *what, ask=ask, name=name: asked.append(name) or ask(*what)
        )
    with half_closed_pair(b"12") as (ours, _):
        wait()
        guard.scan()
        assert asked == ["_getsockopt", "unread", "_getsockopt"]
        asked.clear()
        assert only(guard.scan()).observation.unread == 2
        assert asked == ["_getsockopt", "unread"]
        ours.recv(2)
        guard.scan()
        asked.clear()
        assert only(guard.scan()).observation.unread == 0
        assert asked == ["_getsockopt"]


@needs_dates
def test_a_leak_that_is_reset_between_two_scans_is_dead(guard):
    with connected_pair() as (ours, theirs):
        theirs.close()
        wait()
        leak = only(guard.scan())
        assert leak.verdict is cwg.Verdict.LEAKED
        assert verdicts(guard.scan()) == ["leaked"]
        # The other end is gone: the kernel answers with a reset.
        ours.send(b"too late")
        wait()
        assert verdicts(guard.scan()) == ["closing"]
        wait()
        dead = only(guard.scan())
        assert dead.verdict is cwg.Verdict.DEAD
        assert dead.hint != leak.hint
        assert dead.observation.peer_closed_for is None


def test_two_scans_of_the_same_leak_differ_in_its_ages_only(guard):
    with half_closed_pair(b"12345"):
        wait()
        for _ in range(3):
            first = only(guard.scan())
        time.sleep(0.2)
        second = only(guard.scan())
    for age in ("peer_closed_for", "suspect_for", "last_sent_for", "last_received_for"):
        seconds = getattr(second.observation, age) - getattr(first.observation, age)
        assert 0.15 < seconds < 30
        object.__setattr__(second.observation, age, getattr(first.observation, age))
    assert second == first


def test_a_program_that_reads_on_after_the_fin_has_no_leak(guard):
    with half_closed_pair(b"x" * 250) as (ours, _):
        wait()
        guard.scan()
        for _ in range(4):
            assert scan_within_the_grace_time(guard, lambda: ours.recv(1)).leaks == ()
            time.sleep(GRACE / 2)
        wait()
        assert verdicts(guard.scan()) == ["leaked"]


def test_a_scan_that_had_to_wait_for_the_processor_takes_no_peer_for_still_sending(
    guard, monkeypatch
):
    look = linux.probe_socket

    def late(*args):
        time.sleep(0.1)
        return look(*args)

    with connected_pair() as (ours, theirs):
        ours.sendall(b"request")
        theirs.recv(100)
        theirs.close()
        wait()
        with monkeypatch.context() as busy:
            busy.setattr(linux, "probe_socket", late)
            guard.scan()
        assert verdicts(guard.scan()) == ["leaked"]


@pytest.mark.parametrize("timeout", [None, 0, 5])
def test_unix_streams_whose_peer_has_closed_are_leaks(probed_guard, timeout):
    a, b = socket.socketpair()
    with a:
        a.settimeout(timeout)
        b.close()
        wait()
        report = probed_guard.scan()
        leak = only(report)
        assert leak.verdict is cwg.Verdict.LEAKED
        assert leak.observation.state is cwg.State.UNIX
        assert leak.observation.peer_closed_for is None
        assert "peer closed, at an unknown time" in cwg.render_text(report)
        wait()
        assert only(probed_guard.scan()).observation.peer_closed_for >= GRACE


def test_datagram_raw_and_listening_sockets_are_never_leaks(probed_guard):
    kinds = [
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        socket.create_server(("127.0.0.1", 0)),
    ]
    refused = kinds[0]
    refused.connect(("127.0.0.1", 9))
    refused.send(b"x")
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    kinds += [a]
    b.close()
    waiting = socket.create_connection(kinds[3].getsockname())
    empty, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.send(b"")
    kinds += [empty, sender, waiting]
    wait()
    assert verdicts(probed_guard.scan()) == []
    seen = {seen.fd: seen for seen in probed_guard.scan(full=True).observations}
    assert len(seen) == len(kinds)
    assert seen[kinds[3].fileno()].state is cwg.State.LISTEN
    with pytest.raises(ConnectionRefusedError):
        refused.recv(1)
    for sock in kinds:
        sock.close()


def test_refused_and_never_connected_sockets_that_are_kept_are_dead(probed_guard):
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()
    never, refused = socket.socket(), socket.socket()
    with pytest.raises(ConnectionRefusedError):
        refused.connect(nobody)
    assert probed_guard.scan().findings == ()
    wait()
    report = probed_guard.scan()
    assert verdicts(report) == ["dead", "dead"]
    connections = {leak.observation.connection for leak in report.findings}
    assert connections <= {cwg.Connection.UNCONNECTED, cwg.Connection.NEVER_CONNECTED}
    assert {leak.observation.state for leak in report.findings} == {cwg.State.CLOSE}
    never.close()
    refused.close()


def _never_used(kind):
    return kind()


def _bound(kind):
    sock = kind()
    sock.bind(("", 0))
    return sock


def _no_more_listening(kind):
    sock = _bound(kind)
    sock.listen()
    sock.shutdown(socket.SHUT_RDWR)
    return sock


def _without_an_address(kind):
    """The connect fails before anything is sent."""
    sock = kind()
    with pytest.raises(socket.gaierror):
        sock.connect(("::1" if sock.family == socket.AF_INET else "127.0.0.1", 80))
    return sock


_IPPROTO_MPTCP = 262


def _tcp(family, protocol=0):
    def kind():
        try:
            return socket.socket(family, socket.SOCK_STREAM, protocol)
        except OSError as error:
            pytest.skip(f"not on this machine: {error}")

    return kind


_TCP_KINDS = {
    "ipv4": _tcp(socket.AF_INET),
    "ipv6": _tcp(socket.AF_INET6),
    "multipath": _tcp(socket.AF_INET, _IPPROTO_MPTCP),
}


def _text(report):
    return " ".join(cwg.render_text(report).split())


@pytest.mark.parametrize("kind", _TCP_KINDS.values(), ids=_TCP_KINDS)
@pytest.mark.parametrize("make", [_bound, _no_more_listening], ids=lambda each: each.__name__)
def test_a_socket_that_is_bound_and_may_listen_yet_is_no_finding(guard, make, kind):
    with make(kind):
        wait()
        assert guard.scan().findings == ()


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_the_portable_probe_takes_what_servers_bind_for_no_finding(address):
    with cwg.Guard(cwg.Settings(grace=0, probe="portable")) as guard, socket.socket() as sock:
        if not address:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, 0))
        assert guard.scan().findings == ()
        sock.listen()
        assert guard.scan().findings == ()


def test_a_unix_socket_that_is_bound_and_may_listen_yet_is_no_finding(probed_guard, tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        wait()
        assert probed_guard.scan().findings == ()


@pytest.mark.parametrize("kind", _TCP_KINDS.values(), ids=_TCP_KINDS)
@pytest.mark.parametrize(
    "make",
    [_never_used, _without_an_address],
    ids=lambda each: each.__name__,
)
def test_a_socket_that_never_connected_is_reported_so_in_text_and_data(guard, make, kind):
    with make(kind):
        assert guard.scan().leaks == ()
        wait()
        report = guard.scan()
    leak = only(report)
    assert leak.verdict is cwg.Verdict.DEAD
    assert leak.observation.connection is cwg.Connection.NEVER_CONNECTED
    assert leak.hint.endswith(": it was never connected")
    text = _text(report)
    assert " never connected " in text
    assert "refused" not in text
    assert "failed" not in text
    saved = cwg.to_dict(report)
    assert saved["findings"][0]["observation"]["connection"] == "never_connected"
    assert cwg.from_dict(saved) == report


@pytest.mark.parametrize("timeout", [None, 5, 0], ids=["blocking", "timeout", "non-blocking"])
@pytest.mark.parametrize("kind", _TCP_KINDS.values(), ids=_TCP_KINDS)
def test_a_connect_that_was_refused_is_reported_as_a_failure(guard, kind, timeout):
    host = "::1" if kind is _TCP_KINDS["ipv6"] else "127.0.0.1"
    with kind() as sock, kind() as taken:
        # Bound and not listening: nothing else can have the port meanwhile.
        taken.bind((host, 0))
        sock.settimeout(timeout)
        with pytest.raises((ConnectionRefusedError, BlockingIOError)):
            sock.connect(taken.getsockname())
        select.select([], [sock], [], 5)
        guard.scan()
        wait()
        report = guard.scan()
        [leak] = [leak for leak in report.findings if leak.observation.fd == sock.fileno()]
    assert leak.verdict is cwg.Verdict.DEAD
    assert leak.observation.connection is cwg.Connection.UNCONNECTED
    assert leak.hint.endswith(": the connection failed or ended, and is still open here")
    assert "the connection was refused or failed" in _text(report)


@pytest.mark.parametrize(
    ("probe", "family"),
    [("portable", "AF_INET"), ("portable", "AF_UNIX"), ("linux", "AF_UNIX")],
)
def test_without_tcp_info_no_more_is_reported_than_is_known(probe, family):
    guard = cwg.Guard(cwg.Settings(grace=GRACE, probe=probe))
    with guard, socket.socket(getattr(socket, family)):
        guard.scan()
        wait()
        report = guard.scan()
    leak = only(report)
    assert leak.observation.connection is cwg.Connection.UNCONNECTED
    assert leak.hint.endswith(": the connection failed, ended or was never made")
    assert "refused, or never connected" in _text(report)


def test_one_line_whose_sockets_were_refused_or_never_connected_is_reported_as_both(guard):
    never, refused, taken = [socket.socket() for _ in range(3)]
    with never, refused, taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            refused.connect(taken.getsockname())
        guard.scan()
        wait()
        text = _text(guard.scan())
    assert "never connected, or the connection was refused or failed" in text


def test_a_datagram_socket_without_a_peer_is_well(probed_guard):
    with socket.socket(type=socket.SOCK_DGRAM):
        probed_guard.scan()
        wait()
        assert probed_guard.scan().leaks == ()


def test_a_reset_connection_that_is_kept_is_dead_and_keeps_its_error(probed_guard):
    with connected_pair() as (ours, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        select.select([ours], [], [], 5)
        wait()
        leak = only(probed_guard.scan())
        assert leak.verdict is cwg.Verdict.DEAD
        assert leak.observation.connection is cwg.Connection.GONE
        for _ in range(3):
            probed_guard.scan()
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
        assert only(probed_guard.scan()).verdict is cwg.Verdict.DEAD


def test_a_connection_found_dead_after_being_found_well_has_its_grace_time(guard):
    with connected_pair() as (ours, theirs):
        wait()
        assert guard.scan().findings == ()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        select.select([ours], [], [], 5)
        leak = only(guard.scan())
        assert leak.verdict is cwg.Verdict.CLOSING
        assert "the connection is closing" in leak.hint
        wait()
        assert only(guard.scan()).verdict is cwg.Verdict.DEAD


def test_both_sides_shut_down_and_kept_is_dead(probed_guard):
    with connected_pair() as (ours, theirs):
        theirs.close()
        select.select([ours], [], [], 5)
        ours.shutdown(socket.SHUT_WR)
        wait()
        assert only(probed_guard.scan()).verdict is cwg.Verdict.DEAD


def test_our_own_shutdown_for_reading_is_no_leak(guard):
    with connected_pair() as (ours, _):
        ours.shutdown(socket.SHUT_RD)
        wait()
        assert guard.scan().findings == ()


def test_a_half_closed_connection_that_we_still_serve_is_explained(guard):
    with connected_pair() as (ours, theirs):
        theirs.shutdown(socket.SHUT_WR)
        select.select([ours], [], [], 5)
        for _ in range(6):
            time.sleep(GRACE)
            ours.sendall(b"more")
            assert guard.scan().leaks == ()
        leak = only(guard.scan())
    assert leak.verdict is cwg.Verdict.HALF_CLOSED
    assert leak.severity is cwg.Severity.INFO


def test_a_half_closed_connection_served_no_more_becomes_a_leak():
    with cwg.Guard(cwg.Settings(grace=GRACE, half_close_idle=0.4)) as guard:
        with connected_pair() as (ours, theirs):
            theirs.shutdown(socket.SHUT_WR)
            select.select([ours], [], [], 5)
            guard.scan()
            time.sleep(0.5)
            ours.sendall(b"last")
            assert only(guard.scan()).verdict is cwg.Verdict.HALF_CLOSED
            time.sleep(0.6)
            assert only(guard.scan()).verdict is cwg.Verdict.LEAKED


def test_data_that_the_peer_has_not_taken_yet_means_we_are_still_sending(guard):
    with connected_pair() as (ours, theirs):
        theirs.shutdown(socket.SHUT_WR)
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                ours.send(b"x" * 65536)
        wait()
        leak = only(guard.scan())
        assert leak.verdict is cwg.Verdict.HALF_CLOSED
        assert "this side is still sending" in leak.hint
        assert leak.observation.unsent > 0


def test_our_half_of_a_close_under_way_is_closing(guard):
    with connected_pair() as (ours, theirs):
        ours.shutdown(socket.SHUT_WR)
        select.select([theirs], [], [], 5)
        mine = next(seen for seen in guard.scan(full=True).observations if seen.fd == ours.fileno())
        assert mine.state in (cwg.State.FIN_WAIT1, cwg.State.FIN_WAIT2)


@pytest.mark.parametrize("collected", [False, True])
def test_a_socket_dropped_while_open_is_reported_with_its_creation(probed_guard, collected):
    import gc

    with connected_pair() as (ours, theirs):
        copy = ours.dup()
        peer = copy.getpeername()
        keeper = [copy]
        if collected:
            keeper.append(keeper)
        with pytest.warns(ResourceWarning, match="unclosed"):
            del copy, keeper
            gc.collect()
        leak = only(probed_guard.scan())
        assert leak.verdict is cwg.Verdict.DROPPED
        seen = leak.observation
        assert seen.peer == f"127.0.0.1:{peer[1]}"
        assert seen.record.site.source == "copy = ours.dup()"
        expected = cwg.Evidence.COLLECTED if collected else cwg.Evidence.FINALIZED
        assert seen.evidence is expected
        assert ("cycle" in leak.hint) == collected
        assert probed_guard.scan().coverage.dropped == 1


def unconnected():
    return socket.socket()


def listening():
    return socket.create_server(("127.0.0.1", 0))


def datagrams():
    return socket.socket(type=socket.SOCK_DGRAM)


def of_a_pair():
    kept, left = socket.socketpair()
    left.send(b"123")
    left.close()
    return kept


def with_data():
    with connected_pair() as (ours, theirs):
        theirs.send(b"1234")
        select.select([ours], [], [], 5)
        return ours.dup()


def left_by_its_peer():
    with half_closed_pair(b"12345") as (ours, _):
        return ours.dup()


@pytest.mark.parametrize("probe", [linux, portable])
@pytest.mark.parametrize(
    ("make", "unread"),
    [
        (unconnected, (None, 0)),
        (listening, (None, 0)),
        (datagrams, (None,)),
        (of_a_pair, (3,)),
        (with_data, (4,)),
        (left_by_its_peer, (5,)),
    ],
)
def test_what_is_read_of_a_dead_socket_is_what_a_look_would_have_shown(probe, make, unread):
    with make() as sock:
        view = probe.probe_socket(sock, sock.fileno(), 0)
        remains = FinalSnapshot(sock, sock.fileno())
        endpoint = endpoint_of(sock, sock.fileno())
    read = probe.probe_snapshot(remains)
    assert (read.state, read.evidence, read.connection) == view[:3]
    assert read.unread in unread
    assert endpoint_of_snapshot(remains) == endpoint


def test_the_count_of_the_dropped_outlives_their_records():
    with cwg.Guard(cwg.Settings(dropped_kept=3)) as guard, pytest.warns(ResourceWarning):
        for _ in range(10):
            socket.socket()
    report = guard.scan()
    assert len(report.findings) == 3
    assert report.coverage.dropped == 10
    assert report.coverage.forgotten == 7
    assert "7 of 10 dropped sockets" in cwg.render_text(report).replace("\n  ", " ")


def test_a_subclass_with_a_finalizer_of_its_own_is_seen_if_it_passes_on(guard):
    class Mine(socket.socket):
        def __del__(self):
            super().__del__()

    with pytest.warns(ResourceWarning):
        Mine()
    assert verdicts(guard.scan()) == ["dropped"]
    Mine().close()
    assert guard.scan().coverage.dropped == 1


def test_a_closed_socket_kept_open_by_a_file_object_lingers(probed_guard):
    with connected_pair() as (ours, _):
        file = ours.makefile("rb")
        ours.close()
        assert probed_guard.scan().leaks == ()
        wait()
        leak = only(probed_guard.scan())
        assert leak.verdict is cwg.Verdict.LINGERING
        assert "makefile()" in leak.hint
        assert leak.observation.close_called
        file.close()
        assert probed_guard.scan().leaks == ()


def test_a_closed_socket_whose_file_object_carries_data_is_in_use(guard):
    with connected_pair() as (ours, theirs):
        file = ours.makefile("rb")
        ours.close()

        def carry():
            theirs.sendall(b"line\n")
            assert file.readline() == b"line\n"
            time.sleep(GRACE / 2)

        for _ in range(6):
            assert scan_within_the_grace_time(guard, carry).leaks == ()
        file.close()


def test_a_closed_socket_that_a_thread_waits_to_read_from_is_in_use(probed_guard):
    with connected_pair() as (ours, theirs):
        file = ours.makefile("rb")
        ours.close()
        lines = []
        thread = threading.Thread(target=lambda: lines.append(file.readline()))
        thread.start()
        for _ in range(3):
            wait()
            assert probed_guard.scan().leaks == ()
        theirs.sendall(b"at last\n")
        thread.join(10)
        assert lines == [b"at last\n"]
        file.close()


def test_a_connect_under_way_is_no_leak(guard):
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        socks = [socket.socket() for _ in range(3)]
        for s in socks:
            s.setblocking(False)
            s.connect_ex(full.getsockname())
        wait()
        states = {seen.state for seen in guard.scan(full=True).observations}
        assert guard.scan().leaks == ()
        for s in socks:
            s.close()
    assert cwg.State.SYN_SENT in states


def test_healthy_sockets_are_described_only_when_asked(guard):
    with connected_pair():
        assert guard.scan().observations == ()
        assert guard.scan().open_sockets == 2
        states = [seen.state for seen in guard.scan(full=True).observations]
    assert states == [cwg.State.ESTABLISHED] * 2


def test_a_detached_descriptor_whose_peer_has_closed_is_found(guard):
    a, b = socket.socketpair()
    fd = a.detach()
    b.close()
    wait()
    leak = only(guard.scan())
    assert leak.verdict is cwg.Verdict.LEAKED
    assert leak.observation.record.origin is cwg.Origin.DETACHED
    assert "detach()" in leak.hint
    os.close(fd)
    assert guard.scan().findings == ()


def test_another_socket_on_the_number_of_a_descriptor_closed_elsewhere_is_no_leak(guard):
    victim = socket.socket()
    os.close(victim.fileno())
    a, b = socket.socketpair()
    assert victim.fileno() in (a.fileno(), b.fileno())
    wait()
    report = guard.scan(full=True)
    assert report.findings == ()
    assert all("socketpair" in seen.record.site.source for seen in report.observations)
    victim.detach()
    a.close()
    b.close()


def test_a_descriptor_closed_under_its_object_is_no_leak(guard):
    sock = socket.socket()
    os.close(sock.fileno())
    wait()
    assert guard.scan().leaks == ()
    sock.detach()
    assert guard.scan().coverage.failures == 0
    assert guard.scan().open_sockets == 0


def test_linux_and_portable_agree(request):
    """The portable probe knows less, but contradicts nothing."""
    guards = [
        cwg.Guard(cwg.Settings(grace=GRACE, probe=name)).install() for name in ("linux", "portable")
    ]
    try:
        with half_closed_pair(), connected_pair() as (ours, theirs), socket.socket():
            theirs.sendall(b"data")
            a, b = socket.socketpair()
            b.close()
            wait()
            first, second = (guard.scan() for guard in guards)
            a.close()
    finally:
        for guard in guards:
            guard.uninstall()
    assert verdicts(first) == verdicts(second) == ["dead", "leaked", "leaked"]


def test_the_portable_probe_does_not_know_of_a_fin_behind_unread_data(request):
    with cwg.Guard(cwg.Settings(grace=0, probe="portable")) as guard:
        with half_closed_pair(b"data") as (ours, _):
            assert guard.scan().findings == ()
            ours.recv(10)
            assert only(guard.scan()).verdict is cwg.Verdict.LEAKED


def test_select_serves_where_there_is_no_poll(monkeypatch):
    monkeypatch.delattr(untouched, "poll")
    poller = portable.poller()
    with half_closed_pair() as (ours, theirs), connected_pair() as (healthy, _):
        fds = {ours.fileno(), healthy.fileno(), 100_000}
        assert list(poller.suspects(fds)) == [ours.fileno()]


def test_the_probe_is_chosen_by_platform_and_by_name(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert probe.choose_probe("auto") is portable
    with pytest.raises(cwg.ConfigurationError, match="auto or portable on darwin"):
        probe.choose_probe("linux")


def test_scanning_without_install_finds_what_is_there():
    with half_closed_pair() as (ours, _):
        wait()
        found = {leak.observation.fd: leak for leak in cwg.scan().findings}
        assert found[ours.fileno()].observation.record.origin is cwg.Origin.ADOPTED
        text = " ".join(cwg.render_text(cwg.scan()).split())
    # Its sockets are older than the guard, which would say the same twice.
    assert "Not covered: where sockets were opened, because the guard is not installed." in text


def answer_keepalives(sock, after=1):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, after)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)


def wait_for_an_answer(sock):
    """Until the kernel dates the last segment later than the FIN; the seconds that it says."""
    end = time.monotonic() + 60
    before = 0.0
    while time.monotonic() < end:
        seen = linux.probe_socket(sock, sock.fileno(), 0)
        if seen.fin_for < before:
            return seen.fin_for
        before = seen.fin_for
        time.sleep(0.02)
    raise AssertionError("no keepalive was answered")


@needs_dates
def test_an_answer_to_a_keepalive_excuses_no_leak_and_the_age_is_a_lower_bound():
    with cwg.Guard(cwg.Settings(grace=0.9)) as guard, half_closed_pair() as (ours, _):
        answer_keepalives(ours)
        wait_for_an_answer(ours)
        first = only(guard.scan())
        assert first.verdict is cwg.Verdict.LEAKED
        assert first.observation.is_lower_bound
        assert first.observation.peer_closed_for < first.observation.suspect_for
        wait_for_an_answer(ours)
        report = guard.scan()
    later = only(report).observation
    assert later.peer_closed_for > first.observation.peer_closed_for + 0.5, "it is remembered"
    assert later.is_lower_bound
    assert "CLOSE_WAIT for at least " in cwg.render_text(report)


@needs_dates
def test_a_fin_within_the_idle_time_of_keepalive_is_dated_by_it():
    with cwg.Guard(cwg.Settings(grace=60)) as guard, half_closed_pair() as (ours, _):
        answer_keepalives(ours, after=30)
        time.sleep(0.05)
        leak = only(guard.scan())
    assert leak.verdict is cwg.Verdict.CLOSING
    assert not leak.observation.is_lower_bound
