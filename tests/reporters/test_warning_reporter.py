"""A leak is warned of at the line that leaks, after the program's own filters."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import pytest

import closewait_guard as cwg
import leaking
from closewait_guard import reporters
from closewait_guard._format import page_of
from closewait_guard.testing import half_closed_pair
from leaking import leaking_guard, report_leaks, run

LEAK = """
def fetch(stack):
    return stack.enter_context(half_closed_pair())

def main():
    from contextlib import ExitStack
    with cwg.Guard(cwg.Settings(grace=0), ["warn"]) as guard, ExitStack() as stack:
        fetch(stack)
        for _ in range(3):
            time.sleep(0.03)
            guard.report()
            fetch(stack)
        assert guard.failed_reports == 0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of a program, `shop`, that leaks in its line 8."""
    from leaking import PRELUDE

    (tmp_path / "shop.py").write_text(PRELUDE + LEAK)
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path)


def recorded(**settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = report_leaks(reporters.warn(), **settings)
    return report, caught


def test_a_leak_is_warned_of_at_the_line_that_opened_it():
    report, [warning] = recorded(count=3)
    site = report.findings[0].observation.record.site
    assert warning.category is reporters.SocketLeakWarning
    assert not issubclass(warning.category, ResourceWarning), "Python ignores those"
    assert (warning.filename, warning.lineno) == (leaking.__file__, site.lineno)
    [code] = {finding.code for finding in report.findings}
    hint = report.findings[0].hint
    where = f"({code}, {page_of(code)})"
    assert str(warning.message) == f"leaked socket, opened in fetch(): {hint} {where}"


def test_every_site_that_leaks_is_warned_of_and_no_other():
    report, _ = recorded(count=2)
    first, second = report.findings
    other = replace(first, verdict=cwg.Verdict.DEAD)
    explained = replace(second, verdict=cwg.Verdict.HALF_CLOSED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reporters.warn()(replace(report, findings=(first, other, explained)))
    assert [str(each.message).split()[0] for each in caught] == ["leaked", "dead"]


def test_a_leak_of_unknown_origin_is_warned_of_too():
    with half_closed_pair():
        _, caught = recorded(count=0)
    assert {(each.filename, each.lineno) for each in caught} == {("<unknown>", 0)}


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ([], 1),
        (["-W", "ignore"], 0),
        (["-W", "default"], 1),
        (["-W", "always"], 3),
        (["-W", "module::RuntimeWarning"], 1),
        (["-W", "ignore", "-W", "default::RuntimeWarning:shop"], 1),
        (["-W", "ignore", "-W", "default::RuntimeWarning:leaking"], 0),
        (["-W", "default", "-W", "ignore:leaked socket:RuntimeWarning"], 0),
    ],
)
def test_filters_by_module_and_by_text_work_and_once_is_once(module, options, times):
    _, stderr = run("import shop; shop.main()", options=options, PYTHONPATH=module)
    assert stderr.count("SocketLeakWarning: leaked socket, opened in fetch()") == times
    if times:
        assert f"{module}/shop.py:8: SocketLeakWarning" in stderr
        assert "\n  return stack.enter_context(half_closed_pair())" in stderr


def test_a_filter_by_module_set_in_the_program_works(module):
    code = """
import shop, warnings
warnings.filterwarnings("always", category=reporters.SocketLeakWarning, module="shop")
shop.main()
"""
    _, stderr = run(code, PYTHONPATH=module)
    assert stderr.count("SocketLeakWarning") == 3


def test_a_module_that_is_gone_is_warned_of_once_all_the_same(module):
    code = """
import shop
main = shop.main
del sys.modules["shop"]
main()
"""
    _, stderr = run(code, options=["-W", "default"], PYTHONPATH=module)
    assert stderr.count("SocketLeakWarning") == 1


def test_a_script_is_warned_of_once(module):
    """A script's own name for its file need not be the one its module has."""
    import subprocess
    from pathlib import Path

    script = Path(module, "shop.py")
    script.write_text(script.read_text() + "main()\n")
    done = subprocess.run(
        [sys.executable, "-W", "default", "shop.py"],
        cwd=module,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SocketLeakWarning") == 1


def test_a_filter_that_makes_it_an_error_keeps_no_other_site_from_being_warned_of():
    report, _ = recorded(count=2)
    first, second = report.findings
    report = replace(report, findings=(first, replace(second, verdict=cwg.Verdict.DEAD)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("error", "leaked socket")
        with pytest.raises(reporters.SocketLeakWarning, match="leaked socket"):
            reporters.warn()(report)
    assert [str(each.message).split()[0] for each in caught] == ["dead"]


def test_an_error_that_a_filter_makes_does_not_reach_the_program():
    with leaking_guard("warn") as guard, warnings.catch_warnings():
        warnings.simplefilter("error", reporters.SocketLeakWarning)
        guard.report()
    assert guard.failed_reports == 1
