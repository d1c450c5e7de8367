"""What the programs of the cookbook talk to: an HTTP service in a process of its own.

It keeps a connection for the next request, and closes it when none has come for a while.
`python service.py 18001` starts it by hand, on that port.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 0.2
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 30000\r\n\r\n" + b"42 " * 10_000


@contextmanager
def running() -> Iterator[tuple[str, int]]:
    """Where the service is."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        try:
            yield "127.0.0.1", int(service.stdout.readline())
        finally:
            service.terminate()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        while await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE):
            writer.write(_ANSWER)
    writer.close()


async def _serve(port: int) -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
