"""A server on loopback that takes what is posted to it, or misbehaves."""

from __future__ import annotations

import gzip
import http.server
import threading
from contextlib import contextmanager, suppress

from servers import DEADLINE


class Receiver:
    """Keeps each POST that it has answered well.

    Attributes:
        answers: What the next ones get instead, in order: a status, or "hang", "nonsense", "close",
            or a status with headers.
        asked: The paths and headers of all requests.
    """

    def __init__(self, context=None):
        self.posts, self.asked, self.answers = [], [], []
        self.always = 200
        self.released = threading.Event()
        self._changed = threading.Condition()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver._note(self, body)

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def get_request(self):
                sock, address = super().get_request()
                return (context.wrap_socket(sock, server_side=True) if context else sock), address

            # Closing the server waits for its handlers.
            daemon_threads = False

            def handle_error(self, *_):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def _note(self, handler, body):
        # What the server closes then, the client has not been told of.
        handler.close_connection = True
        with self._changed:
            answer = self.answers.pop(0) if self.answers else self.always
            self.asked.append((handler.path, dict(handler.headers)))
            self._changed.notify_all()
        if answer == "hang":
            self.released.wait(DEADLINE)
        elif answer == "nonsense":
            handler.wfile.write(b"\0\xff what?\r\n\r\n" * 3)
        elif answer != "close":
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            with suppress(OSError):
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", "2")
                handler.end_headers()
                handler.wfile.write(b"{}")
            if status == 200:
                with self._changed:
                    self.posts.append(body)
                    self._changed.notify_all()

    def wait_for(self, number):
        """The first posts, once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.posts) >= number, DEADLINE), self.asked
            return self.posts[:number]

    def wait_for_requests(self, number):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= number, DEADLINE)


@contextmanager
def receiver(context=None):
    found = Receiver(context)
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,), name="receiver")
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        found.server.shutdown()
        thread.join()
        found.server.server_close()
