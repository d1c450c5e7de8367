"""A descriptor of ours is used and closed only while it is still ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from closewait_guard._descriptors import identity_of, owned_pipe


@pytest.fixture
def pipe():
    """Both ends, closed afterwards by their owner."""
    ends = owned_pipe()
    yield ends
    for end in ends:
        end.close()


def test_a_descriptor_has_its_number_until_it_is_closed(pipe):
    reading, writing = pipe
    os.write(writing.fileno(), b"x")
    assert os.read(reading.fileno(), 1) == b"x"
    fd = reading.fileno()
    reading.close()
    reading.close()
    assert reading.fileno() == -1
    assert identity_of(fd) is None


def test_one_that_the_program_has_closed_has_no_number_and_closes_nothing(pipe):
    os.close(pipe[0].fileno())
    assert pipe[0].fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.read(pipe[0].fileno(), 1)


def test_what_the_program_has_opened_on_its_number_is_neither_used_nor_closed(pipe, tmp_path):
    fd = pipe[1].fileno()
    os.close(fd)
    theirs = os.open(tmp_path / "theirs", os.O_WRONLY | os.O_CREAT)
    if theirs != fd:
        os.dup2(theirs, fd)
        os.close(theirs)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(pipe[1].fileno(), b"ours")
    pipe[1].close()
    os.write(fd, b"theirs")
    os.close(fd)
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_once_lost_it_is_never_found_again(pipe):
    fd = pipe[0].fileno()
    copy = os.dup(fd)
    os.close(fd)
    assert pipe[0].fileno() == -1
    os.dup2(copy, fd)
    os.close(copy)
    assert pipe[0].fileno() == -1
    os.close(fd)


WITHOUT_STREAMS = """
import os
from closewait_guard._descriptors import owned_pipe
os.closerange(0, 3)
ends = owned_pipe()
numbers = [end.fileno() for end in ends]
are_kept = [os.get_inheritable(number) for number in numbers]
for fd in range(3):
    try:
        os.fstat(fd)
    except OSError:
        continue
    os._exit(3)
os._exit(min(numbers) < 3 or any(are_kept))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fcntl")
def test_none_takes_the_number_of_a_standard_stream():
    assert subprocess.run([sys.executable, "-c", WITHOUT_STREAMS], timeout=30).returncode == 0
