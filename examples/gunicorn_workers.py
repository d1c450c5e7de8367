"""The guard in gunicorn's workers: each reports by itself, and on SIGPROF.

python examples/gunicorn_workers.py starts gunicorn with this file as its configuration.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import closewait_guard as cwg

workers = 1
control_socket_disable = True
kept: list[socket.socket] = []


def post_worker_init(_: Any) -> None:
    """After the fork, because a monitor is a thread, and threads do not survive it."""
    cwg.install(signal=signal.SIGPROF, grace=0.2)
    cwg.watch(interval=60, reporters=["changes:text"])


def app(_: dict[str, Any], start_response: Any) -> list[bytes]:
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        kept.append(socket.create_connection(upstream.getsockname()))  # Never closed.
        upstream.accept()[0].close()
    start_response("200 OK", [("Content-Length", "5")])
    return [b"%5d" % os.getpid()]


def main() -> None:
    here = Path(__file__)
    listener = socket.create_server(("127.0.0.1", 0))
    fd = listener.fileno()
    command = [sys.executable, "-m", "gunicorn", "-c", str(here), "-b", f"fd://{fd}"]
    command.append(f"{here.stem}:app")
    url = "http://{}:{}/".format(*listener.getsockname())
    with subprocess.Popen(command, cwd=here.parent, pass_fds=[fd], stderr=sys.stdout) as gunicorn:
        pids = [int(urllib.request.urlopen(url, timeout=10).read()) for _ in range(3)]
        time.sleep(0.5)
        os.kill(pids[0], signal.SIGPROF)
        time.sleep(0.5)
        gunicorn.terminate()


if __name__ == "__main__":
    main()
