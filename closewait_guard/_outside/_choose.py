"""Which way to look at processes suits this platform."""

from __future__ import annotations

import sys

from closewait_guard._outside._sight import Looker
from closewait_guard.exceptions import ConfigurationError

__all__ = ["choose"]


def choose(probe: str) -> Looker:
    """The kernel's own tables on Linux, psutil elsewhere, or as the setting `probe` wants it."""
    on_linux = sys.platform == "linux"
    if probe == "linux" and not on_linux:
        raise ConfigurationError(f"probe must be auto or portable on {sys.platform}, not 'linux'")
    if on_linux and probe != "portable":
        from closewait_guard._outside import _linux

        return _linux
    from closewait_guard._outside import _psutil

    return _psutil
