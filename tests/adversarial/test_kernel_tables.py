"""Whatever the kernel, or what stands in its place, answers: no scan hangs or crashes."""

from __future__ import annotations

import io
import os
import socket
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from closewait_guard._processes import linux, netlink, procfs
from closewait_guard._processes.linux import view_of
from closewait_guard._processes.model import Entry

fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


class Replies:
    """A netlink socket that answers with some datagrams, and then with nothing for ever."""

    def __init__(self, *datagrams):
        self._datagrams = list(datagrams)
        self.asked = 0

    def send(self, data):
        return len(data)

    def recv(self, size):
        self.asked += 1
        assert self.asked < 1000, "a loop that does not end"
        return self._datagrams.pop(0) if self._datagrams else b""


def message(kind=20, length=None, body=b"\x02\x08" + b"\0" * 70, attributes=b""):
    """One message as the kernel writes it."""
    data = body + attributes
    length = 16 + len(data) if length is None else length
    return struct.pack("=IHHII", length & 0xFFFFFFFF, kind, 2, 0, 0) + data


def attribute(kind, data, length=None):
    length = 4 + len(data) if length is None else length
    return struct.pack("=HH", length, kind) + data + b"\0" * (-len(data) % 4)


DONE = message(3, body=b"\0" * 4)
lengths = st.none() | st.integers(0, 200) | st.sampled_from([0, 1, 3, 4, 15, 16, 72, 2**32 - 1])
attributes = st.builds(
    attribute,
    st.integers(0, 5),
    st.binary(max_size=120),
    st.none() | st.integers(0, 65535),
)
messages = st.builds(
    message,
    st.sampled_from([20, 20, 20, 1, 2, 3, 99]),
    lengths,
    st.binary(min_size=72, max_size=72) | st.binary(max_size=80),
    st.lists(attributes, max_size=3).map(b"".join),
)
datagrams = st.lists(messages, max_size=4).map(b"".join) | st.binary(max_size=300)


@st.composite
def truncated(draw):
    data = draw(datagrams)
    return data[: draw(st.integers(0, len(data)))]


def rows(*data, dated):
    """The rows that were understood; OSError is what callers fall back upon."""
    try:
        return list(netlink.dump(Replies(*data), 1 << 8, dated=dated))
    except OSError:
        return None


@fuzzed
@given(st.lists(datagrams | truncated(), max_size=3), st.booleans())
def test_no_answer_of_netlink_hangs_or_crashes_the_parser(data, dated):
    for row in rows(*data, DONE, DONE, dated=dated) or ():
        entry = Entry(*row)
        view_of(entry)
        assert len(row) in (11, 12)


@pytest.mark.parametrize("dated", [True, False])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\0" * 16,
        message(length=0),
        message(length=3),
        message(length=2**32 - 1),
        message(length=72),
        message()[:20],
        message(attributes=attribute(1, b"x", length=0)),
        message(attributes=attribute(2, b"x" * 8, length=0)),
        message(attributes=attribute(2, b"x" * 8, length=65535)),
        message(2, body=b""),
        message(2, body=b"\0" * 4),
    ],
    ids=range(13),
)
def test_a_broken_answer_is_an_error_upon_which_the_tables_are_read(data, dated):
    assert rows(data, dated=dated) in (None, [])


def test_good_answers_are_still_understood():
    plain = message()
    assert len(rows(plain * 3, DONE, DONE, dated=False)) == 3
    info = attribute(2, b"i" * 104)
    found = rows((plain + message(attributes=info)) * 2 + DONE, DONE, DONE, dated=True)
    assert [row[-1] for row in found[:4]] == [None, b"i" * 104] * 2


def test_a_scan_goes_on_by_the_tables_where_netlink_answers_nonsense(monkeypatch):
    class Nonsense(Replies):
        def close(self):
            pass

    monkeypatch.setattr(netlink, "open_socket", lambda namespace: Nonsense(message(length=0)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode = os.fstat(server.fileno()).st_ino
        home = procfs.namespace_of("self")
        network = linux.network_of(home, ["self"], {inode}, dated=False)
    assert not network.dated
    assert inode in network.rows


LINE = (
    "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000"
    "  1000        0 12345 1 0000000000000000 100 0 0 10 0\n"
)
SIX = LINE.replace("0100007F", "0" * 32).replace("00000000:0000", "0" * 32 + ":0000")


@fuzzed
@given(
    st.sampled_from(["tcp", "tcp6", "udp", "udp6", "unix"]),
    st.text(max_size=200)
    | st.builds(
        lambda at, new: LINE[:at] + new + LINE[at + len(new) :],
        st.integers(0, len(LINE)),
        st.text(max_size=12),
    ),
)
def test_no_line_of_the_tables_crashes_or_hides_the_others(name, line):
    good = SIX if name.endswith("6") else LINE
    entry = "0000: 00000002 00000000 00010000 0001 01 77 /run/x\n" if name == "unix" else good
    text = f"header\n{line}\n{entry}"
    with ReplacedTables({name: text}):
        if name.startswith("tcp"):
            found = {each.inode for each in procfs.table("self")}
            for each in procfs.table("self"):
                view_of(each), each.local, each.peer
        else:
            found = set(procfs.local_addresses("self"))
    assert (77 if name == "unix" else 12345) in found


class ReplacedTables:
    """/proc/PID/net, as some texts have it."""

    def __init__(self, texts):
        self._texts = texts

    def __enter__(self):
        self._before = procfs._open_table
        procfs._open_table = self._open

    def _open(self, pid, name):
        return io.StringIO(self._texts.get(name, ""))

    def __exit__(self, *failure):
        procfs._open_table = self._before


@fuzzed
@given(st.binary(max_size=120), st.binary(max_size=120), st.binary(max_size=120))
def test_no_name_or_state_of_a_process_crashes_a_look_at_it(
    tmp_path_factory, cmdline, stat, limits
):
    folder = tmp_path_factory.mktemp("process")
    (folder / "cmdline").write_bytes(cmdline)
    (folder / "comm").write_bytes(stat[:15])
    (folder / "stat").write_bytes(b"1 (" + stat + b") S 7" + b" 1" * 20)
    (folder / "limits").write_bytes(b"Max open files            " + limits)
    with ReplacedProcess(folder):
        assert len(procfs.program(1)) <= 120 * 10
        assert procfs._status(1).parent == 7
        assert procfs._fd_limit(1) is None or procfs._fd_limit(1) >= 0


class ReplacedProcess:
    def __init__(self, folder):
        self._folder = folder

    def __enter__(self):
        procfs.open = lambda path, *mode, **how: open(
            path.replace("/proc/1", str(self._folder)), *mode, **how
        )

    def __exit__(self, *failure):
        del procfs.open


def test_a_table_without_line_ends_takes_bounded_memory():
    with ReplacedTables({"tcp": "header\n" + "0" * 4_000_000}):
        tracemalloc.start()
        try:
            assert list(procfs.table("self")) == []
            assert tracemalloc.get_traced_memory()[1] < 40_000_000
        finally:
            tracemalloc.stop()
