"""What a signal handler raises reaches the program, and no socket is left open by it."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
import time

import pytest

import closewait_guard as cwg

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Interrupted(BaseException):
    pass


class LateError(TimeoutError):
    """An OSError, like those that the kernel's answers are asked with."""


class Alarm:
    """Goes off once a round at most, and raises.

    In a finalizer C drops what is raised. What is raised where no socket dies `counts`: it must
    arrive, at whatever pace the machine runs.
    """

    def __init__(self, error):
        self.error = error
        self.armed = False
        self.counting = 0
        self.arrived = 0

    def handle(self, signum, frame):
        if not self.armed:
            return
        self.armed = False
        error = self.error()
        error.counts = frame.f_code is Alarm.interrupt.__code__
        self.counting += error.counts
        raise error

    def interrupt(self, rounds, longest, act):
        """Do something time and again, and go off somewhere in it."""
        chance = random.Random(1)
        for _ in range(rounds):
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, longest))
                act()
                while self.armed:
                    time.sleep(longest)
                # Where one arrives that has waited for the end of a finalizer.
                time.sleep(0)
            except self.error as error:
                # First of all: one of an earlier round may have come late, before this one's.
                self.armed = False
                self.arrived += error.counts


@pytest.fixture(params=[Interrupted, LateError])
def alarm(request):
    made = Alarm(request.param)
    before = signal.signal(signal.SIGALRM, made.handle)
    # Those of others, such as Hypothesis: what is raised in there reaches nobody.
    callbacks, gc.callbacks[:] = gc.callbacks[:], []
    yield made
    gc.callbacks[:] = callbacks
    made.armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def drop():
    socket.socket()


def drop_in_cycles():
    rings = [[socket.socket()] for _ in range(5)]
    for ring in rings:
        ring.append(ring)
    del rings, ring
    gc.collect(0)


def numbers_left(before):
    gc.collect()
    return set(os.listdir("/dev/fd")) - before


@pytest.mark.parametrize(("act", "longest"), [(drop, 1e-4), (drop_in_cycles, 1e-3)])
def test_a_handler_that_raises_does_not_stop_the_finalizer_and_reaches_the_program(
    alarm, act, longest
):
    gc.disable()
    try:
        before = set(os.listdir("/dev/fd"))
        with cwg.Guard():
            alarm.interrupt(300, longest, act)
            # That of the listing itself.
            assert len(numbers_left(before)) <= 1
    finally:
        gc.enable()
    assert alarm.arrived == alarm.counting > 0


def test_a_handler_that_raises_in_a_creation_reaches_the_program_and_loses_no_descriptor(alarm):
    before = set(os.listdir("/dev/fd"))
    with cwg.Guard() as guard:
        alarm.interrupt(300, 1e-4, lambda: socket.socket().close())
        assert len(numbers_left(before)) <= 1
        assert guard.scan().coverage.failures == 0
    assert alarm.arrived == alarm.counting > 0


@pytest.mark.parametrize("raised", [Interrupted, LateError])
@pytest.mark.parametrize("name", ["on_create", "on_detach", "on_makefile"])
def test_what_a_handler_raises_in_our_own_code_is_raised_by_the_call(name, raised, monkeypatch):
    """At the worst moment: in the middle of each of our calls."""

    def handle(signum, frame):
        raise raised

    def interrupted(*_):
        signal.raise_signal(signal.SIGALRM)

    guard = cwg.Guard()
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(guard._registry, name, interrupted)
    before = signal.signal(signal.SIGALRM, handle)
    calls = {
        "on_create": socket.socket,
        "on_detach": lambda: ours.detach(),
        "on_makefile": lambda: ours.makefile(),
    }
    try:
        with guard, pytest.raises(raised):
            calls[name]()
    finally:
        signal.signal(signal.SIGALRM, before)
    # Of a socket that was to give its descriptor away too.
    assert ours.fileno() >= 0
    ours.close()
    theirs.close()


@pytest.mark.parametrize("raised", [Interrupted, LateError])
def test_what_a_handler_raises_while_a_socket_is_finalized_is_raised_after_it_and_as_it_was(
    raised, monkeypatch
):
    error, reported = raised("this one"), []

    def handle(signum, frame):
        raise error

    def interrupted(*_):
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    guard = cwg.Guard()
    monkeypatch.setattr(guard._registry, "on_finalize", interrupted)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        with guard:
            sock = socket.socket()
            number = sock.fileno()
            with pytest.raises(raised) as caught:
                sock = None
                time.sleep(0)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert caught.value is error
    assert not reported


def as_function(raises):
    def handle(signum, frame):
        del frame
        raises()

    return handle


def as_method(raises):
    class Handler:
        def handle(self, signum, frame):
            del frame
            raises()

    return Handler().handle


def as_object(raises):
    class Handler:
        def __call__(self, *given):
            del given
            raises()

    return Handler()


@pytest.mark.parametrize("made", [as_function, as_method, as_object])
def test_a_handler_that_lets_go_of_its_frame_is_known_for_one(made, monkeypatch):
    def raises():
        raise LateError

    guard = cwg.Guard()
    monkeypatch.setattr(
        guard._registry, "on_create", lambda *_: signal.raise_signal(signal.SIGALRM)
    )
    before = signal.signal(signal.SIGALRM, made(raises))
    try:
        with guard, pytest.raises(LateError):
            socket.socket()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("is_patched", [True, False])
def test_no_bytecode_of_ours_runs_where_a_closed_socket_is_finalized(
    closes, is_patched, monkeypatch
):
    """A signal handler could raise there, and what is raised in a finalizer is dropped."""
    finalized, called = [], []

    def of_another_library(sock):
        finalized.append(sock)

    if is_patched:
        monkeypatch.setattr(socket.socket, "__del__", of_another_library, raising=False)
    with cwg.Guard() as guard:
        sock = socket.socket()
        number = sock.fileno()
        if closes:
            sock.close()
        sys.setprofile(lambda frame, event, _: called.append((event, frame.f_code.co_name)))
        sock = None
        sys.setprofile(None)
        calls = [name for event, name in called if event == "call"]
        if closes:
            assert calls == ["of_another_library"] * is_patched
        else:
            assert calls[0] == "notify"
        assert len(finalized) == is_patched
        while finalized:
            finalized.pop().close()
        assert guard.scan().coverage.dropped == (not closes)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, RuntimeError])
def test_a_failure_of_our_own_does_not_stop_the_finalizer(error, monkeypatch):
    def fails(*_):
        raise error

    guard = cwg.Guard()
    monkeypatch.setattr(guard._registry, "on_finalize", fails)
    with guard:
        sock = socket.socket()
        number = sock.fileno()
        sock = None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
        assert guard.scan().coverage.failures == 1


def test_sockets_that_are_dropped_near_the_recursion_limit_are_closed(monkeypatch):
    # What the collector's callbacks raise there: pytest's hook fails, too, and keeps the frames.
    monkeypatch.setattr(sys, "unraisablehook", id)

    def goes_down():
        sock = socket.socket()
        goes_down()
        sock.close()

    def fails_at_every_depth():
        for more in range(40, 60):
            sys.setrecursionlimit(depth() + more)
            # Not by pytest, which would keep the frames.
            try:
                goes_down()
            except RecursionError:
                pass
            finally:
                sys.setrecursionlimit(limit)

    limit, before = sys.getrecursionlimit(), set(os.listdir("/dev/fd"))
    with cwg.Guard():
        fails_at_every_depth()
        assert len(numbers_left(before)) <= 1


def depth():
    frame, found = sys._getframe(), 0
    while frame is not None:
        frame, found = frame.f_back, found + 1
    return found
