"""What the kernel says of a socket: one file a platform, the same names in each."""

from __future__ import annotations

import sys

from closewait_guard._inspect.probe.base import (
    INVALID,
    Endpoint,
    Poller,
    Probe,
    ProbeResult,
    address_text,
    duplicate_fd,
    endpoint_of,
    endpoint_of_snapshot,
    has_moved_no_data,
    has_sent,
    peer_of,
)
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "INVALID",
    "Endpoint",
    "Poller",
    "Probe",
    "ProbeResult",
    "address_text",
    "choose_probe",
    "duplicate_fd",
    "endpoint_of",
    "endpoint_of_snapshot",
    "has_moved_no_data",
    "has_sent",
    "peer_of",
]


def choose_probe(name: str) -> Probe:
    """The probe for this platform, or the one that is asked for by name."""
    on_linux = sys.platform == "linux"
    if name == "linux" and not on_linux:
        raise ConfigurationError(f"probe: expected auto or portable on {sys.platform}, got 'linux'")
    if name == "linux" or (name == "auto" and on_linux):
        from closewait_guard._inspect.probe import linux

        return linux
    from closewait_guard._inspect.probe import portable

    return portable
