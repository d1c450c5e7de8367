"""no_leaks(descriptors=True) fails the block that leaves any descriptor open, and only that."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import pickle
import select
import socket
import subprocess
import sys
import threading

import pytest

import closewait_guard as cwg
from closewait_guard._inspect import descriptors
from closewait_guard.reporters import json_lines

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


def refused(block, **options):
    """What is left open by a block that fails."""
    with pytest.raises(cwg.SocketLeakError) as caught:
        with cwg.no_leaks(grace=0.05, descriptors=True, **options):
            kept = block()
    for fd in kept:
        os.close(fd)
    return caught.value


@linux_only
def test_a_file_left_open_fails_with_its_path(tmp_path):
    log = tmp_path / "app.log"
    error = refused(lambda: [os.open(log, os.O_CREAT | os.O_WRONLY)])
    assert error.descriptors == cwg.Descriptors(1, {"file": 1}, {"file": {str(log): 1}})
    assert error.report.findings == ()
    text = str(error).replace("\n", "").replace(" ", "")
    assert f"1descriptorleftopenbytheblock:1file({log})." in text
    assert "which line opened them is not recorded." in " ".join(str(error).split())


def test_both_ends_of_a_pipe_left_open_fail():
    assert refused(lambda: list(os.pipe())).descriptors.by_kind == {"pipe": 2}


@linux_only
def test_an_epoll_left_open_fails_and_one_that_is_only_garbage_does_not():
    kept = []
    with pytest.raises(cwg.SocketLeakError) as caught:
        with cwg.no_leaks(grace=0.05, descriptors=True):
            kept.append(select.epoll())
    kept.pop().close()
    assert caught.value.descriptors.by_kind == {"epoll": 1}
    gc.disable()
    try:
        with cwg.no_leaks(grace=0.05, descriptors=True):
            cycle = [select.epoll()]
            cycle.append(cycle)
            del cycle
    finally:
        gc.enable()


def test_an_event_loop_left_open_fails_by_its_sockets_and_what_it_waits_with():
    loops = []
    with pytest.raises(cwg.SocketLeakError) as caught:
        with cwg.no_leaks(grace=0.05, descriptors=True):
            loops.append(asyncio.new_event_loop())
    loops.pop().close()
    assert caught.value.descriptors.by_kind == {"epoll": 1}
    assert len(caught.value.report.findings) == 2
    assert "STILL OPEN" in str(caught.value)


UNKNOWN = "which line opened {} is not recorded"


def line_of(function):
    return f"{__file__}:{function.__code__.co_firstlineno + 1}"


def start_child():
    return subprocess.Popen(["true"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def make_loop():
    return asyncio.new_event_loop()


def left_by(make):
    """What is left open by a block that makes something, after something was made before it."""
    before, kept = make(), []
    try:
        with pytest.raises(cwg.SocketLeakError) as caught:
            with cwg.no_leaks(grace=0.05, descriptors=True):
                kept.append(make())
    finally:
        for each in (before, *kept):
            each.communicate() if isinstance(each, subprocess.Popen) else each.close()
    return caught.value.descriptors, " ".join(str(caught.value).split())


@linux_only
@pytest.mark.parametrize("installed", [False, True])
def test_what_has_the_pipes_and_epolls_is_named_with_its_line(installed):
    with cwg.Guard() if installed else contextlib.nullcontext():
        children, text = left_by(start_child)
        loops, text_of_loops = left_by(make_loop)
    child = f"1 subprocess.Popen opened at {line_of(start_child)}"
    assert children.owners == {"pipe": {child: 2}}
    loop = f"1 asyncio event loop opened at {line_of(make_loop)}"
    assert loops.owners == {"epoll": {loop: 1}}
    assert "by the block: 2 pipes (1 subprocess.Popen opened at" in text
    assert "in a `finally` block." in text
    assert "by the block: 1 epoll (1 asyncio event loop opened at" in text_of_loops


@linux_only
def test_what_was_made_before_the_block_is_not_named_and_others_have_no_line():
    with cwg.Guard(), start_child():
        error = refused(lambda: list(os.pipe()))
        assert error.descriptors.owners == {}
        assert UNKNOWN.format("them") in " ".join(str(error).split())
        kept = []

        def leave_both():
            kept.append(start_child())
            return list(os.pipe())

        error = refused(leave_both)
        kept.pop().communicate()
    child = f"1 subprocess.Popen opened at {line_of(start_child)}"
    assert error.descriptors.owners == {"pipe": {child: 2}}
    assert UNKNOWN.format("the others") in " ".join(str(error).split())


def test_without_being_asked_it_is_about_sockets_only():
    with cwg.no_leaks(grace=0.05):
        fds = os.pipe()
    for fd in fds:
        os.close(fd)


@linux_only
def test_a_socket_of_native_code_fails_unless_open_ones_are_accepted():
    # The class in C is what native code uses, for all that the guard sees.
    import _socket

    def open_native():
        return [_socket.socket().detach()]

    assert refused(open_native).descriptors.by_kind == {"socket": 1}
    with cwg.no_leaks(grace=0.05, descriptors=True, allow_open=True):
        [fd] = open_native()
    os.close(fd)


def test_a_socket_is_in_the_report_and_not_counted_twice():
    kept = []
    with pytest.raises(cwg.SocketLeakError) as caught:
        with cwg.no_leaks(grace=0.05, descriptors=True):
            kept.append(socket.socket())
    kept.pop().close()
    assert caught.value.descriptors is None
    assert len(caught.value.report.findings) == 1


def test_what_was_open_before_and_what_is_closed_in_time_passes(tmp_path):
    with (tmp_path / "before").open("w"):
        with cwg.no_leaks(grace=30, descriptors=True):
            reading, writing = os.pipe()
            os.close(reading)
            threading.Timer(0.05, os.close, [writing]).start()


def test_what_another_thread_opens_after_the_block_is_not_its_own():
    late = []

    def end(fds):
        late.extend(os.pipe())
        for fd in fds:
            os.close(fd)

    with cwg.no_leaks(grace=2, descriptors=True):
        timer = threading.Timer(0.1, end, [os.pipe()])
        timer.start()
    timer.join()
    for fd in late:
        os.close(fd)


def test_what_the_guard_opens_for_itself_passes(tmp_path):
    with cwg.Guard() as guard, guard.no_leaks(grace=0.05, descriptors=True):
        reporter = json_lines(tmp_path / "leaks.jsonl")
    reporter.close()


USES_MULTIPROCESSING = """
import multiprocessing.shared_memory, os, random, secrets, subprocess
import closewait_guard as cwg

with cwg.no_leaks(grace=0.5, descriptors=True):
    os.open("/dev/urandom", os.O_RDONLY)  # As a library does that needs it.
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=16)
    memory.close()
    memory.unlink()
    subprocess.run(["true"], stdout=subprocess.PIPE)
    import sqlite3, ssl, zoneinfo
    zoneinfo.available_timezones()
    ssl.create_default_context()
print("no complaint")
"""


def test_what_python_keeps_for_the_whole_process_passes():
    done = subprocess.run(
        [sys.executable, "-c", USES_MULTIPROCESSING], capture_output=True, text=True, timeout=60
    )
    assert "no complaint" in done.stdout, done.stderr


@pytest.mark.parametrize("place", ["at the start", "at the end"])
def test_descriptors_that_cannot_be_listed_fail_the_check(monkeypatch, place):
    def refuse():
        raise OSError(errno.EACCES, "no")

    with pytest.raises(cwg.ConfigurationError, match="cannot be listed here"):
        if place == "at the start":
            monkeypatch.setattr(descriptors, "numbers_to_try", refuse)
        with cwg.no_leaks(grace=0.05, descriptors=True):
            monkeypatch.setattr(descriptors, "numbers_to_try", refuse)
    monkeypatch.undo()
    # Installed for the block only, whatever has become of that.
    assert "closewait_guard" not in str(getattr(socket.socket.__init__, "__module__", ""))


def test_a_decorated_coroutine_is_checked_and_the_error_can_be_pickled(tmp_path):
    kept = []

    @cwg.no_leaks(grace=0.05, descriptors=True)
    async def leak():
        kept.append(os.open(__file__, os.O_RDONLY))

    with pytest.raises(cwg.SocketLeakError) as caught:
        asyncio.run(leak())
    os.close(kept.pop())
    error = caught.value
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.descriptors) == (str(error), error.descriptors)
    assert error.descriptors.by_kind == {"file": 1}


@linux_only
def test_paths_are_redacted(tmp_path):
    kept, settings = [], cwg.Settings(redact=lambda text: text.replace("patient", "***"))
    with pytest.raises(cwg.SocketLeakError) as caught:
        with cwg.Guard(settings) as guard, guard.no_leaks(grace=0.05, descriptors=True):
            kept.append((tmp_path / "patient-17").open("w"))
    kept.pop().close()
    assert caught.value.descriptors.names == {"file": {str(tmp_path / "***-17"): 1}}
    assert "patient" not in str(caught.value)


def test_an_exception_of_the_block_passes_unchanged():
    fds = []
    with pytest.raises(ZeroDivisionError), cwg.no_leaks(descriptors=True):
        fds += os.pipe()
        raise ZeroDivisionError
    for fd in fds:
        os.close(fd)
