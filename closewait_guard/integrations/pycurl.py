"""pycurl: a handle whose connection libcurl has opened, and keeps for the next request."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from closewait_guard.integrations._owner import OwnerKind

__all__ = ["ATTRIBUTED", "OWNERS"]


def _descriptors(curl: Any) -> Iterable[int]:
    return [curl.getinfo(sys.modules["pycurl"].ACTIVESOCKET)]


OWNERS = (OwnerKind(("pycurl:Curl",), _descriptors),)

ATTRIBUTED = {"pycurl": ("pycurl:Curl",)}
