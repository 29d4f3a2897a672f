# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages, files and kernels over a system: this machine's own /usr stands in for one."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness import layer, manifest
from harness.errors import BuildError
from tests.harness.trees_of_debian import write

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts, in a namespace of its own"),
    pytest.mark.skipif(not shutil.which("busybox"), reason="busybox is missing"),
]

SCRIPT = """
set -e
rm /usr/bin/old
rm -r /usr/share/whole
mkdir /usr/share/whole
echo new > /usr/share/whole/file
echo conf > /etc/new.conf
chmod 600 /etc/kept.conf
mkdir -p /var/lib/thing
echo data > /var/lib/thing/data
echo given: $(cat /run/given/deep/file /run/given/file) > /usr/share/given
echo nothing > /tmp/nothing
echo nothing > /run/nothing
: > /dev/null
! echo over > /run/given/deep/file
"""


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """Return a deployment that can run a shell and little more."""
    top = tmp_path / "below"
    busybox = shutil.which("busybox")
    assert busybox
    (top / "usr/bin").mkdir(parents=True)
    shutil.copy(busybox, top / "usr/bin/busybox")
    said = subprocess.run(["ldd", busybox], capture_output=True, text=True, check=False).stdout
    for library in (word for word in said.split() if word.startswith("/")):
        place = top / "usr" / library.removeprefix("/usr").lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    for name in ("sh", "rm", "mkdir", "cat", "chmod"):
        (top / "usr/bin" / name).symlink_to("busybox")
    for name in ("bin", "lib", "lib64"):
        (top / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "run", "tmp", "var"):
        (top / name).mkdir()
    write(top / "usr/bin/old", "old")
    write(top / "usr/share/whole/deep/file", "old")
    write(top / "usr/etc/kept.conf", "kept")
    return top


def test_layer_is_what_the_command_changed(below: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", write(tmp_path / "given", "gift")
    out.mkdir()
    before = manifest.digest(manifest.lines(below))
    made = layer.on_top(
        below,
        out,
        ["/bin/sh", "-c", SCRIPT],
        name="test",
        what="testing",
        given={"deep/file": given, "file": given},
    )
    files = {
        str(path.relative_to(made.tree)): path.read_text()
        for path in made.tree.rglob("*")
        if path.is_file()
    }
    rules = files.pop("usr/lib/tmpfiles.d/ostree-test.conf")
    assert files == {
        "usr/share/whole/file": "new\n",
        "usr/share/given": "given: giftgift\n",
        "usr/etc/new.conf": "conf\n",
        "usr/etc/kept.conf": "kept",
        "usr/share/factory/var/lib/thing/data": "data\n",
    }
    assert (made.tree / "usr/etc/kept.conf").stat().st_mode & 0o777 == 0o600
    assert "C /var/lib/thing/data 0644 0 0 -\n" in rules
    assert sorted(made.removed) == ["/usr/bin/old", "/usr/share/whole"]
    assert [path.name for path in out.iterdir()] == ["tree"]
    assert manifest.digest(manifest.lines(below)) == before
    assert given.read_text() == "gift"


def test_failing_command_leaves_nothing(below: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = ["/bin/sh", "-c", "echo the reason >&2; exit 1"]
    with pytest.raises(BuildError, match="testing: the reason"):
        layer.on_top(below, out, command, name="test", what="testing")
    assert not list(out.iterdir())
