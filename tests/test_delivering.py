"""Reporters are told in isolation: one that fails hurts neither the others nor the program."""

from __future__ import annotations

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard.testing import CapturingReporter, half_closed_pair


def test_reporters_are_told_by_report_and_not_by_scan():
    reporter = CapturingReporter()
    cwg.install(reporters=[reporter], grace=0)
    try:
        with half_closed_pair():
            cwg.scan()
            assert reporter.reports == []
            told = cwg.report()
    finally:
        cwg.uninstall()
    assert reporter.reports == [told]
    assert told.accused


def test_a_reporter_that_raises_is_told_once_and_the_others_still_run():
    def broken(report):
        raise RuntimeError("disk full")

    reporter = CapturingReporter()
    with cwg.Guard(reporters=[broken, reporter]) as guard:
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                guard.report()
    assert len(reporter.reports) == 3
    assert guard.failed_reports == 3
    [log] = logs
    assert log["event"] == "a reporter failed"
    assert "broken" in log["reporter"]
    assert str(log["exc_info"]) == "disk full"


def test_a_broken_logger_does_not_reach_the_program(monkeypatch):
    def broken(*args):
        raise RuntimeError("no logging today")

    monkeypatch.setattr(structlog, "get_logger", broken)
    with cwg.Guard(reporters=[broken]) as guard:
        guard.report()
    assert guard.failed_reports == 1


def test_an_interrupt_in_a_reporter_passes():
    def interrupted(report):
        raise KeyboardInterrupt

    with cwg.Guard(reporters=[interrupted]) as guard, pytest.raises(KeyboardInterrupt):
        guard.report()
