"""A finding names the package whose code opened the socket, and who called that."""

from __future__ import annotations

import asyncio
import importlib
import os
import resource
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager

import httpx
import pytest
import requests

import closewait_guard as cwg
from closewait_guard._libraries import Packages, packages, packages_of
from closewait_guard.model import Frame, FrameKind
from closewait_guard.testing import half_closed_pair
from findings import findings_of
from servers import web

HTTPX, REQUESTS, URLLIB3 = (
    f"{module.__name__} {module.__version__}" for module in (httpx, requests, requests.urllib3)
)
ASKS = """
import httpx

def ask(url):
    client = httpx.Client()
    return client, client.send(client.build_request("GET", url), stream=True)
"""
OPENS = "import socket\n\ndef connect(address):\n    return socket.create_connection(address)\n"


def install(folder, files):
    """Write what pip would, for each distribution; beside a module, which packages it has."""
    for name, text in files.items():
        path = folder / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(folder / "site-packages")


def metadata(name, version):
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: no name\n"
    return {f"{name.replace('-', '_')}-{version}.dist-info/METADATA": text}


@pytest.fixture
def imported(monkeypatch):
    """Import modules from a folder that leaves with the test."""
    before = set(sys.modules)

    def load(folder, name):
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("chatter", "custom_components", "wire"):
            del sys.modules[name]


@contextmanager
def kept_response(ask, server):
    """A response that the server has ended early, and nothing has read."""
    client, response = ask(f"http://127.0.0.1:{server.port}/partial")
    with closing(client), closing(response):
        yield


def record_with(*stack):
    origin = cwg.Origin.CREATED
    return cwg.SocketRecord(1, 1, 0.0, "MainThread", None, (), {}, origin, None, stack)


@pytest.fixture
def guard():
    with cwg.Guard(cwg.Settings(grace=0.05)) as guard:
        yield guard


def only_packages(guard, caller):
    [leak] = [each for each in findings_of(guard, cwg.Verdict.LEAKED) if each.caller == caller]
    assert packages_of(leak.observation.record) == (leak.package, leak.via, leak.caller)
    return leak.package, leak.via


def test_a_library_has_its_version_and_the_outermost_that_the_program_called_is_named(
    guard, imported, tmp_path
):
    files = {
        "chatter/__init__.py": ASKS,
        "chat_client-1.80.dist-info/RECORD": "chatter/__init__.py,,",
    }
    chatter = imported(install(tmp_path, files | metadata("chat-client", "1.80")), "chatter")
    with web() as server, kept_response(chatter.ask, server):
        assert only_packages(guard, "test_packages") == (HTTPX, "chat-client 1.80")


def test_what_only_opens_connections_for_a_library_and_what_awaits_it_are_not_named(guard):
    async def ask(url):
        async with httpx.AsyncClient() as client, client.stream("GET", url):
            found = await asyncio.to_thread(only_packages, guard, "test_packages")
            assert found == (HTTPX, "")

    with web() as server:
        asyncio.run(ask(f"http://127.0.0.1:{server.port}/partial"))


def test_what_the_program_opened_itself_is_of_its_own_package(guard):
    with half_closed_pair():
        assert only_packages(guard, "test_packages") == ("test_packages", "")


def test_a_part_of_the_program_is_named_however_deep_the_library_is_that_it_calls(
    guard, imported, tmp_path
):
    plugin = tmp_path / "custom_components" / "foxess"
    plugin.mkdir(parents=True)
    (plugin / "api.py").write_text(
        "import requests\n\ndef ask(url):\n    session = requests.Session()\n"
        "    return session, session.get(url, stream=True)\n",
        encoding="utf-8",
    )
    api = imported(tmp_path, "custom_components.foxess.api")
    with web() as server, kept_response(api.ask, server):
        found = only_packages(guard, "custom_components.foxess")
    assert found == (URLLIB3, REQUESTS)


def test_without_a_line_of_the_program_the_library_is_named_that_called_the_other(
    guard, imported, tmp_path
):
    runs = (
        "from threading import Thread\nimport chatter\n\n"
        "def start(address, kept):\n"
        "    thread = Thread(target=lambda: kept.append(chatter.connect(address)))\n"
        "    thread.start()\n    thread.join()\n"
    )
    files = {"chatter/__init__.py": OPENS, "chatter-2.0.dist-info/RECORD": "chatter/__init__.py,,"}
    files |= {"wire.py": runs, "wire-3.1.dist-info/RECORD": "wire.py,,"}
    folder = install(tmp_path, files | metadata("chatter", "2.0") | metadata("wire", "3.1"))
    wire, kept = imported(folder, "wire"), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire.start(server.getsockname(), kept)
        server.accept()[0].close()
        with kept[0]:
            assert only_packages(guard, "") == ("chatter 2.0", "wire 3.1")


@pytest.mark.parametrize(
    ("files", "path", "label"),
    [
        # What pip installs and what is imported have different names.
        (metadata("a-b", "1") | {"a_b-1.dist-info/RECORD": "x/y.py,,\nz.py,,"}, "z.py", "a-b 1"),
        (metadata("a-b", "1") | {"a_b-1.dist-info/RECORD": "x/y.py,,\nz.py,,"}, "x/y.py", "a-b 1"),
        # Two of one namespace.
        (
            metadata("ns-a", "1")
            | metadata("ns-b", "2")
            | {"ns_a-1.dist-info/RECORD": "ns/a.py,,", "ns_b-2.dist-info/RECORD": "ns/b.py,,"},
            "ns/b.py",
            "ns-b 2",
        ),
        # As Debian has them, and setuptools had.
        (
            {"p-2.egg-info/PKG-INFO": "Name: P\nVersion: 2", "p-2.egg-info/top_level.txt": "q\n"},
            "q/r.py",
            "P 2",
        ),
        (metadata("q", "3"), "q/r.py", "q 3"),
        # Installed with another package of that name, or with none.
        (metadata("q", "3") | {"q-3.dist-info/RECORD": "q/a.py,,"}, "q/r.py", "q"),
        ({"q-3.dist-info/RECORD": "q/r.py,,"}, "q/r.py", "q"),
        ({"readme": ""}, "q/r.py", "q"),
    ],
)
def test_a_file_is_of_the_distribution_that_has_installed_it(tmp_path, files, path, label):
    folder = install(tmp_path, files)
    frame = Frame(f"{folder}/{path}", 1, "f", "m", FrameKind.LIBRARY)
    assert packages_of(record_with(frame)) == Packages(label)


@pytest.mark.parametrize(
    ("filename", "module", "caller"),
    [
        ("/app/prices.py", "prices", "prices"),
        ("/app/prices.py", "__main__", "prices"),
        ("/app/shop/__main__.py", "__main__", "shop"),
        ("/app/shop/__main__.py", "shop.__main__", "shop"),
        ("/app/shop/__init__.py", "shop", "shop"),
        ("/app/shop/views.py", "shop.views", "shop"),
        ("/app/shop/orders/api/v1.py", "shop.orders.api.v1", "shop.orders"),
        ("/config/plugins/foxess/__init__.py", "plugins.foxess", "plugins.foxess"),
        (
            "/src/homeassistant/components/hue/v2/light.py",
            "homeassistant.components.hue.v2.light",
            "homeassistant.components.hue",
        ),
        ("C:\\odoo\\addons\\sale\\models.py", "odoo.addons.sale.models", "odoo.addons.sale"),
        # Airflow imports each file by its path.
        ("/dags/nightly.py", "unusual_prefix_5be1_nightly", "nightly"),
        ("<stdin>", "<stdin>", ""),
    ],
)
def test_a_part_of_the_program_is_its_package_to_two_levels(filename, module, caller):
    assert packages_of(record_with(Frame(filename, 1, "f", module))) == Packages(caller, "", caller)


def test_without_a_descriptor_left_the_name_is_known_and_the_version_the_next_time(tmp_path):
    files = metadata("chatter", "2.0") | {"chatter-2.0.dist-info/RECORD": "chatter/__init__.py,,"}
    folder = install(tmp_path, files)
    frame = Frame(f"{folder}/chatter/__init__.py", 1, "f", "chatter", FrameKind.LIBRARY)
    record = record_with(frame)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = os.dup(0)
    os.close(highest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        assert packages_of(record).package == "chatter"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert packages_of(record).package == "chatter 2.0"


def test_what_pip_has_written_is_read_for_findings_only_and_importlib_metadata_never_loaded():
    code = """if True:
        import socket, sys, time
        opened = []
        sys.addaudithook(lambda name, args: name == "open" and opened.append(str(args[0])))
        import closewait_guard as cwg
        from urllib3.util.connection import create_connection
        sys.modules.pop("importlib.metadata", None)
        settings = cwg.Settings(grace=0, growth_window=10)
        server = socket.create_server(("127.0.0.1", 0))
        with cwg.Guard(settings) as guard, server:
            with create_connection(server.getsockname()), server.accept()[0] as peer:
                guard.report(), guard.report()
                # What packages declare is read by `install()`.
                read = [name for name in opened if "-info" in name]
                assert all(name.endswith("entry_points.txt") for name in read), read
                peer.close()
                time.sleep(0.05)
                assert guard.scan().leaks[0].package.startswith("urllib3 ")
                assert [name for name in opened if name.endswith("RECORD")]
        assert "importlib.metadata" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


FORKS = """
import os, signal, time
import closewait_guard as cwg
from closewait_guard.testing import connected_pair

with cwg.Guard(cwg.Settings(grace=0.1)) as guard, connected_pair() as (ours, theirs):
    ours.sendall(b"x")
    theirs.recv(1)
    time.sleep(0.2)
    child = os.fork()
    if not child:
        theirs.close()
        time.sleep(60)
    guard.scan()
    ours.close()
    end = time.monotonic() + 20
    found = []
    while not found and time.monotonic() < end:
        time.sleep(0.1)
        found = [each for each in guard.scan().leaks if each.verdict == "inherited"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print([(each.package, each.via, each.caller) for each in found])
"""


def test_what_only_a_child_keeps_open_is_of_the_package_that_opened_it(tmp_path):
    program = tmp_path / "forking.py"
    program.write_text(FORKS, encoding="utf-8")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[('forking', '', 'forking')]\n", done.stderr


def test_names_of_packages_are_names_of_code_and_are_not_redacted():
    settings = cwg.Settings(grace=0.05, redact=lambda _: "x")
    with cwg.Guard(settings) as guard, half_closed_pair():
        assert only_packages(guard, "test_packages") == ("test_packages", "")


def test_many_threads_may_ask_at_once(tmp_path):
    files = metadata("chatter", "2.0")
    files |= {"chatter-2.0.dist-info/RECORD": "".join(f"chatter/m{n}.py,,\n" for n in range(50))}
    folder, found = install(tmp_path, files), []

    def ask():
        for number in range(50):
            found.append(packages._distribution_of(f"{folder}/chatter/m{number}.py").label)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {"chatter 2.0"}
