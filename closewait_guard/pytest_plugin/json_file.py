"""Findings as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

__all__ = ["JsonFile"]


class JsonFile:
    """One JSON object a line. Begun anew for each run, so that it is there even if nothing leaks.

    Raises:
        pytest.UsageError: It cannot be written.
    """

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._path = config.invocation_params.dir / path
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("", encoding="utf-8")
        except OSError as error:
            raise pytest.UsageError(
                f"socket_leaks_json: {self._path} cannot be written: {error.strerror}"
            ) from error

    def write(self, data: Mapping[str, Any]) -> None:
        """Add one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(data, ensure_ascii=False) + "\n")
