"""A leaking server under a monitor, its minutes made short: reported once, worse, and well."""

from __future__ import annotations

import socket
import threading
import time
from itertools import pairwise

import closewait_guard as cwg
from closewait_guard import _monitor, reporters
from closewait_guard._monitor import Monitor
from closewait_guard.testing import CapturingReporter

# One second of the test is ten minutes of the series.
FASTER = 600


class LeakingServer:
    """A thread for each connection; the handler forgets to close when the client has gone."""

    def __init__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.forgotten = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        while True:
            conn, _ = self.server.accept()
            if conn.recv(4) == b"stop":
                conn.close()
                return
            threading.Thread(target=self.handle, args=(conn,)).start()

    def handle(self, conn):
        while conn.recv(100):
            pass
        self.forgotten.append(conn)

    def request(self, text=b"work"):
        with socket.create_connection(self.server.getsockname()) as client:
            client.sendall(text)

    def repair(self):
        while self.forgotten:
            self.forgotten.pop().close()

    def stop(self):
        self.request(b"stop")
        self.thread.join()
        self.server.close()


def run_until(condition, work=None, pause=0.03):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        if work is not None:
            work()
        time.sleep(pause)


def test_a_site_that_leaks_is_reported_once_grows_gets_worse_and_is_reported_as_closed(monkeypatch):
    # The heap of a test run is large: looks that cost what they may would be seconds apart.
    monkeypatch.setattr(_monitor, "SCANNING_SHARE", 0.5)
    everything, news = CapturingReporter(), CapturingReporter()
    settings = cwg.Settings(
        grace=0, growth_window=10, count_warning=40, age_warning=1, age_critical=3
    )
    guard = cwg.Guard(
        settings,
        [everything, reporters.changes(news)],
        clock=lambda: time.monotonic() * FASTER,
    )

    def leak_some():
        # By the number of reports, not by time: a busy machine makes them rarer.
        if len(server.forgotten) < 4 * len(everything.reports):
            server.request()

    with guard:
        server = LeakingServer()
        try:
            with Monitor(guard, interval=0.1):
                run_until(lambda: everything.reports)
                run_until(lambda: {"growth", "count"} <= reported_kinds(everything), leak_some)
                run_until(lambda: "critical" in reported_severities(everything, "age"))
                server.repair()
                run_until(lambda: all_resolved(everything))
        finally:
            server.stop()

    assert_the_site_is_reported_again_only_when_it_has_doubled_or_gets_worse(news.reports)
    assert_growth_is_reported_with_its_site(everything.reports)
    assert_everything_recovers(everything.reports, news.reports)


def reported_kinds(reporter):
    return {alert.kind for report in reporter.reports for alert in report.alerts}


def reported_severities(reporter, kind):
    alerts = (alert for report in reporter.reports for alert in report.alerts)
    return [alert.severity for alert in alerts if alert.kind == kind]


def all_resolved(reporter):
    last = {}
    for report in reporter.reports:
        for alert in report.alerts:
            last[alert.kind, alert.data.get("site")] = alert.status
    return set(last.values()) == {"resolved"}


def assert_the_site_is_reported_again_only_when_it_has_doubled_or_gets_worse(reported):
    steps = []
    for report in reported:
        for group in report.by_site():
            site = group.findings[0].observation.record.site
            assert site is not None
            if not group.findings[0].is_leak:
                # One that is just being closed.
                continue
            if site.function == "LeakingServer.request":
                # Without a grace time, a client between its socket() and its connect() is one too.
                continue
            assert site.function == "LeakingServer.serve"
            steps.append((group.count, group.severity))
    assert steps[-1][0] > 10
    for (before, severity), (count, next_severity) in pairwise(steps):
        assert count >= 2 * before or next_severity.rank > severity.rank
    assert [steps[0][1], steps[-1][1]] == ["warning", "critical"]


def assert_growth_is_reported_with_its_site(reports):
    alerts = [alert for report in reports for alert in report.alerts]
    growth = [alert for alert in alerts if alert.kind == "growth"]
    assert growth[0].status == "raised"
    assert "test_end_to_end.py" in str(growth[0].data["site"])
    assert growth[0].data["per_minute"] > 0
    assert growth[0].data["limit_reached_in_s"] > 0
    count = [alert.status for alert in alerts if alert.kind == "count"]
    assert (count[0], count[-1]) == ("raised", "resolved")
    severities = [alert.severity for alert in alerts if alert.kind == "age"]
    assert severities == sorted(severities, key=lambda severity: severity.rank)
    assert set(severities) == {"warning", "critical"}


def assert_everything_recovers(reports, reported):
    closed = {
        each.finding.observation.record.serial for report in reported for each in report.closed_late
    }
    leaked = {leak.observation.record.serial for report in reported for leak in report.leaks}
    assert closed >= leaked > set()
    assert "CLOSED LATE" in "".join(cwg.render_text(report) for report in reported)
    # The last report is that of the end of the block.
    assert not reports[-1].leaks
