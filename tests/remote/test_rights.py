"""Without the right to attach to a process, a sentence says which flag of a container gives it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from closewait_guard._remote import target
from command_line import COMMAND, LEAKY, call, can_attach
from remote.attached import SERVER, STATE, running

as_root = pytest.mark.skipif(
    getattr(os, "geteuid", int)() != 0 or not shutil.which("setpriv") or not can_attach(),
    reason="rights are taken away by root, with setpriv",
)
pytestmark = as_root
WITHOUT = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
IN_NAMESPACE = ("unshare", "--user", "--map-root-user")
IDLE = "while True: time.sleep(0.01)"
CONTAINER = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def can_unshare():
    return subprocess.run([*IN_NAMESPACE, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("prefix", "sentences"),
    [
        pytest.param(WITHOUT, ("docker run --cap-add SYS_PTRACE, docker exec --privileged,",)),
        pytest.param(
            IN_NAMESPACE,
            ("kubectl debug --profile=sysadmin)", "in a rootless container it reaches no process"),
            marks=pytest.mark.skipif(not can_unshare(), reason="no user namespaces"),
        ),
    ],
)
def test_root_without_the_right_is_told_the_flag_that_gives_it(prefix, sentences):
    with running(SERVER) as program:
        done = call("attach", program.pid, code=2, command=[*prefix, *COMMAND])
    assert all(sentence in done.stderr for sentence in sentences), done.stderr


# Refuses ptrace() and process_vm_readv() with EPERM, as filters of containers do.
FILTER = """
import ctypes, os, struct, sys

def step(code, k, true=0, false=0):
    return struct.pack("HBBI", code, true, false, k)

numbers = {"x86_64": (101, 310), "aarch64": (117, 270)}[os.uname().machine]
steps = step(0x20, 0) + step(0x15, numbers[0], 1, 0) + step(0x15, numbers[1], 0, 1)
steps += step(0x06, 0x00050000 | 1) + step(0x06, 0x7FFF0000)
program = ctypes.create_string_buffer(steps)
head = struct.pack("HxxxxxxQ", len(steps) // 8, ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, head, 0, 0) == 0, ctypes.get_errno()
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_a_seccomp_filter_that_forbids_it_is_named_with_the_flag_that_lifts_it():
    with running(SERVER) as program:
        command = [sys.executable, "-c", FILTER, *COMMAND]
        done = call("attach", program.pid, code=2, command=command)
    assert "--security-opt seccomp=unconfined" in done.stderr
    assert "Operation not permitted" in done.stderr


@pytest.mark.parametrize(
    ("scope", "euid", "cure"),
    [
        ("1", 1000, "kernel.yama.ptrace_scope is 1; run as root, or set it to 0 with sysctl"),
        ("2", 1000, "kernel.yama.ptrace_scope is 2; run as root"),
        ("3", 0, "kernel.yama.ptrace_scope is 3, which forbids it until the machine starts again"),
        ("1", 0, "--cap-add SYS_PTRACE"),
    ],
)
def test_the_setting_of_the_kernel_is_named(monkeypatch, scope, euid, cure):
    monkeypatch.setattr(target, "_ptrace_scope", lambda: scope)
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    assert cure in target._right_lacking(euid)


def test_a_program_in_a_container_is_asked_from_the_host_and_from_within():
    """Mounts and processes of its own, and none of the rights of a debugger."""
    command = [*CONTAINER, *WITHOUT, sys.executable, "-I"]
    with running(STATE, command=command, cwd="/") as started:
        [program] = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        done = call("attach", program, code=0, CLOSEWAIT_GUARD_GRACE="0")
        assert "held by  __main__.kept[0] (module global)" in done.stdout
        inside = ["nsenter", "--target", program, "--pid", "--mount", *WITHOUT, *COMMAND]
        done = call("attach", 1, code=0, command=inside, CLOSEWAIT_GUARD_GRACE="0")
        assert "held by  __main__.kept[0] (module global)" in done.stdout


def test_the_children_of_the_first_process_of_a_container_are_asked():
    leak = LEAKY + "print(1, flush=True)"
    code = f"import os, time\nif os.fork() == 0:\n    exec({leak!r})\n{IDLE}"
    with running(code, command=[*CONTAINER, sys.executable, "-I"], cwd="/") as started:
        [program] = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        inside = ["nsenter", "--target", program, "--pid", "--mount", *COMMAND]
        asked = {"command": inside, "CLOSEWAIT_GUARD_GRACE": "0"}
        done = call("attach", 1, "--tree", "--fail-on-leak", code=1, **asked)
        assert "Asked 2 Python processes." in done.stdout
        done = call("attach", 1, "--fail-on-leak", code=87, **asked)
        assert "Not asked: 1 child process (add --tree)." in done.stdout


def test_a_disk_that_is_full_or_cannot_be_written_to_is_not_used():
    mounts = """
    for each in /tmp /var/tmp /usr/tmp; do
        [ ! -d $each ] || { mount --bind $each $each && mount -o remount,bind,ro $each; }
    done
    mount -t tmpfs -o size=4k none /var/tmp && head -c 4096 /dev/zero >/var/tmp/full
    exec "$@"
    """
    command = ["unshare", "--mount", "sh", "-c", mounts, "sh", sys.executable, "-I"]
    with running(STATE, command=command, cwd="/") as program:
        there = ["nsenter", "--target", str(program.pid), "--mount", "--wd=/proc", *COMMAND]
        done = call("attach", program.pid, code=0, command=there, CLOSEWAIT_GUARD_GRACE="0")
        assert "held by  __main__.kept[0] (module global)" in done.stdout
