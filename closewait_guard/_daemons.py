"""Whether threads may be left to run: only the main interpreter ends while they do.

Another one aborts the process at its end if a daemon thread of its own still runs, or allows none.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from contextlib import suppress

__all__ = ["allows_daemons"]

allows_daemons: Callable[[], bool]

try:
    import ctypes

    _own, _main = (
        ctypes.PYFUNCTYPE(ctypes.c_void_p)((f"PyInterpreterState_{name}", ctypes.pythonapi))
        for name in ("Get", "Main")
    )
# Isolated interpreters have no ctypes, and an audit hook may refuse it.
except Exception:

    def _nothing_known() -> bool:
        return True

    # Since Python 3.12.
    allows_daemons = getattr(_thread, "daemon_threads_allowed", _nothing_known)
else:

    def _is_main() -> bool:
        return bool(_own() == _main())

    allows_daemons = _is_main

    if sys.platform == "linux":
        # An interpreter that ends has daemon threads call pthread_exit(), for which glibc loads
        # this library. With no descriptor left it could not, and would abort the program.
        with suppress(OSError):
            ctypes.CDLL("libgcc_s.so.1")
