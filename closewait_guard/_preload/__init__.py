"""How a guard gets into a program before its first import.

This folder stands first on PYTHONPATH, so that Python finds the `sitecustomize` in it as it starts.
"""

from __future__ import annotations

from closewait_guard._preload._handover import Handover
from closewait_guard._preload._line import Channel, moved_up

__all__ = ["Channel", "Handover", "moved_up"]
