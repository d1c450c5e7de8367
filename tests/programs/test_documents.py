"""What the README, the pages and the examples say is run, and true."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import closewait_guard as cwg

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")))
    if path.name != "CHANGELOG.md"
]
WITH_OUTPUT = [path for path in DOCUMENTS if "<!-- output: " in path.read_text(encoding="utf-8")]
# A program with a name is run by the command whose output the page shows, and only there.
PLAIN_CODE = re.compile(r"(?<!-->\n)```python\n(.*?)```", re.DOTALL)
PROGRAM = re.compile(r"<!-- program: (\S+) -->\n+```python\n(.*?)```", re.DOTALL)
WITH_CODE = [path for path in DOCUMENTS if PLAIN_CODE.search(path.read_text(encoding="utf-8"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What each is there to show.
SHOWN = {
    "asyncio_server": "fixed: 0 leaks",
    "custom_reporter": "closed late, after",
    "gunicorn_workers": "in app()",
    "leaking_client": "fixed: sold out",
    "prove_no_leaks": "1 STILL OPEN",
    "pytest_project": "ERROR at teardown of test_forgets_a_client",
    "requests_and_httpx": "in is_there()",
    "structlog_json": '{"tenant": "acme"',
    "web_application": "in price()",
}
MODULES = ["closewait_guard"] + [
    module.name for module in pkgutil.walk_packages(cwg.__path__, "closewait_guard.")
]


@pytest.mark.parametrize("document", WITH_CODE, ids=lambda path: path.name)
def test_each_block_of_code_runs_by_itself(document):
    for block in PLAIN_CODE.findall(document.read_text(encoding="utf-8")):
        program = [sys.executable, "-c", block]
        done = subprocess.run(program, timeout=60, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", WITH_OUTPUT, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_page_shows_what_its_programs_print(page):
    done = script("page_programs.py", "--check", str(page))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_program_of_a_page_is_run_by_a_command_of_the_page():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        commands = " ".join(re.findall(r"<!-- output: (.*?) -->", text))
        for name, _ in re.findall(PROGRAM, text):
            module = name.removesuffix(".py")
            used = rf"\b(import|from) {module}\b|\b{module}:(make_)?app\b|\"{module}\.\w+\""
            assert name in commands or re.search(used, text), (document, name)


def test_the_site_names_each_program_and_has_all_that_it_needs():
    pytest.importorskip("sphinx")
    show_names = runpy.run_path(str(ROOT / "docs" / "conf.py"))["show_names_of_programs"]
    for page in sorted((ROOT / "docs").rglob("*.md")):
        shown = [page.read_text(encoding="utf-8")]
        show_names(str(page.relative_to(ROOT / "docs").with_suffix("")), shown)
        for name, code in re.findall(PROGRAM, page.read_text(encoding="utf-8")):
            assert f"\n:caption: {name}" in shown[0], page
            assert "os.environ[" not in code, (page, "a reader has no such variable")
            if "import service" in code or "127.0.0.1:18001" in code:
                links = re.findall(r"\[service\.py\]\((.+?)\)", shown[0])
                assert links, page
                assert all((page.parent / link).is_file() for link in links), page


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example):
    done = subprocess.run(
        [sys.executable, str(example)],
        capture_output=True,
        text=True,
        timeout=60,
        # It warns on stderr of a setting that only a project with asynchronous tests needs.
        env=os.environ | {"PYTEST_ADDOPTS": "-p no:asyncio"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert SHOWN[example.stem] in done.stdout
    assert example.read_text(encoding="utf-8").count("\n") < 60


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"socket": __import__("socket")})
    assert failed == 0


def test_the_page_of_settings_lists_every_setting_as_it_is():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for item in fields(cwg.Settings):
        default = getattr(cwg.Settings(), item.name)
        assert f"| `{item.name}` | `{default!r}` | {item.metadata['help']} |" in text
    assert script("settings_page.py", "--check").returncode == 0


def test_the_tables_of_the_performance_page_are_what_was_measured():
    done = script("performance_page.py", "--check")
    assert done.returncode == 0, done.stderr


def test_the_pictures_of_terminals_show_what_is_written_there(tmp_path):
    done = script("render_pictures.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, word in (("report", "place_order"), ("watch", "CLOSE_WAIT")):
        assert word in (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert word in (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"auto(?:function|class):: (?:\w+\.)*(\w+)", text))
    modules = re.findall(r"automodule:: (\S+)\n   :members:", text)
    for module in modules:
        listed |= set(importlib.import_module(module).__all__)
    assert set(cwg.__all__) - {"__version__"} <= listed


def test_every_page_is_in_a_table_of_contents():
    pages = sorted((ROOT / "docs").rglob("*.md"))
    listed = {
        page.parent / f"{name}.md"
        for page in pages
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        for name in block.split()
    }
    assert {*pages} - listed == {ROOT / "docs" / "index.md"}


def test_the_page_of_verdicts_lists_every_one_that_is_given():
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    for verdict in set(cwg.Verdict) - {cwg.Verdict.STALE_POOL}:
        assert f"| `{verdict}` | {'yes' if verdict.is_leak else 'no'} |" in text


def test_the_readme_is_short_and_works_on_a_package_index():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert not re.search(r"\]\((?!https:)", text), "an index has no files beside it"
    addresses = dict(re.findall(r"^\[(.+?)\]: (\S+)$", text, re.MULTILINE))
    for name, address in addresses.items():
        path = address.removeprefix("https://closewait-guard.readthedocs.io/en/latest/")
        page = path.replace("_images/", "pictures/").rstrip("/") or "index"
        places = [ROOT / "docs" / end for end in (page, f"{page}.md", f"{page}/index.md")]
        assert any(place.is_file() for place in places), address
        assert text.count(f"[{name}]") > 1, name


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


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
        timeout=400,
        capture_output=True,
    )
