"""Prometheus and OpenTelemetry show the numbers of the latest report, and hurt no program."""

from __future__ import annotations

import importlib
import math
import socket
import sys
import threading
import time
from contextlib import ExitStack

import pytest
import requests
import urllib3
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import closewait_guard as cwg
from closewait_guard._monitor import Monitor
from closewait_guard._pipeline import Pipeline
from closewait_guard.exceptions import MissingExtraError
from closewait_guard.integrations import opentelemetry, prometheus
from closewait_guard.testing import half_closed_pair
from leaking import leaking_guard, run
from servers import web

INF = math.inf


@pytest.fixture
def registry():
    made = CollectorRegistry()
    yield made
    prometheus.unregister(made)


def scrape(registry):
    """What a scrape shows: by name and labels in their order, read back from the text."""
    text = generate_latest(registry).decode()
    return {
        (
            sample.name.removeprefix("closewait_guard_"),
            *dict(sorted(sample.labels.items())).values(),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_shows_the_latest_report_and_makes_no_scan(registry, monkeypatch):
    with leaking_guard(count=3) as guard:
        prometheus.register(registry, guard=guard)
        assert scrape(registry) == {("up",): 0}
        report = guard.report()
        kept = socket.socket()
        monkeypatch.setattr(Pipeline, "_inspect", None)
        shown = scrape(registry)
        kept.close()
        [group] = report.by_site()
        leak = report.leaks[0].observation
        assert shown["up",] == 1
        assert shown["sockets", "CLOSE_WAIT"] == shown["findings", "warning", "leaked"] == 3
        assert shown["sockets", "healthy"] == report.open_sockets - 3
        site = ("tests/leaking.py:", str(group.site.lineno))
        labels = next(key for key in shown if key[0] == "leaked_sockets")
        assert labels[1:] == ("CWG101", group.fingerprint, "".join(site))
        assert shown[labels] == 3
        assert shown["close_wait_oldest_seconds",] >= leak.peer_closed_for
        assert shown["descriptors_open",] == report.fd_used
        assert shown["descriptors_limit",] == report.fd_limit
        assert shown["descriptors", "socket"] == report.descriptors.by_kind["socket"]
        # Three for each pair, of which the listener and the peer's end are closed; not `kept`.
        assert shown["sockets_opened_total",] == 9
        assert shown["sockets_closed_total",] == 6
        assert shown["leaked_sockets_growth_per_minute",] == 0
        assert shown["descriptors_time_left_seconds",] == INF
        assert 0 < shown["scan_cpu_seconds",] < 60
        assert shown["last_report_timestamp_seconds",] == pytest.approx(report.taken_at)
        assert shown["not_covered",] == len(report.coverage.notes)
    # Its numbers would be taken for those of now.
    assert scrape(registry) == {("up",): 0}


def hide(text):
    return text.replace("127.0.0.1", "HOST")


def test_what_is_no_provider_of_meters_is_refused_in_one_sentence():
    with pytest.raises(cwg.ConfigurationError, match="expected a MeterProvider, got 'otlp'"):
        opentelemetry.register("otlp")


def test_opentelemetry_observes_the_same_numbers_by_the_names_of_its_conventions(registry):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    with (
        web() as server,
        requests.Session() as session,
        leaking_guard(count=2, redact=hide) as guard,
    ):
        for _ in range(2):
            opentelemetry.register(provider, guard=guard)
        prometheus.register(registry, guard=guard)
        session.get(server.url).close()
        guard.report()
        found = {
            (metric.name, *point.attributes.values()): point.value
            for resource in reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }
        shown = scrape(registry)
    provider.shutdown()
    pool = f"urllib3 pool of http://HOST:{server.port}"
    assert shown["pool_connections", "urllib3", pool, "idle"] == 1
    assert found["http.client.open_connections", "urllib3", pool, "idle"] == 1
    assert found["http.client.open_connections", "urllib3", pool, "active"] == 0
    assert not any(name.startswith("db.") for name, *_ in found)
    assert found["process.unix.file_descriptor.count",] == shown["descriptors_open",]
    assert found["closewait_guard.sockets", "CLOSE_WAIT"] == shown["sockets", "CLOSE_WAIT"] == 2
    assert found["closewait_guard.sockets.opened",] == shown["sockets_opened_total",]
    assert found["closewait_guard.findings", "leaked", "warning"] == 2
    assert 0 <= found["closewait_guard.report.age",] < 60
    assert found["closewait_guard.up",] == 1
    # It has no number that a backend may not take.
    assert ("closewait_guard.descriptors.time_left",) not in found
    assert all(map(math.isfinite, found.values()))


def test_a_pool_without_a_connection_left_is_one_of_the_full(registry, guard):
    prometheus.register(registry, guard=guard)
    with web() as server:
        name = f"urllib3 pool of {server.url}"
        pool = urllib3.HTTPConnectionPool("127.0.0.1", server.port, maxsize=1, block=True)
        with pool:
            response = pool.urlopen("GET", "/half", preload_content=False)
            guard.report()
            shown = scrape(registry)
            server.released.set()
            response.drain_conn()
            response.release_conn()
            guard.report()
            later = scrape(registry)
    limit = ("pool_connections_limit", "urllib3", name)
    assert shown["pool_connections", "urllib3", name, "used"] == shown[limit] == 1
    assert [shown[key] for key in shown if key[0] == "pools_full"] == [1]
    assert later["pool_connections", "urllib3", name, "idle"] == later[limit] == 1
    assert not [key for key in later if key[0] == "pools_full"]


def test_growth_and_the_time_that_is_left_are_those_of_the_alert(registry):
    minutes = iter(range(100))
    settings = cwg.Settings(grace=0, growth_window=10)
    with ExitStack() as stack, cwg.Guard(settings, clock=lambda: 60.0 * next(minutes)) as guard:
        prometheus.register(registry, guard=guard)
        for _ in range(25):
            stack.enter_context(half_closed_pair())
            report = guard.report()
        shown = scrape(registry)
    assert shown["leaked_sockets_growth_per_minute",] == pytest.approx(1)
    left = 60 * (report.fd_limit - report.fd_used)
    assert shown["descriptors_time_left_seconds",] == pytest.approx(left)


def test_of_hundreds_of_lines_the_worst_are_shown_by_name_whatever_they_are_called(registry):
    places = [f'/srv/"quoted"\\{number}\n\udc80.py' for number in range(40)]
    with ExitStack() as stack, cwg.Guard(cwg.Settings(grace=0)) as guard:
        prometheus.register(registry, guard=guard, sites=5)
        for number, place in enumerate(places):
            # By another name, so that it is not a helper of the tests that opens them.
            code = compile("made = enter(pair())", place, "exec")
            for _ in range(3 if number == 7 else 1):
                exec(code, {"enter": stack.enter_context, "pair": half_closed_pair})
        report = guard.report()
        shown = scrape(registry)
    leaks = {key[1:]: value for key, value in shown.items() if key[0] == "leaked_sockets"}
    assert len(leaks) == 6
    assert sum(leaks.values()) == len(report.leaks) == 42
    assert leaks["other", "other", "other"] == 42 - 3 - 4
    assert max(leaks.values()) == 35
    [worst] = [site for (*_, site), value in leaks.items() if value == 3]
    assert worst == 'srv/"quoted"/7\\n\\udc80.py:1'
    assert all(key[-1].isprintable() for key in leaks)


def test_registering_twice_is_as_once_and_what_is_unregistered_can_come_back(registry):
    with cwg.Guard() as guard:
        prometheus.register(registry, guard=guard)
        prometheus.register(registry, guard=guard)
        guard.report()
        assert scrape(registry)["up",] == 1
        with pytest.raises(cwg.ConfigurationError, match="with other arguments already"):
            prometheus.register(registry, guard=guard, sites=3)
        with pytest.raises(cwg.ConfigurationError, match="sites: expected a whole number"):
            prometheus.register(registry, sites=-1)
        prometheus.unregister(registry)
        prometheus.unregister(registry)
        assert scrape(registry) == {}
        prometheus.register(registry, guard=guard, sites=3)
        assert scrape(registry)["up",] == 1
        # Another program's metrics of these names.
        other = CollectorRegistry()
        other.register(prometheus._GuardCollector(prometheus.NumberSource()))
        with pytest.raises(cwg.ConfigurationError, match=r"register\(\): Duplicated"):
            prometheus.register(other)


def test_the_guard_of_the_process_is_found_whenever_it_is_installed(registry):
    prometheus.register(registry)
    assert scrape(registry) == {("up",): 0}
    try:
        cwg.install()
        assert scrape(registry) == {("up",): 0}
        with cwg.watch(interval=60, at_exit=False, reporters=[lambda _: None]):
            # Its first report is due in a minute.
            assert scrape(registry) == {("up",): 1}
            cwg.report()
            assert scrape(registry)["sockets", "CLOSE_WAIT"] == 0
        # A monitor that has stopped shows by the age of its report.
        assert time.time() - scrape(registry)["last_report_timestamp_seconds",] < 60
    finally:
        cwg.uninstall()
    assert scrape(registry) == {("up",): 0}


def test_a_scrape_may_ask_for_a_scan(registry):
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
        prometheus.register(registry, guard=guard, scan=True)
        assert scrape(registry)["sockets", "CLOSE_WAIT"] == 1


def test_what_fails_never_reaches_the_scrape(registry, monkeypatch):
    with leaking_guard() as guard:
        prometheus.register(registry, guard=guard)
        guard.report()
        at = scrape(registry)["last_report_timestamp_seconds",]
        with monkeypatch.context() as patched:
            patched.setattr(Pipeline, "_inspect", lambda *_, **__: 1 / 0)
            with Monitor(guard, interval=0.01, at_exit=False):
                time.sleep(0.05)
                # The latest that there is, by its own date.
                assert scrape(registry)["last_report_timestamp_seconds",] == at
        guard.report()
        monkeypatch.setattr("closewait_guard._series.numbers_of", lambda *_: 1 / 0)
        assert scrape(registry) == {("up",): 0}


def test_scrapes_beside_reports_and_an_uninstall_show_something_whole(registry):
    problems = []
    with leaking_guard() as guard:
        prometheus.register(registry, guard=guard)
        guard.report()
        should_end = threading.Event()

        def read():
            while not should_end.is_set():
                shown = scrape(registry)
                if shown != {("up",): 0} and shown["sockets", "CLOSE_WAIT"] != 1:
                    problems.append(shown)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            guard.report()
        guard.uninstall()
        guard.install()
        guard.report()
        should_end.set()
        for thread in threads:
            thread.join()
    assert not problems


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("prometheus", "prometheus_client", "prometheus"),
        ("opentelemetry", "opentelemetry.metrics", "opentelemetry"),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch, name, package, extra):
    module = f"closewait_guard.integrations.{name}"
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'closewait-guard\[{extra}\]'"):
        importlib.import_module(module)


FORKS = """
import threading, warnings
from prometheus_client import CollectorRegistry, mmap_dict, multiprocess
from closewait_guard.integrations import prometheus

warnings.simplefilter("ignore")
write_value = mmap_dict.MmapedDict.write_value

def write_slowly(*arguments):
    # Under the lock of prometheus_client.
    time.sleep(0.002)
    write_value(*arguments)

mmap_dict.MmapedDict.write_value = write_slowly
prometheus.register()
guard = cwg.install(grace=0)
end = threading.Event()

def report():
    while not end.is_set():
        guard.report()

thread = threading.Thread(target=report)
thread.start()
kept = half_closed_pair()
kept.__enter__()
for _ in range(6):
    child = os.fork()
    if not child:
        # Its own leak is counted for it, and not what the parent has counted so far.
        with half_closed_pair():
            guard.report()
        os._exit(0)
    end_by = time.monotonic() + 15
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < end_by, "a child hangs"
        time.sleep(0.001)
end.set()
thread.join()
guard.report()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
opened = registry.get_sample_value("closewait_guard_sockets_opened_total")
labels = {"pid": str(os.getpid()), "state": "CLOSE_WAIT"}
print(opened, registry.get_sample_value("closewait_guard_sockets", labels))
cwg.uninstall()
own = {"pid": str(os.getpid())}
print(registry.get_sample_value("closewait_guard_up", own))
# Not zero, which would be the moment of the alert.
print(registry.get_sample_value("closewait_guard_descriptors_time_left_seconds", own))
# The next guard begins to count anew, and a total never falls.
guard = cwg.install(grace=0)
with half_closed_pair():
    guard.report()
print(registry.get_sample_value("closewait_guard_sockets_opened_total") - opened)
"""


def test_processes_that_fork_while_reports_are_made_write_their_own_numbers(tmp_path):
    output, _ = run(FORKS, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert output.splitlines()[:4] == [f"{7 * 3:.1f} 1.0", "0.0", "nan", "3.0"], output


SHARED = """
from prometheus_client import CollectorRegistry, multiprocess
from closewait_guard.integrations import prometheus

prometheus.register()
guard = cwg.install(grace=0)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)

def show():
    found = [
        registry.get_sample_value(f"closewait_guard_{name}", {"pid": str(os.getpid())})
        for name in ("descriptors_open", "close_wait_oldest_seconds", "not_covered")
    ]
    # The peer may have ended in this very millisecond, but NaN is not at least zero.
    print(found[0] > 0, found[1] >= 0, found[2])

with half_closed_pair():
    for _ in range(3):
        guard.report()
        show()
"""


def test_what_workers_share_are_numbers_after_each_report(tmp_path):
    output, _ = run(SHARED, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert output.splitlines()[:3] == ["True True 0.0"] * 3, output


NO_FOLDER = """
from prometheus_client import CollectorRegistry, multiprocess
from closewait_guard.integrations import prometheus

prometheus.register()
guard = cwg.install(grace=0)
guard.report()
guard.report()
os.mkdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])
guard.report()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(registry.get_sample_value("closewait_guard_up", {"pid": str(os.getpid())}))
"""


def test_numbers_that_workers_cannot_share_are_told_once_until_they_can(tmp_path):
    folder = tmp_path / "made later"
    output, errors = run(NO_FOLDER, PROMETHEUS_MULTIPROC_DIR=str(folder))
    assert output == "1.0\n"
    (line,) = errors.splitlines()
    assert line.startswith(f"closewait-guard: metrics are lost: PROMETHEUS_MULTIPROC_DIR={folder} ")
