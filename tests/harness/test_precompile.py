# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compiling in advance, by this machine's own Python in place of a guest's."""

from __future__ import annotations

import importlib.util
import marshal
import os
import subprocess
import sys
from types import CodeType
from typing import TYPE_CHECKING

import pytest

from harness import precompile
from harness.initramfs import Archive

if TYPE_CHECKING:
    from pathlib import Path

MODULE = "def outer():\n    def inner():\n        raise ValueError\n    inner()\n"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Return a project; whatever is asked to run it is the interpreter of these tests."""
    monkeypatch.setattr(precompile, "python", lambda _root: [sys.executable])
    monkeypatch.setattr(precompile, "environment", lambda _root: {"PATH": os.defpath})
    archive = Archive()
    archive.file("src/package/__init__.py", b"")
    archive.file("src/package/module.py", MODULE.encode())
    archive.file("src/package/unused.py", b"")
    return archive


def compiled(archive: Archive) -> list[str]:
    return [name for name in archive.names() if name.endswith(".pyc")]


def cached(module: str) -> str:
    return importlib.util.cache_from_source(f"src/package/{module}.py")


def precompiled(files: Archive, tmp_path: Path, *argv: str) -> tuple[Archive, list[str]]:
    said: list[str] = []
    found = precompile.precompile(tmp_path, files, argv, cwd="/src", say=said.append)
    return found, said


def test_what_a_command_imports_comes_compiled(files: Archive, tmp_path: Path) -> None:
    found, said = precompiled(files, tmp_path, "-c", "import package.module")
    assert compiled(found) == [cached("__init__"), cached("module")]
    assert not compiled(files)
    assert said == []


def test_compiled_modules_are_valid_for_sources_of_no_time_and_name_them_where_they_will_be(
    files: Archive, tmp_path: Path
) -> None:
    found, _ = precompiled(files, tmp_path, "-c", "import package.module")
    found.extract(tmp_path / "out")
    data = (tmp_path / "out" / cached("module")).read_bytes()
    assert data[:4] == importlib.util.MAGIC_NUMBER
    assert int.from_bytes(data[4:8], "little") == 0  # checked by time and size
    assert int.from_bytes(data[8:12], "little") == 0
    assert int.from_bytes(data[12:16], "little") == len(MODULE)
    code = marshal.loads(data[16:])
    names = set()
    while code is not None:
        names.add(code.co_filename)
        code = next((c for c in code.co_consts if isinstance(c, CodeType)), None)
    assert names == {"/src/package/module.py"}


def test_python_takes_what_was_compiled(files: Archive, tmp_path: Path) -> None:
    found, _ = precompiled(files, tmp_path, "-c", "import package.module")
    place = tmp_path / "guest"
    for archive in (files, found):
        archive.extract(place)
    for file in place.rglob("*.py"):
        os.utime(file, (0, 0))
    code = "import package.module as m; print(m.__cached__)"
    done = subprocess.run(
        [sys.executable, "-v", "-c", code],
        cwd=place / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(place / cached("module"))
    assert f"matches {place}/src/package/module.py" in done.stderr


def test_command_that_fails_is_told_and_what_it_did_is_taken(
    files: Archive, tmp_path: Path
) -> None:
    found, (line,) = precompiled(files, tmp_path, "-c", "import package; import nonsense")
    assert compiled(found) == [cached("__init__")]
    assert "No module named 'nonsense'" in line


def test_pytest_s_own_way_of_compiling_counts(files: Archive, tmp_path: Path) -> None:
    files.file("src/test_it.py", b"def test_it():\n    assert True\n")
    found, said = precompiled(
        files, tmp_path, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"
    )
    assert said == []
    (name,) = [name for name in compiled(found) if "test_it" in name]
    assert "-pytest-" in name
