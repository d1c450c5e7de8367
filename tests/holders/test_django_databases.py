"""Database connections of Django: kept for the next request, or left to a thread's end."""

from __future__ import annotations

import gc
import threading
import warnings
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest

import closewait_guard as cwg
from findings import findings_of
from servers import postgres

pytest.importorskip("django")
from django.db.utils import ConnectionHandler

import django_project

pytestmark = pytest.mark.whole_program

django_project.configure()
# More than `surplus` allows, also where tests before have left some threads.
MANY = 12


@pytest.fixture(scope="module")
def postgres_port():
    with postgres() as port:
        yield port


@pytest.fixture
def make_connections(postgres_port):
    def make(max_age):
        database = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "postgres",
            "USER": "postgres",
            "HOST": "127.0.0.1",
            "PORT": postgres_port,
            "CONN_MAX_AGE": max_age,
        }
        return ConnectionHandler({"default": database})

    return make


@contextmanager
def quietly():
    """psycopg warns of what it finds itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def ask(connections):
    with connections["default"].cursor() as cursor:
        cursor.execute("select 1")


@contextmanager
def threads_that_ask(connections, count):
    """Threads that have asked the database, and wait for the next request."""
    asked, end = threading.Semaphore(0), threading.Event()

    def serve():
        ask(connections)
        asked.release()
        end.wait()
        connections.close_all()

    threads = [threading.Thread(target=serve) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            assert asked.acquire(timeout=30)
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def restart(port):
    """End all sessions, as a server that restarts."""
    with psycopg.connect(host="127.0.0.1", port=port, user="postgres") as admin:
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where pid <> pg_backend_pid() and backend_type = 'client backend'"
        )


def test_connections_that_conn_max_age_keeps_are_no_leak_also_when_the_server_has_closed_them(
    guard, postgres_port, make_connections
):
    with threads_that_ask(make_connections(600), MANY):
        assert guard.scan().findings == ()
        restart(postgres_port)
        stale = findings_of(guard, cwg.Verdict.STALE_POOL, MANY)
        assert guard.scan().leaks == ()
    assert {each.code for each in stale} == {"CWG701"}
    assert "Django database default: idle in the pool" in stale[0].holders[-1]
    assert "CONN_HEALTH_CHECKS" in stale[0].hint


def test_a_connection_that_a_thread_does_not_close_after_its_work_is_leaked_with_djangos_fix(
    guard, postgres_port, make_connections
):
    guard.attribute("psycopg")
    with threads_that_ask(make_connections(0), 1):
        restart(postgres_port)
        (leak,) = findings_of(guard, cwg.Verdict.LEAKED)
    assert leak.observation.record.site.function == "ask"
    assert "close_old_connections()" in leak.hint


def test_the_connection_of_a_thread_that_has_ended_is_unclosed_with_djangos_fix(
    guard, make_connections
):
    thread = threading.Thread(target=partial(ask, make_connections(600)))
    with quietly():
        thread.start()
        thread.join()
        gc.collect()
        (found,) = findings_of(guard, cwg.Verdict.UNCLOSED)
    assert found.observation.owner.name == "psycopg.Connection"
    assert found.observation.record.site.function == "ask"
    assert "close_old_connections()" in found.hint


def test_a_connection_of_the_programs_own_has_the_fix_of_its_library(guard, postgres_port):
    with quietly():
        psycopg.connect(host="127.0.0.1", port=postgres_port, user="postgres")
        gc.collect()
        (found,) = findings_of(guard, cwg.Verdict.UNCLOSED)
    assert "psycopg.connect(...) as connection" in found.hint
