"""Births and scans in odd places neither recurse nor raise."""

from __future__ import annotations

import socket
import sys

import pytest

import closewait_guard as cwg


class Odd:
    def __getattr__(self, name):
        # Those with underscores are what pytest asks of each module.
        raise (AttributeError if name.startswith("__") else RuntimeError)(name)


def test_a_context_provider_that_opens_sockets_is_not_asked_about_them():
    asked = []

    def opens():
        asked.append(1)
        socket.socket().close()
        return {"request": 1}

    with cwg.Guard(cwg.Settings(context=opens)) as guard, socket.socket():
        [seen] = guard.scan(full=True).observations
        assert guard.scan().coverage.births == 2
    assert seen.record.context == {"request": 1}
    assert asked == [1]


@pytest.mark.parametrize("odd", [None, Odd()])
def test_odd_objects_in_place_of_the_module_ssl_stop_no_scan(odd, monkeypatch):
    monkeypatch.setitem(sys.modules, "ssl", odd)
    with cwg.Guard() as guard, socket.socket():
        report = guard.scan(full=True)
    assert len(report.observations) + len(report.leaks) == 1
    assert report.coverage.failures == 0
