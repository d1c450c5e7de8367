"""What scans is loaded with the first scan, in whatever state the program is by then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

import closewait_guard
from command_line import environment

PACKAGE = Path(closewait_guard.__file__).parent
# A connection that its peer has closed, and of which a scan must say so.
LEAKY = """
import os, signal, socket, sys, threading, time
import closewait_guard as cwg

server = socket.create_server(("127.0.0.1", 0))
cwg.install()
assert "closewait_guard._pipeline" not in sys.modules
leaked = socket.create_connection(server.getsockname())
server.accept()[0].close()

def is_seen():
    return leaked.fileno() in {each.observation.fd for each in cwg.scan().findings}

def says(*parts):
    try:
        cwg.scan()
    except cwg.NotLoadedError as error:
        return all(part in str(error) for part in parts) or print(error, file=sys.stderr)
"""


def run(source, cwd, *, before="", env=None, timeout=60):
    done = subprocess.run(
        [sys.executable, "-c", before + LEAKY + source],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment() | (env or {}),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def copy_of_package(folder):
    """A copy of the package in a folder, and the environment in which it is the one imported."""
    shutil.copytree(
        PACKAGE, folder / "closewait_guard", ignore=shutil.ignore_patterns("__pycache__")
    )
    return {"PYTHONPATH": str(folder)}


def test_the_first_scan_knows_since_when_sockets_are_recorded(tmp_path):
    run(
        """
import struct
cwg.uninstall()
cwg.install(grace=0.1)
refused = socket.create_connection(server.getsockname())
other = server.accept()[0]
other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
other.close()
time.sleep(0.5)
[verdict] = [e.verdict for e in cwg.scan().findings if e.observation.fd == refused.fileno()]
assert verdict == "dead", verdict
""",
        tmp_path,
    )


FIRST_SCANS = {
    "with no descriptor left": """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
assert is_seen()
""",
    "in another directory, with an empty path of modules": """
os.chdir("/")
standard, sys.path[:] = sys.path[:], []
assert says("No module named")
sys.path[:] = standard
assert is_seen()
""",
    "with a finder that refuses": """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("closewait_guard", "dataclasses")):
            raise ImportError("no import of " + name + " here")
sys.meta_path.insert(0, Refuse())
assert says("cannot be loaded", "no import of")
del sys.meta_path[0]
assert is_seen()
""",
    "with an audit hook that refuses": """
is_on = True
def refuse(event, arguments):
    if is_on and event in ("import", "open"):
        raise RuntimeError("not in this sandbox")
sys.addaudithook(refuse)
assert says("not in this sandbox")
is_on = False
assert is_seen()
""",
    "with everything replaced that a test replaces": """
import builtins, io, select
places = {builtins: ["open"], io: ["open"], select: ["poll"], threading: ["get_ident", "Lock"],
    os: ["listdir", "scandir", "stat", "readlink"], socket: ["gethostname"],
    time: ["time", "monotonic", "perf_counter", "thread_time", "sleep"]}
class Fake:
    def __call__(self, *args, **kwargs):
        return self
    def __getattr__(self, name):
        raise AttributeError(name)
originals = [(place, name, getattr(place, name)) for place in places for name in places[place]]
assert "tokenize" not in sys.modules
for place, name, _ in originals:
    setattr(place, name, Fake())
try:
    cwg.scan()
except Exception as error:
    print(repr(error), file=sys.stderr)
for original in originals:
    setattr(*original)
assert "tokenize" in sys.modules and "closewait_guard._pipeline" in sys.modules
assert is_seen()
kept = [
    (name, at) for name, module in list(sys.modules.items()) for at, value in vars(module).items()
    if type(value) is Fake
]
assert not kept, kept
""",
    "after it was removed from sys.modules": """
error_class = cwg.NotLoadedError
gone = {name: sys.modules.pop(name) for name in list(sys.modules) if "closewait_guard" in name}
guard = gone["closewait_guard._api"].install()
try:
    guard.scan()
except error_class as error:
    assert "removed from sys.modules" in str(error)
else:
    raise AssertionError
sys.modules.update(gone)
assert is_seen()
""",
    "in a test that replaces modules and then removes what was loaded": """
import types
before, originals = dict(sys.modules), {"os": os, "io": sys.modules["io"], "time": time}
for name, module in originals.items():
    sys.modules[name] = types.SimpleNamespace(**vars(module))
assert is_seen()
for name in set(sys.modules) - set(before):
    del sys.modules[name]
sys.modules.update(before)
settings = cwg.Settings()
cwg.install()
report = cwg.scan()
assert cwg.install() is cwg.install(settings) and type(report) is cwg.model.Report and is_seen()
assert cwg.render_text(report) and type(cwg.from_dict(cwg.to_dict(report))) is type(report)
used = [
    name for name, module in list(sys.modules.items())
    if name.startswith("closewait_guard") and vars(module).get("os", os) is not os
]
assert not used, used
""",
    "in a handler that interrupts its import": """
import builtins
original, at = builtins.__import__, []
def interrupted(name, *args, **kwargs):
    if name == "dataclasses" and not at:
        at.append(name)
        signal.raise_signal(signal.SIGUSR1)
    return original(name, *args, **kwargs)
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(is_seen()))
builtins.__import__ = interrupted
assert is_seen() and seen == [True]
""",
    "interrupted by what a handler raises": """
class Enough(Exception):
    pass
def handler(*_):
    raise Enough
signal.signal(signal.SIGALRM, handler)
ends = set()
for microseconds in range(500, 200_000, 1500):
    signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
    try:
        try:
            cwg.scan()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Enough:
        ends.add("interrupted")
    except cwg.NotLoadedError as error:
        # Python 3.11 makes a RuntimeError of what is raised while a class is made.
        assert isinstance(error.__cause__.__cause__, Enough)
    else:
        break
assert ends and is_seen()
""",
    "at the recursion limit": """
def deeper(left):
    return deeper(left - 1) if left else cwg.scan()
limit = sys.getrecursionlimit()
for left in range(limit - 30, 0, -20):
    try:
        deeper(left)
    except RecursionError:
        continue
    except cwg.NotLoadedError as error:
        assert "RecursionError" in str(error)
        continue
    break
assert is_seen()
""",
    "in a finalizer": """
class Owner:
    def __del__(self):
        seen.append(is_seen())
seen = []
Owner()
assert seen == [True]
""",
    "in two threads at once": """
both, seen = threading.Barrier(2), []
def scan():
    both.wait()
    seen.append(is_seen())
threads = [threading.Thread(target=scan) for _ in range(2)]
for each in threads: each.start()
for each in threads: each.join(30)
assert seen == [True, True] and is_seen()
""",
    "in a thread that the module waits for which is being imported": """
open("waiting.py", "w").write('''
import threading, __main__
seen = []
thread = threading.Thread(target=lambda: seen.append(__main__.is_seen()))
thread.start()
thread.join(30)
''')
sys.path.insert(0, os.getcwd())
import waiting
assert waiting.seen == [True]
""",
    "in the middle of the import of a module with a name of ours": """
for name in ("settings", "model", "_pipeline"):
    open(name + ".py", "w").write("import __main__; seen = __main__.is_seen()")
sys.path.insert(0, os.getcwd())
import _pipeline, model, settings
assert _pipeline.seen and model.seen and settings.seen
""",
    "in a function of atexit": """
import atexit
atexit.register(lambda: os._exit(0 if is_seen() else 3))
sys.exit(4)
""",
    "in a child": """
pid = os.fork()
if not pid:
    leaked.close()
    own = socket.create_connection(server.getsockname())
    server.accept()[0].close()
    fds = {each.observation.fd for each in cwg.scan().findings}
    os._exit(0 if own.fileno() in fds else 5)
assert os.waitpid(pid, 0)[1] == 0
assert is_seen()
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals and forks")
@pytest.mark.parametrize("when", FIRST_SCANS)
def test_the_first_scan_sees_what_has_leaked_or_says_in_one_sentence_why_not(when, tmp_path):
    run(FIRST_SCANS[when], tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_child_loads_nothing_so_it_waits_for_no_import_of_another_thread(tmp_path):
    # At the fork another thread is in the middle of an import that the first scan needs too.
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "slow.py").write_text("import __main__; __main__.block()")
    source = """
import builtins
sys.path.insert(0, "modules")
entered, leave = threading.Event(), threading.Event()
def block():
    entered.set()
    leave.wait(30)
thread = threading.Thread(target=__import__, args=("slow",))
thread.start()
entered.wait(30)
forked = os.fork()
if not forked:
    names = set(sys.modules)
    signal.alarm(20)
    seen = is_seen()
    os._exit(0 if names == set(sys.modules) and seen else 5)
status = os.waitpid(forked, 0)[1]
leave.set()
assert status == 0, status
"""
    run(source, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_what_a_handler_raises_while_a_fork_loads_reaches_the_parent_only(tmp_path):
    source = """
import builtins
original = builtins.__import__
def interrupted(name, *args, **kwargs):
    if name == "dataclasses":
        builtins.__import__ = original
        signal.raise_signal(signal.SIGINT)
    return original(name, *args, **kwargs)
builtins.__import__ = interrupted
# It may have been started with that signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What has to be noted of each at a fork is not to take the exception's time.
many = [socket.socket() for _ in range(400)]
caught = pid = None
try:
    pid = os.fork()
    if pid == 0 and os.fork() == 0:
        os._exit(0)
    for _ in range(1000 if pid else 50):
        time.sleep(0.01)
except KeyboardInterrupt:
    caught = True
if pid == 0:
    os._exit(5 if caught else 0)
# The number may have been lost with the exception.
status = os.wait()[1]
assert (caught, status) == (True, 0), (caught, status)
"""
    done = run(source, tmp_path)
    assert not done.stderr


def test_other_files_than_those_that_run_are_not_loaded(tmp_path):
    folder = tmp_path / "site"
    env = copy_of_package(folder)
    source = """
import pathlib
for path in pathlib.Path(cwg.__file__).parent.rglob("*.py"):
    path.write_text("raise SystemExit('this is the next version')")
assert says("its files have been replaced; restart the program")
assert says("its files have been replaced; restart the program")
"""
    run(source, tmp_path, env=env)


def test_a_package_that_has_been_deleted_gets_one_sentence(tmp_path):
    env = copy_of_package(tmp_path / "site")
    source = """
import shutil
shutil.rmtree(os.path.dirname(cwg.__file__))
assert says("its files have been replaced; restart the program")
"""
    run(source, tmp_path, env=env)


def test_in_an_archive_with_a_relative_path_and_another_directory_one_sentence_is_said(tmp_path):
    copy_of_package(tmp_path / "app")
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz", main="closewait_guard:install")
    source = """
os.chdir("/")
assert says("cannot be loaded")
os.chdir(home)
assert is_seen()
assert "app.pyz" in cwg.__file__
"""
    before = "import os, sys; home = os.getcwd(); sys.path.insert(0, 'app.pyz')\n"
    run(source, tmp_path, before=before)


def test_without_a_spare_descriptor_all_is_loaded_at_once(tmp_path):
    source = """
import os, sys, resource
import closewait_guard as cwg
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
cwg.install()
assert "closewait_guard._pipeline" in sys.modules
"""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment())
    assert done.returncode == 0


def test_an_install_that_can_load_nothing_leaves_the_class_as_it_was(tmp_path):
    source = """
import os, socket
from closewait_guard import NotLoadedError, install
before, taken = dict(vars(socket.socket)), []
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
try:
    install()
except NotLoadedError as error:
    assert "Too many open files" in str(error)
else:
    raise AssertionError
assert dict(vars(socket.socket)) == before
# Some builds of libffi keep one from the first import of ctypes on.
os.close(taken.pop())
os.close(taken.pop())
assert install().installed
"""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment())
    assert done.returncode == 0


def test_the_program_gets_the_lowest_numbers_as_without_the_guard(tmp_path):
    source = """
import os
before = os.dup(0)
os.close(before)
import closewait_guard as cwg
cwg.install()
assert os.dup(0) == before
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment())
    assert done.returncode == 0


def test_with_too_little_memory_the_scan_fails_and_the_next_one_does_not(tmp_path):
    source = """
import resource
limit = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
taken = []
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limit[1]))
try:
    while True:
        taken.append(bytearray(1 << 12))
except MemoryError:
    pass
for _ in range(8):
    taken.pop()
try:
    seen = is_seen()
except (MemoryError, cwg.NotLoadedError):
    seen = None
del taken
resource.setrlimit(resource.RLIMIT_AS, limit)
assert seen in (True, None) and is_seen()
"""
    pytest.importorskip("resource")
    run(source, tmp_path)
