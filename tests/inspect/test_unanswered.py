"""A peer that is gone without a word is found, and none that is only slow, stopped or silent."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import jsonschema
import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard._inspect import unanswered as module
from closewait_guard._inspect.probe import linux
from closewait_guard._inspect.unanswered import UnansweredSockets
from closewait_guard.reporters.events import events
from closewait_guard.testing import CapturingReporter, connected_pair
from schema import SCHEMA

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")

# The kernel sends again after 0.2, 0.6 and 1.4 seconds, and asks for room as often.
GRACE = 0.5
ATTACH_FILTER, DETACH_FILTER = 26, 27
# One instruction of BPF: keep nothing of a packet.
DROP_ALL = struct.pack("=HBBI", 6, 0, 0, 0)


def vanish(sock):
    """From now on nothing that is sent to it arrives, and so nothing is acknowledged."""
    code = ctypes.create_string_buffer(DROP_ALL)
    program = struct.pack("@HP", 1, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, program)


def come_back(sock):
    sock.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)


def fill(sock):
    """Send until the peer has no room, and this end neither."""
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        pass


def info_of(sock):
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)


def scan_until(guard, is_seen, seconds=30.0):
    end = time.monotonic() + seconds
    while not is_seen(report := guard.scan()):
        assert time.monotonic() < end, str(report)
        time.sleep(0.1)
    return report


def has_findings(report):
    return bool({each.verdict for each in report.findings} - {cwg.Verdict.CLOSING})


def assert_silence(guard, seconds=2.5):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert guard.scan().findings == ()
        time.sleep(0.1)
    assert guard.scan(full=True).findings == ()


@pytest.fixture
def guard():
    with cwg.Guard(cwg.Settings(grace=0.05, unanswered_grace=GRACE)) as installed:
        yield installed


@pytest.fixture
def vanished(guard):
    """Our end of a connection; the other is gone, and something was sent to it."""
    with connected_pair() as (ours, theirs):
        vanish(theirs)
        ours.sendall(b"hello")
        yield ours


def test_a_peer_that_acknowledges_nothing_is_a_warning_and_no_leak(guard, vanished):
    report = scan_until(guard, has_findings)
    [finding] = report.findings
    seen = finding.observation
    assert finding.verdict is cwg.Verdict.UNANSWERED
    assert (finding.code, finding.severity) == ("CWG709", cwg.Severity.WARNING)
    assert "TCP_USER_TIMEOUT" in finding.hint
    assert not finding.is_leak
    assert report.leaks == ()
    assert seen.fd == vanished.fileno()
    assert (seen.state, seen.connection) == (cwg.State.ESTABLISHED, cwg.Connection.LIVE)
    assert seen.unsent == 5
    assert seen.unanswered.attempts >= 1
    assert GRACE <= seen.unanswered.seconds <= seen.unanswered.heard_for + 0.1
    assert seen.ended_for == seen.unanswered.seconds
    assert seen.record.site.function == "vanished"


def test_nothing_is_said_before_the_threshold(vanished):
    with cwg.Guard(cwg.Settings(unanswered_grace=30)) as patient:
        assert_silence(patient)


def test_a_report_says_for_how_long_and_what_was_tried(guard, vanished):
    report = scan_until(guard, has_findings)
    text = " ".join(str(report).split())
    assert "No leaks. 1 socket unanswered." in text
    assert "1 UNANSWERED TCP to 127.0.0.1:" in text
    assert "state no answer for at least 0." in text
    assert " times, peer last heard from " in text.replace("1 time,", "1 times,")
    assert "5 bytes not yet taken by the peer" in text


def test_it_is_saved_and_logged_with_its_facts(guard, vanished):
    report = scan_until(guard, has_findings)
    data = json.loads(json.dumps(cwg.to_dict(report)))
    jsonschema.validate(data, SCHEMA)
    assert cwg.from_dict(data) == report
    [event] = events(report)
    facts = report.findings[0].observation.unanswered
    assert (event.name, event.level) == ("socket_finding", cwg.Severity.WARNING)
    assert event.fields["unanswered_s"] == event.fields["oldest_s"] == round(facts.seconds, 3)
    assert event.fields["attempts"] == facts.attempts
    assert event.fields["heard_s"] == round(facts.heard_for, 3)
    assert event.fields["is_lower_bound"] is True
    assert "for at least 0." in event.message


def test_a_client_that_is_gone_is_information(guard):
    with connected_pair() as (theirs, accepted):
        vanish(theirs)
        accepted.sendall(b"hello")
        [finding] = scan_until(guard, has_findings).findings
        assert finding.verdict is cwg.Verdict.UNANSWERED
        assert finding.severity is cwg.Severity.INFO
        assert "1 connection from a peer that does not answer" in " ".join(
            str(guard.scan()).split()
        )


def test_one_that_answers_again_is_no_finding_any_more(guard):
    with connected_pair() as (ours, theirs):
        vanish(theirs)
        ours.sendall(b"hello")
        guard.report()
        scan_until(guard, has_findings)
        assert guard.report().findings
        come_back(theirs)
        scan_until(guard, lambda report: not has_findings(report))
        assert guard.report().closed_late == ()
        assert theirs.recv(10) == b"hello"


def test_a_slow_reader_is_no_finding(guard):
    with connected_pair() as (ours, _theirs):
        fill(ours)
        assert_silence(guard)


def test_a_reader_without_room_that_is_gone_is_one(guard):
    with connected_pair() as (ours, theirs):
        fill(ours)
        time.sleep(0.5)
        vanish(theirs)
        [finding] = scan_until(guard, has_findings).findings
        assert finding.verdict is cwg.Verdict.UNANSWERED
        assert finding.observation.unanswered.attempts > 1


READER = """
import socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while sock.recv(65536):
    pass
"""


def test_a_stopped_peer_is_no_finding(guard):
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", READER, str(server.getsockname()[1])]
        with subprocess.Popen(command) as peer:
            ours, _ = server.accept()
            with ours:
                os.kill(peer.pid, signal.SIGSTOP)
                ours.sendall(b"hello")
                assert_silence(guard)
                fill(ours)
                assert_silence(guard)
                os.kill(peer.pid, signal.SIGCONT)
            assert peer.wait(30) == 0


def test_an_idle_connection_is_no_finding_whether_its_peer_is_there_or_not(guard):
    with connected_pair() as (ours, theirs), connected_pair() as (other, gone):
        for each in (ours, other):
            each.sendall(b"hello")
        assert (theirs.recv(5), gone.recv(5)) == (b"hello", b"hello")
        vanish(gone)
        assert_silence(guard)


def test_an_idle_connection_counts_from_what_was_sent(guard):
    with connected_pair() as (ours, theirs):
        vanish(theirs)
        time.sleep(2 * GRACE)
        ours.sendall(b"hello")
        began = time.monotonic()
        [finding] = scan_until(guard, has_findings).findings
        assert finding.observation.unanswered.seconds <= time.monotonic() - began + 0.1


def test_a_program_that_has_set_the_time_limit_is_not_told_to(guard, vanished):
    vanished.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 600_000)
    assert_silence(guard)


def test_the_end_of_sending_may_be_unanswered_too(guard):
    with connected_pair() as (ours, theirs):
        vanish(theirs)
        ours.shutdown(socket.SHUT_WR)
        [finding] = scan_until(guard, has_findings).findings
        assert finding.verdict is cwg.Verdict.UNANSWERED
        assert finding.observation.state is cwg.State.FIN_WAIT1


def test_a_descriptor_without_an_object_is_asked_too(guard):
    with connected_pair() as (ours, theirs):
        vanish(theirs)
        ours.sendall(b"hello")
        fd = ours.detach()
        try:
            [finding] = scan_until(guard, has_findings).findings
            assert (finding.verdict, finding.observation.fd) == (cwg.Verdict.UNANSWERED, fd)
        finally:
            os.close(fd)


def test_where_the_kernel_dates_nothing_nothing_is_said():
    settings = cwg.Settings(probe="portable", unanswered_grace=0)
    with cwg.Guard(settings) as guard, connected_pair() as (ours, theirs):
        vanish(theirs)
        ours.sendall(b"hello")
        assert_silence(guard)


def test_a_block_may_leave_it_open_no_more_than_any_other(guard):
    with contextlib.ExitStack() as stack:
        with pytest.raises(cwg.SocketLeakError, match="STILL OPEN"), guard.no_leaks(grace=0.1):
            ours, theirs = stack.enter_context(connected_pair())
            vanish(theirs)
            ours.sendall(b"hello")
            scan_until(guard, has_findings)


def test_a_server_that_does_not_answer_is_news_and_a_client_is_none(guard):
    taken = CapturingReporter()
    changes = reporters.changes(taken)
    with connected_pair() as (theirs, accepted):
        vanish(theirs)
        accepted.sendall(b"hello")
        changes(scan_until(guard, has_findings))
    assert taken.reports == []
    with connected_pair() as (ours, theirs):
        vanish(theirs)
        ours.sendall(b"hello")
        report = scan_until(guard, has_findings)
        changes(report)
        changes(report)
    [report] = taken.reports
    assert [each.verdict for each in report.findings] == [cwg.Verdict.UNANSWERED]


def test_very_many_are_asked_in_turns_and_what_waits_is_said(guard, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    monkeypatch.setattr(module, "_EACH_SECOND", 0)
    monkeypatch.setattr(module, "_OFTEN", 2 * GRACE)
    guard.scan()
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(connected_pair()) for _ in range(5)]
        for ours, theirs in ends[1::2]:
            vanish(theirs)
            ours.sendall(b"hello")
        time.sleep(2 * GRACE)
        found = [{each.observation.fd for each in guard.scan().findings} for _ in range(11)]
        assert found[0] != found[-1] == {ours.fileno() for ours, _ in ends[1::2]}
        # Those of before are asked again, whoever's turn it is.
        assert all(earlier <= later for earlier, later in itertools.pairwise(found))
        assert guard.scan().coverage.notes == ()
        time.sleep(3 * GRACE)
        assert guard.scan().coverage.notes == (
            "whether the peers of 8 sockets acknowledge what is sent to them: a later scan asks",
        )
        assert guard.scan(full=True).coverage.notes == ()


class Answers:
    """A probe that has one answer after another."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def has_unsent(self, _):
        return True

    def unanswered(self, _):
        return self.answers.pop(0)


def test_what_a_scan_has_seen_counts_as_long_as_nothing_has_come_since(guard, monkeypatch):
    with connected_pair() as (ours, _theirs):
        at = 100.0
        monkeypatch.setattr(module, "now", lambda: at)
        creations = guard._registry.open_sockets()
        creations.creations = {
            fd: each for fd, each in creations.creations.items() if fd == ours.fileno()
        }
        probe = Answers(
            cwg.Unanswered(1.0, 1, 50.0), cwg.Unanswered(1.0, 9, 60.0), cwg.Unanswered(1.0, 1, 2.0)
        )
        sockets = UnansweredSockets(probe, 60.0)
        seconds = []
        for at in (100.0, 110.0, 120.0):  # noqa: B007 - it is the clock
            seconds.append(sockets.find(creations, (), everything=True)[ours.fileno()].seconds)
        assert seconds == [1.0, 11.0, 1.0]


class Counting:
    """A probe that counts its questions: a socket has something unsent in some of them."""

    def __init__(self):
        self.asked, self.has_sent = 0, False

    def has_unsent(self, _):
        self.asked += 1
        return self.has_sent

    def unanswered(self, _):
        return None


def test_one_that_was_acknowledged_is_not_asked_for_the_grace_time_and_others_at_each_scan(
    guard, monkeypatch
):
    at = 100.0
    monkeypatch.setattr(module, "now", lambda: at)
    with connected_pair():
        probe, open_sockets = Counting(), guard._registry.open_sockets()
        total = len(open_sockets.creations)
        sockets = UnansweredSockets(probe, 60.0)
        asked = []
        for at, probe.has_sent in (  # noqa: B007 - it is the clock
            *((100.0, False), (101.0, True), (159.0, True)),
            *((160.0, True), (161.0, True), (162.0, False), (163.0, False)),
            (220.0, False),
        ):
            probe.asked = 0
            assert sockets.find(open_sockets, (), everything=False) == {}
            asked.append(probe.asked / total)
        assert asked == [1, 0, 0, 1, 1, 1, 0, 1]
        probe.asked = 0
        sockets.find(open_sockets, (), everything=True)
        assert probe.asked == total


ESTABLISHED, FIN_WAIT1 = 1, 4


def info(
    state=ESTABLISHED, retransmits=0, probes=0, backoff=0, wait=0.2, unacked=1, sent=0, heard=9e9
):
    return struct.pack(
        "=BxBBB3xI12xI16xI8xI",
        state,
        retransmits,
        probes,
        backoff,
        int(wait * 1_000_000),
        unacked,
        int(sent * 1000),
        int(min(heard, 4e6) * 1000),
    )


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        # 0.2 + 0.4 + ... + 25.6 have passed, and 10 since.
        (info(retransmits=8, backoff=8, wait=51.2, sent=10), 61.0),
        (info(retransmits=8, backoff=8, wait=51.2, sent=10, heard=20), 20.0),
        # What was sent last was acknowledged, if not taken: the peer has taken its window back.
        (info(retransmits=8, backoff=8, wait=51.2, sent=10, heard=9.9), None),
        # A FIN is not dated.
        (info(FIN_WAIT1, retransmits=2, backoff=2, wait=0.8, sent=500, heard=500), 0.6),
        # Asked for room after 0.4 and 0.8 seconds, again.
        (info(probes=3, backoff=3, unacked=0), 1.2),
        (info(probes=5, backoff=12, unacked=0), 112.5),
        (info(probes=1, backoff=9, unacked=0), None),
        (info(unacked=1, sent=100, heard=100), None),
        (info(2, retransmits=3, backoff=3), None),
        (b"", None),
    ],
)
def test_the_seconds_are_those_that_must_have_passed(given, seconds):
    found = linux._unanswered_by(given)
    assert (None if found is None else round(found.seconds, 6)) == seconds


FAR = """
import ctypes, os, socket, subprocess, sys, time
run = lambda *command: subprocess.run(command, check=True)
ask = lambda: sys.stdin.readline()
libc = ctypes.CDLL(None, use_errno=True)
run("ip", "link", "set", "lo", "up")
print("made", flush=True)
ask()
run("ip", "addr", "add", "10.99.0.2/24", "dev", "far0")
run("ip", "link", "set", "far0", "up")
server = socket.create_server(("10.99.0.2", 7000))
print("ready", flush=True)
accepted = server.accept()[0]
ask()
run(*sys.argv[1:])
print("gone", flush=True)
ask()
"""

NEAR = """
import socket, subprocess, sys, time
import closewait_guard as cwg
run = lambda *command: subprocess.run(command, check=True)
far = subprocess.Popen(
    ["unshare", "-n", sys.executable, "-c", sys.argv[1], *sys.argv[2:]],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
)
def step():
    far.stdin.write("go\\n")
    far.stdin.flush()
    return far.stdout.readline()
far.stdout.readline()
run("ip", "link", "set", "lo", "up")
run("ip", "link", "add", "near0", "type", "veth", "peer", "name", "far0", "netns", str(far.pid))
run("ip", "addr", "add", "10.99.0.1/24", "dev", "near0")
run("ip", "link", "set", "near0", "up")
step()
with cwg.Guard(cwg.Settings(unanswered_grace=1)) as guard, \\
        socket.create_connection(("10.99.0.2", 7000)) as sock:
    sock.sendall(b"hello")
    time.sleep(0.5)
    assert guard.scan().findings == ()
    assert step() == "gone\\n"
    sock.sendall(b"hello")
    end = time.monotonic() + 30
    while not (found := guard.scan().findings) and time.monotonic() < end:
        time.sleep(0.2)
    print(*(f"{each.verdict} {each.observation.peer}" for each in found))
far.stdin.close()
far.wait(30)
"""


@pytest.mark.parametrize(
    "how",
    [
        ["ip", "link", "set", "far0", "down"],
        ["ip", "route", "add", "blackhole", "10.99.0.1/32"],
    ],
    ids=["its link is down", "its answers get lost"],
)
def test_another_host_that_is_gone_is_found(how):
    unshare = shutil.which("unshare")
    if not unshare or not shutil.which("ip"):
        pytest.skip("it needs unshare and ip")
    link = ["ip", "link", "add", "near0", "type", "veth", "peer", "name", "far0"]
    if subprocess.run([unshare, "-n", *link], check=False, capture_output=True).returncode:
        pytest.skip("it may not make a network")
    done = subprocess.run(
        [unshare, "-n", sys.executable, "-c", NEAR, FAR, *how],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("unanswered 10.99.0.2:7000\n", 0), done.stderr
