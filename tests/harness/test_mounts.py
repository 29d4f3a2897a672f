# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mount table of a machine: what is stacked on what, told from real tables."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import mounts

ROOT = "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, in a namespace of its own")


def table_after(script: str) -> mounts.Table:
    """Return the table of a new mount namespace after *script*; $D is an empty tmpfs."""
    setup = "set -e; D=$(mktemp -d); trap 'rmdir $D' EXIT; mount -t tmpfs play $D; cd $D\n"
    script = textwrap.dedent(script)
    finish = "\necho $D; cat /proc/self/mountinfo; cd /; umount -l $D"
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", setup + script + finish],
        capture_output=True,
        check=True,
    )
    place, _, table = done.stdout.partition(b"\n")
    return mounts.parse(table.replace(place, b"/play"))


def sources(found: tuple[mounts.Mount, ...]) -> list[str]:
    return [mount.source for mount in found]


def test_line_is_taken_apart() -> None:
    line = r"42 1 0:35 /sub\040dir /mnt/a\011b rw,nosuid shared:7 master:2 - overlay over\134lay "
    (mount,) = mounts.parse(line + "ro,lowerdir=/a:/b,upperdir=/c,index=off\n")
    assert (mount.mount_id, mount.parent_id, mount.device) == (42, 1, "0:35")
    assert (mount.root, mount.mount_point) == ("/sub dir", "/mnt/a\tb")
    assert (mount.fstype, mount.source) == ("overlay", "over\\lay")
    assert mount.propagation == ("shared:7", "master:2")
    assert mount.option("nosuid") == ""
    assert mount.option("lowerdir") == "/a:/b"
    assert mount.option("upper") is None
    assert mount.read_only
    assert mounts.parse(ROOT.encode()).mounts[0].fs_options == ("rw", "discard")


def test_source_may_be_empty() -> None:
    (mount,) = mounts.parse("42 1 0:35 / /mnt rw - tmpfs  rw\n")
    assert (mount.source, mount.fs_options) == ("", ("rw",))


@pytest.mark.parametrize(
    "text",
    [
        *("x", "1 2 3 4 5 6 7", "a 1 0:1 / / rw - t s rw", "1 2 - a b"),
        "1 2 0:1 / / rw - t s\n2 1 0:1 / / rw - t s",  # there is no end to who lies on whom
        "1 1 0:1 / / rw - t s\n1 1 0:1 / / rw - t s",
    ],
)
def test_what_is_no_mountinfo_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"mountinfo|invalid literal"):
        mounts.parse(text)


@given(st.text() | st.binary())
def test_any_text_is_parsed_or_refused(text: str | bytes) -> None:
    try:
        table = mounts.parse(text)
    except (ValueError, UnicodeEncodeError):
        return
    for mount in table:
        table.at(mount.mount_point)


@needs_root
def test_real_table_has_this_machines_root() -> None:
    with open("/proc/self/mountinfo", "rb") as file:
        table = mounts.parse(file.read())
    assert table.shown("/").mount_point == "/"
    assert table.shown("/proc/self").fstype == "proc"
    for mount in table:
        assert mount in table.at(mount.mount_point)


@needs_root
def test_stacked_mounts_are_in_order_and_the_last_is_seen() -> None:
    table = table_after("mkdir a; for n in 1 2 3; do mount -t tmpfs t$n a; done")
    assert sources(table.at("/play/a")) == ["t1", "t2", "t3"]
    assert table.shown("/play/a/deep/in").source == "t3"
    top = table.top("/play/a")
    assert top is not None
    assert top.source == "t3"
    assert table.top("/play/a/deep") is None


@needs_root
def test_mount_that_was_put_beneath_is_not_the_one_that_is_seen() -> None:
    """MOVE_MOUNT_BENEATH (Linux 6.5): the newer mount, of the higher id, is the lower."""
    beneath = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        call = lambda *a: libc.syscall(*a) if 1 else 0
        fs = libc.syscall(430, b"tmpfs", 0)
        libc.syscall(431, fs, 1, b"source", b"new", 0)
        libc.syscall(431, fs, 6, None, None, 0)
        mount = libc.syscall(432, fs, 0, 0)
        if libc.syscall(429, mount, b"", -100, b"a", 0x4 | 0x200) < 0:
            os._exit(77)
    """
    script = f"""
        mkdir a; mount -t tmpfs old a
        {sys.executable} -c '{textwrap.dedent(beneath)}' || exit $?
    """
    try:
        table = table_after(textwrap.dedent(script).replace("\n\n", "\n"))
    except subprocess.CalledProcessError as error:
        if error.returncode == 77:
            pytest.skip("this kernel cannot mount beneath")
        raise
    assert sources(table.at("/play/a")) == ["new", "old"]
    assert table.shown("/play/a").source == "old"


@needs_root
def test_mount_under_a_covered_directory_is_not_seen() -> None:
    table = table_after("""
        mkdir -p a/b; mount -t tmpfs inner a/b; mount -t tmpfs outer a; mkdir a/b
    """)
    assert sources(table.at("/play/a/b")) == ["inner"]
    assert table.top("/play/a/b") is None
    assert table.shown("/play/a/b").source == "outer"


@needs_root
def test_below_goes_by_components_of_the_path() -> None:
    table = table_after("""
        mkdir lib lib64; mount -t tmpfs one lib; mkdir lib/x; mount -t tmpfs two lib/x
        mount -t tmpfs three lib64
    """)
    assert sources(table.below("/play/lib")) == ["one", "two"]
    assert sources(table.below("/play")) == ["play", "one", "two", "three"]


@needs_root
def test_files_and_names_with_spaces_are_mount_points() -> None:
    table = table_after("""
        touch "a file" b; mount --bind b "a file"
    """)
    top = table.top("/play/a file")
    assert top is not None
    assert top.root == "/b"


def test_what_was_added_is_told_by_what_it_is_not_by_its_id() -> None:
    before = mounts.parse(ROOT + "5 1 0:9 / /run rw - tmpfs tmpfs rw\n")
    same = mounts.parse(ROOT + "77 1 0:10 / /run rw - tmpfs tmpfs rw\n")
    assert same.added_since(before) == ()
    twice = mounts.parse(
        ROOT + "7 1 0:9 / /run rw - tmpfs tmpfs rw\n8 7 0:9 / /run rw - tmpfs tmpfs rw\n"
    )
    assert [mount.mount_id for mount in twice.added_since(before)] == [8]
    assert before.added_since(twice) == ()


def test_root_of_a_container_and_of_an_initramfs() -> None:
    container = mounts.parse(
        ROOT.replace("1 0", "90 60", 1) + "91 90 0:5 / /proc rw - proc proc rw\n"
    )
    assert container.shown("/proc/1").fstype == "proc"
    rootfs = "1 1 0:2 / / rw - rootfs rootfs rw\n20 1 8:1 / / rw - ext4 /dev/vda rw\n"
    assert mounts.parse(rootfs).shown("/etc").fstype == "ext4"
    assert sources(mounts.parse(rootfs).at("/")) == ["rootfs", "/dev/vda"]
    with pytest.raises(LookupError):
        mounts.parse("").shown("/")
