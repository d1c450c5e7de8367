"""`report`: what running processes say of themselves, whatever they do."""

from __future__ import annotations

import subprocess

import pytest

from command_line import COMMAND
from remote.programs import INSTALL, LEAK, STUCK, line_of, report_of, running

RUN = (*COMMAND, "run", "--grace", "0")


def test_a_program_of_run_answers_while_it_is_stuck_in_accept(tmp_path):
    program = tmp_path / "server.py"
    program.write_text(LEAK + STUCK)
    with running(str(program), tmp_path, command=RUN, stderr=subprocess.DEVNULL) as started:
        report = report_of(int(line_of(started)))
    [finding] = report["findings"]
    assert finding["verdict"] == "leaked"
    assert finding["observation"]["record"]["stack"][-1]["filename"] == str(program)


@pytest.mark.parametrize("off", ["0", "false"])
def test_what_run_guards_does_not_answer_where_that_is_turned_off(tmp_path, off):
    program = tmp_path / "server.py"
    program.write_text("import os\nprint(os.listdir(os.environ['XDG_RUNTIME_DIR']))")
    command = (*RUN, "--control", off)
    with running(str(program), tmp_path, command=command, stderr=subprocess.DEVNULL) as started:
        assert line_of(started) == "['server.py']"


def test_a_program_of_run_that_installs_a_guard_too_has_one_control_socket(tmp_path):
    program = tmp_path / "server.py"
    program.write_text(INSTALL + LEAK + "cwg.uninstall()" + STUCK)
    with running(str(program), tmp_path, command=RUN, stderr=subprocess.DEVNULL) as started:
        pid = int(line_of(started))
        assert report_of(pid)["pid"] == pid
        assert len(list((tmp_path / "closewait_guard").iterdir())) == 1
