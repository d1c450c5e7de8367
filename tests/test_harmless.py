"""The guard never hurts its host: warnings, shutdown, forks, exhausted descriptors, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest


def run(code, *options, expect=0):
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stderr
    return done


# libffi may keep a descriptor open from the first import of ctypes on.
WARNING_PROGRAM = """
    import ctypes, gc, socket, sys, warnings
    {install}

    class Mine(socket.socket):
        pass

    def drop():
        s = socket.socket()
        s = None  # dropped here

    def cycle():
        c = [socket.socket()]
        c.append(c)

    def closed():
        socket.socket().close()

    def pair():
        a, b = socket.socketpair()
        a.close()

    for _ in range(3):
        drop()
        closed()
    cycle()
    gc.collect()
    pair()
    Mine()
    kept = socket.socket()
    {uninstall}
"""


@pytest.mark.parametrize(
    "options", [(), ("-W", "always"), ("-W", "default"), ("-W", "error"), ("-X", "dev")]
)
@pytest.mark.parametrize("uninstall", ["", "closewait_guard.uninstall()"])
def test_resource_warnings_are_the_same_as_without_the_guard(tmp_path, options, uninstall):
    """The same text, at the same place, as many times."""
    stderr_of = {}
    for install in ("pass", "import closewait_guard; closewait_guard.install()"):
        script = tmp_path / "program.py"
        off = uninstall if install != "pass" else ""
        script.write_text(textwrap.dedent(WARNING_PROGRAM).format(install=install, uninstall=off))
        done = subprocess.run(
            [sys.executable, *options, str(script)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        stderr_of[install] = done.stderr
    without, with_guard = stderr_of.values()
    assert with_guard == without
    if options:
        assert "ResourceWarning: unclosed" in without


@pytest.mark.parametrize("uninstall", ["", "cwg.uninstall()"])
def test_shutdown_with_open_sockets_is_silent(uninstall):
    done = run(
        f"""
        import socket, threading, time
        import closewait_guard as cwg
        cwg.install()
        kept = [socket.socket() for _ in range(5)]
        cycle = [socket.socket()]; cycle.append(cycle); del cycle
        pair = socket.socketpair(); file = pair[0].makefile(); pair[0].close()
        def work():
            while True:
                socket.socket().close()
        threading.Thread(target=work, daemon=True).start()
        cwg.scan(full=True)
        time.sleep(0.05)
        {uninstall}
        """
    )
    assert done.stdout == done.stderr == ""


def test_functions_for_forked_children_are_called_in_order_and_not_kept_alive():
    run(
        """
        import gc, os, weakref
        from closewait_guard._threads import in_child
        calls = []
        @in_child
        def first(): calls.append("first")
        @in_child
        def gone(): calls.append("gone")
        @in_child
        def second(): calls.append("second")
        alive = weakref.ref(gone)
        del gone
        gc.collect()
        assert alive() is None
        child = os.fork()
        if child == 0:
            os._exit(0 if calls == ["first", "second"] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert calls == []
        """
    )


def test_functions_for_forked_children_keep_no_module_alive():
    run(
        """
        import gc, sys, weakref
        import closewait_guard._threads as forks
        # pytest's holds its configuration, and so all tests.
        alive = weakref.ref(forks.__loader__)
        ours = [name for name in sys.modules if name.startswith("closewait_guard")]
        for name in ours:
            del sys.modules[name]
        del forks
        gc.collect()
        assert alive() is None
        """
    )


def test_a_fork_in_the_middle_of_a_scan_works_and_the_child_reports_what_it_inherited():
    done = run(
        """
        import os, socket, sys, threading, time
        import closewait_guard as cwg
        guard = cwg.install(grace=0)
        parents = [socket.socketpair() for _ in range(200)]
        socket.socket()  # dropped, which concerns the parent only
        for _, theirs in parents[:50]:
            theirs.close()
        stop = threading.Event()
        def scan():
            while not stop.is_set():
                guard.scan(full=True); guard.mark()
        threads = [threading.Thread(target=scan) for _ in range(3)]
        for thread in threads: thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                report = guard.scan()
                verdicts = {leak.verdict for leak in report.findings}
                records = [leak.observation.record for leak in report.findings]
                ok = verdicts == {cwg.Verdict.INHERITED} and len(records) == 50
                ok = ok and all(r.pid == os.getpid() != r.parent.pid for r in records)
                own, other = socket.socketpair(); other.close()
                young = [leak for leak in guard.scan().findings if leak.verdict == "leaked"]
                ok = ok and [leak.observation.fd for leak in young] == [own.fileno()]
                ok = ok and "fork()" in young[0].hint + report.findings[0].hint
                ok = ok and report.coverage.opened == 0 and guard.scan().coverage.opened == 2
                ok = ok and "dropped" not in verdicts
                own.close()
                with cwg.no_leaks(grace=0):
                    socket.socket().close()
                os._exit(0 if ok else 1)
            deadline = time.monotonic() + 30
            while True:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid: break
                assert time.monotonic() < deadline, "the child hangs"
                time.sleep(0.001)
            assert status == 0, status
        stop.set()
        for thread in threads: thread.join()
        assert {leak.verdict for leak in guard.scan().findings} == {"leaked", "dropped"}
        for pair in parents:
            for s in pair: s.close()
        """,
        "-W",
        "ignore",
    )
    assert done.stderr == ""


def test_a_report_needs_no_descriptor():
    run(
        """
        import os, resource, socket
        import closewait_guard as cwg
        guard = cwg.install(grace=0)
        guard.scan()  # Until then it keeps two, for what scans to be loaded.
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        pairs, held = [socket.socketpair() for _ in range(5)], []
        for _, theirs in pairs: theirs.close()
        detached = socket.socketpair(); fd = detached[0].detach(); detached[1].close()
        try:
            while True: held.append(os.dup(0))
        except OSError as error:
            assert error.errno == 24
        try:
            socket.socket()
        except OSError as error:
            assert error.errno == 24
        else:
            raise SystemExit("there was room")
        report = guard.report()
        assert len(report.leaks) == 6, report.leaks
        assert report.fd_used == report.fd_limit == 128
        assert "6 leaked" in cwg.render_text(report)
        for one in held: os.close(one)
        assert len(guard.scan().leaks) == 6
        os.close(fd)
        for ours, _ in pairs: ours.close()
        """
    )


def test_a_finalizer_that_opens_sockets_does_not_deadlock():
    run(
        """
        import gc, socket, warnings
        import closewait_guard as cwg
        guard = cwg.install()
        class Maker:
            def __init__(self): self.me = self
            def __del__(self):
                socket.socket().close()
                guard.scan(); guard.mark()
        gc.set_threshold(1)
        for _ in range(300):
            Maker()
            socket.socket().close()
        gc.collect()
        cwg.uninstall()
        assert guard.scan().coverage.opened == 600
        """
    )


def test_a_signal_handler_may_scan_in_the_middle_of_a_scan():
    run(
        """
        import signal, socket, time
        import closewait_guard as cwg
        guard = cwg.install()
        socks = [socket.socket() for _ in range(100)]
        signal.signal(signal.SIGALRM, lambda *_: (guard.scan(full=True), guard.mark()))
        for step in range(1, 200):
            signal.setitimer(signal.ITIMER_REAL, step * 3e-5)
            guard.scan(full=True); guard.mark()
            time.sleep(0.001)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for s in socks: s.close()
        """
    )


def test_a_failure_of_the_guard_is_counted_and_never_reaches_the_program():
    import socket

    import closewait_guard as cwg

    guard = cwg.Guard()

    def broken(*_):
        raise RuntimeError("of the guard")

    for name in ("on_create", "on_detach", "on_makefile", "on_finalize"):
        setattr(guard._registry, name, broken)
    guard.install()
    try:
        a, b = socket.socketpair()
        a.makefile().close()
        socket.socket(fileno=a.detach()).close()
        b.close()
        with pytest.warns(ResourceWarning):
            socket.socket()
        assert guard.scan().coverage.failures == 7
        assert "7 openings or ends of sockets that" in cwg.render_text(guard.scan())
    finally:
        guard.uninstall()


def test_sockets_made_without_their_constructor_are_ignored():
    import socket

    import closewait_guard as cwg

    empty = socket.socket.__new__(socket.socket)
    with cwg.Guard() as guard:
        assert guard.scan(full=True).coverage.failures == 0
    assert empty.fileno() == -1


def test_sockets_opened_near_the_recursion_limit_only_raise_the_programs_own_error():
    run(
        """
        import socket, sys
        import closewait_guard as cwg
        guard = cwg.install()
        def deep():
            socket.socket().close()
            deep()
        try:
            deep()
        except RecursionError:
            pass
        socket.socket().close()
        """
    )


def test_threads_that_open_drop_and_close_lose_no_record_and_cause_no_false_leak():
    """`STRESS_SOCKETS=200000` is the size that the library must withstand."""
    total = int(os.environ.get("STRESS_SOCKETS", "20000"))
    done = run(
        f"""
        import gc, random, socket, ssl, sys, threading, warnings, weakref
        import closewait_guard as cwg
        warnings.simplefilter("ignore")
        sys.setswitchinterval(1e-4)
        gc.set_threshold(1)
        guard = cwg.install(grace=0, stack_depth=5, dropped_kept=10)
        context = ssl.create_default_context()
        server = socket.create_server(("127.0.0.1", 0), backlog=512)
        opened, drops, errors, alive = [0] * 8, [0] * 8, [], []
        accepting = threading.Lock()
        stop = threading.Event()

        def closed(n, chance):
            socket.socket().close()
            opened[n] += 1

        def pair(n, chance):
            a, b = socket.socketpair()
            opened[n] += 2
            a.close(); b.close()

        def dropped(n, chance):
            socket.socket()
            opened[n] += 1; drops[n] += 1

        def cycle(n, chance):
            ring = [socket.socket()]; ring.append(ring)
            opened[n] += 1; drops[n] += 1

        def accepted(n, chance):
            with accepting:
                client = socket.create_connection(server.getsockname())
                ours, _ = server.accept()
            opened[n] += 2
            ours.close(); client.close()

        def wrapped(n, chance):
            context.wrap_socket(socket.socket(), server_hostname="x").close()
            opened[n] += 2

        def detached(n, chance):
            socket.socket(fileno=socket.socket().detach()).close()
            opened[n] += 2

        def watched(n, chance):
            s = socket.socket()
            opened[n] += 1
            alive.append(weakref.ref(s))
            s.close()

        kinds = [closed, pair, dropped, cycle, accepted, detached, watched]

        def work(n):
            chance = random.Random(n)
            try:
                while opened[n] < {total} // 8:
                    kind = chance.choice(kinds) if chance.random() > 0.005 else wrapped
                    kind(n, chance)
            except BaseException as error:
                errors.append(repr(error))

        def scan():
            while not stop.is_set():
                try:
                    for leak in guard.scan().leaks:
                        # Between open and close a socket may truly be dead or left by its peer.
                        if leak.verdict is cwg.Verdict.LINGERING:
                            errors.append(leak.verdict)
                except BaseException as error:
                    errors.append(repr(error))

        scanner = threading.Thread(target=scan)
        scanner.start()
        workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in workers: thread.start()
        for thread in workers: thread.join(600)
        stop.set(); scanner.join(60)
        gc.collect()
        assert not errors, errors[:5]
        assert not any(thread.is_alive() for thread in [*workers, scanner])
        report = guard.scan(full=True)
        coverage = report.coverage
        assert coverage.opened == sum(opened) + 1, (coverage, sum(opened))
        assert coverage.dropped == sum(drops), (coverage, sum(drops))
        assert coverage.failures == 0
        assert report.open_sockets == 1, report.open_sockets
        assert [leak for leak in report.leaks if leak.verdict != "dropped"] == []
        assert not any(ref() is not None for ref in alive)
        server.close()
        print(coverage.opened)
        """
    )
    assert int(done.stdout) >= total
