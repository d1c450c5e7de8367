"""What each way into the package loads: a program pays for what it uses, and for nothing else.

What a run of pytest loads is in `tests/pytest_plugin/test_plugin_loading.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Raise it only for what every program with a guard needs.
_MAX_MODULES_OF_INSTALL = 79


def modules_after(code: str, *arguments: str) -> set[str]:
    """The names of all modules that a fresh interpreter has loaded in the end."""
    report = "import sys; print('\\n', *sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


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


def test_installing_loads_no_more_modules_of_ours_than_it_did():
    loaded = ours(modules_after("import closewait_guard as cwg; cwg.install()"))
    assert len(loaded) <= _MAX_MODULES_OF_INSTALL, sorted(loaded)


def test_scanning_another_process_loads_nothing_that_records_the_sockets_of_this_one():
    code = "import sys; from closewait_guard.commands import main; main(sys.argv[1:])"
    loaded = modules_after(code, "scan", str(os.getpid()))
    assert "_processes" in parts(loaded)
    assert not parts(loaded) & {"_capture", "_guard", "_pipeline", "_holders"}
