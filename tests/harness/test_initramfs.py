# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives and modules: what is written is read back by cpio, an implementation of its own."""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from harness import elf
from harness.errors import BuildError
from harness.initramfs import Archive, modules
from tests.harness import elves


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Return an archive that has one of each kind."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/program").write_text("#!/bin/sh\n")
    (tree / "sub/program").chmod(0o4755)
    (tree / "left").mkdir()
    (tree / "left/out").write_text("")
    (tree / "link").symlink_to("sub")
    archive = Archive()
    archive.tree(tree, "/opt", skip=lambda name: name == "left")
    archive.file("etc/name", b"text\n")
    archive.file("/etc/secret", b"", mode=0o600)
    archive.symlink("bin", "usr/bin")
    archive.directory("tmp", mode=0o1777)
    archive.device("dev/console", 5, 1)
    return archive


def listing(data: bytes) -> list[str]:
    """Return what cpio says is in archives one after the other."""
    if not shutil.which("cpio"):
        pytest.skip("cpio is not here")
    done = subprocess.run(
        ["cpio", "--list", "--verbose", "--numeric-uid-gid", "--quiet"],
        env={**os.environ, "TZ": "UTC", "LC_ALL": "C"},
        input=data,
        capture_output=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    return [" ".join([words[0], words[2], words[3], words[-1]]) for words in lines]


def test_every_kind_is_read_back(archive: Archive) -> None:
    assert listing(archive.to_bytes()) == [
        "drwxr-xr-x 0 0 .",
        "lrwxrwxrwx 0 0 usr/bin",
        "drwxr-xr-x 0 0 dev",
        "crw------- 0 0 dev/console",
        "drwxr-xr-x 0 0 etc",
        "-rw-r--r-- 0 0 etc/name",
        "-rw------- 0 0 etc/secret",
        "drwxr-xr-x 0 0 opt",
        "lrwxrwxrwx 0 0 sub",
        "drwxr-xr-x 0 0 opt/sub",
        "-rwxr-xr-x 0 0 opt/sub/program",
        "drwxrwxrwt 0 0 tmp",
    ]


def test_contents_are_read_back(archive: Archive, tmp_path: Path) -> None:
    data = archive.to_bytes()
    listing(data)
    done = subprocess.run(
        ["cpio", "--extract", "--to-stdout", "--quiet", "etc/name"],
        input=data,
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"text\n"
    archive.extract(tmp_path / "out")
    assert (tmp_path / "out/etc/name").read_text() == "text\n"
    assert (tmp_path / "out/opt/link/program").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out/bin").readlink() == Path("usr/bin")


def test_same_contents_make_the_same_bytes(archive: Archive, tmp_path: Path) -> None:
    again = Archive()
    for file in tmp_path.rglob("*"):
        os.utime(file, (1, 1), follow_symlinks=False)
    again.device("dev/console", 5, 1)
    again.directory("tmp", mode=0o1777)
    again.symlink("bin", "usr/bin")
    again.file("etc/secret", b"", mode=0o600)
    again.file("etc/name", b"text\n")
    again.tree(tmp_path / "tree", "opt", skip=lambda name: name == "left")
    assert again.to_bytes() == archive.to_bytes()
    assert b"\0" * 16 not in archive.to_bytes()[:110]  # no field is left open


def test_another_archive_may_follow_where_the_kernel_looks_for_it(archive: Archive) -> None:
    assert len(archive.to_bytes()) % 512 == 0


def test_file_that_comes_again_replaces_the_earlier_one() -> None:
    archive = Archive()
    archive.file("a", b"old")
    archive.file("/a", b"new")
    assert archive.names() == [".", "a"]
    assert "a" in archive
    assert b"new" in archive.to_bytes()


def test_nothing_lies_beneath_a_link_or_a_file() -> None:
    archive = Archive()
    archive.symlink("lib", "usr/lib")
    with pytest.raises(BuildError, match="lib/x: lib is no directory in this archive"):
        archive.file("lib/x", b"")


def test_what_is_neither_file_nor_link_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BuildError, match="neither a file nor a link"):
        Archive().copy(tmp_path / "pipe", "pipe")
    archive = Archive()
    archive.tree(tmp_path, "all")  # a socket in somebody's tree is nothing to fail at
    assert archive.names() == [".", "all"]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Return the modules of a kernel: overlay needs two, of which one is built in."""
    directory = tmp_path / "6.1.0-test"
    (directory / "kernel/fs/overlayfs").mkdir(parents=True)
    (directory / "kernel/lib").mkdir()
    (directory / "kernel/fs/overlayfs/overlay.ko").write_bytes(elves.module("crc-x", "virtio"))
    (directory / "kernel/lib/crc-x.ko.xz").write_bytes(lzma.compress(elves.module("deep")))
    (directory / "kernel/lib/deep.ko").write_bytes(elves.module())
    (directory / "kernel/lib/unused.ko").write_bytes(elves.module())
    (directory / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    return directory


def test_module_comes_after_all_it_needs(kernel: Path) -> None:
    found = modules(kernel, ["overlay", "virtio", "crc_x"])
    assert [module.name for module in found] == ["deep", "crc_x", "overlay"]
    assert [module.depends for module in found] == [(), ("deep",), ("crc_x", "virtio")]
    assert all(module.content.startswith(b"\x7fELF") for module in found)


def test_module_that_a_kernel_does_not_have_is_named(kernel: Path) -> None:
    with pytest.raises(BuildError, match=r"6\.1\.0-test has no module erofs"):
        modules(kernel, ["overlay", "erofs"])


def test_libraries_of_programs_are_read() -> None:
    assert elf.needed(elves.program("libc.so.6", "libm.so.6")) == ["libc.so.6", "libm.so.6"]
    assert elf.needed(elves.program()) == []
    assert elf.needed(b"#!/bin/sh\n") == []


def test_libraries_of_a_real_program_are_read() -> None:
    found = shutil.which("cp")
    assert found is not None
    assert "libc.so.6" in elf.needed(Path(found).resolve().read_bytes())
