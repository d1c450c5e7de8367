"""What is built of the sources: with the extensions, without, and where they cannot be compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import closewait_guard as cwg

ROOT = Path(__file__).parents[2]
PACKAGE = Path(cwg.__file__).parent
SOURCES = sorted((ROOT / "closewait_guard").glob("*/_*.c"))
CAN_COMPILE = (
    sys.implementation.name == "cpython"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
    and shutil.which("cc") is not None
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
# What pip calls; here without an environment of its own for each build, which needs the network.
BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])('.'))"
)


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources as they are committed: without what .gitignore names."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    names = shutil.ignore_patterns(".git", *(Path(pattern).name for pattern in ignored))
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=names)


def build(tree, hook="build_wheel", **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    inherited.pop("CLOSEWAIT_GUARD_SPEEDUPS", None)
    return subprocess.run(
        [sys.executable, "-c", BUILD, hook],
        cwd=tree,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def archive(tree, hook="build_wheel", **environment):
    done = build(tree, hook, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / done.stdout.splitlines()[-1]


def files_in(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


def extensions(files):
    return {name.partition(".")[0] for name in files if name.endswith((".so", ".pyd"))}


def test_an_extension_that_is_built_in_place_is_as_new_as_its_source():
    for source in SOURCES:
        built = source.with_name(source.stem + sysconfig.get_config_var("EXT_SUFFIX"))
        is_old = built.exists() and built.stat().st_mtime < source.stat().st_mtime
        assert PACKAGE != ROOT / "closewait_guard" or not is_old, (
            f"{built} is older than its source: pip install -e ."
        )


def test_an_extra_names_each_requirement_once_and_the_package_with_a_hyphen():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirements in project["optional-dependencies"].values():
        names = [re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements]
        assert len(names) == len({*names} - {"closewait_guard"})


def test_the_project_addresses_are_those_of_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"Homepage", "Documentation", "Changelog"} <= {*project["urls"]}
    assert [url for url in project["urls"].values() if url not in readme] == []


@pytest.mark.whole_program
@pytest.mark.skipif(not CAN_COMPILE, reason="this machine has no compiler, or no Python.h")
def test_a_wheel_has_the_extensions_and_not_their_sources(tree):
    wheel = archive(tree, CLOSEWAIT_GUARD_SPEEDUPS="1")
    wanted = {source.relative_to(ROOT).with_suffix("").as_posix() for source in SOURCES}
    if sys.platform != "linux":
        wanted.remove("closewait_guard/_signal/_deadline")
    assert extensions(files_in(wheel)) == wanted
    assert "none-any" not in wheel.name


@pytest.mark.whole_program
def test_without_a_compiler_a_wheel_is_built_that_lacks_the_extension_only(tree):
    files = files_in(archive(tree, CC="/bin/false"))
    packaged = {
        path.relative_to(tree).as_posix()
        for path in (tree / "closewait_guard").rglob("*")
        if path.is_file() and path.suffix != ".c"
    }
    assert files == packaged
    assert {"closewait_guard/py.typed", "closewait_guard/report.schema.json"} <= files


@pytest.mark.whole_program
def test_where_the_extension_is_asked_for_a_wheel_without_it_is_an_error(tree):
    assert build(tree, CC="/bin/false", CLOSEWAIT_GUARD_SPEEDUPS="1").returncode != 0


@pytest.mark.whole_program
def test_where_the_extension_is_not_wanted_one_wheel_is_for_every_platform(tree):
    wheel = archive(tree, CLOSEWAIT_GUARD_SPEEDUPS="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not extensions(files_in(wheel))
    with zipfile.ZipFile(wheel) as opened:
        (entry_points,) = (name for name in opened.namelist() if name.endswith("entry_points.txt"))
        text = opened.read(entry_points).decode()
    assert "closewait-guard = closewait_guard.__main__:main" in text
    assert "closewait_guard = closewait_guard.pytest_plugin" in text
    assert any("licenses/LICENSE" in name for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.whole_program
def test_a_module_that_is_gone_is_not_in_the_next_wheel(tree):
    passing = tree / "closewait_guard/_passing.py"
    passing.write_text("")
    assert "closewait_guard/_passing.py" in files_in(archive(tree, CLOSEWAIT_GUARD_SPEEDUPS="0"))
    passing.unlink()
    assert "closewait_guard/_passing.py" not in files_in(
        archive(tree, CLOSEWAIT_GUARD_SPEEDUPS="0")
    )


@pytest.mark.whole_program
@pytest.mark.parametrize("speedups", ["0", "1"])
def test_the_sdist_has_every_file_of_the_sources_and_the_wheel_is_built_of_it(tree, speedups):
    sources = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    with tarfile.open(archive(tree, "build_sdist", CLOSEWAIT_GUARD_SPEEDUPS=speedups)) as opened:
        packed = {member.name.partition("/")[2] for member in opened if member.isfile()}
        opened.extractall(tree.parent, filter="data")
    assert sources <= packed
    made = {name for name in packed - sources if not name.startswith("closewait_guard.egg-info/")}
    assert made <= {"PKG-INFO", "setup.cfg"}
    (unpacked,) = tree.parent.glob("closewait_guard-*")
    assert files_in(archive(unpacked, CC="/bin/false")) == files_in(archive(tree, CC="/bin/false"))
