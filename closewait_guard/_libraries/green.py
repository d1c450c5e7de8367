"""What a guard patches as soon as it is installed, and where more is known of it.

The classes that gevent and eventlet have in the place of the socket class, those of owners, and
those of pools that hand out connections.
This loads nothing else.
"""

from __future__ import annotations

from closewait_guard._enums import Origin

__all__ = [
    "OWNER_CLASSES",
    "POOL_CLASSES",
    "SOCKET_CLASSES",
    "SOCKET_CONSTRUCTORS",
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
    "asyncio.base_events:BaseEventLoop": "stdlib",
    "asyncio.base_subprocess:BaseSubprocessTransport": "processes",
    "asyncpg.connection:Connection": "asyncpg",
    "botocore.client:BaseClient": "urllib3",
    "concurrent.futures.process:ProcessPoolExecutor": "processes",
    "httpx:AsyncClient": "httpcore",
    "httpx:Client": "httpcore",
    "multiprocessing.pool:Pool": "processes",
    "multiprocessing.pool:ThreadPool": "processes",
    "psycopg:AsyncConnection": "psycopg",
    "psycopg:Connection": "psycopg",
    "psycopg_pool:AsyncConnectionPool": "psycopg",
    "psycopg_pool:ConnectionPool": "psycopg",
    "pymongo.asynchronous.mongo_client:AsyncMongoClient": "pymongo",
    "pymongo.synchronous.mongo_client:MongoClient": "pymongo",
    "redis.asyncio.client:Redis": "redis",
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
    "psycopg_pool:AsyncConnectionPool": "psycopg",
    "psycopg_pool:ConnectionPool": "psycopg",
    "redis.asyncio.connection:BlockingConnectionPool": "redis",
    "redis.asyncio.connection:ConnectionPool": "redis",
    "redis.connection:BlockingConnectionPool": "redis",
    "redis.connection:ConnectionPool": "redis",
    "sqlalchemy:Pool": "sqlalchemy",
}
