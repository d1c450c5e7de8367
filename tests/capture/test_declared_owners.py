"""A package declares its own kinds of owners by an entry point; one that is broken does no harm."""

from __future__ import annotations

import subprocess
import sys

import pytest

import closewait_guard as cwg
from command_line import environment

CLIENT = """
class Client:
    def __init__(self, sock):
        self.sock = sock
        self.is_closed = False

    def close(self):
        self.is_closed = True
        self.sock.close()
"""
KINDS = """
import closewait_guard as cwg

KINDS = (
    cwg.OwnerKind(
        "shop.client:Client",
        "shop.Client",
        is_closed=lambda client: client.is_closed,
        connections=lambda client: [client.sock],
    ),
)
"""
PROGRAM = """
import closewait_guard as cwg
guard = cwg.install(grace=0.05)
import sys
assert not {"importlib.metadata", "shop", "closewait_guard._libraries.kinds"} & sys.modules.keys()
import socket
import shop.client

def make():
    ours, theirs = socket.socketpair()
    return shop.client.Client(ours), theirs

for close in (True, False):
    client, theirs = make()
    if close:
        client.close()
    del client
    theirs.close()
report = guard.scan()
for found in report.findings:
    owner, site = found.observation.owner, found.observation.record.site
    print(found.code, owner.name if owner else None, site.function)
print(*report.coverage.notes, sep="\\n")
cwg.uninstall()
print(vars(shop.client.Client).get("__del__"))
"""


@pytest.fixture
def run(tmp_path):
    """Run the program with an installed package that declares something; returns what it prints."""

    def run(kinds, place="shop._guard:KINDS", program=PROGRAM, client=CLIENT):
        package, metadata = tmp_path / "shop", tmp_path / "shop-1.0.dist-info"
        package.mkdir()
        metadata.mkdir()
        (package / "__init__.py").touch()
        (package / "client.py").write_text(client)
        (package / "_guard.py").write_text(kinds)
        (metadata / "entry_points.txt").write_text(
            f"[console_scripts]\nshop = shop:main\n\n[closewait_guard.libraries]\nany = {place}\n"
        )
        command = [sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env=environment(PYTHONPATH=str(tmp_path)),
        )
        return done.stdout.splitlines()

    return run


def test_an_owner_that_a_package_declares_is_found_with_its_line(run):
    assert run(KINDS) == ["CWG901 shop.Client make", "", "None"]


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("KIND = ()", "KeyError: 'KINDS'"),
        ("KINDS = 'shop'", "TypeError: expected OwnerKind, or several in a tuple"),
    ],
)
def test_one_that_is_broken_is_one_sentence_and_the_rest_is_found(run, kinds, why):
    lines = run(kinds)
    assert lines[0] == "CWG301 None make", "its socket stands for itself"
    said = [line for line in lines if "shop._guard" in line]
    assert said == [f"the objects that shop._guard:KINDS should describe ({why})"]


BLOCK = """
import closewait_guard as cwg
import socket
import shop.client

def make(close):
    with cwg.no_leaks(grace=0.05):
        client = shop.client.Client(None)
        if close:
            client.close()
    return client

try:
    kept = make(close=False)
except cwg.SocketLeakError as error:
    print(error)
make(close=True)
"""


def test_a_block_does_not_pass_with_an_owner_that_cannot_be_asked(run):
    # Only one that is closed can be.
    kinds = KINDS.replace("[client.sock]", "[1 / client.is_closed]")
    client = CLIENT.replace("self.sock.close()", "pass")
    lines = run(kinds, program=BLOCK, client=client)
    assert " ".join(map(str.strip, lines)).strip() == (
        "Whether the block has left sockets open is unknown: looking at 1 shop.Client opened "
        "at <string>:8 in make() has failed."
    )


def test_the_kind_is_a_public_value():
    kind = cwg.OwnerKind("shop.client:Client", "shop.Client", lambda client: client.is_closed)
    assert kind.holder == "shop.client.Client"
