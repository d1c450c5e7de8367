"""A server on asyncio whose handler forgets its writer when the client closes.

python examples/asyncio_server.py
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import closewait_guard as cwg

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
subscribers: set[asyncio.StreamWriter] = set()


async def subscribe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    subscribers.add(writer)  # To send them the news.
    while line := await reader.readline():
        print("received", line)
    # The client has gone. subscribers.discard(writer) and writer.close() belong here.


async def subscribe_fixed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    subscribers.add(writer)
    try:
        while line := await reader.readline():
            print("received", line)
    finally:
        subscribers.discard(writer)
        writer.close()
        await writer.wait_closed()


def visit(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"news, please\n")


async def scan_after_two_visits(handler: Handler) -> cwg.Report:
    """Let two clients connect and close, then scan."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        for _ in range(2):
            await asyncio.to_thread(visit, server.sockets[0].getsockname())
        await asyncio.sleep(0.5)
        report = cwg.scan()
        for writer in subscribers:
            writer.close()
    return report


cwg.install(grace=0.2)
print(cwg.render_text(asyncio.run(scan_after_two_visits(subscribe))))
subscribers.clear()
print("fixed:", len(asyncio.run(scan_after_two_visits(subscribe_fixed)).leaks), "leaks")
cwg.uninstall()
