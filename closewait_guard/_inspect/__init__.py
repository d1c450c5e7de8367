"""The kernel is asked about the recorded sockets; answers become observations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from closewait_guard._inspect.observation import (
    ScanResult,
    SiteCount,
    SuspectAge,
    is_unused_since,
    make_observation,
    suspect_for,
    update_age,
)
from closewait_guard._inspect.probe import (
    Endpoint,
    Probe,
    ProbeResult,
    has_moved_no_data,
    has_sent,
    peer_of,
)

if TYPE_CHECKING:
    from closewait_guard._inspect.descriptors import (
        DescriptorCounter,
        DescriptorsOfBlock,
        descriptors_of_process,
    )
    from closewait_guard._inspect.native import attributed_libraries, attributed_module
    from closewait_guard._inspect.owners import CheckoutScanner, OwnerScanner
    from closewait_guard._inspect.records import (
        add_open_at_end,
        count_as_own,
        count_by_site,
        is_ours,
        kind_of,
        record_of,
        resolve,
        retry_sources,
    )
    from closewait_guard._inspect.scanner import SocketScanner
else:
    _HOMES = {
        "CheckoutScanner": "owners",
        "DescriptorCounter": "descriptors",
        "DescriptorsOfBlock": "descriptors",
        "OwnerScanner": "owners",
        "SocketScanner": "scanner",
        "attributed_libraries": "native",
        "attributed_module": "native",
        "descriptors_of_process": "descriptors",
    }

    # Of recorded sockets: what looks at other processes records none, and loads nothing of it.
    def __getattr__(name: str) -> object:
        module = _HOMES.get(name, "records")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{module}"), name)


__all__ = [
    "CheckoutScanner",
    "DescriptorCounter",
    "DescriptorsOfBlock",
    "Endpoint",
    "OwnerScanner",
    "Probe",
    "ProbeResult",
    "ScanResult",
    "SiteCount",
    "SocketScanner",
    "SuspectAge",
    "add_open_at_end",
    "attributed_libraries",
    "attributed_module",
    "count_as_own",
    "count_by_site",
    "descriptors_of_process",
    "has_moved_no_data",
    "has_sent",
    "is_ours",
    "is_unused_since",
    "kind_of",
    "make_observation",
    "peer_of",
    "record_of",
    "resolve",
    "retry_sources",
    "suspect_for",
    "update_age",
]
