"""Metrics for OpenTelemetry, by its API: the program's SDK decides where they go.

    from closewait_guard.integrations import opentelemetry

    opentelemetry.register()

They are those of the latest report of `watch()`, named after the semantic conventions where these
have a name: to collect them makes no scan.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from closewait_guard._clock import wall
from closewait_guard._config import shown
from closewait_guard._guard import Guard
from closewait_guard._numbers import MEASURES, Measure, Sample
from closewait_guard.exceptions import ConfigurationError, MissingExtraError
from closewait_guard.integrations._source import MOST_SITES, NumberSource

try:
    from opentelemetry.metrics import (
        CallbackOptions,
        Meter,
        MeterProvider,
        Observation,
        get_meter_provider,
    )
except ImportError as missing:
    raise MissingExtraError(
        "metrics for OpenTelemetry need opentelemetry-api: "
        f"pip install 'closewait-guard[opentelemetry]' ({missing})"
    ) from missing

__all__ = [
    "register",
]


class _Convention(NamedTuple):
    """How a measure is called there, its unit, and what its labels are called.

    Attributes:
        is_sum: It may be added up over processes, and rises and falls.
    """

    name: str
    unit: str
    labels: tuple[str, ...] = ()
    is_sum: bool = True


_OWN = "closewait_guard."
_CONVENTIONS = {
    "sockets": _Convention("closewait_guard.sockets", "{socket}", ("state",)),
    "findings": _Convention("closewait_guard.findings", "{socket}", ("verdict", "severity")),
    "leaked_sockets": _Convention(
        "closewait_guard.leaked_sockets", "{socket}", ("fingerprint", "site", "code")
    ),
    "sockets_opened": _Convention("closewait_guard.sockets.opened", "{socket}"),
    "sockets_closed": _Convention("closewait_guard.sockets.closed", "{socket}"),
    "sockets_dropped": _Convention("closewait_guard.sockets.dropped", "{socket}"),
    "close_wait_oldest_seconds": _Convention(
        "closewait_guard.close_wait.oldest", "s", is_sum=False
    ),
    "descriptors": _Convention("closewait_guard.descriptors", "{file_descriptor}", ("kind",)),
    "descriptors_open": _Convention("process.unix.file_descriptor.count", "{file_descriptor}"),
    "descriptors_limit": _Convention(
        "closewait_guard.descriptors.limit", "{file_descriptor}", is_sum=False
    ),
    "leaked_sockets_growth_per_minute": _Convention(
        "closewait_guard.leaked_sockets.growth", "{socket}/min", is_sum=False
    ),
    "descriptors_time_left_seconds": _Convention(
        "closewait_guard.descriptors.time_left", "s", is_sum=False
    ),
    "pools_full": _Convention("closewait_guard.pools.full", "{pool}", (f"{_OWN}pool",)),
    "scan_cpu_seconds": _Convention("closewait_guard.scan.cpu_time", "s", is_sum=False),
    "last_report_timestamp_seconds": _Convention("closewait_guard.report.age", "s", is_sum=False),
    "not_covered": _Convention("closewait_guard.not_covered", "{note}", is_sum=False),
}
# Pools of connections to databases, and those of HTTP clients, have conventions of their own.
_DATABASES = _Convention(
    "db.client.connection.count",
    "{connection}",
    (f"{_OWN}library", "db.client.connection.pool.name", "db.client.connection.state"),
)
_DATABASE_LIMITS = _Convention(
    "db.client.connection.max",
    "{connection}",
    (f"{_OWN}library", "db.client.connection.pool.name"),
)
_DATABASE_WAITING = _Convention(
    "db.client.connection.pending_requests",
    "{request}",
    (f"{_OWN}library", "db.client.connection.pool.name"),
)
_HTTP_WAITING = _Convention(
    "closewait_guard.http.client.pending_requests",
    "{request}",
    (f"{_OWN}library", f"{_OWN}pool"),
)
_HTTP = _Convention(
    "http.client.open_connections",
    "{connection}",
    (f"{_OWN}library", f"{_OWN}pool", "http.connection.state"),
)
_HTTP_LIBRARIES = frozenset({"urllib3", "httpcore", "httpcore2", "aiohttp"})
_HTTP_STATES = {"used": "active", "idle": "idle"}


def register(
    provider: MeterProvider | None = None,
    *,
    guard: Guard | None = None,
    sites: int = MOST_SITES,
) -> None:
    """Have a meter provider observe the numbers of the latest report. Idempotent.

    Without a guard that reports there is `closewait_guard.up` with 0, and nothing else.

    Args:
        provider: By default the one that the program has set, or will set.
        guard: Whose reports; by default the process-wide guard's, whenever it is installed.
        sites: How many leaking lines have a series of their own, the worst first.

    Raises:
        ConfigurationError: The number of sites is none, or the provider is no MeterProvider.
    """
    global _has_default
    if provider is not None and not isinstance(provider, MeterProvider):
        raise ConfigurationError(
            f"opentelemetry.register(): expected a MeterProvider, got {shown(provider)}"
        )
    source = NumberSource.of(guard, scan=False, sites=sites)
    with _registering:
        if _has_default if provider is None else provider in _registered:
            return
        if provider is None:
            # What it returns before the program has set one hands all on to that.
            _has_default, provider = True, get_meter_provider()
        _registered.add(provider)
    meter = provider.get_meter("closewait_guard")
    for measure in MEASURES:
        if measure.name in _CONVENTIONS:
            _observe(meter, _CONVENTIONS[measure.name], measure, partial(_all_of, source))
    of_pool = {measure.name: measure for measure in MEASURES}
    connections, limits = of_pool["pool_connections"], of_pool["pool_connections_limit"]
    waiting = of_pool["pool_waiting"]
    _observe(meter, _DATABASES, connections, partial(_of_databases, source))
    _observe(meter, _DATABASE_LIMITS, limits, partial(_of_databases, source))
    _observe(meter, _DATABASE_WAITING, waiting, partial(_of_databases, source))
    _observe(meter, _HTTP, connections, partial(_of_http, source))
    _observe(meter, _HTTP_WAITING, waiting, partial(_of_http, source))
    meter.create_observable_gauge(
        "closewait_guard.up",
        [lambda _: [Observation(int(source.read() is not None))]],
        description="Whether a guard reports in this process.",
    )


_registering = threading.Lock()
_registered: weakref.WeakSet[MeterProvider] = weakref.WeakSet()
_has_default = False
_Read = Callable[[Measure], Iterator[Sample]]


def _observe(meter: Meter, convention: _Convention, measure: Measure, read: _Read) -> None:
    create: Callable[..., object] = meter.create_observable_gauge
    if measure.is_total:
        create = meter.create_observable_counter
    elif convention.is_sum:
        create = meter.create_observable_up_down_counter

    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for labels, value in read(measure):
            attributes: Mapping[str, str] = dict(zip(convention.labels, labels, strict=True))
            # What receives it may know no infinite number.
            if math.isfinite(value):
                yield Observation(value, attributes)

    create(convention.name, [observe], unit=convention.unit, description=measure.description)


def _all_of(source: NumberSource, measure: Measure) -> Iterator[Sample]:
    for sample in (source.read() or {}).get(measure.name, ()):
        if measure.name == "last_report_timestamp_seconds":
            # There it is an age: a stopped monitor is one whose age grows.
            yield Sample((), max(0.0, wall() - sample.value))
        else:
            yield sample


def _of_databases(source: NumberSource, measure: Measure) -> Iterator[Sample]:
    for sample in _all_of(source, measure):
        if sample.labels[0] not in _HTTP_LIBRARIES:
            yield sample


def _of_http(source: NumberSource, measure: Measure) -> Iterator[Sample]:
    for labels, value in _all_of(source, measure):
        library, pool, *states = labels
        if library in _HTTP_LIBRARIES:
            yield Sample((library, pool, *(_HTTP_STATES[each] for each in states)), value)
