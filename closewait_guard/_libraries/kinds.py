"""What a file of this folder says of a library: its pools, owners, hints and native code."""

from __future__ import annotations

import _socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from closewait_guard._enums import DescriptorKind, Origin, Verdict
from closewait_guard._live import (
    attributes_of,
    class_value,
    elements_of,
    field,
    is_a,
    layers_of,
    mro_of,
)
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "MAX_CONNECTIONS",
    "NOT_GIVEN_BACK",
    "RESPONSES",
    "UNBOUNDED",
    "CheckoutKind",
    "HandleKind",
    "HolderHint",
    "Library",
    "NativeCode",
    "PoolKind",
    "PoolUse",
    "always",
    "connections_of",
    "for_each_call",
    "give_back",
    "itself",
    "made_by",
    "never",
    "nothing",
    "out_of_use",
    "read_response",
    "tracked_kind",
    "waiting_for",
]


# What some libraries give as the bound of a pool that has none.
UNBOUNDED = 1_000_000

MAX_CONNECTIONS = 1000  # Of one owner.

# The flag of a type whose attributes cannot be set.
_IMMUTABLE = 1 << 8

# How the names end of what has a connection until it was read or closed.
RESPONSES = ("Response", "StreamingBody", "requests.api", "urllib.request")

# Of sockets that should have been closed by means of the library.
_NOT_CLOSED = (
    Verdict.LEAKED,
    Verdict.DEAD,
    Verdict.LINGERING,
    Verdict.DROPPED,
    Verdict.UNCLOSED,
    Verdict.SURPLUS,
    Verdict.OPEN,
)
NOT_GIVEN_BACK = (*_NOT_CLOSED, Verdict.CHECKED_OUT)


def for_each_call(library: str) -> str:
    """The holder of connections in more pools of a library than a program has reason to make."""
    return f"{library} for each call"


def out_of_use(library: str) -> str:
    """The holder of connections in a pool of a library that nothing can use any more."""
    return f"{library} out of use"


def made_by(call: str) -> str:
    """The holder of an object that a library has made for the program, by the name of its call."""
    return f"made by {call}"


def read_response(library: str) -> str:
    """The holder of an idle connection that a response keeps which was read: by its open client."""
    return f"{library} after a response was read"


def nothing(_: Any) -> Iterable[Any]:
    """For a kind whose objects have nothing of a sort, or do not show it."""
    return ()


def waiting_for(queue: Any) -> Iterable[object]:
    """What waits for an element of a queue: one of `queue`, of SQLAlchemy, or of asyncio."""
    getters = field(queue, "_getters")
    return elements_of(field(field(queue, "not_empty"), "_waiters") if getters is None else getters)


def never(_: Any) -> bool:
    """For a kind whose objects do not say that they are closed: the call of their close does."""
    return False


def always(_: Any) -> bool:
    """For a kind whose objects do nothing between two calls that show on their connections."""
    return True


def itself(connection: Any) -> object:
    """For a kind of pool whose connections stand for themselves."""
    return connection


@dataclass(frozen=True, slots=True)
class PoolKind:
    """One kind of pool. Each callable is given the pool, and may raise: then it is passed over.

    Attributes:
        classes: The classes of the pool, as `module:name`; subclasses are found by themselves.
        name: What its users would call it.
        max_size: How many connections it keeps; None where there is no bound.
        idle: The connections that wait in it: sockets, what wraps one, or descriptors.
        checked_out: Those that are in use.
        waiting: What waits for one: a thread, a task or a request each.
        kept_by: Classes of objects that have a reference to the pool and take nothing out of it.
        is_of_thread: Each thread has one of its own, so there are as many as the program needs.
        purpose: What it is for, where one address serves several: hosts by name, a database.
    """

    classes: tuple[str, ...]
    name: Callable[[Any], str]
    max_size: Callable[[Any], int | None]
    idle: Callable[[Any], Iterable[object]]
    checked_out: Callable[[Any], Iterable[object]] = nothing
    waiting: Callable[[Any], Iterable[object]] = nothing
    kept_by: tuple[str, ...] = ()
    is_of_thread: bool = False
    purpose: Callable[[Any], Iterable[object]] = nothing


@dataclass(frozen=True, slots=True)
class HandleKind:
    """One kind of object that has a descriptor for which there is no socket object.

    Attributes:
        classes: Its classes, as `module:name`; subclasses are found by themselves.
        descriptors: Those that it has at this moment; may raise, then it is passed over.
    """

    classes: tuple[str, ...]
    descriptors: Callable[[Any], Iterable[int]]


@dataclass(frozen=True, slots=True)
class OwnerKind:
    """One kind of object that has connections and is meant to be closed: a session, a client.

    Each callable is given the object, runs in finalizers too, and may raise: then the object is
    passed over.

    Attributes:
        owner_class: Its class, as `module:name`; subclasses are found by themselves.
        name: What its users call it.
        is_closed: Whether it was closed, or need not be.
        connections: Its connections: sockets, what wraps one, or descriptors of sockets.
        closes: Its methods after whose call it counts as closed, where it does not say that itself.
        closes_itself: It is closed by its library when it is collected.
        descriptors: Its other descriptors, each with its kind.
        loop: The event loop without which it cannot be closed any more.
        threads: Its own threads, which need no further such object.
        is_idle: Whether it does nothing at this moment.
        is_surplus: What too many of one line are: more than needed, or not closed as they should.
        needs_connections: One without connections and other descriptors is not missed.
        part_of: Packages and modules that make one for a pool of their own, which stands for it.
        purpose: What it is for, where one address serves several: hosts by name, a database.
        part: What is closed with it, and may be finalized before it. Its kind is asked of that too.
    """

    owner_class: str
    name: str
    is_closed: Callable[[Any], bool]
    connections: Callable[[Any], Iterable[object]] = nothing
    closes: tuple[str, ...] = ()
    closes_itself: bool = False
    descriptors: Callable[[Any], Iterable[tuple[DescriptorKind, int]]] = nothing
    loop: Callable[[Any], object] = nothing
    threads: Callable[[Any], Iterable[object]] = nothing
    is_idle: Callable[[Any], bool] = always
    is_surplus: bool = True
    needs_connections: bool = True
    part_of: tuple[str, ...] = ()
    purpose: Callable[[Any], Iterable[object]] = nothing
    part: Callable[[Any], object] | None = None

    @property
    def holder(self) -> str:
        """The name by which hints know it."""
        return self.owner_class.replace(":", ".")


Listen = Callable[[type, Callable[[Any, Any], None], Callable[[Any], None]], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class CheckoutKind:
    """How one kind of pool hands out its connections.

    That is seen by events of the library, if it has such, else by the calls of two methods. The
    callables are given the pool, or what stands for a connection, and may raise: then it is passed
    over.

    Attributes:
        library: The name of the library, by which hints know it.
        pool_class: Its class, as `module:name`; subclasses are found by themselves.
        name: What its users call a pool.
        max_size: How many connections it hands out at most; None where there is no bound.
        is_out: Whether a connection is out of its pool.
        connection: What has the descriptor of it: a socket, or what wraps one.
        borrowed: What the program has of it, by which holders are found.
        listen: Begins to call two functions, by events: with the pool and what stands for a
            connection when that was taken, with this alone when it is given back. Neither raises.
            Returns what ends that.
        takes: The method that returns a connection, where there are no events.
        gives_back: The method that takes one back.
        taken_class: The class whose method that is, where it is not the pool's: that of what the
            program has.
        entry: What stands for a connection: there is a weak reference to it, and it is the same
            when it is given back.
        pool_of: The pool of a connection that is out, where there is no weak reference to pools.
        waiting: As for a kind of pool.
        is_busy: Whether the library itself waits for an answer on a connection that is out.
        may_last: How the names of calls begin for which one may be out for any time, because they
            wait for something, and give it back themselves.
    """

    library: str
    pool_class: str
    name: Callable[[Any], str]
    max_size: Callable[[Any], int | None]
    is_out: Callable[[Any], bool]
    connection: Callable[[Any], object]
    borrowed: Callable[[Any], object]
    listen: Listen | None = None
    takes: str = ""
    gives_back: str = ""
    taken_class: str = ""
    entry: Callable[[Any], object] = itself
    pool_of: Callable[[Any], object] | None = None
    waiting: Callable[[Any], Iterable[object]] = nothing
    is_busy: Callable[[Any], bool] = never
    may_last: tuple[str, ...] = ()


def connections_of(owner: object, kind: OwnerKind) -> Iterator[tuple[int, _socket.socket | None]]:
    """The descriptors of its connections, -1 for one that is closed, and their socket objects."""
    for connection in islice(kind.connections(owner), MAX_CONNECTIONS):
        if type(connection) is int:
            yield connection, None
            continue
        for layer in layers_of(connection):
            if is_a(layer, _socket.socket):
                yield _socket.socket.fileno(layer), layer
                break


def tracked_kind(cls: type, close: str | Iterable[str]) -> OwnerKind:
    """The kind of a class that a program wants to have tracked.

    Args:
        cls: The class.
        close: The method that closes an object of it, or several.

    Raises:
        ConfigurationError: It is no class, lacks one of the methods, or cannot be tracked.
    """
    if not is_a(cls, type):
        raise ConfigurationError(f"track(): expected a class, got {cls!r}")
    name = f"{cls.__module__}.{cls.__qualname__}"
    closes = (close,) if type(close) is str else tuple(close)
    for each in closes:
        if not any(callable(class_value(base, each)) for base in mro_of(cls)):
            raise ConfigurationError(f"track(): {name} has no method {each!r}: give close=...")
    if cls.__flags__ & _IMMUTABLE:
        raise ConfigurationError(f"track(): {name} is written in C and cannot be changed")
    if not cls.__weakrefoffset__:
        raise ConfigurationError(
            f"track(): {name} allows no weak references: add '__weakref__' to its __slots__"
        )
    return OwnerKind(
        f"{cls.__module__}:{cls.__qualname__}",
        name,
        never,
        lambda owner: [value for _, value in attributes_of(owner)],
        closes,
        needs_connections=False,
    )


class HolderHint(NamedTuple):
    """What to change in a program where an object of a library holds the socket.

    Attributes:
        holder: The name of a type, such as `requests.models.Response`, or of a package: then any
            of its types. A pool goes by the name of its library, or by `for_each_call(library)`.
            What held a dropped socket is gone: the calls that have opened it stand for it.
        sentence: What to do.
        verdicts: For which verdicts it is; those of sockets that are not closed, unless given.
        origin: For which origin of the descriptor it is, before any TLS wrapping: with `CREATED`
            and `ACCEPTED` for one side of a connection. None for any.
    """

    holder: str
    sentence: str
    verdicts: tuple[Verdict, ...] = _NOT_CLOSED
    origin: Origin | None = None

    def fits(self, verdict: Verdict, origin: Origin, holders: Iterable[str]) -> bool:
        """Whether it is for a socket with these holders."""
        return (
            verdict in self.verdicts
            and self.origin in (None, origin)
            and any(name == self.holder or name.startswith(f"{self.holder}.") for name in holders)
        )


def give_back(
    library: str,
    sentence: str,
    verdicts: tuple[Verdict, ...] = (Verdict.CHECKED_OUT, Verdict.LEAKED, Verdict.DEAD),
) -> HolderHint:
    """What to change where a connection was taken from a pool of a library and not given back."""
    return HolderHint(library, f"give it back: {sentence}", verdicts, Origin.CHECKED_OUT)


class NativeCode(NamedTuple):
    """Code that opens sockets outside Python, or puts a class of its own in their place.

    Attributes:
        module: What a program imports.
        distribution: What pip installs.
        file_part: A part of the names of its files, once a process has loaded it.
        what: What opens the sockets.
    """

    module: str
    distribution: str
    file_part: str
    what: str


# Compared by identity, so that a tuple of them is a quick key.
@dataclass(frozen=True, slots=True, eq=False)
class Library:
    """All that is known of one foreign library, which is not imported for it.

    Attributes:
        name: Its package, and what its pools are called in hints.
        pools: Its pools, and what is checked out of them.
        owners: Its objects that are meant to be closed, and whose creation is recorded.
        checkouts: Its pools of which is recorded what they hand out.
        handles: Its objects that have descriptors of their own, and that a program holds.
        inner: Further such objects, which are only asked where something else wraps them.
        attributed: What `attribute(name)` wraps, to know where its sockets are opened.
        hints: What to change; the first that fits is taken.
        native: What `doctor` says of it.
    """

    name: str
    pools: tuple[PoolKind, ...] = ()
    owners: tuple[OwnerKind, ...] = ()
    checkouts: tuple[CheckoutKind, ...] = ()
    handles: tuple[HandleKind, ...] = ()
    inner: tuple[HandleKind, ...] = ()
    attributed: tuple[str, ...] = ()
    hints: tuple[HolderHint, ...] = ()
    native: tuple[NativeCode, ...] = ()


class PoolUse(NamedTuple):
    """What a pool has to do with one connection. Plain data: it keeps nothing alive.

    Attributes:
        library: The name of the library.
        name: The pool, as its users would call it.
        is_idle: The connection waits in the pool, rather than being checked out.
        max_size: How many connections the pool keeps; None where it has no bound.
        pools: How many such pools have idle connections that one line has made to one address.
        users: How many threads and event loops have made them, and are still there.
        too_many_pools: There are more of them than a program has reason to make.
        is_out_of_use: Nothing can use the pool any more: its client is closed, or garbage.
        is_in_doubt: Whether anything can still use it is not known, and is needed.
    """

    library: str
    name: str
    is_idle: bool
    max_size: int | None
    pools: int = 1
    users: int = 1
    too_many_pools: bool = False
    is_out_of_use: bool = False
    is_in_doubt: bool = False

    @property
    def is_excuse(self) -> bool:
        """Whether the pool will close the connection when it is next used."""
        return self.is_idle and not (self.too_many_pools or self.is_out_of_use or self.is_in_doubt)

    @property
    def surplus(self) -> str:
        """What is wrong with so many pools, though each closes its connections; or nothing."""
        needed = max(1, self.users)
        if not self.is_excuse or self.pools <= needed:
            return ""
        enough = "one" if needed == 1 else f"{needed:,}"
        return (
            f"not a leak yet, but {self.pools:,} clients of this line keep idle connections to one "
            f"address, and {enough} would do, unless their settings differ"
        )

    @property
    def holders(self) -> tuple[str, ...]:
        """The names by which hints know it."""
        if self.is_out_of_use:
            return out_of_use(self.library), for_each_call(self.library)
        return (for_each_call(self.library) if self.too_many_pools else self.library,)

    def without_read_responses(self, owners: tuple[str, ...]) -> tuple[str, ...]:
        """The names of what holds the connection: if it is idle, no response has yet to be read."""
        others = tuple(name for name in owners if not name.endswith(RESPONSES))
        if not self.is_idle or self.is_out_of_use or len(others) == len(owners):
            return owners
        return *others, read_response(self.library)

    @property
    def sentence(self) -> str:
        """Where the connection is."""
        where = "idle in" if self.is_idle else "checked out of"
        bound = f"at most {self.max_size:,}" if self.max_size is not None else "without a bound"
        beside = f", one of {self.pools:,} pools for this address" if self.pools > 1 else ""
        unused = ", which nothing can use any more" if self.is_out_of_use else ""
        if self.is_in_doubt:
            unused = ", and whether anything can still use that was not found out in time"
        return f"{self.name}: {where} the pool ({bound}){beside}{unused}"
