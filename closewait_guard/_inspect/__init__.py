"""The kernel is asked about the recorded sockets; answers become observations."""

from __future__ import annotations

from closewait_guard._inspect.observation import SuspectAge, notice, observed, suspect_for
from closewait_guard._inspect.probe import Endpoint, Probe, ProbeResult, peer_of
from closewait_guard._inspect.records import (
    SiteCount,
    count_by_site,
    is_ours,
    kind_of,
    read_again,
    record_of,
    resolve,
)
from closewait_guard._inspect.scanner import ScanResult, SocketScanner

__all__ = [
    "Endpoint",
    "Probe",
    "ProbeResult",
    "ScanResult",
    "SiteCount",
    "SocketScanner",
    "SuspectAge",
    "count_by_site",
    "is_ours",
    "kind_of",
    "notice",
    "observed",
    "peer_of",
    "read_again",
    "record_of",
    "resolve",
    "suspect_for",
]
