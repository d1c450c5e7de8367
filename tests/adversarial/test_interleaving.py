"""Scans, births and ends in several threads: whatever comes in between, all is as if one by one."""

from __future__ import annotations

import _socket
import gc
import sys
import weakref
from functools import partial

from interleaving import each_interleaving

from closewait_guard import _stack
from closewait_guard._frames import resolve
from closewait_guard._heap import instances_of


def test_a_stack_that_two_threads_make_small_at_once_stays_whole():
    whole = resolve(_stack.capture(sys._getframe(), 5))
    for call in each_interleaving(_stack):
        stack = _stack.capture(sys._getframe(), 5)
        _stack._known.clear()
        make_small = partial(_stack.settle, stack)
        call(make_small, make_small)
        assert [frame.function for frame in resolve(stack)] == [frame.function for frame in whole]


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
