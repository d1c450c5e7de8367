"""Sockets opened, closed and scanned in several threads, interleaved at any instruction."""

from __future__ import annotations

import _socket
import gc
import sys
import time
import weakref
from contextlib import ExitStack
from functools import partial

from interleaving import each_interleaving

from closewait_guard._capture import stack
from closewait_guard._inspect.records import resolve
from closewait_guard._live.gc_objects import instances_of
from closewait_guard.testing import half_closed_pair


def names_of(captured):
    return [frame.function for frame in resolve(captured)]


def test_a_stack_that_two_threads_make_small_at_once_stays_whole():
    whole = stack.capture(sys._getframe(), 5)
    for call in each_interleaving(stack):
        captured = stack.capture(sys._getframe(), 5)
        stack._shared.clear()
        make_small = partial(stack.intern, captured)
        call(make_small, make_small)
        assert names_of(captured) == names_of(whole)


def test_a_report_that_another_has_overtaken_takes_nothing_back(guard, monkeypatch):
    scan = guard._pipeline._scan

    def scan_and_be_overtaken(**options):
        seen = scan(**options)
        monkeypatch.setattr(guard._pipeline, "_scan", scan)
        leaking.enter_context(half_closed_pair())
        time.sleep(0.1)
        assert guard.report().leaks
        return seen

    with ExitStack() as leaking:
        monkeypatch.setattr(guard._pipeline, "_scan", scan_and_be_overtaken)
        assert not guard.report().leaks
    assert len(guard.report().closed_late) == 1


class Thing:
    pass


def test_a_walk_through_the_heap_keeps_nothing():
    """Among the rest is what other threads are in the middle of making."""
    thing = Thing()
    ref = weakref.ref(thing)
    gc.disable()
    try:
        instances_of([_socket.socket])
        del thing
        assert ref() is None
    finally:
        gc.enable()
