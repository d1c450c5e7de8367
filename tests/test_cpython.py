"""Private names of CPython: this Python has each; without one a guard does less, and no harm."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard import _cpython as names

PACKAGE = Path(cwg.__file__).parent

LEAK = """
import _asyncio, io, socket, sys, threading
import closewait_guard as cwg

cwg.install(grace=0)
server = socket.create_server(("127.0.0.1", 0))
def open_one():
    return socket.create_connection(server.getsockname())
kept = open_one()
server.accept()[0].close()
kept.recv(1)
report = cwg.scan()
lines = [frame.function for leak in report.leaks for frame in leak.observation.record.stack]
print(kept.fileno() > 0, "open_one" in lines, report.coverage.failures > 0)
"""

HOT = {("_capture/recorder.py", "_name"), ("_capture/recorder.py", "_get_running_loop")}
OF_PYTEST = {"_finalizers", "_fixtureinfo", "_pyfuncitem"}


@pytest.fixture
def copy_without(monkeypatch):
    """Loads a copy of the module while an attribute of something is missing."""

    def load(owner, name):
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            spec = importlib.util.spec_from_file_location("copy_of_cpython", names.__file__)
            copy = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(copy)
            return copy

    return load


def run_without(deletion):
    code = LEAK.replace("import closewait_guard", f"{deletion}\nimport closewait_guard", 1)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    "deletion",
    [
        "pass",
        "del sys._getframe",
        "del sys._current_frames",
        "del threading._active",
        "sys.modules['_sha1'] = None",
        "sys.modules['ctypes'] = None",
    ],
)
def test_a_leak_is_found_at_its_line_without_a_private_name(deletion):
    assert run_without(deletion) == ["True", "True", "False"]


def test_without_the_function_for_the_running_loop_reports_count_what_was_not_recorded():
    deletion = "del _asyncio._get_running_loop"
    assert run_without(deletion) == ["True", "False", "True"]


def test_frames_are_found_by_a_traceback_where_the_interpreter_does_not_give_them(copy_without):
    copy = copy_without(sys, "_getframe")

    def inner():
        return copy.current_frame(0), copy.current_frame(1)

    found = inner()
    assert [frame.f_code for frame in found] == [inner.__code__, sys._getframe().f_code]
    with pytest.raises(ValueError, match="not deep enough"):
        copy.current_frame(100_000)


def test_without_the_frames_of_threads_none_is_seen(copy_without):
    assert copy_without(sys, "_current_frames").current_frames() == {}


def test_without_the_table_of_threads_none_is_known(copy_without):
    assert copy_without(threading, "_active").threads == {}


def test_without_the_names_of_threads_none_is_known(copy_without):
    assert copy_without(threading.main_thread(), "_name").threads == {}


def test_a_socket_counts_as_closed_by_its_descriptor_where_nothing_else_says_so():
    class Bare: ...

    is_closed = names.is_closed_reader(Bare, socket.socket.fileno)
    assert names.file_objects_reader(Bare)(None) > 0
    with socket.socket() as sock:
        assert not is_closed(sock)
    assert is_closed(sock)


@pytest.mark.parametrize("has_method", [True, False])
def test_errors_of_a_finalizer_are_dropped_in_c_or_in_python(monkeypatch, has_method):
    seen = []

    def fail(argument):
        seen.append(argument)
        raise KeyboardInterrupt

    if not has_method:
        monkeypatch.setattr(names.io, "BufferedReader", lambda *_: object())
    assert names.dropping_errors(fail)("socket") is None
    assert seen[0] == "socket"


@pytest.mark.parametrize("has_extension", [True, False])
def test_the_interpreter_is_called_by_the_extension_or_by_ctypes(monkeypatch, has_extension):
    if not has_extension:
        monkeypatch.setattr(names, "_calls", None)
    elif names._calls is None:
        pytest.skip("the package has no extension")
    own, main, newest = names.interpreter_states("own", "main", "newest")
    assert own() == main() == newest() != 0
    asked = []

    class Asked:
        def __bool__(self):
            asked.append(threading.current_thread())
            return False

    ask_soon, kept = names.truth_asker(), Asked()
    assert ask_soon(kept)
    deadline = time.monotonic() + 10
    while not asked and time.monotonic() < deadline:
        time.sleep(0.001)
    assert asked == [threading.main_thread()]
    names.keep_library("there is none.so")


def test_where_the_interpreter_cannot_be_called_nothing_is_promised(monkeypatch):
    monkeypatch.setattr(names, "_calls", None)
    monkeypatch.setitem(sys.modules, "ctypes", None)
    assert names.interpreter_states("main") is None
    assert names.truth_asker()(object()) is False
    assert names.main_thread_waker(lambda _: 0) is None
    names.keep_library("libc.so.6")


@pytest.mark.parametrize("has_name", [True, False])
def test_the_running_loop_is_that_of_this_thread(monkeypatch, has_name):
    if not has_name:
        monkeypatch.delattr(asyncio, "_get_running_loop")

    async def ask():
        return names.running_loop() is asyncio.get_running_loop()

    assert asyncio.run(ask())
    assert names.running_loop() is None


def test_this_python_has_each_attribute_that_is_read():
    loop = asyncio.SelectorEventLoop()
    ours, theirs = multiprocessing.Pipe()
    pool, executor = ThreadPool(1), ProcessPoolExecutor(1)
    with socket.socket() as sock, sock.makefile("rb", buffering=0) as file, ours, theirs:
        task = partial(asyncio.tasks._PyTask, loop=loop)
        coroutine = asyncio.sleep(0)
        of_task = (names.TASK_NAME, names.TASK_COROUTINE, names.TASK_STATE)
        expected = [
            (threading.main_thread(), (names.THREAD_NAME, names.THREAD_TARGET)),
            (task(coroutine), of_task),
            (loop.call_soon(print), (names.HANDLE_CALLBACK,)),
            (loop, (names.LOOP_CLOSED, names.LOOP_SELECTOR, *names.LOOP_WAKERS)),
            (loop.create_future(), (names.DONE_CALLBACKS,)),
            (asyncio.TaskGroup(), (names.GROUP_TASK,)),
            (asyncio.Queue(), (names.QUEUE_WAITERS,)),
            (asyncio.StreamReader(loop=loop), (names.LOOP_OF,)),
            (file, (names.FILE_SOCKET,)),
            (ours, (names.CONNECTION_HANDLE,)),
            (pool, (names.POOL_STATE, names.POOL_TASKS[0])),
            (pool, (*names.POOL_QUEUES, *names.POOL_THREADS)),
            (executor, (names.EXECUTOR_CLOSED, names.EXECUTOR_THREAD, names.POOL_TASKS[1])),
            (executor, names.EXECUTOR_QUEUES),
            (executor._call_queue, (*names.QUEUE_ENDS, names.QUEUE_THREAD)),
        ]
        for owner, attributes in expected:
            assert [name for name in attributes if not hasattr(owner, name)] == [], owner
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    executor.shutdown()
    pool.close()
    pool.join()


def private_names_of_others(tree):
    """Private attributes of modules, and those that are read by name."""
    modules = {"sys", "socket", "threading", "asyncio", "io", "signal", "_asyncio", "_signal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and node.attr.startswith("_"):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            reads = node.func.id in ("field", "getattr") and len(node.args) > 1
            if reads and ast.unparse(node.args[0]) != "self":
                name = node.args[1]
                if isinstance(name, ast.Constant) and str(name.value).startswith("_"):
                    yield name.value


def test_no_other_module_reads_a_private_name_of_the_standard_library():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        # The attributes of foreign libraries stand in the file of each.
        if where != "_cpython/__init__.py" and not where.startswith(
            ("_libraries/", "integrations/")
        ):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {(where, name) for name in private_names_of_others(tree)}
    dunders = {each for each in found if each[1].startswith("__")}
    of_pytest = {each for each in found if each[1] in OF_PYTEST}
    assert found - dunders - of_pytest <= HOT


OF_ANOTHER = """
import socket, sys
sys.implementation.name = "pypy"
before = dict(vars(socket.socket))
import closewait_guard as cwg
for attempt in range(2):
    try:
        cwg.install()
    except ImportError as error:
        print(type(error).__name__, error)
print(vars(socket.socket) == before, cwg.Settings().grace, cwg.label("a"))
"""


def test_another_interpreter_is_refused_in_one_sentence_and_left_as_it_was():
    done = subprocess.run(
        [sys.executable, "-c", OF_ANOTHER], capture_output=True, text=True, timeout=60, check=True
    )
    *refusals, rest = done.stdout.splitlines()
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith(
            "UnsupportedPythonError closewait_guard needs CPython, and this is "
        )
    assert rest.startswith("True 1.0 ")


def test_a_run_of_pytest_in_another_interpreter_is_refused_only_where_it_asks(tmp_path):
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    (tmp_path / "test_two.py").write_text("def test_two(closewait_guard): pass\n")
    code = "import sys, pytest; sys.implementation.name = 'pypy'; sys.exit(pytest.main())"

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path,
        )
        return done.returncode, done.stdout + done.stderr

    assert run("test_one.py")[0] == 0
    for arguments in (("test_one.py", "--socket-leaks=fail"), ("test_two.py",)):
        code_of_exit, output = run(*arguments)
        assert code_of_exit == pytest.ExitCode.USAGE_ERROR, output
        assert "ERROR: closewait_guard needs CPython, and this is " in output
        assert "Traceback" not in output


# Before the guard is imported: what it may not use then is counted.
WITHOUT_GIL = """
import gc, sys
from pathlib import Path
sys._is_gil_enabled = lambda: False
used = set()
def watch(place, name):
    original = getattr(place, name)
    def call(*args):
        if "closewait_guard" in Path(sys._getframe(1).f_code.co_filename).parts:
            used.add(name)
        return original(*args)
    setattr(place, name, call)
for place, name in ((gc, "get_referrers"), (gc, "get_objects"), (gc, "get_referents"),
                    (sys, "getrefcount"), (sys, "_current_frames")):
    watch(place, name)
"""

LEAK_WITHOUT_GIL = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
import closewait_guard as cwg
cwg.install(grace=0)
def open_one():
    ours = socket.create_connection(server.getsockname())
    server.accept()[0].close()
    ours.recv(1)
    return ours
kept = [open_one()]
may_end = threading.Event()
def serve():
    held = open_one()
    may_end.wait()
thread = threading.Thread(target=serve)
thread.start()
while len((report := cwg.scan()).leaks) < 2:
    pass
open_one()
report = cwg.scan()
may_end.set()
print(*sorted(f"{leak.verdict} {leak.observation.record.opener.thread}" for leak in report.leaks))
print(sum("without the GIL" in note for note in report.coverage.notes), used)
"""

TEST_WITHOUT_GIL = """
import socket
server = socket.create_server(("127.0.0.1", 0))
def test_failing():
    assert False
def test_leaking():
    test_leaking.ours = socket.create_connection(server.getsockname())
def test_closing():
    socket.create_connection(server.getsockname()).close()
"""


def run_code(code: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=directory,
    )
    assert done.stderr == ""
    return done.stdout


def test_without_the_gil_leaks_are_found_and_nothing_of_other_threads_is_read(tmp_path):
    leaks, rest = run_code(WITHOUT_GIL + LEAK_WITHOUT_GIL, tmp_path).splitlines()
    assert leaks == "dropped MainThread leaked MainThread leaked Thread-1 (serve)"
    assert rest == "1 set()"


def test_without_the_gil_a_run_of_pytest_finds_its_leaks_and_reads_nothing_unsafe(tmp_path):
    (tmp_path / "test_it.py").write_text(TEST_WITHOUT_GIL)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "--socket-leaks=fail"]
    code = f"{WITHOUT_GIL}\nimport pytest; pytest.main({options})\nprint('used', used)"
    output = run_code(code, tmp_path)
    assert "ERROR test_it.py::test_leaking - line 7: leaked 1 socket" in output
    assert "1 failed, 2 passed, 1 error" in output
    assert "used set()" in output
