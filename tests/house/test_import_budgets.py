"""What each way into the package loads: a program pays for what it uses, and for nothing else.

What a run of pytest with sockets loads is in `tests/pytest_plugin/test_plugin_loading.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

# Raise it only for what every program with a guard needs.
_MAX_MODULES_OF_INSTALL = 30
# Raise it only for what every suite needs that uses the pytest plugin.
_MAX_MODULES_BEFORE_THE_FIRST_SOCKET = 17


def modules_after(code: str, *arguments: str, cwd: Path | None = None) -> set[str]:
    """The names of all modules that a fresh interpreter has loaded in the end."""
    report = "import sys; print('\\n', *sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_after_pytest(directory: Path, mode: str, *, expect: int) -> set[str]:
    """The same for a run of pytest in a directory, with the plugin in one of its modes."""
    code = """if True:
        import os, pytest, sys
        directory, mode, expect = sys.argv[1:]
        os.chdir(directory)
        # Other plugins may make sockets.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        options = ["-p", "closewait_guard.pytest_plugin", "-p", "no:cacheprovider"]
        assert pytest.main(["-q", *options, f"--socket-leaks={mode}"]) == int(expect)
    """
    return modules_after(code, str(directory), mode, str(expect))


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] == "closewait_guard"}


def parts(modules: set[str]) -> set[str]:
    """The folders and files in the root of the package that are loaded."""
    return {name.split(".")[1] for name in ours(modules) if "." in name}


def test_importing_the_package_loads_nothing_but_itself():
    before = modules_after("")
    assert modules_after("import closewait_guard") - before == {"closewait_guard", "__future__"}


def test_installing_loads_no_reporter_no_command_and_no_view_of_other_processes():
    loaded = modules_after("import closewait_guard as cwg; cwg.install(); cwg.scan()")
    assert not parts(loaded) & {"reporters", "integrations", "commands", "_processes", "testing"}


def test_installing_loads_neither_asyncio_nor_ssl():
    loaded = modules_after("import closewait_guard as cwg; cwg.install(); cwg.scan()")
    assert not loaded & {"asyncio", "_asyncio", "ssl", "_ssl", "wrapt"}


def test_installing_loads_no_more_modules_than_it_did(tmp_path):
    # Where no project file has settings of the guard.
    before = modules_after("import socket", cwd=tmp_path)
    code = "import closewait_guard as cwg; cwg.install()"
    loaded = modules_after(code, cwd=tmp_path) - before
    assert len(ours(loaded)) <= _MAX_MODULES_OF_INSTALL, sorted(ours(loaded))
    assert not parts(loaded) & {"_inspect", "_judge", "_holders", "_pipeline", "model"}
    assert not parts(loaded) & {"_render", "_format", "_stream", "_delivery"}
    assert not loaded & {"dataclasses", "inspect", "pathlib", "json"}


def test_scanning_another_process_loads_nothing_that_records_the_sockets_of_this_one():
    code = "import sys; from closewait_guard.commands import main; main(sys.argv[1:])"
    loaded = modules_after(code, "scan", str(os.getpid())) - modules_after("")
    assert "_processes" in parts(loaded)
    assert not parts(loaded) & {"_capture", "_guard", "_pipeline", "_holders"}
    # A tenth of the time that all its modules take.
    assert not loaded & {"pathlib", "urllib.parse", "closewait_guard._libraries.kinds"}


def test_a_pytest_run_with_the_plugin_off_loads_what_reads_its_options_alone(tmp_path):
    loaded = modules_after_pytest(tmp_path, "off", expect=5)
    assert parts(loaded) == {"pytest_plugin", "_config", "exceptions"}
    assert {name for name in loaded if name.startswith("closewait_guard.pytest_plugin.")} == {
        "closewait_guard.pytest_plugin._options"
    }


def test_a_pytest_run_without_a_socket_loads_nothing_that_records_looks_or_judges(tmp_path):
    (tmp_path / "test_without_sockets.py").write_text("def test_it(): pass", encoding="utf-8")
    loaded = modules_after_pytest(tmp_path, "fail", expect=0)
    assert "closewait_guard.pytest_plugin._hooks" in loaded
    unused = {"_live", "_inspect", "_judge", "_holders", "_libraries", "_guard", "_pipeline"}
    assert not parts(loaded) & unused
    capture = {name for name in ours(loaded) if name.startswith("closewait_guard._capture.")}
    assert capture == {"closewait_guard._capture.hooks"}
    assert len(ours(loaded)) <= _MAX_MODULES_BEFORE_THE_FIRST_SOCKET, sorted(ours(loaded))


@pytest.mark.parametrize("package", ["_capture", "_inspect", "_libraries"])
def test_a_package_that_loads_its_names_on_demand_has_them_all(package):
    front = import_module(f"closewait_guard.{package}")
    assert all(hasattr(front, name) for name in front.__all__)
    assert not hasattr(front, "no_such_name")
