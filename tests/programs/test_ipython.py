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


def test_without_the_extension_the_package_does_not_import_ipython():
    code = (
        "import closewait_guard, sys; closewait_guard.scan(); assert 'IPython' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
