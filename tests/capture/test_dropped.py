"""What is dropped and what is closed, where the garbage collector closes sockets by finalizers."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
import weakref

import pytest

import closewait_guard as cwg
from closewait_guard._capture.hooks import SOCKET

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture
def collecting():
    """No collection but those that the test asks for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Client:
    """Closes its socket in its own finalizer, as many libraries do."""

    def __init__(self):
        self.sock = socket.socket()

    def __del__(self):
        self.sock.close()


def in_a_cycle(thing):
    thing.itself = thing
    return thing


def dropped_sites(guard):
    dropped = [each for each in guard.scan().findings if each.verdict == cwg.Verdict.DROPPED]
    return [each.observation.record.site.function for each in dropped]


def test_an_unclosed_event_loop_is_found_each_time_though_its_finalizer_closes_its_sockets(
    guard, collecting
):
    def forgets_a_loop():
        in_a_cycle(asyncio.new_event_loop())

    for _ in range(20):
        forgets_a_loop()
        gc.collect()
    found = guard.scan().findings
    assert [each.verdict for each in found] == [cwg.Verdict.UNCLOSED] * 20
    assert {each.observation.owner.sockets for each in found} == {2}
    sites = {each.observation.record.site.function.rpartition(".")[2] for each in found}
    assert sites == {"forgets_a_loop"}


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_what_a_finalizer_closes_during_a_collection_is_dropped(guard, collecting, generation):
    in_a_cycle(Client())
    assert dropped_sites(guard) == []
    gc.collect(generation)
    assert dropped_sites(guard) == ["Client.__init__"]
    assert guard.scan().coverage.dropped == 1
    assert guard.scan().open_sockets == 0


def test_what_is_known_of_it_is_what_the_kernel_said_before_it_was_closed(guard, collecting):
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = in_a_cycle(Client())
        client.sock.connect(server.getsockname())
        peer = "{}:{}".format(*server.getsockname())
        del client
        gc.collect()
        [found] = [each.observation for each in guard.scan().leaks]
    assert (found.peer, found.state, found.evidence) == (
        peer,
        cwg.model.State.ESTABLISHED,
        cwg.model.Evidence.COLLECTED,
    )


def test_what_a_finalizer_closes_without_a_collection_is_closed(guard, collecting):
    Client()
    assert dropped_sites(guard) == []


def test_what_was_closed_before_the_collection_is_closed(guard, collecting):
    client = in_a_cycle(Client())
    client.sock.close()
    del client
    gc.collect()
    assert dropped_sites(guard) == []


def test_a_pool_that_weakref_finalize_closes_is_closed(guard, collecting):
    """As urllib3 does it: the pool is not garbage, the registry of finalizers holds it."""

    class Owner:
        pass

    pool = [socket.socket(), socket.socket()]
    owner = in_a_cycle(Owner())
    weakref.finalize(owner, lambda socks: [sock.close() for sock in socks], pool)
    del owner, pool
    gc.collect()
    assert dropped_sites(guard) == []
    assert guard.scan().open_sockets == 0


def test_what_a_finalizer_closes_of_a_living_object_is_closed(guard, collecting):
    class Lease:
        def __init__(self, sock):
            self.sock = sock

        def __del__(self):
            self.sock.close()

    pooled = socket.socket()
    in_a_cycle(Lease(pooled))
    gc.collect()
    assert pooled.fileno() == -1
    assert dropped_sites(guard) == []


def test_what_another_thread_closes_during_a_collection_is_closed(guard, collecting):
    go, done = threading.Event(), threading.Event()

    class Slow:
        def __del__(self):
            go.set()
            assert done.wait(10)

    def closes():
        sock = socket.socket()
        assert go.wait(10)
        sock.close()
        del sock
        done.set()

    thread = threading.Thread(target=closes)
    thread.start()
    in_a_cycle(Slow())
    gc.collect()
    thread.join()
    assert dropped_sites(guard) == []


# Where the guard refers to sockets.
REFERRING = ("_capture", "_inspect", "_descriptors")


def collecting_at_call(number, look, leave=lambda: in_a_cycle(Client())):
    """Leave a cycle whose end closes a socket; look, with a collection at one of the calls of that.

    Returns how many calls there were, and what was found.
    """
    calls = 0

    def profile(frame, event, arg):
        nonlocal calls
        if event == "call" and any(name in frame.f_code.co_filename for name in REFERRING):
            calls += 1
            if calls == number:
                gc.collect(0)

    with cwg.Guard(cwg.Settings()) as guard:
        leave()
        sys.setprofile(profile)
        try:
            found = look(guard)
        finally:
            sys.setprofile(None)
        gc.collect(0)
        return calls, found, guard._open_since(0)


@pytest.mark.parametrize(
    "look",
    [lambda guard: guard._open_since(0), lambda guard: guard._registry.adopt() or ()],
    ids=["scan", "adopt"],
)
def test_a_collection_in_the_middle_of_a_look_at_sockets_hides_none(collecting, look):
    """What refers to them meanwhile keeps none of them alive that the collector closes."""
    # The first look loads what it needs.
    calls = [collecting_at_call(None, look)[0] for _ in range(2)][-1]
    for number in range(1, calls + 1):
        _, at_once, later = collecting_at_call(number, look)
        assert [each.verdict for each in later] == [cwg.Verdict.DROPPED], f"{number} of {calls}"
        assert len(at_once) <= 1, f"{number} of {calls}"


def test_what_is_closed_in_time_in_the_middle_of_a_scan_is_not_dropped(collecting):
    pool = []

    def leave():
        pool[:] = [in_a_cycle(Client()).sock]

    def look(guard):
        return guard._open_since(0)

    calls = [collecting_at_call(None, look, leave)[0] for _ in range(2)][-1]
    for number in range(1, calls + 1):
        assert collecting_at_call(number, look, leave)[2] == (), f"{number} of {calls}"


def test_outside_of_collections_closing_is_the_c_method_itself(guard):
    (asked,) = SOCKET._real_close.__defaults__
    assert asked.close is vars(socket.socket.__base__)["close"]


def test_closing_is_left_as_it_was_found():
    defaults, callbacks = SOCKET._real_close.__defaults__, gc.callbacks.copy()
    with cwg.Guard(), cwg.Guard():
        assert SOCKET._real_close.__defaults__ != defaults
    assert SOCKET._real_close.__defaults__ is defaults
    assert gc.callbacks == callbacks


def test_uninstalling_in_a_finalizer_leaves_closing_as_it_was(collecting):
    guard = cwg.Guard().install()

    class Uninstalls:
        def __del__(self):
            guard.uninstall()

    in_a_cycle(Uninstalls())
    gc.collect()
    assert SOCKET._real_close.__defaults__ == (socket.socket.__base__,)
    socket.socket().close()


@pytest.mark.parametrize("error", [MemoryError, RecursionError, RuntimeError])
def test_a_failure_of_our_own_does_not_stop_the_close(error, monkeypatch, collecting):
    def fails(*_):
        raise error

    guard = cwg.Guard()
    monkeypatch.setattr(guard._registry, "on_close_in_collection", fails)
    with guard:
        number = in_a_cycle(Client()).sock.fileno()
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
        assert guard.scan().coverage.failures == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
def test_what_a_handler_raises_around_collections_is_never_lost(monkeypatch):
    """In a callback of the collector that is written in Python, it would be."""
    lost, handled, caught = [], [], []

    class Struck(BaseException):
        pass

    def handle(signum, frame):
        handled.append(signum)
        raise Struck

    def collects_until_struck(delay):
        struck = len(handled)
        signal.setitimer(signal.ITIMER_REAL, delay)
        while len(handled) == struck:
            gc.collect(0)

    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    # Those of other libraries are written in Python.
    others = gc.callbacks[:]
    gc.callbacks.clear()
    before = signal.signal(signal.SIGALRM, handle)
    try:
        with cwg.Guard():
            for step in range(1, 201):
                with pytest.raises(Struck) as error:
                    collects_until_struck(step * 1e-5)
                caught.append(error.type)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.callbacks[:] = others
    assert len(caught) == len(handled) == 200
    assert not lost
