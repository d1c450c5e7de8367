"""The variables of running frames are read, and what shares them with it sees nothing."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import contextmanager

import pytest

import closewait_guard as cwg
from closewait_guard._live import frames
from closewait_guard._live.frames import (
    locals_of,
    locals_of_other_thread,
    unnamed_values_of,
)
from closewait_guard.testing import half_closed_pair


@pytest.fixture
def leaking():
    """A guard that has something to search for."""
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair() as (ours, _):
        time.sleep(0.02)
        yield guard, ours


def test_a_scan_leaves_what_exec_has_set_in_a_running_function(leaking):
    guard, ours = leaking
    begun, scanned, seen = threading.Event(), threading.Event(), []

    def works(sock, run, variables):
        value = "before"
        run(
            "value = 'set by exec'\nbegun.set()\nscanned.wait(60)\nseen.append(value)",
            names,
            variables(),
        )
        return value, sock

    names = {"begun": begun, "scanned": scanned, "seen": seen}
    thread = threading.Thread(target=works, args=(ours, exec, locals), name="worker-8")
    thread.start()
    begun.wait(60)
    report = guard.scan()
    scanned.set()
    thread.join()
    assert report.findings
    assert seen == ["set by exec"]


def has_set(frame):
    """As a debugger does: the dict is written, and written back into the variables later."""
    variables = frame.f_locals
    variables["value"], variables["added"] = "set by a debugger", 1
    return variables


def test_a_scan_leaves_what_a_debugger_has_set_in_a_function_and_in_a_generator(leaking):
    guard, _ = leaking
    shared = []

    def waits():
        value, sock = "before", socket.socket()
        shared.append(has_set(sys._getframe()))
        yield sock.fileno()
        sock.close()
        return value

    def calls():
        value, suspended = "before", waits()
        shared.append(has_set(sys._getframe()))
        next(suspended)
        report = guard.check(0)
        return report, value, list(suspended)

    report, *_ = calls()
    assert any("local 'sock' of" in holder for leak in report.findings for holder in leak.holders)
    for variables in shared:
        assert variables["value"] == "set by a debugger"
        assert variables["added"] == 1


def test_a_creation_by_dup_leaves_the_variables_of_its_caller():
    with cwg.Guard() as guard, socket.socket() as first:
        held = []

        def trace(frame, event, arg):
            if frame.f_code is socket.socket.dup.__code__ and event == "call":
                held.append(frame.f_locals)
                held[0]["fd"] = "set by a debugger"

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            second = first.dup()
        finally:
            sys.settrace(before)
        with second:
            assert guard.scan(full=True).observations
    if held and sys.version_info < (3, 13):
        assert held[0]["fd"] == "set by a debugger"


def test_every_kind_of_variable_is_read_and_none_that_is_unbound():
    shared, later = object(), object()

    def has(first, /, second, *rest, third=3, **more):
        gone = 1
        cell = [shared]
        del gone
        if not rest:
            never = 1

        def uses():
            return cell, later, never

        return locals_of(sys._getframe()), uses

    found, uses = has(1, 2, 4, 5, fourth=6)
    assert found == {
        "first": 1,
        "second": 2,
        "rest": (4, 5),
        "third": 3,
        "more": {"fourth": 6},
        "cell": [shared],
        "shared": shared,
        "later": later,
        "uses": uses,
    }


@contextmanager
def working_threads(works, ended):
    """Three threads that work until they are to end, and are switched often."""
    threads = [threading.Thread(target=works) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    [thread.start() for thread in threads]
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        [thread.join() for thread in threads]


def frames_for_a_second():
    """The frames of all threads, again and again."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        for frame in list(sys._current_frames().values()):
            while frame is not None:
                yield frame
                frame = frame.f_back


def test_frames_that_come_and_go_while_they_are_read_give_values_or_none():
    ended = threading.Event()

    def deep(depth):
        kept = [depth]
        if depth:
            deep(depth - 1)
        return kept

    def works():
        while not ended.is_set():
            deep(30)

    seen = 0
    with working_threads(works, ended):
        for frame in frames_for_a_second():
            found = locals_of_other_thread(frame)
            if frame.f_code is deep.__code__ and "kept" in found:
                assert found["kept"] == [found["depth"]]
                seen += 1
    assert seen


class Block:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return True


def blocks_of(frame):
    """What a call is to exit: the method, or the object itself, as this Python has it."""
    values = [getattr(value, "__self__", value) for value in unnamed_values_of(frame)]
    return [value for value in values if type(value) is Block]


def test_what_a_call_is_to_exit_is_read_wherever_the_call_is():
    def counts():
        return len(blocks_of(sys._getframe().f_back))

    def works():
        found = [counts()]
        with Block(), Block():
            found.append(counts())
            for number in range(2):
                with Block():
                    found += [counts() for _ in range(number)]
                    raise OSError
            try:
                raise OSError
            except OSError:
                found.append(counts())
            finally:
                found.append(counts())
        with Block() as named:
            found.append(counts())
        return [*found, counts()], named

    found, _ = works()
    with_comprehension = found[2]
    # Until Python 3.11 a comprehension is a call of its own.
    assert with_comprehension in (0, 3)
    assert [*found[:2], *found[3:]] == [0, 2, 2, 2, 1, 0]


def test_blocks_that_come_and_go_while_they_are_read_are_blocks_or_nothing():
    ended = threading.Event()

    def deep(depth):
        with Block():
            if depth:
                deep(depth - 1)
            for _ in (Block(), Block()):
                with Block():
                    raise OSError

    def suspends():
        with Block():
            yield from (Block() for _ in range(3))

    def works():
        while not ended.is_set():
            deep(20)
            list(suspends())

    seen = 0
    with working_threads(works, ended):
        for frame in frames_for_a_second():
            assert all(sys.getrefcount(value) > 1 for value in unnamed_values_of(frame))
            seen += frame.f_code is deep.__code__ and bool(blocks_of(frame))
    assert seen


def test_where_variables_of_other_threads_cannot_be_read_the_report_says_so(leaking, monkeypatch):
    guard, _ = leaking
    monkeypatch.setattr(frames, "_read_of_others", frames._by_copy)
    monkeypatch.setattr(frames, "_loaded", [None])
    assert (
        "what other threads have in their variables: this Python does not show it safely"
        in guard.scan().coverage.notes
    )
    monkeypatch.undo()
    notes = guard.scan().coverage.notes
    assert not any(note.startswith("what other threads have") for note in notes)
