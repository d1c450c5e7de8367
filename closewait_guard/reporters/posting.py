"""Posts over HTTP and HTTPS by connections of its own, which no guard takes for the program's.

Each post is bounded in time as a whole. No redirect is followed and no proxy used: a body goes to
the host that was named, and nowhere else.
"""

from __future__ import annotations

import _socket
import errno
import os
import re
import socket
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from closewait_guard._clock import now, pause, wall
from closewait_guard._descriptors import OwnedDescriptor
from closewait_guard._format import escape_line
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from ssl import SSLContext, SSLObject
    from urllib.parse import SplitResult

__all__ = [
    "PostError",
    "Poster",
    "WebAddress",
]


# Out of the way of the numbers that programs count on.
_LOWEST_NUMBER = 64
_MAX_HEAD, _PIECE = 1 << 16, 1 << 14
# Green threads run meanwhile, and from outside a thread in poll() may be using any descriptor.
_PAUSE = 0.01
# The program may have SIGPIPE end it.
_FLAGS = getattr(_socket, "MSG_NOSIGNAL", 0)
_UNDER_WAY = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK, errno.EINTR, 10035, 10037}
_CONNECTED = {0, errno.EISCONN, 10056}
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)[ \r\n]")
_RETRY_AFTER = re.compile(rb"(?im)^retry-after:[ \t]*(.{1,40}?)[ \t\r]*$")
# Of these a later attempt may be answered otherwise; as of all from 500 on.
_PASSING = {408, 425, 429}
_T = TypeVar("_T")


class PostError(Exception):
    """Something was not posted; the text says why, and names neither path nor password.

    Attributes:
        is_final: Another attempt would fail too.
        retry_after: After how many seconds the server wants the next; 0 if it does not say.
    """

    def __init__(self, why: str, *, is_final: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.is_final, self.retry_after = is_final, retry_after


class WebAddress(NamedTuple):
    """Where to post.

    Attributes:
        name: The address as it may be shown: path and password may be secret.
        authority: Host and port, for the header.
        authorization: A header with user and password; empty without.
        context: How to encrypt; None for plain HTTP.
    """

    name: str
    host: str
    port: int
    authority: str
    path: str
    authorization: str
    context: SSLContext | None

    @classmethod
    def parse(cls, reporter: str, url: str) -> WebAddress:
        """What an address means.

        Raises:
            ConfigurationError: It is not one; the text does not repeat it.
        """
        from urllib.parse import unquote

        try:
            parts, port = _split(url)
        except ValueError as error:
            raise ConfigurationError(
                f"{reporter} needs an address, as in {reporter}:https://host/path: {error}"
            ) from None
        is_secure = parts.scheme == "https"
        authority = parts.netloc.rpartition("@")[2]
        login = ":".join(map(unquote, (parts.username or "", parts.password or "")))
        return cls(
            name=f"{parts.scheme}://{authority}/...",
            host=parts.hostname or "",
            port=port or (443 if is_secure else 80),
            authority=authority,
            path=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
            authorization=f"Basic {b64encode(login.encode()).decode()}" if login != ":" else "",
            context=_secure_context() if is_secure else None,
        )


def _split(url: str) -> tuple[SplitResult, int | None]:
    """The parts of an address, and its port; what is wrong with it quotes nothing of it."""
    from urllib.parse import urlsplit

    if not isinstance(url, str) or not url.startswith(("https://", "http://")):
        raise ValueError("it does not begin with https:// or http://")
    if not url.isascii() or re.search(r"[\s\x00-\x20\x7f]", url):
        raise ValueError("it has characters that must be escaped")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        # Loads the codec now: later there may be no descriptor to load it with.
        host.encode("idna")
    except ValueError:
        raise ValueError("its host or port is not valid") from None
    if not host:
        raise ValueError("it has no host")
    return parts, port


def _secure_context() -> SSLContext:
    import ssl

    return ssl.create_default_context()


class Poster:
    """Posts to one target, one body at a time.

    Args:
        target: Where to.
    """

    def __init__(self, target: WebAddress) -> None:
        # What reads a date is loaded now: later there may be no descriptor to load it with.
        import email.utils

        self._parse_date = email.utils.parsedate_to_datetime
        self._target = target
        self._descriptor: OwnedDescriptor | None = None

    def post(self, body: bytes, end: Callable[[], float]) -> None:
        """Post a JSON document.

        Args:
            body: The document.
            end: Until when, by `now()`; asked while waiting, because it may become earlier.

        Raises:
            PostError: It has not arrived, or that is not certain.
        """
        try:
            head = self._exchange(self._request(body), end)
        except TimeoutError as error:
            raise PostError("no answer in time") from error
        except OSError as error:
            why = getattr(error, "verify_message", None) or error.strerror or type(error).__name__
            raise PostError(escape_line(str(why))[:200]) from error
        finally:
            self.close()
        self._require_success(head)

    def close(self) -> None:
        """Close the connection; in a forked child, its copy."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            descriptor.close()

    def _request(self, body: bytes) -> bytes:
        target = self._target
        lines = [
            f"POST {target.path} HTTP/1.1",
            f"Host: {target.authority}",
            *([f"Authorization: {target.authorization}"] if target.authorization else []),
            "Content-Type: application/json",
            "User-Agent: closewait-guard",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body

    def _require_success(self, head: bytes) -> None:
        status = _STATUS.match(head)
        if status is None:
            raise PostError("what answers is no HTTP server")
        code = int(status[1])
        if 200 <= code < 300:
            return
        later = _RETRY_AFTER.search(head)
        raise PostError(
            f"HTTP {code}",
            is_final=code < 500 and code not in _PASSING,
            retry_after=self._seconds(later[1].decode("latin-1")) if later else 0.0,
        )

    def _seconds(self, text: str) -> float:
        """What `Retry-After` has: seconds, or a date."""
        if text.isascii() and text.isdigit():
            return float(text)
        try:
            return max(0.0, self._parse_date(text).timestamp() - wall())
        except (TypeError, ValueError, OverflowError):
            return 0.0

    def _exchange(self, request: bytes, end: Callable[[], float]) -> bytes:
        """Send the request, and return the beginning of the answer."""
        self._connect(end)
        if self._target.context is None:
            self._send(request, end)
            return _read_head(lambda: self._receive(end))
        return _Encrypted(self._target, self._send, self._receive).exchange(request, end)

    def _connect(self, end: Callable[[], float]) -> None:
        """To the first address that answers; each has its share of the time that is left."""
        failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        found = socket.getaddrinfo(self._target.host, self._target.port, type=_socket.SOCK_STREAM)
        for number, (family, kind, protocol, _, address) in enumerate(found):
            began = now()
            share = began + (end() - began) / (len(found) - number)
            try:
                sock = _socket.socket(family, kind, protocol)
                self._descriptor = OwnedDescriptor(sock.detach(), _LOWEST_NUMBER)
                self._finish_connecting(address, partial(_earlier_of, share, end))
            except OSError as error:
                self.close()
                failure = error
            else:
                return
        raise failure

    def _finish_connecting(self, address: object, end: Callable[[], float]) -> None:
        def connect(sock: _socket.socket) -> None:
            number = sock.connect_ex(address)  # type: ignore[arg-type]
            if number in _UNDER_WAY:
                raise BlockingIOError
            if number not in _CONNECTED:
                raise OSError(number, os.strerror(number))

        self._call(connect, end)

    def _send(self, data: bytes, end: Callable[[], float]) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._call(methodcaller("send", rest, _FLAGS), end) :]

    def _receive(self, end: Callable[[], float]) -> bytes:
        return self._call(lambda sock: sock.recv(_PIECE), end)

    def _call(self, function: Callable[[_socket.socket], _T], end: Callable[[], float]) -> _T:
        """Call without blocking, until it does not have to wait."""
        # Before each: a server that always has more to say would be listened to for ever.
        while now() < end():
            fd = -1 if self._descriptor is None else self._descriptor.fileno()
            if fd < 0:
                raise OSError(errno.EBADF, "the program has closed the connection")
            # For one call: an object must not close what it does not own.
            sock = _socket.socket(fileno=fd)
            try:
                sock.settimeout(0)
                return function(sock)
            except BlockingIOError:
                pass
            finally:
                sock.detach()
            pause(_PAUSE)
        raise TimeoutError


def _earlier_of(moment: float, end: Callable[[], float]) -> float:
    return min(moment, end())


def _read_head(receive: Callable[[], bytes]) -> bytes:
    """What comes up to the first empty line, without interim answers."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD:
        piece = receive()
        if not piece:
            break
        head += piece
        while head.startswith(b"HTTP/1.1 1") and b"\r\n\r\n" in head:
            head = head.partition(b"\r\n\r\n")[2]
    return head


class _Encrypted:
    """TLS in memory: a socket object of `ssl` would be one of the program's."""

    def __init__(
        self,
        target: WebAddress,
        send: Callable[[bytes, Callable[[], float]], None],
        receive: Callable[[Callable[[], float]], bytes],
    ) -> None:
        import ssl

        self._send, self._receive = send, receive
        self._wants_more = ssl.SSLWantReadError
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object: SSLObject = target.context.wrap_bio(  # type: ignore[union-attr]
            self._incoming, self._outgoing, server_hostname=target.host
        )

    def exchange(self, request: bytes, end: Callable[[], float]) -> bytes:
        """Send the request, and return the beginning of the answer."""
        self._call(self._object.do_handshake, end)
        rest = memoryview(request)
        while rest:
            rest = rest[self._call(partial(self._object.write, rest), end) :]
        return _read_head(lambda: self._call(self._read, end))

    def _read(self) -> bytes:
        import ssl

        with suppress(ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return self._object.read(_PIECE)
        return b""

    def _call(self, function: Callable[[], _T], end: Callable[[], float]) -> _T:
        while True:
            try:
                result = function()
            except self._wants_more:
                self._send(self._outgoing.read(), end)
                if data := self._receive(end):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                self._send(self._outgoing.read(), end)
                return result
