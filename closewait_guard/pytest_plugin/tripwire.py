"""What records births is loaded with the first: a suite without sockets never pays for it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from closewait_guard._wrappers import SOCKET, taking_self

__all__ = ["Tripwire"]


class Tripwire:
    """Calls `sprung` at the next birth, before it; then the socket class is as it was found.

    Whatever `sprung` raises stays here, and the wire stays up: the next birth is another try.
    """

    def __init__(self, sprung: Callable[[], object]) -> None:
        self._sprung = sprung
        self._lock = threading.RLock()
        self._is_up = False
        self._ours: Any = None
        self._found: Any = None

    def put_up(self) -> None:
        """Wait for a birth from now on."""
        self._is_up = True
        self._found = vars(SOCKET)["__init__"]
        self._ours = SOCKET.__init__ = _wire(self._found, self._spring)

    def take_down(self) -> None:
        """Wait no more. A wire that somebody has covered stays beneath, silent, until then."""
        self._is_up = False
        if self._is_on_top():
            SOCKET.__init__ = self._found

    def _is_on_top(self) -> bool:
        return vars(SOCKET)["__init__"] is self._ours

    def _spring(self) -> Any:
        """Call `sprung`, once; what is to make the socket instead of what was found, if anything.

        Whoever has covered the wire has called what he found already: it must not be called twice.
        """
        with self._lock:
            was_on_top = self._is_on_top()
            if not self._is_up:
                return None
            self.take_down()
            try:
                self._sprung()
            except BaseException as error:
                self._put_back(on_top=was_on_top)
                # Imports can fail in the middle of a test that mocks the file system. What stops
                # a test, such as its timeout, must stop it here too.
                if not isinstance(error, Exception):
                    raise
                return None
            return SOCKET.__init__ if was_on_top else None

    def _put_back(self, *, on_top: bool) -> None:
        self._is_up = True
        if on_top and vars(SOCKET)["__init__"] is self._found:
            SOCKET.__init__ = self._ours


def _wire(found: Any, spring: Callable[[], Any]) -> Any:
    original = taking_self(found)

    # Its name tells the guard to look for the birth's caller further out.
    @functools.wraps(found)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        (spring() or original)(self, *args, **kwargs)

    return __init__
