"""Reports posted to a server on loopback, which misbehaves: nothing of that reaches the program."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard._clock import now
from closewait_guard.reporters import webhook as module
from closewait_guard.reporters.posting import Poster, PostError, WebAddress
from closewait_guard.testing import CapturingReporter
from leaking import PRELUDE, report_leaks, run
from receivers import receiver
from servers import authority


@pytest.fixture
def server():
    with receiver() as served:
        yield served


@pytest.fixture(autouse=True)
def no_logging_of_the_program():
    """What goes wrong is printed on stderr where the program has not configured structlog."""
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(sys.modules[module.__module__], "_FIRST_DELAY", 0.01)


@pytest.fixture(scope="module")
def report():
    """A report with a leak and an alert."""
    found = report_leaks(CapturingReporter())
    alert = cwg.Alert(cwg.AlertKind.COUNT, cwg.Severity.CRITICAL, "many", {"count": 7})
    return replace(found, alerts=(alert,))


def url_of(server, login=""):
    return f"http://{login}127.0.0.1:{server.port}/hook/s3cret?key=s3cret"


def test_a_report_is_posted_with_its_text_its_events_and_all_of_it(server, report):
    hook = reporters.webhook(url_of(server, "me:s3%2Fcret@"))
    hook(report)
    document = json.loads(server.wait_for(1)[0])
    hook.close()
    assert document["schema"] == "closewait-guard-webhook/1"
    assert (document["severity"], document["lost"]) == ("critical", 0)
    assert "1 LEAKED" in document["text"]
    alert, leak = document["events"]
    assert (alert["event"], alert["level"]) == ("socket_alert", "critical")
    assert (leak["event"], leak["code"]) == ("socket_leak", report.findings[0].code)
    assert cwg.from_dict(document["report"]) == report
    [(path, headers)] = server.asked
    assert path == "/hook/s3cret?key=s3cret"
    assert headers["Authorization"] == "Basic bWU6czMvY3JldA=="
    assert headers["Content-Type"] == "application/json"


def test_https_needs_a_certificate_that_the_default_context_trusts(
    report, tmp_path, monkeypatch, capfd
):
    theirs, _, certificate = authority()
    (tmp_path / "ca.pem").write_bytes(certificate)
    with receiver(theirs) as served:
        url = f"https://localhost:{served.port}/"
        untrusting = reporters.webhook(url)
        untrusting(report)
        untrusting.close()
        assert (untrusting.lost, served.asked) == (1, [])
        assert "why='unable to get local issuer certificate'" in capfd.readouterr().err
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        hook = reporters.webhook(url)
        hook(report)
        assert json.loads(served.wait_for(1)[0])["severity"] == "critical"
        hook.close()


def test_what_passes_is_tried_again_and_not_before_the_server_wants_it(server, report, capfd):
    hook = reporters.webhook(url_of(server))
    server.answers[:] = [500, "close", 200]
    hook(report)
    server.wait_for(1)
    assert (hook.lost, len(server.asked)) == (0, 3)
    server.answers[:] = [(429, {"Retry-After": "3000"})]
    hook(report)
    server.wait_for_requests(4)
    while hook._not_before < now() + 10:
        time.sleep(0.01)
    # It would have to wait for longer than the program has, and is not waited for.
    began = time.monotonic()
    hook.close()
    assert time.monotonic() - began < 2
    assert (hook.lost, len(server.asked)) == (1, 4)
    assert capfd.readouterr().err.count("reports did not arrive") == 1


def test_what_is_lost_is_logged_once_and_counted_in_the_next_post(server, report, capfd):
    hook = reporters.webhook(url_of(server))
    elsewhere = {"Location": f"http://localhost:{server.port}/elsewhere"}
    server.answers[:] = [(302, elsewhere), 404, *["nonsense"] * 3]
    with cwg.Guard(cwg.Settings(), [reporters.at_least("warning", hook)]) as guard:
        for _ in range(3):
            hook(report)
        hook(report)
        assert json.loads(server.wait_for(1)[0])["lost"] == 3
        hook(report)
        assert json.loads(server.wait_for(2)[1])["lost"] == 0
        assert guard.failed_reports == hook.lost == 3
    assert {path for path, _ in server.asked} == {"/hook/s3cret?key=s3cret"}
    line = capfd.readouterr().err
    assert line == (
        "closewait-guard: reports did not arrive: "
        f"reporter=\"webhook('http://127.0.0.1:{server.port}/...')\", lost=1, why='HTTP 302'\n"
    )


def test_a_server_that_hangs_costs_old_reports_and_the_end_a_bounded_time(
    server, report, monkeypatch, capfd
):
    monkeypatch.setattr(sys.modules[module.__module__], "_FLUSH_SECONDS", 0.2)
    hook = reporters.webhook(url_of(server))
    server.always = "hang"
    hook(report)
    server.wait_for_requests(1)
    for _ in range(25):
        hook(report)
    assert hook.lost == 5
    hook.close()
    assert hook.lost == 26
    assert "s3cret" not in capfd.readouterr().err


def test_a_server_that_never_stops_talking_is_listened_to_only_until_the_end():
    interim = b"HTTP/1.1 100 " + b"x" * ((1 << 14) - 17) + b"\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            for _ in range(2):
                connection = listener.accept()[0]
                with connection, suppress(OSError):
                    for each in scripts.pop(0):
                        connection.sendall(each)

        # The second is done at last, all in one piece.
        scripts = [
            [interim] * 2000,
            [b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 103 \r\n\r\nHTTP/1.1 200 \r\n\r\n"],
        ]
        thread = threading.Thread(target=talk)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        poster = Poster(WebAddress.parse("webhook", address))
        moments = iter([math.inf] * 50)
        with pytest.raises(PostError, match="no answer in time"):
            poster.post(b"{}", lambda: next(moments, 0.0))
        poster.post(b"{}", lambda: math.inf)
        thread.join()


def test_an_address_that_does_not_answer_leaves_time_for_the_next(server, monkeypatch):
    with socket.socket() as silent, socket.socket() as waiting:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        # Nothing is accepted: of a further connection the kernel ignores the first packet.
        waiting.connect(silent.getsockname())
        addresses = [silent.getsockname(), ("127.0.0.1", server.port)]
        kinds = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *_, **__: [(*kinds, each) for each in addresses]
        )
        end = now() + 2
        Poster(WebAddress.parse("webhook", url_of(server))).post(b"{}", lambda: end)
    assert server.wait_for(1) == [b"{}"]


def test_what_was_given_up_is_neither_waited_for_nor_counted_again(report, monkeypatch):
    began, is_over = threading.Event(), threading.Event()

    def hang(*_):
        # As a name service does.
        began.set()
        is_over.wait()
        raise PostError("at last", is_final=True)

    monkeypatch.setattr(Poster, "post", hang)
    monkeypatch.setattr(sys.modules[module.__module__], "_FLUSH_SECONDS", 0)
    hook = reporters.webhook("http://hangs.invalid/")
    hook(report)
    began.wait()
    hook.flush()
    monkeypatch.setattr(hook, "_hurry", None)
    hook.close()
    thread = hook._thread
    is_over.set()
    thread.join()
    assert hook.lost == 1


def test_slack_gets_what_has_changed_as_escaped_text_of_bounded_length(server, report):
    label = "<!channel> ``` & " + "x" * 100
    with cwg.label(label):
        labelled = report_leaks(CapturingReporter())
    [leak] = labelled.findings
    record = leak.observation.record

    def at_line(number):
        stack = tuple(replace(frame, lineno=number) for frame in record.stack)
        seen = replace(leak.observation, record=replace(record, stack=stack))
        return replace(leak, observation=seen)

    many = replace(labelled, findings=tuple(at_line(number) for number in range(1, 40)))
    hook = reporters.slack(url_of(server))
    quiet = replace(report, alerts=())
    for each in (quiet, quiet, many):
        hook(each)
    first, last = (json.loads(body) for body in server.wait_for(2))
    hook.close()
    assert len(server.posts) == 2
    assert first.keys() == {"text"}
    assert first["text"].startswith("```\nclosewait-guard  ")
    assert "1 LEAKED" in first["text"]
    assert len(last["text"]) < 4000
    assert "&lt;!channel&gt; ''' &amp;" in last["text"]
    assert (last["text"].count("```"), "<" in last["text"]) == (2, False)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("webhook", "it does not begin with https:// or http://"),
        ("webhook:ftp://me:s3cret@host/", "it does not begin with https:// or http://"),
        ("webhook:https://", "it has no host"),
        ("webhook:https://me:s3/cret@host/", "its host or port is not valid"),
        ("slack:https://host/s3 cret", "it has characters that must be escaped"),
    ],
)
def test_what_is_no_address_is_refused_in_one_sentence(name, why):
    with pytest.raises(cwg.ConfigurationError) as caught:
        reporters.named(name)
    word = name.partition(":")[0]
    assert str(caught.value) == (f"{word} needs an address, as in {word}:https://host/path: {why}")


def test_settings_show_the_host_of_an_address_and_nothing_else_of_it():
    url = "https://me:s3cret@host:8443/s3cret"
    settings = cwg.Settings(reporters=(f"changes:webhook:{url}", "text"))
    shown = "('changes:webhook:https://host:8443/...', 'text')"
    assert settings.describe()["reporters"] == shown
    assert "s3cret" not in repr(settings)
    assert list(cwg.Settings().changes_to(settings)) == [f"reporters: () -> {shown}"]


def test_its_connection_is_none_of_the_program_s_and_what_waits_goes_out_at_exit_once(
    server, tmp_path
):
    code = """
hook = reporters.named("webhook:" + sys.argv[1])
# On a busy machine the usual ones may be too short.
vars(sys.modules[type(hook).__module__]).update(_POST_SECONDS=60, _FLUSH_SECONDS=30)
guard = cwg.install(grace=0, reporters=[hook])

def has_socket():
    paths = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return any(os.readlink(path).startswith("socket:") for path in paths if os.path.islink(path))

with cwg.no_leaks(grace=0):
    guard.report()
    end = time.monotonic() + 20
    while hook._poster._descriptor is None:
        assert time.monotonic() < end
    full = cwg.scan(full=True)
    assert has_socket()
assert (full.open_sockets, full.coverage.native, full.findings) == (0, 0, ())
guard.report()
# A child has neither the thread nor what waits in it.
pid = os.fork()
if not pid:
    assert not has_socket()
    hook.close()
    os._exit(hook.lost)
assert os.waitpid(pid, 0)[1] == 0
open(sys.argv[2], "w").close()
"""
    path = tmp_path / "has-forked"
    server.answers[:] = ["hang"]

    def release():
        end = time.monotonic() + 30
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        server.released.set()

    thread = threading.Thread(target=release)
    thread.start()
    try:
        assert run(code, url_of(server), path, options=("-W", "ignore")) == ("", "")
    finally:
        thread.join()
    assert len(server.wait_for(2)) == len(server.posts) == 2


@pytest.mark.whole_program
def test_the_last_report_arrives_before_sigterm_ends_a_program_under_run(server, tmp_path):
    program = tmp_path / "app.py"
    leak = "with half_closed_pair():\n    time.sleep(0.3)\n    os.kill(os.getpid(), 15)\n"
    program.write_text(PRELUDE + leak + "    time.sleep(20)\n")
    command = [sys.executable, "-m", "closewait_guard", "run", "--interval", "600"]
    done = subprocess.run(
        [*command, "--report", f"changes:webhook:{url_of(server)}", "--grace", "0", str(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM), done.stderr
    document = json.loads(server.wait_for(1)[0])
    assert [event["event"] for event in document["events"]] == ["socket_leak"]
    assert "s3cret" not in done.stderr
