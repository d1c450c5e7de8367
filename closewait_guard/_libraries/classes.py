"""The classes of other packages that are patched as soon as the program imports them, by name.

Those that gevent and eventlet have in the place of the socket class, those of owners, and those of
pools that hand out connections; and those that other packages declare by entry points. Loaded with
`install()`, so it loads little: `importlib.metadata` would take ten times as long and five
megabytes, so what pip has written beside the packages is read here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from closewait_guard._enums import Origin
from closewait_guard._interruptions import interrupts
from closewait_guard._live import type_qualname

if TYPE_CHECKING:
    from closewait_guard._libraries.kinds import OwnerKind

__all__ = [
    "OWNER_CLASSES",
    "POOL_CLASSES",
    "SOCKET_CLASSES",
    "SOCKET_CONSTRUCTORS",
    "DeclaredKinds",
]


# As `module:name`; each derives from the class in C.
SOCKET_CLASSES = (
    # The objects in C: those of the class that programs see each have one of these.
    "gevent._socket3:_wrefsocket",
    # The socket class of a module that is loaded a second time.
    "eventlet.greenio.base:_original_socket",
)

# Which functions, as `module:name`, make such a socket of a descriptor, and which of their
# variables has the socket that goes before.
SOCKET_CONSTRUCTORS = {
    "gevent._socket3:socket.accept": (Origin.ACCEPTED, "self"),
    "gevent._socket3:socket.dup": (Origin.DUPLICATED, "self"),
    "gevent.server:StreamServer.do_read": (Origin.ACCEPTED, "sock"),
    "socket:socket.accept": (Origin.ACCEPTED, "self"),
    "socket:socket.dup": (Origin.DUPLICATED, "self"),
}

# The classes of owners, and the file of this folder that knows their kinds.
OWNER_CLASSES = {
    "aiohttp.client:ClientSession": "aiohttp",
    "aiohttp.connector:BaseConnector": "aiohttp",
    "asyncio.base_events:BaseEventLoop": "stdlib",
    "asyncio.base_subprocess:BaseSubprocessTransport": "processes",
    "asyncpg.connection:Connection": "asyncpg",
    "botocore.client:BaseClient": "urllib3",
    "concurrent.futures.process:ProcessPoolExecutor": "processes",
    "httpx:AsyncClient": "httpcore",
    "httpx:Client": "httpcore",
    "httpx2:AsyncClient": "httpcore",
    "httpx2:Client": "httpcore",
    "multiprocessing.pool:Pool": "processes",
    "multiprocessing.pool:ThreadPool": "processes",
    "psycopg:AsyncConnection": "psycopg",
    "psycopg:Connection": "psycopg",
    "psycopg_pool:AsyncConnectionPool": "psycopg",
    "psycopg_pool:ConnectionPool": "psycopg",
    "pymongo.asynchronous.mongo_client:AsyncMongoClient": "pymongo",
    "pymongo.synchronous.mongo_client:MongoClient": "pymongo",
    "redis.asyncio.client:Redis": "redis",
    "redis.asyncio.connection:ConnectionPool": "redis",
    "redis.client:Redis": "redis",
    "redis.connection:ConnectionPool": "redis",
    "requests.sessions:Session": "urllib3",
    "sqlalchemy.engine.base:Engine": "sqlalchemy",
    "subprocess:Popen": "processes",
    "urllib3.connectionpool:HTTPConnectionPool": "urllib3",
    "urllib3.poolmanager:PoolManager": "urllib3",
    "websockets.asyncio.client:ClientConnection": "others",
}

# The classes of pools of which is recorded what they hand out, and the file that knows them.
POOL_CLASSES = {
    "asyncpg.pool:Pool": "asyncpg",
    "httpcore._async.connection_pool:AsyncConnectionPool": "httpcore",
    "httpcore._sync.connection_pool:ConnectionPool": "httpcore",
    "httpcore2._async.connection_pool:AsyncConnectionPool": "httpcore",
    "httpcore2._sync.connection_pool:ConnectionPool": "httpcore",
    "psycopg_pool:AsyncConnectionPool": "psycopg",
    "psycopg_pool:ConnectionPool": "psycopg",
    "redis.asyncio.connection:BlockingConnectionPool": "redis",
    "redis.asyncio.connection:ConnectionPool": "redis",
    "redis.connection:BlockingConnectionPool": "redis",
    "redis.connection:ConnectionPool": "redis",
    "sqlalchemy:Pool": "sqlalchemy",
    "urllib3.connectionpool:HTTPConnectionPool": "urllib3",
}

# Of entry points.
_GROUP = "closewait_guard.libraries"

# One with more entry points than this has room for is not read to the end.
_MAX_BYTES = 65_536


class DeclaredKinds:
    """Loads what a package declares when the program has imported that package.

    Args:
        wait: Calls a function with each of some names when the module of it has been imported.
        patch: What to call when the module of an owner has been imported, with its class.

    Attributes:
        kinds: Those that are loaded, by the class of the owner, `module:name`.
        failed: What could not be loaded, and why.
    """

    def __init__(
        self,
        wait: Callable[[Callable[[str], object], Iterable[str], Callable[[str], str]], object],
        patch: Callable[[str], object],
    ) -> None:
        self._wait, self._patch = wait, patch
        self.kinds: dict[str, OwnerKind] = {}
        self.failed: tuple[str, ...] = ()

    def begin(self) -> None:
        """Wait for the packages that declare something."""
        places = dict.fromkeys(place for folder in sys.path for place in _declared_in(folder))
        if places:
            self._wait(self._load, places, lambda place: place.partition(":")[0].partition(".")[0])

    def _load(self, place: str) -> None:
        """What is declared at a place, `module:name`: one kind, or several."""
        try:
            found = {kind.owner_class: kind for kind in _load_kinds(place)}
        except BaseException as error:
            if interrupts(error):
                raise
            why = f"{type_qualname(type(error))}: {error}"
            self.failed += (f"the objects that {place} should describe ({why})",)
            return
        self.kinds |= found
        self._wait(self._patch, found, lambda name: name.partition(":")[0])


def _load_kinds(place: str) -> tuple[OwnerKind, ...]:
    from closewait_guard._libraries.kinds import OwnerKind

    module, _, name = place.partition(":")
    found: Any = import_module(module).__dict__[name]
    kinds = tuple(found) if type(found) in {list, tuple} else (found,)
    if not all(type(each) is OwnerKind for each in kinds):
        raise TypeError("expected OwnerKind, or several in a tuple")
    return kinds


def _declared_in(folder: object) -> Iterator[str]:
    # An audit hook may refuse it; archives are passed over.
    try:
        names = os.listdir(folder or ".") if type(folder) is str else []  # noqa: PTH208
    except Exception:
        return
    for name in names:
        if name.endswith((".dist-info", ".egg-info")):
            text = _read(f"{folder}{os.sep}{name}{os.sep}entry_points.txt")
            if _GROUP in text:
                yield from _values(text)


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY)
    except Exception:
        return ""
    try:
        return os.read(fd, _MAX_BYTES).decode(errors="replace")
    except Exception:
        return ""
    finally:
        os.close(fd)


def _values(text: str) -> Iterator[str]:
    """Those of the group.

    Example:
        >>> text = "[closewait_guard.libraries]|a = b:c|[other]|d = e:f"
        >>> list(_values(text.replace("|", chr(10))))
        ['b:c']
    """
    is_ours = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            is_ours = line == f"[{_GROUP}]"
        elif is_ours and "=" in line and not line.startswith("#"):
            yield line.partition("=")[2].strip()
