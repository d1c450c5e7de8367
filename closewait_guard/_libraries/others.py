"""Libraries that a few lines are enough for: pycurl and others in C, uvicorn, trio."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import (
    HandleKind,
    HolderHint,
    Library,
    NativeCode,
    OwnerKind,
    never,
)
from closewait_guard._live import call_native, field, find_classes, module_dict, value_at
from closewait_guard.model import Origin

__all__ = [
    "LIBRARIES",
]


_CURL = ("pycurl:Curl",)


def _descriptors(curl: Any) -> Iterable[int]:
    for cls in find_classes(_CURL).values():
        which = value_at(module_dict(value_at(sys.modules, "pycurl")), "ACTIVESOCKET")
        yield int(call_native(curl, cls, "getinfo", which))


def _native(module: str, distribution: str, file_part: str, what: str) -> Library:
    """A library of which only this is known."""
    return Library(module, native=(NativeCode(module, distribution, file_part, what),))


LIBRARIES = (
    _native("MySQLdb", "mysqlclient", "libmysqlclient", "libmysqlclient"),
    # A handle keeps its connection for the next request.
    Library(
        "pycurl",
        handles=(HandleKind(_CURL, _descriptors),),
        attributed=_CURL,
        hints=(HolderHint("pycurl.Curl", "call curl.close() when you are done with the handle"),),
        native=(NativeCode("pycurl", "pycurl", "libcurl", "libcurl"),),
    ),
    _native("curl_cffi", "curl_cffi", "/curl_cffi", "libcurl"),
    _native("grpc", "grpcio", "/grpc/_cython", "grpc"),
    _native("zmq", "pyzmq", "libzmq", "libzmq"),
    _native("confluent_kafka", "confluent-kafka", "librdkafka", "librdkafka"),
    _native("pylibmc", "pylibmc", "libmemcached", "libmemcached"),
    _native("oracledb", "oracledb", "libclntsh", "libclntsh, in thick mode"),
    _native("pyodbc", "pyodbc", "libodbc", "the driver"),
    _native("pymssql", "pymssql", "libsybdb", "FreeTDS"),
    Library(
        "websockets",
        # One of the threaded client is kept by its thread as long as it is open.
        owners=(
            OwnerKind(
                "websockets.asyncio.client:ClientConnection",
                "websockets connection",
                never,
                lambda connection: [field(connection, "transport")],
                loop=lambda connection: field(connection, "loop"),
                # Each is a stream of its own.
                is_idle=never,
            ),
        ),
        hints=(
            HolderHint(
                "websockets",
                "use `async with connect(...) as websocket:` (`with` in the threaded client), or "
                "`await websocket.close()`",
                origin=Origin.CREATED,
            ),
            # Of a socket that an event loop in C has opened the side is not known.
            HolderHint(
                "websockets",
                "receive in the handler until the client disconnects, then return, or call `await "
                "websocket.close()` (websocket.close() in a threaded server)",
                origin=Origin.ACCEPTED,
            ),
            HolderHint(
                "websockets",
                "call `await websocket.close()` (websocket.close() in threaded code) in a "
                "`finally` block",
            ),
        ),
    ),
    Library(
        "uvicorn",
        hints=(
            HolderHint(
                "uvicorn.protocols",
                "return from the endpoint when the client disconnects (WebSocketDisconnect, "
                "http.disconnect), or call `await websocket.close()`",
            ),
        ),
    ),
    Library(
        "trio",
        hints=(HolderHint("trio", "use `async with stream:`, or `await stream.aclose()`"),),
    ),
)
