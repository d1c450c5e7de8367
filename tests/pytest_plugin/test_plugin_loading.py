"""The plugin's own modules are loaded as without pytest; its import hook is left as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_pytest_s_import_hook_finds_all_modules_but_ours(suite):
    suite.pytester.makepyfile(helper="")
    result = suite.fail(
        """
import sys
import helper

@pytest.mark.parametrize(
    ("name", "hooked"),
    [
        ("closewait_guard.pytest_plugin._hooks", False),
        ("closewait_guard._capture.registry", False),
        (__name__, True),
    ],
)
def test_it(name, hooked):
    socket.socket().close()
    found = type(sys.modules[name].__loader__).__module__ == "_pytest.assertion.rewrite"
    assert found == hooked
""",
        apart=True,
    )
    result.assert_outcomes(passed=3)


def test_pytest_under_run_starts_where_its_warnings_are_errors(tmp_path):
    """The package is loaded before pytest is, which warns of what it can no longer rewrite."""
    (tmp_path / "test_it.py").write_text("def test_it(): pass")
    pytest_with_errors = ["pytest", "-q", "-W", "error::pytest.PytestAssertRewriteWarning"]
    done = subprocess.run(
        [sys.executable, "-m", "closewait_guard", "run", "-m", *pytest_with_errors],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "1 passed" in done.stdout


def test_a_run_that_closes_its_sockets_loads_nothing_that_scans_or_judges(suite):
    suite.write(
        """
def test_it():
    socket.socket().close()
    left, right = socket.socketpair()
    left.close()
    right.close()
"""
    )
    code = """if True:
        import pytest, sys
        options = ["-p", "closewait_guard.pytest_plugin", "--socket-leaks=fail"]
        outcome = pytest.main(["-q", *options])
        loaded = {name for name in sys.modules if name.startswith("closewait_guard.")}
        assert "closewait_guard._capture.registry" in loaded
        parts = {name.split(".")[1] for name in loaded}
        assert not parts & set(sys.argv[1:]), parts
        sys.exit(outcome)
        """
    scanning = ("_guard", "_inspect", "_judge", "_holders", "_render", "model", "settings")
    done = subprocess.run(
        [sys.executable, "-c", code, *scanning],
        cwd=suite.pytester.path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("assertions", ["rewrite", "plain"])
def test_the_path_of_finders_is_left_as_it_was(suite, assertions):
    suite.write(
        """
import sys

def test_it():
    socket.socket().close()
    ours = [each for each in sys.meta_path if type(each).__name__ == "_PlainFinder"]
    assert len(ours) == (sys.argv[1] == "rewrite")
"""
    )
    code = f"""if True:
        import pytest, sys
        before = list(sys.meta_path)
        options = ["-p", "closewait_guard.pytest_plugin", "--socket-leaks=fail"]
        outcome = pytest.main(["-q", "--assert={assertions}", *options])
        assert sys.meta_path == before, sys.meta_path
        sys.exit(outcome)
        """
    done = subprocess.run(
        [sys.executable, "-c", code, assertions],
        cwd=suite.pytester.path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_within_a_run_uses_what_an_earlier_one_has_loaded(suite):
    """pytester takes what a run has imported out of `sys.modules` again."""
    for _ in range(3):
        result = suite.fail(
            "import closewait_guard as cwg\n"
            "def test_it():\n    assert callable(cwg.scan)\n    keep(socket.socket())\n"
        )
        result.assert_outcomes(passed=1, errors=1)
