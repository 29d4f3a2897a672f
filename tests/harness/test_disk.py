# SPDX-License-Identifier: LGPL-2.1-or-later
"""A deployment on a disk, made without mounting it, and seen from outside."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from harness import commit, disk, manifest
from harness.errors import BuildError
from harness.trees import remove_tree
from tests.harness.trees_of_debian import RELEASE, debian, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="deployments need root"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("ostree", "mkfs.ext4", "qemu-img"))), reason="tools are missing"
    ),
]
SIZE = 64 << 20
needs_loop = pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="no loop devices")


@dataclass(frozen=True)
class Made:
    """A disk, and the directory from which it was made."""

    sysroot: Path
    image: Path
    deployment: disk.Deployment


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Return a disk with a small Debian deployed on it."""
    top = tmp_path_factory.mktemp("disk")
    tree, repo, sysroot, image = (top / name for name in ("tree", "repo", "sysroot", "disk.raw"))
    debian(tree)
    write(tree / "etc/os-release", 'NAME="Small"\nID=small\n')
    write(tree / "usr/bin/setuid", "setuid", mode=0o4755)
    os.setxattr(tree / "usr/bin/setuid", "user.kept", b"yes")
    os.chown(tree / "usr/bin/tool", 7, 8)
    commit.arrange(tree)
    commit.init(repo)
    commit.commit(repo, "base", tree, subject="base")
    sysroot.mkdir()
    own = disk.make_sysroot(sysroot, "small", repo)
    write(tree / "usr/bin/more", "more")
    commit.commit(own, "whole", tree, subject="whole")
    deployment = disk.deploy(sysroot, "small", "whole", drop=["base"])
    disk.write(sysroot, image, size=SIZE)
    yield Made(sysroot, image, deployment)
    remove_tree(sysroot)  # has an immutable directory


def test_entry_says_how_to_boot_it(made: Made) -> None:
    assert made.deployment.arguments.startswith(f"{disk.ROOT} ostree=/ostree/boot.1/small/")
    assert made.deployment.kernel.name == f"vmlinuz-{RELEASE}"
    assert (made.sysroot / made.deployment.kernel).read_text() == "kernel"
    assert (made.sysroot / made.deployment.initrd).read_text() == "initramfs"


def test_repository_has_the_one_commit_and_writes_safely(made: Made) -> None:
    repo = made.sysroot / "ostree/repo"
    command = ("ostree", f"--repo={repo}", "refs", "--list")
    refs = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "whole" in refs
    assert "base" not in refs
    assert "fsync" not in (repo / "config").read_text()
    assert "bootloader=none" in (repo / "config").read_text()
    subprocess.run(["ostree", f"--repo={repo}", "fsck", "--quiet"], check=True)


def test_disk_is_sparse_and_clean(made: Made) -> None:
    status = made.image.stat()
    assert status.st_size == SIZE
    assert status.st_blocks * 512 < SIZE / 2
    check = subprocess.run(["e2fsck", "-fn", made.image], capture_output=True, check=False)
    assert check.returncode == 0, check.stdout


@needs_loop
def test_disk_has_what_the_directory_has(made: Made) -> None:
    usr = made.deployment.root / "usr"
    lines = list(manifest.lines(made.sysroot / usr))
    assert any(" 7 8 " in line for line in lines)
    assert any("user.kept=" in line for line in lines)
    assert disk.digest(made.image, usr, disk_format="raw") == manifest.digest(lines)


@needs_loop
def test_hard_links_to_the_repository_are_kept(made: Made) -> None:
    tool = made.deployment.root / "usr/bin/tool"
    assert disk.look(made.image, ["stat", "-c", "%h", tool], disk_format="raw") == "2\n"


@needs_loop
def test_looking_changes_nothing(made: Made) -> None:
    before = manifest.digest(manifest.lines(made.image.parent))
    assert "sysroot" not in disk.look(made.image, ["ls"], disk_format="raw")
    disk.look(made.image, ["touch", "new"], disk_format="raw")
    assert manifest.digest(manifest.lines(made.image.parent)) == before


@needs_loop
def test_change_on_an_overlay_of_the_disk_shows(made: Made, tmp_path: Path) -> None:
    usr = made.deployment.root / "usr"
    changed = tmp_path / "raw"
    shutil.copy(made.image, changed)
    script = f"write /etc/hostname {made.deployment.root}/usr/bin/other"
    subprocess.run(["debugfs", "-w", "-R", script, changed], capture_output=True, check=True)
    over = tmp_path / "overlay.qcow2"
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", changed, over)
    subprocess.run(create, check=True)
    assert disk.digest(over, usr) != disk.digest(made.image, usr, disk_format="raw")


@needs_loop
def test_failed_look_says_why(made: Made) -> None:
    with pytest.raises(BuildError, match=r"looking into disk\.raw: .*No such file"):
        disk.look(made.image, ["cat", "nothing"], disk_format="raw")


def test_disk_that_is_there_is_not_overwritten(made: Made) -> None:
    with pytest.raises(FileExistsError):
        disk.write(made.sysroot, made.image, size=SIZE)
