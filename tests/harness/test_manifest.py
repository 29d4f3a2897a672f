# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a manifest notices and what not, as a module and as the script that runs in a guest."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness import manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes devices and changes owners")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a directory with one of each kind."""
    top = tmp_path / "tree"
    (top / "bin").mkdir(parents=True)
    (top / "bin/tool").write_bytes(b"tool")
    (top / "bin/tool").chmod(0o755)
    (top / "bin/other").write_bytes(b"other")
    (top / "lib").symlink_to("usr/lib")
    os.mkfifo(top / "fifo")
    (top / "empty").mkdir()
    return top


def digest(tree: Path) -> str:
    return manifest.digest(manifest.lines(tree))


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-IS", manifest.__file__, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def other_kind(top: Path) -> None:
    (top / "empty").rmdir()
    (top / "empty").touch()


def other_target(top: Path) -> None:
    (top / "lib").unlink()
    (top / "lib").symlink_to("usr/lib64")


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda top: (top / "bin/tool").write_bytes(b"tuul"),
    "mode": lambda top: (top / "bin/tool").chmod(0o4755),
    "mode of a directory": lambda top: (top / "empty").chmod(0o700),
    "a new name": lambda top: (top / "bin/new").touch(),
    "a name less": lambda top: (top / "bin/other").unlink(),
    "another kind": other_kind,
    "a link's target": other_target,
    "an attribute": lambda top: os.setxattr(top / "bin/tool", "user.x", b"1"),
    "a blank in a name": lambda top: (top / "bin/other").rename(top / "bin/oth er"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_changes_the_digest(tree: Path, change: Callable[[Path], object]) -> None:
    before = digest(tree)
    change(tree)
    assert digest(tree) != before


@needs_root
def test_owner_and_device_numbers_count(tree: Path) -> None:
    digests = {digest(tree)}
    os.chown(tree / "bin/tool", 1, 0)
    digests.add(digest(tree))
    for minor in (3, 5):
        os.mknod(tree / "device", 0o020600, os.makedev(1, minor))
        digests.add(digest(tree))
        (tree / "device").unlink()
    assert len(digests) == 4


def test_times_and_hard_links_do_not_count(tree: Path) -> None:
    before = digest(tree)
    os.utime(tree / "bin/tool", (1, 1))
    os.utime(tree, (1, 1))
    os.link(tree / "bin/tool", tree.parent / "elsewhere")
    assert digest(tree) == before


def test_order_in_the_directory_does_not_count(tmp_path: Path) -> None:
    for place, names in (("one", "abc"), ("two", "cba")):
        (tmp_path / place).mkdir()
        for name in names:
            (tmp_path / place / name).write_text(name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_odd_names_have_lines_of_their_own(tmp_path: Path) -> None:
    for name in (b"a b", b"a\nb", b"a\\040b", b"\xff\xfe", "ä".encode(), "ä b".encode()):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    found = list(manifest.lines(tmp_path))
    assert len(found) == len({line.rpartition(" ")[2] for line in found}) == 7
    assert all(len(line.split(" ")) == 8 for line in found)
    assert not any("\n" in line for line in found)


def test_differences_name_what_changed(tree: Path) -> None:
    before = list(manifest.lines(tree))
    CHANGES["content"](tree)
    CHANGES["a new name"](tree)
    (tree / "fifo").unlink()
    found = list(manifest.differences(before, manifest.lines(tree)))
    assert sorted((line[0], line.rpartition(" ")[2]) for line in found) == [
        ("+", "bin/new"),
        ("+", "bin/tool"),
        ("-", "bin/tool"),
        ("-", "fifo"),
    ]


def test_script_says_the_same_as_the_module(tree: Path) -> None:
    assert script(tree).stdout.strip() == digest(tree)
    assert script("--lines", tree).stdout.splitlines() == list(manifest.lines(tree))


def test_script_fails_on_a_difference_alone(tree: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(script("--lines", tree).stdout)
    same = script("--against", known, tree)
    assert (same.returncode, same.stdout.strip()) == (0, digest(tree))
    CHANGES["mode"](tree)
    other = script("--against", known, tree)
    assert other.returncode == 1
    assert [line[0] for line in other.stdout.splitlines()] == ["-", "+"]


def test_script_explains_itself_without_arguments() -> None:
    done = script()
    assert done.returncode == 2
    assert "--against FILE TREE" in done.stderr
