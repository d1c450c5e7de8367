"""A server on loopback that answers each command of MongoDB's protocol: it is there, no more.

As a program it prints its port, and ends with its standard input.
"""

from __future__ import annotations

import socketserver
import struct
import sys
import threading

# The code of the older kind of message, which is for the first command.
_QUERY = 2004
_HELLO = {
    "ok": 1.0,
    "ismaster": True,
    "isWritablePrimary": True,
    "helloOk": True,
    "minWireVersion": 0,
    "maxWireVersion": 21,
    "maxBsonObjectSize": 16 * 2**20,
    "maxMessageSizeBytes": 48 * 2**20,
    "maxWriteBatchSize": 100_000,
    "readOnly": False,
}


class Mongo(socketserver.BaseRequestHandler):
    """Answers every command as a server that has nothing to say but that it is there."""

    def handle(self):
        import bson

        while len(head := self.request.recv(16, 0x100)) == 16:
            length, number, _, code = struct.unpack("<iiii", head)
            self.request.recv(length - 16, 0x100)
            answer = bson.encode(_HELLO)
            if code == _QUERY:
                body, code = struct.pack("<iqii", 8, 0, 0, 1) + answer, 1
            else:
                body = struct.pack("<ib", 0, 0) + answer
            self.request.sendall(struct.pack("<iiii", 16 + len(body), 1, number, code) + body)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Mongo) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()
        server.shutdown()
