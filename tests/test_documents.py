"""What the README, the guide and the examples say is run, and true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import closewait_guard as cwg

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What each is there to show.
SHOWN = {
    "custom_reporter": "closed after all, after 0.",
    "demo": "born at",
    "prove_no_leaks": "born at",
    "structlog_json": '"event": "socket_leak", "level": "info"',
    "web_application": "in price()",
}
MODULES = ["closewait_guard"] + [
    module.name for module in pkgutil.walk_packages(cwg.__path__, "closewait_guard.")
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_run(document):
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    program = "\n".join(["import closewait_guard as cwg", *blocks])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example):
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert SHOWN[example.stem] in done.stdout
    assert example.read_text(encoding="utf-8").count("\n") <= 65


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"socket": __import__("socket")})
    assert failed == 0


def test_the_guide_lists_every_setting_as_it_is():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for item in fields(cwg.Settings):
        default = getattr(cwg.Settings(), item.name)
        assert f"| `{item.name}` | `{default!r}` | {item.metadata['help']} |" in text


def test_the_guide_lists_every_verdict_that_is_given():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for verdict in set(cwg.Verdict) - {cwg.Verdict.STALE_POOL}:
        assert f"| `{verdict}` | {'yes' if verdict.accused else 'no'} |" in text


def test_links_within_the_repository_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), target


def test_the_benchmarks_run():
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not beside the tests")
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", "/dev/null"],
        cwd=ROOT,
        check=True,
        timeout=120,
        capture_output=True,
    )
