"""Start a server, ask it for a path a few times, and end it: how the pages get their reports.

python visit.py PROGRAM PATH TIMES COMMAND...

PROGRAM asks the service at port 18001, which may be taken here: the service gets a free port, and
PROGRAM and the output are changed accordingly. `{socket}` in COMMAND is where the server is to
listen. It is ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import service

# A server with the guard takes a second to start, and minutes where the machine is busy.
_START_SECONDS, _STOP_SECONDS = 120, 60
_NO_SERVER = 75  # EX_TEMPFAIL: `page_programs.py` writes no such output into a page.
_PORT = ":18001"


def main(program: str, path: str, times: str, *command: str) -> int:
    source = Path(program)
    code = source.read_text()
    with tempfile.TemporaryFile("w+") as output, service.running() as (_, port):
        source.write_text(code.replace(_PORT, f":{port}"))
        try:
            visit(path, int(times), command, output)
        except TimeoutError as error:
            print(error, file=sys.stderr)
            return _NO_SERVER
        finally:
            source.write_text(code)
        output.seek(0)
        print(output.read().replace(f":{port}", _PORT), end="")
    return 0


def visit(path: str, times: int, command: Sequence[str], output: IO[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder, "http"))
        words = [word.format(socket=address) for word in command]
        with subprocess.Popen(words, stdout=output, stderr=output) as server:
            try:
                for _ in range(times):
                    ask(address, path)
                time.sleep(1.5)  # More than the grace time.
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(_STOP_SECONDS)


def ask(address: str, path: str) -> None:
    end = time.monotonic() + _START_SECONDS
    with socket.socket(socket.AF_UNIX) as client:
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                client.connect(address)
                break
            if time.monotonic() > end:
                raise TimeoutError(f"no server at {address}")
            time.sleep(0.05)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        while client.recv(65536):
            pass


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
