"""Findings as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from closewait_guard._output_file import OutputFile

__all__ = ["JsonFile"]


class JsonFile:
    """One JSON object a line. Begun anew for each run, so that it is there even if nothing leaks.

    Attributes:
        failure: A sentence that says why lines are missing, if any are.

    Raises:
        pytest.UsageError: It cannot be written.
    """

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._path = config.invocation_params.dir / path
        self._missing = 0
        self._reason = ""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = OutputFile(self._path)
            self._file.clear()
        except (OSError, ValueError) as error:
            raise pytest.UsageError(self._sentence(error)) from error

    @property
    def failure(self) -> str | None:
        if not self._missing:
            return None
        return f"{self._reason}; findings that are missing in it: {self._missing:,}"

    def write(self, data: Mapping[str, Any]) -> None:
        """Add one line; one that cannot be written is counted, and costs no other."""
        # In a string of JSON, what replaces half a surrogate pair is the escape for it.
        text = json.dumps(data, ensure_ascii=False) + "\n"
        try:
            if not self._file.is_current():
                self._file.reopen()
            self._file.append(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self._missing += 1
            self._reason = self._reason or self._sentence(error)

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()

    def _sentence(self, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or error
        return f"socket_leaks_json: {self._path} cannot be written: {reason}"
