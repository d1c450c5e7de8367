"""Have the rest of this package loaded as it is without pytest.

pytest's own import hook looks in every module of a plugin for assertions to rewrite. Here are none,
and the looking takes as long as the loading.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import pytest

__all__ = ["load_plainly"]

_DONE = pytest.StashKey[bool]()


class _Plainly:
    """Finds the modules of this package, and no others."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith("closewait_guard."):
            return PathFinder.find_spec(name, path, target)
        return None


def load_plainly(config: pytest.Config) -> None:
    """Step before pytest's hook, and behind whoever is before it, until the run is over."""
    if config.stash.get(_DONE, False):
        return
    config.stash[_DONE] = True
    for place, finder in enumerate(sys.meta_path):
        if type(finder).__module__ == "_pytest.assertion.rewrite":
            ours = _Plainly()
            sys.meta_path.insert(place, ours)
            config.add_cleanup(partial(_remove, ours))
            return


def _remove(finder: _Plainly) -> None:
    # Tests may have put back a list of their own.
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
