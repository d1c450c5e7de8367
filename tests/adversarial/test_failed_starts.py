"""A `watch()` that cannot begin leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import closewait_guard as cwg
from closewait_guard import _api


@pytest.fixture(autouse=True)
def nothing_is_installed():
    # On a busy machine a thread of the test before may still be ending.
    for thread in threading.enumerate():
        if thread.name.startswith("closewait"):
            thread.join(10)
    yield
    cwg.uninstall()


def watchers():
    return [each.name for each in threading.enumerate() if each.name.startswith("closewait")]


def refused(*_):
    raise RuntimeError("can't start new thread")


def test_an_interval_that_cannot_be_used_installs_nothing():
    with pytest.raises(cwg.ConfigurationError, match="interval"):
        cwg.watch(interval=-1)
    assert _api._guard is None
    assert watchers() == []


def test_without_room_for_a_thread_nothing_is_installed_and_the_next_begins(monkeypatch):
    with monkeypatch.context() as no_thread:
        no_thread.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="new thread"):
            cwg.watch(interval=3600, at_exit=False)
    assert _api._guard is None
    assert watchers() == []
    with cwg.watch(interval=3600, at_exit=False) as monitor:
        assert monitor.running


def test_a_monitor_that_could_not_begin_can_be_stopped(monkeypatch, guard):
    monitor = cwg.Monitor(guard, 3600, at_exit=False)
    with monkeypatch.context() as no_thread:
        no_thread.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="new thread"):
            monitor.start()
    monitor.stop()
    assert not monitor.running


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
def test_without_a_descriptor_for_signals_the_handler_alone_reports(monkeypatch, capfd):
    def no_room():
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as exhausted:
        exhausted.setattr(os, "pipe", no_room)
        # One that is left of another guard would do.
        exhausted.setattr("closewait_guard._signal.report._spare", None)
        monitor = cwg.watch(interval=3600, at_exit=False, signal="SIGUSR1")
    assert monitor.running
    assert watchers() == ["closewait-guard-monitor"]
    os.kill(os.getpid(), signal.SIGUSR1)
    text = ""
    for _ in range(500):
        text += capfd.readouterr().err
        if "no leaks" in text:
            break
        threading.Event().wait(0.01)
    assert "no leaks" in text
    monitor.stop()
    assert watchers() == []


def test_what_interrupts_a_start_leaves_no_thread(monkeypatch, guard):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(guard, "_signal_reader", interrupted)
    monitor = cwg.Monitor(guard, 3600, at_exit=False)
    with pytest.raises(KeyboardInterrupt):
        monitor.start()
    assert not monitor.running
    assert watchers() == []
