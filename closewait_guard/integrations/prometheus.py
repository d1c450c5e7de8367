"""Metrics for Prometheus, in the registry of prometheus_client.

    from closewait_guard.integrations import prometheus

    prometheus.register()

They are those of the latest report of `watch()`: a scrape makes no scan. Where the workers of a
server share a folder (`PROMETHEUS_MULTIPROC_DIR`), each writes its numbers there after each report,
and they carry its `pid`.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from closewait_guard._guard import Guard
from closewait_guard._numbers import MEASURES, Measure, Numbers, Sample
from closewait_guard._series import after_each_report
from closewait_guard._stream import print_error
from closewait_guard._threads import before_fork, in_child, in_parent
from closewait_guard.exceptions import ConfigurationError, MissingExtraError
from closewait_guard.integrations._source import MOST_SITES, NumberSource

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, make_wsgi_app
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise MissingExtraError(
        "metrics for Prometheus need prometheus_client: "
        f"pip install 'closewait-guard[prometheus]' ({missing})"
    ) from missing

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from prometheus_client.core import Metric

__all__ = [
    "ProcessNumbers",
    "make_app",
    "register",
    "unregister",
]


# The values of the labels of a process, and its numbers; None where no guard reports.
ProcessNumbers = tuple[tuple[str, ...], Numbers | None]

_PREFIX = "closewait_guard_"
_UP = f"{_PREFIX}up", "Whether a guard reports in this process."
# Of one measure. What is written to a file cannot be taken out of it again.
_MAX_LABELS_IN_FILES = 200
_VARIABLES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


def register(
    registry: CollectorRegistry = REGISTRY,
    *,
    guard: Guard | None = None,
    scan: bool = False,
    sites: int = MOST_SITES,
) -> None:
    """Have a registry show the numbers of the latest report. Idempotent.

    Without a guard, or before its first report, there is `closewait_guard_up` and nothing else: 0
    if none reports. No scrape fails for a reason of the guard's.

    Args:
        registry: The registry of the program, by default the one of prometheus_client.
        guard: Whose reports; by default the process-wide guard's, whenever it is installed.
        scan: Scan for each scrape, rather than show the latest report.
        sites: How many leaking lines have a series of their own, the worst first.

    Raises:
        ConfigurationError: The registry has these metrics already, of another guard or with other
            arguments.
    """
    source = NumberSource.of(guard, scan=scan, sites=sites)
    shared = _is_shared()
    # Every registry shows the same files.
    registry = REGISTRY if shared else registry
    with _registering:
        known = _registered.get(registry)
        if known is not None and known.source != source:
            raise ConfigurationError(
                "prometheus.register(): the registry has these metrics with other arguments "
                "already; call prometheus.unregister() first"
            )
        if shared and scan:
            raise ConfigurationError(
                "prometheus.register(): scan=True needs a scrape, and with "
                "PROMETHEUS_MULTIPROC_DIR another process may answer it"
            )
        if shared:
            _registered[registry] = known or _FileWriter(source)
            return
        collector = known if isinstance(known, _GuardCollector) else _GuardCollector(source)
        try:
            registry.register(collector)
        except ValueError as error:
            if known is None:
                raise ConfigurationError(f"prometheus.register(): {error}") from None
        _registered[registry] = collector


def unregister(registry: CollectorRegistry = REGISTRY) -> None:
    """Take the metrics out of a registry again. Idempotent."""
    with _registering:
        known = _registered.pop(REGISTRY if _is_shared() else registry, None)
    if isinstance(known, _FileWriter):
        known.stop()
    elif known is not None:
        try:
            registry.unregister(known)
        except KeyError:
            # The program has done so.
            return


def _is_shared() -> bool:
    return any(name in os.environ for name in _VARIABLES)


def make_app(
    read: Callable[[], Iterable[ProcessNumbers]], labels: Sequence[str]
) -> WSGIApplication:
    """A web application that answers a scrape with the numbers of several processes.

    Args:
        read: Reads them. It raises nothing.
        labels: The names of the labels by which processes are distinguished.
    """
    registry = CollectorRegistry()
    registry.register(_ProcessesCollector(read, labels))
    return make_wsgi_app(registry)


class _ProcessesCollector(Collector):
    """Shows the numbers of several processes."""

    def __init__(self, read: Callable[[], Iterable[ProcessNumbers]], labels: Sequence[str]) -> None:
        self._read, self._labels = read, tuple(labels)

    def describe(self) -> Iterator[Metric]:
        """All there may be: what registers it must not begin to read."""
        return _families((), self._labels, with_empty=True)

    def collect(self) -> Iterator[Metric]:
        return _families(self._read(), self._labels)


class _GuardCollector(_ProcessesCollector):
    """Shows the numbers of this process."""

    def __init__(self, source: NumberSource) -> None:
        super().__init__(lambda: [((), source.read())], ())
        self.source = source


def _families(
    read: Iterable[ProcessNumbers], labels: tuple[str, ...], *, with_empty: bool = False
) -> Iterator[Metric]:
    processes = list(read)
    up = GaugeMetricFamily(*_UP, labels=labels)
    for values, numbers in processes:
        up.add_metric(values, float(numbers is not None))
    yield up
    for measure in MEASURES:
        family = _family_of(measure, labels)
        for values, numbers in processes:
            for sample in (numbers or {}).get(measure.name, ()):
                family.add_metric((*values, *sample.labels), sample.value)
        if family.samples or with_empty:
            yield family


def _family_of(
    measure: Measure, labels: tuple[str, ...]
) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if measure.is_total else GaugeMetricFamily
    return kind(_PREFIX + measure.name, measure.description, labels=(*labels, *measure.labels))


class _FileWriter:
    """Writes the numbers to the files that the workers of a server share, after each report.

    Whichever worker is scraped shows what is in all files: a collector would have its own only.
    """

    def __init__(self, source: NumberSource) -> None:
        self.source = source
        # A process that never reports has no numbers, not even zeros.
        self._up: Gauge | None = None
        self._has_failed = False
        self._metrics: dict[str, Gauge | Counter] = {}
        self._shown: dict[str, set[tuple[str, ...]]] = {}
        # What has been counted, and by whom: another begins anew.
        self._counted: dict[str, float] = {}
        self._counted_by: tuple[int, weakref.ref[Guard]] | None = None
        self._stop = after_each_report(self.write)

    def stop(self) -> None:
        """Write no more."""
        self._stop()
        self.clear()

    def write(self) -> None:
        """Write the numbers of the latest report; what prevents it is told once."""
        try:
            self._write_latest()
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                folder = next(filter(None, map(os.environ.get, _VARIABLES)), "")
                print_error(f"metrics are lost: {_VARIABLES[0]}={folder} cannot be used: {error}")
        else:
            self._has_failed = False

    def _write_latest(self) -> None:
        guard, numbers = self.source.find_guard(), self.source.read()
        if guard is None or not numbers:
            return
        with _writing:
            if self._counted_by != (counted_by := (os.getpid(), weakref.ref(guard))):
                self._counted_by = counted_by
                self._counted.clear()
            if self._up is None:
                # All or none: there may be no room for another file.
                self._metrics = {each.name: _make_metric(each) for each in MEASURES}
                self._up = Gauge(*_UP, registry=None, multiprocess_mode="liveall")
            self._up.set(1)
            for measure in MEASURES:
                self._write(measure, numbers.get(measure.name, ()))
        guard._on_uninstall(self.clear)

    def clear(self) -> None:
        """Say that no guard reports any more."""
        with _writing:
            if self._up is None:
                return
            self._up.set(0)
            for measure in MEASURES:
                self._write(measure, ())

    def _write(self, measure: Measure, samples: Iterable[Sample]) -> None:
        metric = self._metrics[measure.name]
        if isinstance(metric, Counter):
            for _, value in samples:
                metric.inc(max(0.0, value - self._counted.get(measure.name, 0.0)))
                self._counted[measure.name] = value
            return
        shown = self._shown.setdefault(measure.name, set())
        values: dict[tuple[str, ...], float] = {}
        for labels, value in samples:
            is_kept = labels in shown or len(shown) < _MAX_LABELS_IN_FILES
            key = labels if is_kept else ("other",) * len(labels)
            shown.add(key)
            values[key] = values.get(key, 0.0) + value
        # What is gone counts as none; and what is no count, such as the time that is left, as NaN.
        gone = dict.fromkeys(shown - values.keys(), 0.0 if measure.labels else math.nan)
        for labels, value in (values | gone).items():
            (metric.labels(*labels) if labels else metric).set(value)


def _make_metric(measure: Measure) -> Gauge | Counter:
    name = _PREFIX + measure.name
    if measure.is_total:
        return Counter(name, measure.description, measure.labels, registry=None)
    return Gauge(
        name, measure.description, measure.labels, registry=None, multiprocess_mode="liveall"
    )


_registered: weakref.WeakKeyDictionary[CollectorRegistry, _GuardCollector | _FileWriter] = (
    weakref.WeakKeyDictionary()
)
_registering, _writing = threading.Lock(), threading.Lock()
# prometheus_client has a lock around its files, which must not be taken while the process forks.
_MAX_SECONDS_BEFORE_FORK = 1.0
_held_for_fork = False


@before_fork
def _before_fork() -> None:
    global _held_for_fork
    _held_for_fork = _writing.acquire(timeout=_MAX_SECONDS_BEFORE_FORK)


@in_parent
def _in_parent() -> None:
    global _held_for_fork
    if _held_for_fork:
        _held_for_fork = False
        _writing.release()


@in_child
def _in_child() -> None:
    global _writing, _held_for_fork
    _writing, _held_for_fork = threading.Lock(), False
