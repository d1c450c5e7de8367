"""Threads of the guard that end before each fork, and go on after it."""

from __future__ import annotations

import os
import threading
import warnings
from threading import Event

from closewait_guard._remote.thread import RepeatingThread
from remote.programs import DEADLINE, eventually


def fork():
    """Of what else has a thread here Python warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def test_a_step_that_a_fork_does_not_wait_for_is_done_once_and_can_be_the_last():
    has_begun, may_end, ends = Event(), Event(), []

    def step():
        has_begun.set()
        may_end.wait(DEADLINE)
        ends.append(step)

    thread = RepeatingThread(step)
    assert has_begun.wait(DEADLINE)
    fork()
    assert not ends
    may_end.set()
    eventually(lambda: ends)
    # In the thread that has taken the place of the first, nothing is left to do.
    thread.stop(DEADLINE)
    assert ends == [step]


def test_steps_go_on_after_a_fork_and_no_longer_when_it_was_stopped():
    steps = []
    thread = RepeatingThread(lambda: steps.append(thread) or 0.001)
    eventually(lambda: steps)
    fork()
    count = len(steps)
    eventually(lambda: len(steps) > count)
    thread.stop(DEADLINE)
    count = len(steps)
    fork()
    assert len(steps) == count


def test_a_step_that_starts_a_thread_is_not_counted_among_the_threads_of_the_program():
    def step():
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        done.set()
        return 60.0

    done, before = Event(), threading.enumerate()
    repeating = RepeatingThread(step)
    assert done.wait(DEADLINE)
    eventually(lambda: threading.enumerate() == before)
    repeating.stop(DEADLINE)


def test_where_no_thread_can_be_started_after_a_fork_that_is_said(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    losses = []
    thread = RepeatingThread(lambda: 0.001, on_loss=lambda: losses.append(thread))
    monkeypatch.setattr("closewait_guard._remote.thread._Thread", refuse)
    fork()
    fork()
    assert losses == [thread]
