"""pycurl: a handle whose connection libcurl has opened, and keeps for the next request."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import OwnerKind
from closewait_guard._live import call_native, find_classes, module_dict, value_at

__all__ = [
    "ATTRIBUTED",
    "OWNERS",
]


_CLASSES = ("pycurl:Curl",)


def _descriptors(curl: Any) -> Iterable[int]:
    for cls in find_classes(_CLASSES).values():
        which = value_at(module_dict(value_at(sys.modules, "pycurl")), "ACTIVESOCKET")
        yield int(call_native(curl, cls, "getinfo", which))


OWNERS = (OwnerKind(_CLASSES, _descriptors),)

ATTRIBUTED = {"pycurl": ("pycurl:Curl",)}
