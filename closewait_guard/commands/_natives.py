"""Libraries whose sockets Python's socket class never sees, or that put another in its place."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from closewait_guard.exceptions import ReportFormatError

__all__ = ["Library", "installed", "loaded_by"]

_UNSEEN = "opens its sockets outside Python"
_OWN_CLASS = "puts a class of its own in the place of socket.socket"


class Library(NamedTuple):
    """One library, and how it shows.

    Attributes:
        module: What a program imports.
        distribution: What pip installs.
        part: A part of the names of its files, when a process has loaded it.
        what: What it does.
    """

    module: str
    distribution: str
    part: str
    what: str


_LIBRARIES = (
    Library("uvloop", "uvloop", "/uvloop/", f"an event loop on libuv, {_UNSEEN}"),
    Library("rloop", "rloop", "/rloop/", f"an event loop in Rust, {_UNSEEN}"),
    Library("gevent", "gevent", "/gevent/", _OWN_CLASS),
    Library("eventlet", "eventlet", "/eventlet/", _OWN_CLASS),
    Library("psycopg2", "psycopg2", "libpq", f"libpq {_UNSEEN}"),
    Library("psycopg_c", "psycopg-c", "libpq", f"libpq {_UNSEEN}"),
    Library("psycopg_binary", "psycopg-binary", "libpq", f"libpq {_UNSEEN}"),
    Library("MySQLdb", "mysqlclient", "libmysqlclient", f"libmysqlclient {_UNSEEN}"),
    Library("pycurl", "pycurl", "libcurl", f"libcurl {_UNSEEN}"),
    Library("curl_cffi", "curl_cffi", "/curl_cffi", f"libcurl {_UNSEEN}"),
    Library("grpc", "grpcio", "/grpc/_cython", f"grpc {_UNSEEN}"),
    Library("zmq", "pyzmq", "libzmq", f"libzmq {_UNSEEN}"),
    Library("confluent_kafka", "confluent-kafka", "librdkafka", f"librdkafka {_UNSEEN}"),
    Library("pylibmc", "pylibmc", "libmemcached", f"libmemcached {_UNSEEN}"),
    Library("oracledb", "oracledb", "libclntsh", f"in its thick mode {_UNSEEN}"),
    Library("pyodbc", "pyodbc", "libodbc", f"the driver {_UNSEEN}"),
    Library("pymssql", "pymssql", "libsybdb", f"FreeTDS {_UNSEEN}"),
)


def installed() -> Iterator[tuple[Library, str]]:
    """Those that this Python could import, with their versions; none of them is imported."""
    for library in _LIBRARIES:
        if find_spec(library.module) is not None:
            yield library, _version(library.distribution)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def loaded_by(pid: int) -> list[Library]:
    """Those of whom a running process has mapped a file.

    Raises:
        ReportFormatError: There is no such process, or it may not be looked into.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except PermissionError:
        raise ReportFormatError(f"not permitted to look into process {pid}: run as root") from None
    except OSError:
        raise ReportFormatError(f"no such process, or no /proc to look into: {pid}") from None
    found: dict[str, Library] = {}
    for library in _LIBRARIES:
        if library.part in maps:
            found.setdefault(library.part, library)
    return list(found.values())
