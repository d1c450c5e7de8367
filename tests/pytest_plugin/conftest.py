"""What this process has imported for other tests is not what the suites of these have."""

from __future__ import annotations

import pytest

from closewait_guard.pytest_plugin import _lazy_start


@pytest.fixture(autouse=True)
def without_native_drivers(monkeypatch):
    monkeypatch.setattr(_lazy_start, "_NATIVE_DRIVERS", ())
