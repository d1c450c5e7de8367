"""A search touches objects of any class, and runs nothing that a class defines."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import closewait_guard as cwg
from closewait_guard._holders.explain import Explainer
from closewait_guard.pytest_plugin._excuses import reachable
from command_line import environment

made = weakref.WeakSet()


def left_by_its_peer():
    ours, theirs = socket.socketpair()
    theirs.close()
    made.add(ours)
    return ours


def close_all():
    for sock in list(made):
        sock.close()


@pytest.fixture
def nothing_evaluated():
    """From here on all traps of the zoo are armed; at the end none was sprung."""
    zoo.evaluated.clear()
    yield zoo.armed.set
    zoo.armed.clear()
    zoo.kept.clear()
    assert zoo.evaluated == []


@pytest.fixture
def place():
    """A module of the program's own, beside others that are odd."""
    module = types.ModuleType("app.zoo_keeper")
    module.__file__ = "/srv/app/zoo_keeper.py"
    odd = zoo.module(None)
    names = ("app.zoo_keeper", "app.odd_module", zoo.Name("app.odd_name"), "app.no_module", 7)
    values = (module, odd, odd, zoo.attribute(None), None)
    sys.modules.update(zip(names, values, strict=True))
    yield module
    zoo.armed.clear()
    close_all()
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize("keep", zoo.KEEPERS, ids=lambda keep: keep.__name__)
def test_every_stage_runs_nothing_of_what_holds_the_socket(keep, place, nothing_evaluated):
    reports = []
    with cwg.Guard(cwg.Settings(grace=0), [reports.append]) as guard:
        a = left_by_its_peer()
        place.kept = keep(a)
        ids = {id(a): 1}
        a = None
        time.sleep(0.02)
        nothing_evaluated()
        for report in (
            guard.scan(),
            guard.report(),
            guard.scan(full=True),
            guard.check(0),
        ):
            assert report.findings
            assert any(
                keep.__name__ in holder or "app." in holder for holder in report.findings[0].holders
            ), report.findings
            assert "what holds" not in " ".join(report.coverage.notes)
        assert reports
        assert cwg.from_dict(cwg.to_dict(report)) == report
        assert cwg.render_text(report)
        assert reachable([place.kept], ids) == (
            set() if keep in (zoo.module, zoo.descriptor) else {1}
        )
        zoo.armed.clear()
        close_all()
        del place.kept


@given(st.lists(st.sampled_from(zoo.KEEPERS), min_size=2, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_combination_of_holders_runs_nothing_of_theirs(place, keepers):
    zoo.evaluated.clear()
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        a = left_by_its_peer()
        kept = a
        for keep in keepers:
            kept = keep(kept)
        place.kept, kept = kept, None
        time.sleep(0.01)
        zoo.armed.set()
        try:
            [leak] = guard.scan().leaks
        finally:
            zoo.armed.clear()
            close_all()
            del place.kept
    assert zoo.evaluated == []
    assert leak.holders


def test_a_block_and_a_monitor_run_nothing_of_the_zoo(place, nothing_evaluated):
    reports = []
    with cwg.Guard(cwg.Settings(grace=0), [reports.append]) as guard:
        a = left_by_its_peer()
        place.kept = [keep(a) for keep in zoo.KEEPERS]
        time.sleep(0.02)
        nothing_evaluated()
        with cwg.Monitor(guard, interval=0.05):
            deadline = time.monotonic() + 60
            while not reports and time.monotonic() < deadline:
                time.sleep(0.02)
        assert reports
        assert reports[0].findings
        with pytest.raises(cwg.SocketLeakError), guard.no_leaks(grace=0.05):
            place.more = zoo.attribute(left_by_its_peer())
        zoo.armed.clear()
        close_all()
        del place.kept


LEAKY = """
import socket, sys
sys.path.insert(0, {folder!r})
import zoo

def leave():
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours

kept = [keep(leave()) for keep in zoo.KEEPERS]
sys.modules["odd"] = zoo.module(None)
zoo.armed.set()
"""
TESTED = """

def test_leaves_them():
    kept.append(zoo.attribute(leave()))

def test_evaluated():
    assert not zoo.evaluated
    zoo.armed.clear()
"""


def program(folder, name, text):
    path = folder / name
    path.write_text(LEAKY.format(folder=str(Path(zoo.__file__).parent)) + text)
    return str(path)


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(CLOSEWAIT_GUARD_GRACE="0", **variables),
        check=False,
    )


def test_a_program_of_the_zoo_fails_for_its_leaks(tmp_path):
    path = program(
        tmp_path, "shop.py", "import atexit\natexit.register(lambda: print(zoo.evaluated))"
    )
    done = run("closewait_guard", "run", "--fail-on-leak", path)
    assert done.returncode == 86, done.stderr
    assert done.stdout == "[]\n"
    assert "kept[" in done.stderr
    assert "EvaluatedError" not in done.stderr


def test_a_suite_of_the_zoo_fails_for_its_leaks(tmp_path):
    path = program(tmp_path, "test_shop.py", TESTED)
    done = run("pytest", "-q", "-p", "no:cacheprovider", "--socket-leaks=fail", path)
    assert "test_leaves_them" in done.stdout
    assert "1 error" in done.stdout, done.stdout
    assert "EvaluatedError" not in done.stdout


def broken(*_):
    raise ValueError("an object that is of no kind")


@pytest.mark.parametrize(
    ("place", "note"),
    [
        (
            "closewait_guard._holders.describe.sentence_of",
            "what holds 2 sockets (the search failed)",
        ),
        (
            "closewait_guard._holders.references.referrers",
            "what holds 2 sockets (the search failed)",
        ),
        ("closewait_guard._holders.explain.Roots", "what holds 2 sockets (the search failed)"),
        (
            "closewait_guard._holders.libraries.find_classes",
            "what waits in pools: asking them has failed",
        ),
    ],
)
def test_a_search_that_fails_loses_no_leak_and_is_reported(place, note, monkeypatch):
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        kept = [left_by_its_peer(), left_by_its_peer()]
        time.sleep(0.02)
        with monkeypatch.context() as patched:
            patched.setattr(place, broken)
            report = guard.scan()
        assert len(report.leaks) == 2
        assert note in report.coverage.notes
        close_all()
        del kept
        assert note not in guard.scan().coverage.notes


class HostileSocket(socket.socket):
    """It is asked for nothing, not even for its class."""

    __class__ = zoo.lying(socket.socket)
    __getattribute__ = zoo.trap("socket.__getattribute__", socket.socket.__getattribute__)
    __hash__ = zoo.trap("socket.__hash__", socket.socket.__hash__)
    __eq__ = zoo.trap("socket.__eq__", socket.socket.__eq__)


def abandoned(cls):
    ours, theirs = socket.socketpair()
    theirs.close()
    return cls(fileno=ours.detach())


def test_a_socket_of_a_hostile_class_is_seen_and_asked_for_nothing(nothing_evaluated):
    pytest.importorskip("ssl")
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        kept = [abandoned(HostileSocket), abandoned(socket.socket)]
        time.sleep(0.01)
        nothing_evaluated()
        assert len(guard.scan(full=True).leaks) == 2
        assert len(guard.scan().leaks) == 2
        zoo.armed.clear()
        for sock in kept:
            sock.close()


def unfolded(text):
    return " ".join(text.split())


@pytest.fixture
def one_undescribable(monkeypatch):
    """Sockets of one class cannot be described."""
    from closewait_guard._inspect import scanner

    real = scanner.endpoint_of

    def endpoint_of(sock, fd):
        return broken() if type(sock).__name__ == "HostileSocket" else real(sock, fd)

    monkeypatch.setattr(scanner, "endpoint_of", endpoint_of)


def test_a_socket_that_cannot_be_described_hides_no_other_and_is_reported(one_undescribable):
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        kept = [abandoned(HostileSocket), abandoned(socket.socket)]
        time.sleep(0.01)
        report = guard.scan()
        assert len(report.leaks) == 1
        assert "the state of 1 socket (inspecting it failed)" in report.coverage.notes
        for sock in kept:
            sock.close()
        assert "looking at it" not in " ".join(guard.scan().coverage.notes)


@pytest.mark.parametrize("allow_open", [False, True])
def test_a_block_that_leaves_a_socket_that_cannot_be_described_fails(one_undescribable, allow_open):
    kept = []
    with pytest.raises(cwg.SocketLeakError, match="STILL OPEN  unknown") as caught:
        with cwg.no_leaks(grace=0, allow_open=allow_open):
            kept.append(abandoned(HostileSocket))
    kept.pop().close()
    assert "the state of 1 socket (inspecting it failed)" in unfolded(str(caught.value))


def test_pytest_fails_a_test_that_leaves_a_socket_that_cannot_be_described(
    suite, one_undescribable
):
    result = suite.fail(
        """
class HostileSocket(socket.socket): pass
def test_leaves_it(): keep(HostileSocket())
def test_closes_it(): KEPT.pop().close()
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*NEVER CLOSED  unknown*", "*ERROR *test_leaves_it*"])
    assert "the state of 1 socket (inspecting it failed)" in unfolded(result.stdout.str())


def test_a_periodic_report_that_fails_again_and_again_is_logged_once(monkeypatch):
    from closewait_guard import _monitor

    logged = []
    monkeypatch.setattr(_monitor, "log_error", lambda *facts: logged.append(facts))
    with cwg.Guard() as guard:
        schedule = _monitor.Schedule(guard, 60)
        with monkeypatch.context() as patched:
            patched.setattr(guard, "_next_in_series", broken)
            schedule.run_once()
            schedule.run_once()
        assert len(logged) == 1
        schedule.run_once()
        with monkeypatch.context() as patched:
            patched.setattr(guard, "_next_in_series", broken)
            schedule.run_once()
    assert len(logged) == 2


class Text(zoo.Name):
    """It is its own text, and stays what it is when it is made a string."""

    __str__ = zoo.trap("text.__str__", lambda self: self)
    __getattribute__ = zoo.trap("text.__getattribute__", str.__getattribute__)
    __len__ = zoo.trap("text.__len__", str.__len__)
    __iter__ = zoo.trap("text.__iter__", str.__iter__)


class Worded:
    def __str__(self):
        return Text("worded")


class Wordless:
    def __str__(self):
        raise ValueError(Text("no words"))


def recorded(context=None):
    """What is recorded of one creation, after all that is reported of it was written."""
    with cwg.Guard(cwg.Settings(grace=0, context=context)) as guard:
        sock = abandoned(socket.socket)
        time.sleep(0.01)
        zoo.armed.set()
        report = guard.scan()
        cwg.render_text(report)
        cwg.to_dict(report)
        zoo.armed.clear()
        sock.close()
    return report.findings[0].observation.record, report.coverage.notes


def recorded_in_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(recorded()[0]), name=Text("text"))
    thread._name = Text("text")
    thread.start()
    thread.join()
    return found[0].thread


def recorded_in_task():
    async def record():
        return recorded()[0]

    async def main():
        return await asyncio.create_task(record(), name=Text("text"))

    return asyncio.run(main()).task


def recorded_in_label():
    with cwg.label(Text("text")):
        return recorded()[0].labels[0]


@pytest.mark.parametrize("find", [recorded_in_thread, recorded_in_task, recorded_in_label])
def test_a_name_of_a_hostile_class_is_recorded_as_an_exact_string(find, nothing_evaluated):
    found = find()
    assert type(found) is str
    assert found == "text"


def test_a_context_is_recorded_in_exact_values_and_one_without_text_loses_no_other(
    nothing_evaluated,
):
    context = {Text("name"): Text("text"), "worded": Worded(), "bad": Wordless(), "n": 1}
    record, notes = recorded(lambda: context)
    assert dict(record.context) == {"name": "text", "worded": "worded", "n": 1}
    assert {type(each) for each in (*record.context, *record.context.values())} == {str, int}
    assert "a value of the context has no text: ValueError: no words" in notes


def test_a_context_value_of_a_class_that_cannot_be_hashed_is_recorded():
    value = zoo.UnhashableMeta("Value", (), {"__str__": lambda self: "value"})()
    assert dict(recorded(lambda: {"value": value})[0].context) == {"value": "value"}


@pytest.mark.parametrize("key", [10**4000, -(10**20_000)], ids=["long", "unwritable"])
def test_a_key_of_thousands_of_digits_is_shortened_and_loses_no_holder(key, place):
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        place.kept = {key: left_by_its_peer()}
        time.sleep(0.01)
        report = guard.scan()
        close_all()
        del place.kept
    [holder] = report.findings[0].holders
    assert "...]" in holder
    assert len(holder) < 120
    assert "what holds" not in " ".join(report.coverage.notes)


def test_sockets_whose_holders_were_not_searched_for_are_counted_beside_one_of_their_line(
    monkeypatch,
):
    real = Explainer._choose_to_search
    monkeypatch.setattr(
        Explainer,
        "_choose_to_search",
        lambda *each, is_paused: real(*each, is_paused=is_paused)[:1],
    )
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        kept = [left_by_its_peer() for _ in range(3)]
        time.sleep(0.01)
        report = guard.scan()
        close_all()
        del kept
    assert sum(not leak.holders for leak in report.leaks) == 2
    assert any(note.startswith("what holds 2 sockets (searching") for note in report.coverage.notes)
