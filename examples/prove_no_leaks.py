"""Prove that a function leaves no socket behind, without any test framework."""

from __future__ import annotations

import asyncio
import socket
import sys

import closewait_guard as cwg


@cwg.no_leaks(grace=0.2)
def ask_and_close(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(b"hello")


@cwg.no_leaks(grace=0.2)
def ask_and_keep(address: tuple[str, int], kept: list[socket.socket]) -> None:
    kept.append(socket.create_connection(address))


@cwg.no_leaks(grace=0.2)
async def ask_and_close_async(address: tuple[str, int]) -> None:
    _, writer = await asyncio.open_connection(*address)
    writer.close()


def main() -> int:
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        ask_and_close(address)
        asyncio.run(ask_and_close_async(address))
        try:
            ask_and_keep(address, kept)
        except cwg.SocketLeakError as error:
            print(error)
            return 0
        finally:
            for sock in kept:
                sock.close()
    return 1


if __name__ == "__main__":
    sys.exit(main())
