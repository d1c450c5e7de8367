"""Which lines of code the plugin names, and how wide it writes."""

from __future__ import annotations

import re

import pytest

LIBRARY = """
import asyncio, socket, threading

KEPT = []

def connect():
    KEPT.append(socket.create_server(("127.0.0.1", 0)))

def connect_in_thread():
    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()

async def connect_in_task():
    done = asyncio.get_running_loop().create_future()

    async def connect_later():
        connect()
        done.set_result(None)

    KEPT.append(asyncio.get_running_loop().create_task(connect_later()))
    await done
"""


@pytest.fixture
def library(suite, monkeypatch):
    """A suite, and `mylib` in a `site-packages` that is outside the checkout and the rootdir."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    outside = suite.pytester.mkdir("site-packages")
    (outside / "mylib.py").write_text(LIBRARY, encoding="utf-8")
    (suite.pytester.mkdir("helpers") / "tools.py").write_text(
        "import mylib\ndef connect(): mylib.connect()\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", f"{outside}:{suite.pytester.path / 'helpers'}")
    checkout = suite.pytester.mkdir("checkout")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(checkout))

    def run(source):
        (checkout / "test_own.py").write_text(source, encoding="utf-8")
        return suite.fail(None, "-rE", "--rootdir=checkout", "checkout/test_own.py", apart=True)

    return run


@pytest.mark.parametrize("module", ["mylib", "tools"])
def test_the_line_that_is_annotated_and_summed_up_is_the_innermost_within_the_checkout(
    library, monkeypatch, module
):
    monkeypatch.setenv("COLUMNS", "120")
    result = library(
        f"""\
import {module}

def ask():
    {module}.connect()

def test_it():
    ask()
"""
    )
    result.stdout.fnmatch_lines(
        [
            "::error file=test_own.py,line=4::1 socket opened here leaked by *::test_it;*",
            "ERROR *test_own.py::test_it - line 4: leaked 1 socket",
        ]
    )


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import mylib\n\nclass TestIt:\n  def test_it(self): mylib.connect_in_thread()\n", 4),
        (
            "import mylib, pytest\n\n@pytest.fixture(scope='module')\ndef client():\n"
            "    mylib.connect_in_thread()\n\ndef test_it(client): pass\n",
            4,
        ),
    ],
    ids=["method", "fixture"],
)
def test_without_a_line_within_the_checkout_the_test_or_fixture_is_annotated(library, source, line):
    result = library(source)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.re_match_lines(
        [rf"::error file=test_own\.py,line={line}::1 socket leaked by .*(test_it|'client' of .*);"]
    )


def test_of_a_background_task_without_a_line_of_yours_the_error_names_the_test(library):
    result = library(
        "import asyncio, mylib\n\ndef test_it(): asyncio.run(mylib.connect_in_task())\n"
    )
    result.assert_outcomes(passed=1, errors=1)
    text = " ".join(result.stdout.str().split())
    assert re.search(r"opened in a background task[^;]*, by test_own\.py::test_it ", text), text
    assert "no line of your code" not in text


KEEPS = """
import socket

STORED = {{"{key}": []}}

def test_it():
    STORED["{key}"].append(socket.create_server(("127.0.0.1", 0)))
"""


@pytest.mark.parametrize(
    ("key", "between"), [("of", "  "), ("of" * 20, "\n           ")], ids=["short", "long"]
)
def test_where_the_global_variable_that_holds_the_socket_is_defined_is_said(suite, key, between):
    result = suite.fail(KEEPS.format(key=key))
    result.assert_outcomes(passed=1, errors=1)
    source = (suite.pytester.path / "test_it.py").read_text(encoding="utf-8").splitlines()
    [number] = [place for place, line in enumerate(source, 1) if line.startswith("STORED = ")]
    held = f"  held by  test_it.STORED['{key}'][0]{between}<- defined at test_it.py:{number}\n"
    assert held in result.stdout.str()
    result.stdout.no_fnmatch_line("*(module global)*")


def test_of_a_librarys_variable_the_place_begins_with_its_package(library):
    result = library("import mylib\n\ndef test_it(): mylib.connect()\n")
    result.stdout.fnmatch_lines(["  held by  mylib.KEPT[0]  <- defined at mylib.py:4"])


@pytest.mark.parametrize(("columns", "width"), [(60, 60), (100, 100), (40, 60), (200, 120)])
@pytest.mark.parametrize("options", [(), ("-v",)], ids=["plain", "verbose"])
def test_the_error_is_as_wide_as_pytests_lines_but_not_too_narrow_or_too_wide(
    suite, monkeypatch, columns, width, options
):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = suite.fail(KEEPS.format(key="prices"), *options)
    titles = [line for line in result.outlines if line.strip().startswith("NEVER CLOSED ")]
    assert [len(line) for line in titles] == [width] * (2 if options else 1)
    begun = result.outlines.index(titles[0])
    ended = next(n for n, line in enumerate(result.outlines) if "= short test summary" in line)
    block = [line for line in result.outlines[begun:ended] if "=" * 5 not in line]
    assert max(map(len, block)) <= width
