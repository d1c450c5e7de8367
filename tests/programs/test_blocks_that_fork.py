"""`no_leaks()` sees what a forked child keeps open of what its block has closed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from suites import FORKING

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")

IMPORTS = """
import atexit, concurrent.futures, contextlib, multiprocessing, os, signal, socket, socketserver
import subprocess, sys, textwrap, threading, time
import closewait_guard as cwg

def listener():
    return socket.create_server(("127.0.0.1", 0))
"""
PREAMBLE = (
    IMPORTS
    + FORKING
    + """
def leaks_of(block, grace=0.3, **options):
    try:
        with cwg.no_leaks(grace, **options):
            block()
    except cwg.SocketLeakError as error:
        return error
    return None
"""
)


def run(code, prefix=()):
    source = PREAMBLE + textwrap.dedent(code)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", source], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("options", ["", "allow_open=True"])
def test_a_block_fails_for_a_connection_that_only_its_child_keeps_open(options):
    run(
        f"""
        theirs = children = None

        def block():
            global theirs, children
            ours, theirs = connect()
            children = [fork(lambda: (theirs.close(), time.sleep(60)))]
            ours.close()

        theirs_before, _ = connect()
        with theirs_before:
            error = leaks_of(block, {options})
        theirs.close()
        found = [leak for leak in error.report.findings if leak.verdict == "inherited"]
        [leak] = found
        assert leak.is_leak and leak.code == "CWG501"
        assert leak.observation.state == "ESTABLISHED"
        assert leak.observation.record.site.function == "connect"
        assert leak.holders[0].startswith(f"process {{children[0]}} (")
        text = " ".join(str(error).split())
        assert f"process {{children[0]}} has it open unused" in text, text
        assert "close it in the child" in text
        end(*children)
        """
    )


needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root"
)


@needs_root
@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_a_block_fails_for_its_child_in_the_first_process_of_a_container_too():
    run(
        """
        assert os.getpid() == 1
        theirs = None

        def block():
            global theirs
            ours, theirs = connect()
            fork(lambda: (theirs.close(), time.sleep(60)))
            ours.close()

        found = leaks_of(block).report.findings
        assert "inherited" in [leak.verdict for leak in found]
        theirs.close()
        """,
        prefix=("unshare", "--mount", "--pid", "--fork", "--mount-proc"),
    )


@needs_root
def test_a_block_does_not_pass_for_a_child_in_a_network_that_cannot_be_looked_at():
    run(
        """
        import ctypes, errno
        from closewait_guard._processes import netlink, procfs

        def refused(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        def go_away(theirs):
            theirs.close()
            ctypes.CDLL(None).unshare(0x40000000)  # CLONE_NEWNET
            os.write(ready, b"1")
            time.sleep(60)

        def block():
            global child
            ours, theirs = connect()
            child = fork(lambda: go_away(theirs))
            os.read(gone, 1)
            ours.close()
            theirs.close()

        gone, ready = os.pipe()
        netlink._open_within = procfs.table = refused
        text = " ".join(str(leaks_of(block)).split())
        assert f"what 1 child process may keep open: not to be read ({child})" in text, text
        end(child)
        """
    )


def test_a_block_fails_for_a_copy_whose_peer_has_closed_too():
    run(
        """
        def block():
            global child
            ours, theirs = connect()
            child = fork(lambda: (theirs.close(), time.sleep(60)))
            ours.close()
            theirs.close()

        error = leaks_of(block)
        assert [leak.verdict for leak in error.report.findings] == ["inherited"], error
        assert "CLOSE_WAIT" in str(error)
        end(child)
        """
    )


def test_a_block_passes_as_soon_as_the_child_has_ended_or_closed_its_copies():
    run(
        """
        def block(work):
            global child
            ours, theirs = connect()
            with ours, theirs:
                child = fork(lambda: work(ours, theirs))

        def ends(ours, theirs):
            time.sleep(0.2)

        def closes(ours, theirs):
            time.sleep(0.2)
            ours.close()
            theirs.close()
            time.sleep(60)

        for work in (ends, closes):
            began = time.monotonic()
            assert leaks_of(lambda: block(work), grace=30) is None
            assert time.monotonic() - began < 20
            end(child)
        """
    )


def test_a_block_passes_when_its_children_have_ended_inside_it():
    run(
        """
        def work(number):
            return number + 1

        def with_process():
            process = multiprocessing.get_context("fork").Process(target=work, args=[1])
            process.start()
            process.join()

        def with_pool():
            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map(work, [1, 2]) == [2, 3]

        def with_executor():
            context = multiprocessing.get_context("fork")
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
                assert list(executor.map(work, [1, 2])) == [2, 3]

        def unwaited():
            # It has ended, and nothing has asked for its status: it has no descriptors.
            fork(lambda: None)
            time.sleep(0.2)

        for run in (with_process, with_pool, with_executor, unwaited):
            def block():
                ours, theirs = connect()
                run()
                ours.close()
                theirs.close()

            error = leaks_of(block, grace=0)
            assert error is None, (run, error)
        """
    )


def test_a_worker_of_a_pool_that_stays_keeps_what_was_open_when_it_was_forked():
    run(
        """
        def block():
            global pool
            ours, theirs = connect()
            pool = multiprocessing.get_context("fork").Pool(1)
            assert pool.apply(abs, [-1]) == 1
            ours.close()
            theirs.close()

        def uses_pool():
            with contextlib.ExitStack() as stack:
                for sock in connect():
                    stack.enter_context(sock)
                assert pool.apply(abs, [-2]) == 2

        error = leaks_of(block)
        found = {leak.observation.record.opener.origin: leak for leak in error.report.findings}
        assert found["created"].holders[0].startswith(f"process {pool._pool[0].pid} ("), error
        # What is opened when the workers are there already is none of theirs.
        assert leaks_of(uses_pool) is None
        pool.terminate()
        pool.join()
        """
    )


def test_what_the_children_of_a_forking_server_serve_fails_no_block():
    run(
        """
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                for line in self.rfile:
                    if line == b"sleep\\n":
                        time.sleep(60)
                    self.wfile.write(line)

        # In a process of its own: a child of ours would have a copy of what its client opens here.
        CLIENT = '''
        import socket, sys
        with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
            sock.sendall(sys.argv[2].encode())
            print(sock.recv(9) if sys.argv[3:] else b"", flush=True)
            input()
        '''

        def block(*arguments):
            command = [sys.executable, "-c", textwrap.dedent(CLIENT), str(server.server_address[1])]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            clients.append(subprocess.Popen([*command, *arguments], **pipes))
            server.handle_request()
            clients[-1].stdout.readline()

        clients = []
        with socketserver.ForkingTCPServer(("127.0.0.1", 0), Handler) as server:
            # Answered; not asked for anything yet; asked, and not answered yet.
            for arguments in (["x\\n", "answer"], ["x"], ["sleep\\n"]):
                error = leaks_of(lambda: block(*arguments))
                assert error is None, (arguments, error)
            for client in clients:
                client.communicate(b"x\\n")
            for child in list(server.active_children):
                end(child)
        """
    )


def test_a_block_fails_for_its_client_that_a_child_of_its_own_server_keeps_open():
    run(
        """
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                # Waits for an end that its own copy of the client keeps from coming.
                for line in self.rfile:
                    self.wfile.write(line)

        class Server(socketserver.ForkingTCPServer):
            block_on_close = False

        def block():
            with socket.create_connection(server.server_address) as client:
                client.sendall(b"x\\n")
                assert client.recv(9) == b"x\\n"

        with Server(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            [left] = leaks_of(block).report.findings
            [child] = server.active_children
            assert left.holders[0].startswith(f"process {child} (")
            server.shutdown()
            end(child)
        """
    )


def test_a_child_that_may_use_a_copy_is_named_and_left_open_is_what_it_says():
    run(
        """
        def works():
            end = time.monotonic() + 20
            while time.monotonic() < end:
                pass

        def block():
            global child
            ours, theirs = connect()
            child = fork(works)
            ours.close()
            theirs.close()

        error = leaks_of(block)
        [left] = error.report.findings
        assert not left.is_leak and left.holders[0].startswith(f"process {child} (")
        text = " ".join(str(error).split())
        assert f"process {child} has it open, and its parent has closed it" in text, text
        assert leaks_of(block, allow_open=True) is None
        end(child)
        """
    )


def test_a_program_that_is_started_by_subprocess_has_no_copies():
    run(
        """
        def block():
            global program
            ours, theirs = connect()
            program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            ours.close()
            theirs.close()

        for _ in range(2):
            assert leaks_of(block) is None
            program.communicate(b"x")
        """
    )
