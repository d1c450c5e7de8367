"""Imported by Python as it starts, in the place of the program's own `sitecustomize`, if any.

It takes itself off the path, has the guard installed, and then lets the real one be imported.
Nothing that goes wrong here may reach the program.
"""

from __future__ import annotations

import os
import sys


def _leave_no_trace() -> None:
    """Off the path that the program sees; its children find this folder in their environment."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is slow
    sys.path[:] = [path for path in sys.path if path != here]
    sys.path_importer_cache.pop(here, None)
    del sys.modules["sitecustomize"]


def _install() -> None:
    try:
        from closewait_guard._preload.start import start
    except Exception as error:
        if not _say_unguarded(error) and os.environ.get("_CLOSEWAIT_GUARD_MAIN") == str(
            os.getpid()
        ):
            sys.stderr.write(
                f"closewait-guard: {sys.executable} is not guarded: {error}; "
                "install closewait-guard for it\n"
            )
        return
    start()


def _say_unguarded(error: Exception) -> bool:
    """To the launcher, which prints it; whether that waits for it."""
    try:
        import _socket
        import json

        _, channel, *_ = json.loads(os.environ["_CLOSEWAIT_GUARD_RUN"])
        address, token, *_ = channel
        line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            line.connect(address)
            why = "closewait_guard cannot be imported: " + str(error).replace("\n", " ")
            line.send(f"{token} {os.getpid()} unguarded {why}\n".encode(errors="replace"))
        finally:
            line.close()
    except Exception:
        # There is none, or it has ended.
        return False
    return True


if __name__ == "sitecustomize":
    _leave_no_trace()
    _install()
    # If there is none, this raises the very error that Python expects then.
    __import__("sitecustomize")
