"""The extension of IPython, in a real shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("IPython")
pytestmark = pytest.mark.whole_program

RUNNER = Path(__file__).parents[2] / "docs" / "guides" / "cells.py"
SERVER = """
import socket, time
import closewait_guard as cwg

server = socket.create_server(("127.0.0.1", 0))

def connect():
    ours = socket.create_connection(server.getsockname())
    server.accept()[0].close()
    return ours

def wait():
    end = time.monotonic() + 20
    while not cwg.scan().leaks and time.monotonic() < end:
        time.sleep(0.01)
"""


def run(tmp_path, *cells):
    """What each cell has printed, with itself."""
    program = tmp_path / "cells.ipy"
    program.write_text("\n# %%\n".join(cells), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(program)],
        env={**os.environ, "CLOSEWAIT_GUARD_GRACE": "0.05", "IPYTHONDIR": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    )
    return ["", *done.stdout.split("In [")[1:]]


def test_a_report_has_the_lines_of_cells_and_names_the_output_history(tmp_path):
    printed = run(
        tmp_path,
        "%load_ext closewait_guard",
        SERVER,
        "connect()",
        "wait()",
        "%closewait",
        "cwg.scan()",
        "%closewait status",
        "%closewait uninstall",
        "%unload_ext closewait_guard",
        "%closewait",
    )
    for report in printed[5:7]:
        assert re.search(r"opened   Cell In\[2\]:\d+ in connect\(\)", report)
        assert "ours = socket.create_connection(server.getsockname())" in report
        assert "from Cell In[3]:1 in <module>" in report
        assert "held by  IPython's output history (Out[3])" in report
    assert "closewait-guard is installed: 3 sockets opened since then, 2 open, 1 leak" in printed[7]
    assert "closewait-guard is not installed: %closewait install" in printed[8]
    assert "`%closewait` not found" in "".join(printed)


def test_a_cell_that_leaves_a_socket_open_fails(tmp_path):
    printed = run(
        tmp_path,
        "%load_ext closewait_guard\n%closewait nonsense",
        SERVER,
        "%%no_leaks 0.1\nkept = connect()",
        "%%no_leaks\nconnect().close()\nprint('closed')",
        "%%no_leaks\nconnect()\n1 / 0",
        "%%no_leaks later\npass",
        "%%no_leaks 0.1\nimport asyncio\nawait asyncio.sleep(0)\nprint('awaited')",
    )
    everything = "".join(printed)
    assert "%closewait takes one of scan, status, install, uninstall, not 'nonsense'" in everything
    assert "from Cell In[3]:1 in <module>" in printed[3]
    assert "held by  __main__.kept (module global)" in printed[3]
    assert "integrations/ipython.py" not in printed[3]
    assert printed[4].rstrip().endswith("closed")
    assert "ZeroDivisionError" in printed[5]
    assert "leaked socket" not in printed[5]
    assert "%%no_leaks takes a number of seconds, not 'later'" in everything
    # The loop of IPython, which is made for the first cell that awaits, is not the cell's.
    assert printed[7].rstrip().endswith("awaited")


def test_the_guard_that_was_there_before_stays_when_the_extension_goes(tmp_path):
    printed = run(
        tmp_path,
        "import closewait_guard as cwg\nguard = cwg.install()",
        "%load_ext closewait_guard\n%unload_ext closewait_guard",
        "guard.installed",
    )
    assert "True" in printed[3]


SHELL = """
import asyncio, os, re, sys
from html.parser import HTMLParser
from IPython.core.interactiveshell import InteractiveShell
import closewait_guard as cwg

shell = InteractiveShell.instance()
# As a kernel does it.
shell.compile.get_code_name = lambda raw, code, number: f"/tmp/ipykernel_1/{hash(code)}.py"
run, show = shell.run_cell, shell.display_formatter.format
LOADED_LATER = ("rich", "closewait_guard._render.page", "closewait_guard.reporters")


def shown_on_terminal(report):
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:
        before, sys.stdout = sys.stdout, terminal
        try:
            return show(report)[0]["text/plain"]
        finally:
            sys.stdout = before
            os.close(ours)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
"""


def run_shell(tmp_path, code):
    """Run code that looks at what a shell shows; `run` runs a cell, `show` is the mime bundle."""
    environment = {**os.environ, "CLOSEWAIT_GUARD_GRACE": "0.05", "IPYTHONDIR": str(tmp_path)}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    environment["TERM"] = "xterm"
    program = f"SERVER = {SERVER!r}\n{SHELL}{code}"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


def test_a_notebook_shows_a_report_as_a_page_in_a_frame_and_a_terminal_as_text(tmp_path):
    run_shell(
        tmp_path,
        r"""
run("%load_ext closewait_guard")
run(SERVER, store_history=True)
assert not set(LOADED_LATER) & set(sys.modules)
data = show(run("%closewait scan").result)[0]
assert set(data) == {"text/plain"} and data["text/plain"].startswith("closewait-guard: no leaks")

run("with cwg.label('\"></iframe><script>alert(1)</script>'): kept = connect()", store_history=True)
run("wait()", store_history=True)
report = run("%closewait scan").result
data = show(report)[0]
assert set(data) == {"text/plain", "text/html"}
assert "opened   Cell In[1]:" in data["text/plain"] and "\x1b" not in data["text/plain"]
tags = Tags(data["text/html"]).found
assert [tag for tag, _ in tags] == ["iframe", "details", "summary", "pre"], tags
assert tags[0][1]["sandbox"].split()[0] == "allow-scripts" and "same" not in tags[0][1]["sandbox"]
page = tags[0][1]["srcdoc"]
assert page.startswith("<!DOCTYPE html>") and "Content-Security-Policy" in page
assert "Cell In[1]:" in page and "ipykernel_1" not in page
assert '<td class="package"></td>' in page
full = show(run("cwg.scan(full=True)").result)[0]["text/html"]
assert "create_server" in full and "ipykernel_1" not in full

plain = cwg.render_text(report).splitlines()[1]
in_color = shown_on_terminal(report)
assert "\x1b[" in in_color and plain in re.sub("\x1b\\[[0-9;]*m", "", in_color)
shell.colors = "nocolor"
assert "\x1b" not in shown_on_terminal(report)
sys.modules["rich.console"] = None
for name in [name for name in sys.modules if name == "closewait_guard._rich"]:
    del sys.modules[name]
shell.colors = "linux"
assert plain in shown_on_terminal(report)

# As a notebook does, whose loop runs the cells.
async def main():
    return run("%%no_leaks\nimport asyncio\nawait asyncio.sleep(0)").error_in_exec
assert "use `async with closewait_guard.no_leaks():`" in str(asyncio.run(main()))

run("%unload_ext closewait_guard")
data = show(report)[0]
assert set(data) == {"text/plain"} and data["text/plain"].startswith("Report(")
""",
    )


def test_without_the_extension_the_package_does_not_import_ipython():
    code = (
        "import closewait_guard, sys; closewait_guard.scan(); assert 'IPython' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
