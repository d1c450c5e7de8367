"""Django: a database connection for each thread and alias, which requests use again and close."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import NOT_GIVEN_BACK, HolderHint, Library, PoolKind, made_by
from closewait_guard._libraries.psycopg import libpq_descriptor
from closewait_guard._live import field, text_of, value_at

__all__ = [
    "LIBRARIES",
]


_WRAPPER = "django.db.backends.base.base:BaseDatabaseWrapper"
_CLOSE_IT = (
    "Django closes connections at the end of a request: in a thread or program of your own call "
    "django.db.close_old_connections() after each piece of work, or connection.close() in a "
    "`finally` block"
)


def _name(wrapper: Any) -> str:
    return f"Django database {text_of(field(wrapper, 'alias')) or ''}".rstrip()


def _idle(wrapper: Any) -> Iterable[object]:
    """The connection that waits for the next request of its thread, by CONN_MAX_AGE."""
    max_age = value_at(field(wrapper, "settings_dict"), "CONN_MAX_AGE")
    if max_age == 0 or field(wrapper, "in_atomic_block") is not False:
        return ()
    connection = field(wrapper, "connection")
    fd = libpq_descriptor(connection)
    return [connection if fd is None else fd]


LIBRARIES = (
    Library(
        "django",
        pools=(PoolKind((_WRAPPER,), _name, lambda _: 1, _idle, is_of_thread=True),),
        hints=(
            HolderHint(
                "django",
                "set CONN_HEALTH_CHECKS to True, or CONN_MAX_AGE below the server's timeout: the "
                "next query on this connection would fail; in a thread of your own call "
                "django.db.close_old_connections() before each piece of work",
                (Verdict.STALE_POOL,),
            ),
            HolderHint("django.db.backends", _CLOSE_IT, NOT_GIVEN_BACK),
            HolderHint(made_by("django.db.backends"), _CLOSE_IT, (Verdict.UNCLOSED,)),
        ),
    ),
)
