# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copying a source into a layer: what is kept, what is dropped, what is refused.

On real trees in a temporary directory.  What a copy of a hostile or changing tree must not do is
tried out, with a hand in the progress object that acts between two steps.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayd import layers, walker, writer
from overlayd.errors import InterruptedByUserError, OverlaydError, RefusedError, SpaceError
from overlayd.progress import Progress
from tests.unit.conftest import (
    PAGE,
    WIDE,
    Meddler,
    copy,
    file_names,
    follow_chain,
    give_xattr,
    is_one_printable_line,
    make_acl,
    make_chain,
    measure,
    needs_root,
    open_fds,
    opened,
    time_limit,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_descriptor_stays_open")
ACCESS_ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
SOMEBODY = 65533
OLD = -(10**9) * 1000 - 1
"""A time before 1970, in nanoseconds."""


def copier_of(source: Path, dest: int) -> layers.Copier:
    into = writer.Writer(str(source), WIDE, dest)
    return layers.Copier(into, preserve_owner=False, progress=Progress())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# What is written


def test_file_is_never_written_over_what_is_there(dest: Path) -> None:
    dest.mkdir()
    (dest / "file").write_text("file")
    (dest / "link").symlink_to("file")
    with opened(dest) as fd:
        into = writer.Writer("s", WIDE, fd)
        for name in ("file", "link"):
            with pytest.raises(FileExistsError):
                into.create(name, fd)
    assert (dest / "file").read_text() == "file"


def test_link_to_a_symlink_is_not_one_to_what_that_leads_to(dest: Path, tmp_path: Path) -> None:
    dest.mkdir()
    (tmp_path / "outside").touch()
    (dest / "first").symlink_to(tmp_path / "outside")
    with opened(dest) as fd:
        writer.Writer("s", WIDE, fd).link(("first",), "second", fd)
    assert (dest / "second").is_symlink()
    assert (tmp_path / "outside").stat().st_nlink == 1


# What is kept


def test_tree_is_copied_whole(source: Path, dest: Path) -> None:
    (source / "sub/deeper").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "a").write_bytes(b"a" * 100_000)
    (source / "sub/b").write_bytes(b"b")
    (source / "sub/deeper/none").touch()
    copy(source, dest)
    found = {
        str(path.relative_to(dest)): path.read_bytes() if path.is_file() else None
        for path in dest.rglob("*")
    }
    assert found == {
        "sub": None,
        "sub/deeper": None,
        "empty": None,
        "a": b"a" * 100_000,
        "sub/b": b"b",
        "sub/deeper/none": b"",
    }


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o711, 0o700, 0o777, 0o555, 0o500])
def test_modes_of_files_and_directories_are_kept(source: Path, dest: Path, bits: int) -> None:
    (source / "d").mkdir()
    (source / "d/f").touch()
    (source / "d/f").chmod(bits)
    (source / "d").chmod(bits)
    copy(source, dest)
    assert (mode(dest / "d"), mode(dest / "d/f")) == (bits, bits)


@needs_root
def test_mode_that_lets_nobody_in_is_kept(source: Path, dest: Path) -> None:
    (source / "d").mkdir()
    (source / "d/f").write_text("x")
    (source / "d/f").chmod(0)
    (source / "d").chmod(0)
    copy(source, dest)
    assert (mode(dest / "d"), mode(dest / "d/f")) == (0, 0)
    assert (dest / "d/f").read_text() == "x"


@pytest.mark.parametrize("time", [0, 1, 1_700_000_000_123_456_789, OLD])
def test_times_are_kept_to_the_nanosecond(source: Path, dest: Path, time: int) -> None:
    (source / "d").mkdir()
    (source / "d/f").touch()
    (source / "d/l").symlink_to("f")
    for name in ("d/f", "d/l", "d", "."):
        os.utime(source / name, ns=(time, time), follow_symlinks=False)
    copy(source, dest)
    for name in ("d/f", "d/l", "d", "."):
        assert (dest / name).lstat().st_mtime_ns == time, name


def test_hard_links_stay_linked_within_and_across_directories(source: Path, dest: Path) -> None:
    for folder in ("one", "two/deep", "three"):
        (source / folder).mkdir(parents=True)
    (source / "one/a").write_text("x")
    for name in ("one/b", "two/deep/c", "three/d", "e"):
        os.link(source / "one/a", source / name)
    (source / "other").write_text("x")
    os.link(source / "other", source / "three/other")
    copy(source, dest)
    facts = {(dest / name).stat().st_ino for name in ("one/a", "one/b", "two/deep/c", "three/d")}
    assert facts == {(dest / "e").stat().st_ino}
    assert (dest / "e").stat().st_nlink == 5
    assert (dest / "other").stat().st_ino == (dest / "three/other").stat().st_ino
    assert (dest / "other").stat().st_ino != (dest / "e").stat().st_ino


def test_file_with_links_outside_the_source_is_copied_alone(
    source: Path, dest: Path, tmp_path: Path
) -> None:
    (source / "a").write_text("x")
    os.link(source / "a", tmp_path / "outside")
    copy(source, dest)
    assert (dest / "a").stat().st_nlink == 1
    assert (dest / "a").read_text() == "x"


def sparse(path: Path, size: int, *stretches: tuple[int, bytes]) -> None:
    """Write a file with holes, or skip where there are none."""
    with path.open("wb") as file:
        for at, data in stretches:
            file.seek(at)
            file.write(data)
        file.truncate(size)
        os.fsync(file.fileno())
    if path.stat().st_blocks * 512 >= size:
        pytest.skip(f"{path.parent} keeps no holes in files")


@pytest.mark.parametrize(
    ("size", "stretches"),
    [
        (64 << 20, []),
        (64 << 20, [(32 << 20, b"middle" * 1000)]),
        (64 << 20, [(0, b"start"), ((64 << 20) - 3, b"end")]),
        ((64 << 20) + 1, [(5 << 20, b"x"), (9 << 20, b"y")]),
    ],
    ids=["nothing", "middle", "both ends", "hole at the end"],
)
def test_sparse_file_stays_sparse(
    source: Path, dest: Path, size: int, stretches: list[tuple[int, bytes]]
) -> None:
    sparse(source / "f", size, *stretches)
    copy(source, dest)
    facts = (dest / "f").stat()
    assert facts.st_size == size
    assert facts.st_blocks * 512 <= 128 << 10
    with (dest / "f").open("rb") as file:
        for at, data in stretches:
            file.seek(at)
            assert file.read(len(data)) == data
    assert (dest / "f").read_bytes() == (source / "f").read_bytes()


def test_symlinks_are_copied_as_symlinks_wherever_they_lead(
    source: Path, dest: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    leads = {
        "dangling": "nowhere/at all",
        "absolute": str(tmp_path / "secret"),
        "relative": "../secret",
        "to-directory": ".",
        "to-itself": "to-itself",
        "odd": "a\nb\udcff",
        "long": "x/" * 2000,
    }
    for name, lead in leads.items():
        (source / name).symlink_to(lead)
    copy(source, dest)
    assert {name: os.readlink(dest / name) for name in os.listdir(dest)} == leads
    assert sorted(os.listdir(tmp_path)) == ["dest", "secret", "source"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(names=st.lists(file_names, min_size=1, max_size=6, unique=True))
def test_names_are_kept_byte_for_byte(tmp_path: Path, names: list[bytes]) -> None:
    top = os.fsencode(tmp_path)
    source, dest = tmp_path / "named", tmp_path / "copied"
    source.mkdir()
    kept = set()
    for number, name in enumerate(names):
        path = b"/".join([top, b"named", name])
        try:
            if number % 3 == 0:
                os.mkdir(path)
                Path(os.fsdecode(path + b"/" + name)).touch()
            elif number % 3 == 1:
                os.symlink(name, path)
            else:
                Path(os.fsdecode(path)).touch()
        except OSError:  # a filesystem that takes UTF-8 alone, say
            continue
        kept.add(name)
    copy(source, dest)
    assert set(os.listdir(os.fsencode(dest))) == kept
    for name in kept & {names[0]}:
        assert os.listdir(b"/".join([top, b"copied", name])) == [name]
    shutil.rmtree(source)
    shutil.rmtree(dest)


def test_names_of_255_bytes_are_copied(source: Path, dest: Path) -> None:
    name = "é" * 127 + "x"
    (source / name / name).mkdir(parents=True)
    (source / name / name / name).write_text("x")
    copy(source, dest)
    assert (dest / name / name / name).read_text() == "x"


def test_path_longer_than_one_system_call_takes_is_copied_with_its_hard_links(
    source: Path, dest: Path
) -> None:
    names = ["d" * 255] * 20
    fd = make_chain(source, names)
    try:
        Path(f"/proc/self/fd/{fd}/f").write_text("deep")
        os.link("f", "linked", src_dir_fd=fd, dst_dir_fd=fd)
        top = os.open(source, os.O_RDONLY)
        os.link("f", "above", src_dir_fd=fd, dst_dir_fd=top)
        os.close(top)
    finally:
        os.close(fd)
    copy(source, dest)
    fd = follow_chain(dest, names)
    try:
        assert Path(f"/proc/self/fd/{fd}/f").read_text() == "deep"
        inodes = {os.stat(name, dir_fd=fd).st_ino for name in ("f", "linked")}
    finally:
        os.close(fd)
    assert inodes == {(dest / "above").stat().st_ino}
    assert (dest / "above").stat().st_nlink == 3
    shutil.rmtree(source)
    shutil.rmtree(dest)


def test_user_attributes_are_kept_on_files_and_directories(source: Path, dest: Path) -> None:
    (source / "d").mkdir()
    (source / "d/f").touch()
    for name in ("d", "d/f", "."):
        give_xattr(source / name, "user.colour", b"gr\0een")
        give_xattr(source / name, "user.empty", b"")
    copy(source, dest)
    for name in ("d", "d/f", "."):
        assert os.getxattr(dest / name, "user.colour") == b"gr\0een"
        assert os.getxattr(dest / name, "user.empty") == b""


def test_umask_has_no_effect(source: Path, dest: Path) -> None:
    (source / "d").mkdir()
    for name, bits in (("d", 0o755), ("f", 0o666), ("d/x", 0o777)):
        if name != "d":
            (source / name).touch()
        (source / name).chmod(bits)
    # An ordinary user could not work in directories of mode 0.
    before = os.umask(0o777 if os.geteuid() == 0 else 0o077)
    try:
        dest.mkdir()
        dest.chmod(0o700)
        with opened(source) as source_fd, opened(dest) as dest_fd:
            copier_of(source, dest_fd).tree(source_fd, None)
            os.close(writer.make_directory(dest_fd, "made", source_fd))
    finally:
        os.umask(before)
    assert [mode(dest / name) for name in ("d", "f", "d/x")] == [0o755, 0o666, 0o777]
    assert mode(dest / "made") == mode(source)


# What is dropped


def test_set_id_bits_are_dropped(source: Path, dest: Path) -> None:
    (source / "f").touch()
    (source / "d").mkdir()
    (source / "f").chmod(0o6755)
    (source / "d").chmod(0o6775)
    if mode(source / "f") != 0o6755:
        pytest.skip("no set-id bits here")
    copy(source, dest)
    assert (mode(dest / "f"), mode(dest / "d")) == (0o755, 0o775)


def test_sticky_bit_is_kept_on_directories_and_dropped_on_files(source: Path, dest: Path) -> None:
    (source / "f").touch()
    (source / "d").mkdir()
    (source / "d").chmod(0o1777)
    (source / "f").chmod(0o1755 if os.geteuid() == 0 else 0o755)
    copy(source, dest)
    assert (mode(dest / "d"), mode(dest / "f")) == (0o1777, 0o755)


def test_attributes_of_an_overlay_are_dropped(source: Path, dest: Path) -> None:
    (source / "d").mkdir()
    (source / "f").touch()
    for name in ("d", "f", "."):
        give_xattr(source / name, "user.overlay.opaque", b"y")
        give_xattr(source / name, "user.kept", b"1")
    copy(source, dest)
    for name in ("d", "f", "."):
        assert os.listxattr(dest / name) == ["user.kept"]


@needs_root
def test_attributes_that_only_root_may_set_are_dropped(source: Path, dest: Path) -> None:
    (source / "d").mkdir()
    (source / "f").touch()
    capability = (0x02000000).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + bytes(12)
    for name in ("d", "f"):
        give_xattr(source / name, "trusted.overlay.opaque", b"y")
        give_xattr(source / name, "trusted.own", b"y")
        give_xattr(source / name, "security.own", b"y")
    give_xattr(source / "f", "security.capability", capability)
    (source / "l").symlink_to("f")
    give_xattr(source / "l", "trusted.overlay.redirect", b"/etc")
    copy(source, dest)
    for name in ("d", "f", "l"):
        kept = os.listxattr(dest / name, follow_symlinks=False)
        assert {key for key in kept if key != "security.selinux"} == set()


def test_access_lists_of_a_source_are_dropped(source: Path, dest: Path) -> None:
    (source / "d").mkdir()
    (source / "f").touch()
    for name in ("d", "f"):
        give_xattr(source / name, ACCESS_ACL, make_acl(default_for=SOMEBODY))
    give_xattr(source / "d", DEFAULT_ACL, make_acl(default_for=SOMEBODY))
    (source / "d/inner").touch()
    copy(source, dest)
    for name in ("d", "f", "d/inner"):
        assert not [key for key in os.listxattr(dest / name) if "acl" in key]


@needs_root
def test_owner_is_root_unless_it_is_to_be_preserved(source: Path, dest: Path) -> None:
    (source / "d").mkdir()
    (source / "d/f").touch()
    (source / "l").symlink_to("x")
    names = ("d", "d/f", "l", ".")
    for name in names:
        os.chown(source / name, 12, 34, follow_symlinks=False)
    copy(source, dest)
    for name in names:
        facts = (dest / name).lstat()
        assert (facts.st_uid, facts.st_gid) == (0, 0), name
    shutil.rmtree(dest)
    copy(source, dest, preserve_owner=True)
    for name in names:
        facts = (dest / name).lstat()
        assert (facts.st_uid, facts.st_gid) == (12, 34), name


@needs_root
def test_set_id_bits_are_dropped_even_if_the_owner_is_preserved(source: Path, dest: Path) -> None:
    (source / "f").touch()
    os.chown(source / "f", 12, 34)
    (source / "f").chmod(0o6755)
    copy(source, dest, preserve_owner=True)
    assert mode(dest / "f") == 0o755


# What is refused


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def _device(kind: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        try:
            os.mknod(path, kind | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("needs root, to make a device")

    return make


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (_fifo, "FIFO"),
        (_socket, "socket"),
        (_device(stat.S_IFCHR), "character device"),
        (_device(stat.S_IFBLK), "block device"),
    ],
    ids=["fifo", "socket", "character device", "block device"],
)
def test_special_file_is_refused_by_name_and_nobody_waits(
    source: Path, dest: Path, make: Callable[[Path], None], what: str
) -> None:
    (source / "sub").mkdir()
    make(source / "sub/odd\n")
    for attempt in (lambda: measure(source), lambda: copy(source, dest)):
        with time_limit(5), pytest.raises(RefusedError) as caught:
            attempt()
        assert caught.value.message == rf"{source}/sub/odd\n is a {what}"


def test_tree_as_deep_as_the_limit_is_copied_and_a_deeper_one_refused_with_its_path(
    source: Path, dest: Path
) -> None:
    depth = 150
    os.close(make_chain(source, ["d"] * depth))
    exact = walker.Limits(WIDE.entries, WIDE.size, depth)
    assert measure(source, limits=exact).entries == depth + 1
    copy(source, dest, limits=exact)
    os.close(follow_chain(dest, ["d"] * depth))
    shutil.rmtree(dest)
    short = walker.Limits(WIDE.entries, WIDE.size, depth - 1)
    for attempt in (
        lambda: measure(source, limits=short),
        lambda: copy(source, dest, limits=short),
    ):
        with pytest.raises(RefusedError, match=f"deeper than {depth - 1} ") as caught:
            attempt()
        assert caught.value.message.startswith(f"{source}{'/d' * depth} ")
        assert caught.value.hint is not None
        assert "limits.source_depth" in caught.value.hint
    shutil.rmtree(source)
    shutil.rmtree(dest)


def test_depth_needs_no_recursion_of_python(source: Path, dest: Path) -> None:
    os.close(make_chain(source, ["d"] * 150))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        copy(source, dest)
        assert measure(source).entries == 151
    finally:
        sys.setrecursionlimit(before)
    shutil.rmtree(source)
    shutil.rmtree(dest)


def test_limit_of_entries_binds_when_measuring_to_the_last_one(source: Path) -> None:
    for name in "abcd":
        (source / name).touch()
    assert measure(source, limits=walker.Limits(5, 1 << 30, 10)).entries == 5
    with pytest.raises(SpaceError, match="more than 4 entries") as caught:
        measure(source, limits=walker.Limits(4, 1 << 30, 10))
    assert caught.value.hint is not None
    assert "limits.source_entries" in caught.value.hint


def test_limit_of_entries_binds_again_when_copying(source: Path, dest: Path) -> None:
    for name in "abcdefgh":
        (source / name).touch()
    with pytest.raises(SpaceError, match="more than 3 entries"):
        copy(source, dest, limits=walker.Limits(3, 1 << 30, 10))
    assert len(os.listdir(dest)) <= 3


def test_limit_of_size_binds_when_measuring_to_the_last_byte_with_both_figures(
    source: Path,
) -> None:
    (source / "f").write_bytes(b"x" * (64 << 10))
    assert measure(source, limits=walker.Limits(10, 64 << 10, 10)).size == 64 << 10
    with pytest.raises(SpaceError, match="holds 64K; a source may have 60K") as caught:
        measure(source, limits=walker.Limits(10, 60 << 10, 10))
    assert caught.value.hint is not None
    assert "limits.source_size" in caught.value.hint


def test_limit_of_size_binds_again_when_copying(source: Path, dest: Path) -> None:
    (source / "f").write_bytes(b"x" * (64 << 10))
    copy(source, dest, limits=walker.Limits(10, 64 << 10, 10))
    shutil.rmtree(dest)
    with pytest.raises(SpaceError, match="may have 63K"):
        copy(source, dest, limits=walker.Limits(10, 63 << 10, 10))


def test_limit_of_size_binds_again_when_copying_a_sparse_file(source: Path, dest: Path) -> None:
    sparse(source / "f", 64 << 20, (1 << 20, b"x" * (1 << 20)))
    copy(source, dest, limits=walker.Limits(10, 2 << 20, 10))
    shutil.rmtree(dest)
    with pytest.raises(SpaceError, match="may have 64K"):
        copy(source, dest, limits=walker.Limits(10, 64 << 10, 10))


def test_hard_links_and_holes_count_once_and_not_at_all(source: Path) -> None:
    sparse(source / "sparse", 1 << 40, (1 << 30, b"x"))
    (source / "a").write_bytes(b"x" * 5000)
    os.link(source / "a", source / "b")
    found = measure(source)
    assert found.entries == 4
    assert found.size <= 64 << 10
    assert found.size >= 3 * PAGE


# Where the base has the directory too


def test_merged_directories_keep_what_the_base_says_of_them(
    source: Path, base: Path, dest: Path
) -> None:
    for top in (source, base):
        (top / "d/inner").mkdir(parents=True)
    (source / "d/own").mkdir()
    (source / "d/inner/f").touch()
    for name, bits in ((".", 0o750), ("d", 0o1775), ("d/inner", 0o2711)):
        (source / name).chmod(0o700)
        (base / name).chmod(bits)
        os.utime(source / name, ns=(1, 1))
    for name in (".", "d", "d/inner"):
        os.utime(base / name, ns=(7, 1_600_000_000_000_000_123))
    (source / "d/own").chmod(0o705)
    copy(source, dest, base=base)
    for name in (".", "d", "d/inner"):
        assert mode(dest / name) == mode(base / name), name
        assert (dest / name).stat().st_mtime_ns == 1_600_000_000_000_000_123, name
    assert mode(dest / "d/own") == 0o705


def test_merged_directories_keep_attributes_and_access_lists_of_the_base(
    source: Path, base: Path, dest: Path
) -> None:
    for top in (source, base):
        (top / "d").mkdir()
    (source / "d/f").touch()
    (source / "d/sub").mkdir()
    for name in (".", "d"):
        give_xattr(source / name, "user.source", b"1")
        give_xattr(base / name, "user.base", b"2")
        give_xattr(base / name, ACCESS_ACL, make_acl(default_for=SOMEBODY))
        give_xattr(base / name, DEFAULT_ACL, make_acl(default_for=SOMEBODY))
    copy(source, dest, base=base)
    for name in (".", "d"):
        assert sorted(os.listxattr(dest / name)) == sorted([ACCESS_ACL, DEFAULT_ACL, "user.base"])
        for key in (ACCESS_ACL, DEFAULT_ACL, "user.base"):
            assert os.getxattr(dest / name, key) == os.getxattr(base / name, key)
        assert mode(dest / name) == mode(base / name)
    for name in ("d/f", "d/sub"):
        assert os.listxattr(dest / name) == []


@needs_root
def test_merged_directories_keep_owner_and_trusted_attributes_but_none_of_an_overlay(
    source: Path, base: Path, dest: Path
) -> None:
    for top in (source, base):
        (top / "d").mkdir()
    for name in (".", "d"):
        os.chown(base / name, 12, 34)
        (base / name).chmod(0o2755)
        give_xattr(base / name, "trusted.own", b"1")
        give_xattr(base / name, "trusted.overlay.opaque", b"y")
    copy(source, dest, base=base)
    for name in (".", "d"):
        facts = (dest / name).stat()
        assert (facts.st_uid, facts.st_gid, mode(dest / name)) == (12, 34, 0o2755)
        assert "trusted.own" in os.listxattr(dest / name)
        assert "trusted.overlay.opaque" not in os.listxattr(dest / name)


@needs_root
def test_owner_of_a_merged_directory_is_the_base_s_even_if_owners_are_preserved(
    source: Path, base: Path, dest: Path
) -> None:
    (source / "d").mkdir()
    (base / "d").mkdir()
    os.chown(source / "d", 12, 34)
    os.chown(base / "d", 56, 78)
    copy(source, dest, base=base, preserve_owner=True)
    facts = (dest / "d").stat()
    assert (facts.st_uid, facts.st_gid) == (56, 78)


def test_base_itself_is_not_touched(source: Path, base: Path, dest: Path) -> None:
    (source / "d/new").mkdir(parents=True)
    (source / "d/f").write_text("new")
    (base / "d").mkdir()
    (base / "d/f").write_text("old")
    before = [(p, p.stat().st_mtime_ns, p.stat().st_mode) for p in (base, *base.rglob("*"))]
    copy(source, dest, base=base)
    assert before == [(p, p.stat().st_mtime_ns, p.stat().st_mode) for p in (base, *base.rglob("*"))]
    assert (base / "d/f").read_text() == "old"


def _both(source: Path, base: Path, dest: Path, words: str, path: str) -> None:
    for attempt in (
        lambda: measure(source, base=base),
        lambda: copy(source, dest, base=base),
    ):
        with pytest.raises(RefusedError) as caught:
            attempt()
        assert words in caught.value.message
        assert caught.value.message.startswith(f"{source}/{path}")
        assert is_one_printable_line(caught.value.message)


def test_file_over_a_directory_is_refused_naming_it(source: Path, base: Path, dest: Path) -> None:
    (source / "sub").mkdir()
    (base / "sub/thing\n").mkdir(parents=True)
    (source / "sub/thing\n").touch()
    _both(source, base, dest, "a file over a directory", r"sub/thing\n")


def test_symlink_over_a_directory_is_refused_naming_it(
    source: Path, base: Path, dest: Path
) -> None:
    (base / "thing").mkdir()
    (source / "thing").symlink_to("elsewhere")
    _both(source, base, dest, "a file over a directory", "thing")


def test_directory_over_a_file_is_refused_naming_it(source: Path, base: Path, dest: Path) -> None:
    (source / "sub/thing").mkdir(parents=True)
    (base / "sub").mkdir()
    (base / "sub/thing").touch()
    _both(source, base, dest, "a directory over a file", "sub/thing")


def test_directory_over_a_symlink_is_refused_even_if_that_leads_to_a_directory(
    source: Path, base: Path, dest: Path
) -> None:
    (source / "thing").mkdir()
    (base / "real").mkdir()
    (base / "thing").symlink_to("real")
    _both(source, base, dest, "a directory over a file", "thing")


def test_file_over_a_file_and_over_a_symlink_is_copied(
    source: Path, base: Path, dest: Path
) -> None:
    (base / "dir").mkdir()
    (base / "f").write_text("old")
    (base / "l").symlink_to("dir")
    (source / "f").write_text("new")
    (source / "l").write_text("new")
    measure(source, base=base)
    copy(source, dest, base=base)
    assert ((dest / "f").read_text(), (dest / "l").read_text()) == ("new", "new")


# A source that changes meanwhile


def meddle(source: Path, dest: Path, action: Callable[[], object]) -> OverlaydError:
    """Copy, and let *action* happen when the first bytes have been copied; return the error."""
    progress = Meddler(action, when=lambda _entries, size: size > 0)
    with time_limit(20), pytest.raises(OverlaydError) as caught:
        copy(source, dest, progress=progress)
    assert is_one_printable_line(caught.value.message)
    return caught.value


def test_file_that_grows_while_it_is_copied_is_refused_naming_it(source: Path, dest: Path) -> None:
    file = source / "d/f"
    file.parent.mkdir()
    file.write_bytes(b"x" * 100)

    def grow() -> None:
        with file.open("ab") as end:
            end.write(b"more")

    error = meddle(source, dest, grow)
    assert isinstance(error, RefusedError)
    assert error.message == f"{file} changed while it was read"


def test_file_that_is_rewritten_while_it_is_copied_is_refused(source: Path, dest: Path) -> None:
    (source / "f").write_bytes(b"x" * 100)
    os.utime(source / "f", ns=(5, 5))
    error = meddle(source, dest, lambda: (source / "f").write_bytes(b"y" * 100))
    assert isinstance(error, RefusedError)


@pytest.mark.parametrize("size", [0, 16 << 20], ids=["to nothing", "to what was copied"])
def test_file_that_is_truncated_while_it_is_copied_is_refused_naming_it(
    source: Path, dest: Path, size: int
) -> None:
    file = source / "d/f"
    file.parent.mkdir()
    with file.open("wb") as out:
        out.write(b"x" * (20 << 20))
    error = meddle(source, dest, lambda: os.truncate(file, size))
    assert isinstance(error, RefusedError)
    assert error.message == f"{file} changed while it was read"


def test_sparse_file_that_is_truncated_while_it_is_copied_is_refused(
    source: Path, dest: Path
) -> None:
    sparse(source / "f", 8 << 20, (0, b"x" * PAGE), (4 << 20, b"x" * PAGE))
    error = meddle(source, dest, lambda: os.truncate(source / "f", 0))
    assert isinstance(error, RefusedError)


def _others(folder: Path) -> list[str]:
    """Return the files that are not the first to be copied: a directory is read in its order."""
    return os.listdir(folder)[1:]


def test_file_that_vanishes_before_its_turn_is_refused_naming_where(
    source: Path, dest: Path
) -> None:
    folder = source / "some/where"
    folder.mkdir(parents=True)
    for name in "abcd":
        (folder / name).write_bytes(b"x")
    others = _others(folder)
    error = meddle(source, dest, lambda: list(map(os.unlink, [folder / n for n in others])))
    assert isinstance(error, RefusedError)
    assert error.message.startswith(f"{folder}/")
    assert error.message.endswith(" changed while it was read")


def test_file_that_becomes_a_symlink_before_its_turn_is_refused_and_not_followed(
    source: Path, dest: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    for name in "abcd":
        (source / name).write_bytes(b"x")
    others = _others(source)

    def replace() -> None:
        for name in others:
            (source / name).unlink()
            (source / name).symlink_to(tmp_path / "secret")

    assert isinstance(meddle(source, dest, replace), RefusedError)
    assert all(path.read_bytes() != b"secret" for path in dest.iterdir())


def test_file_that_becomes_a_fifo_before_its_turn_is_refused_and_nobody_waits(
    source: Path, dest: Path
) -> None:
    folder = source / "some/where"
    folder.mkdir(parents=True)
    for name in "abcd":
        (folder / name).write_bytes(b"x")
    others = _others(folder)

    def replace() -> None:
        for name in others:
            (folder / name).unlink()
            os.mkfifo(folder / name)

    error = meddle(source, dest, replace)
    assert isinstance(error, RefusedError)
    assert re.fullmatch(rf"{re.escape(str(folder))}/[a-d] is a FIFO", error.message)


def test_symlink_that_becomes_a_file_before_its_turn_is_refused_naming_it(
    source: Path, dest: Path
) -> None:
    folder = source / "some/where"
    folder.mkdir(parents=True)
    for name in "abcd":
        (folder / name).symlink_to("x")
    others = _others(folder)

    def replace() -> None:
        for name in others:
            (folder / name).unlink()
            (folder / name).touch()

    progress = Meddler(replace, when=lambda entries, _size: entries > 0)
    with pytest.raises(RefusedError) as caught:
        copy(source, dest, progress=progress)
    assert caught.value.message.startswith(f"{folder}/")
    assert "changed while it was read" in caught.value.message


def test_directory_that_becomes_a_symlink_before_its_turn_is_refused_and_not_followed(
    source: Path, dest: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    (source / "d/sub").mkdir(parents=True)
    (source / "d/f").write_bytes(b"x")

    def replace() -> None:
        (source / "d/sub").rmdir()
        (source / "d/sub").symlink_to(outside)

    error = meddle(source, dest, replace)
    assert isinstance(error, RefusedError)
    assert error.message == f"{source}/d/sub changed while it was read"
    assert not list(dest.rglob("secret"))


def test_directory_that_vanishes_before_its_turn_is_refused_naming_it(
    source: Path, dest: Path
) -> None:
    (source / "d/sub").mkdir(parents=True)
    (source / "d/f").write_bytes(b"x")
    error = meddle(source, dest, (source / "d/sub").rmdir)
    assert isinstance(error, RefusedError)
    assert error.message == f"{source}/d/sub changed while it was read"


# Stopping


def test_stop_ends_a_copy_at_the_next_step(source: Path, dest: Path) -> None:
    for name in "abcdefgh":
        (source / name).write_bytes(b"x")
    progress = Progress()
    stopper = Meddler(lambda: None, when=lambda _entries, _size: False)
    progress.stop()
    with pytest.raises(InterruptedByUserError):
        copy(source, dest, progress=progress)
    assert not list(dest.iterdir())
    shutil.rmtree(dest)
    stopper = Meddler(lambda: stopper.stop(), when=lambda entries, _size: entries > 0)  # noqa: PLW0108
    with pytest.raises(InterruptedByUserError):
        copy(source, dest, progress=stopper)
    assert 0 < len(list(dest.iterdir())) < 8


def test_stop_ends_a_copy_in_the_middle_of_a_large_file(source: Path, dest: Path) -> None:
    with (source / "f").open("wb") as out:
        out.write(b"x" * (40 << 20))
    progress = Meddler(lambda: progress.stop(), when=lambda _entries, size: size > 0)  # noqa: PLW0108
    with pytest.raises(InterruptedByUserError):
        copy(source, dest, progress=progress)
    assert (dest / "f").stat().st_size < 40 << 20


def test_stop_ends_measuring(source: Path) -> None:
    progress = Progress()
    progress.stop()
    with pytest.raises(InterruptedByUserError):
        measure(source, progress=progress)


# Measuring


def test_measure_is_what_the_copy_reports(source: Path, dest: Path) -> None:
    (source / "d/e").mkdir(parents=True)
    for number, name in enumerate(["a", "d/b", "d/e/c"]):
        (source / name).write_bytes(b"x" * PAGE * (number + 1))
    os.link(source / "a", source / "d/linked")
    (source / "d/l").symlink_to("b")
    found = measure(source)
    progress = copy(source, dest)
    assert (found.entries, found.size) == (8, 6 * PAGE)
    assert (progress.entries, progress.size) == (found.entries, found.size)


def test_measure_is_what_tmpfs_needs(source: Path) -> None:
    shm = Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK) and _is_tmpfs(shm)):
        pytest.skip("no tmpfs on /dev/shm that can be written to")
    (source / "d").mkdir()
    for number, size in enumerate([0, 1, PAGE - 1, PAGE, PAGE + 1, 100_000]):
        (source / f"d/{number}").write_bytes(b"x" * size)
    os.link(source / "d/5", source / "linked")
    (source / "short").symlink_to("x" * 100)
    sparse(source / "sparse", 10 << 20, (5 << 20, b"x" * PAGE), (9 << 20, b"y"))
    sparse(source / "tail", (3 << 20) + 5, (1 << 20, b"x"), (3 << 20, b"tail!"))
    dest = shm / f"overlayd-unit-{os.getpid()}"
    try:
        copy(source, dest)
        inodes = {facts.st_ino: facts for facts in map(os.lstat, dest.rglob("*"))}
        used = sum(facts.st_blocks * 512 for facts in inodes.values())
    finally:
        shutil.rmtree(dest, ignore_errors=True)
    assert measure(source).size == used


def _is_tmpfs(path: Path) -> bool:
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return any(line.split()[1:3] == [str(path), "tmpfs"] for line in mounts)


def test_text_of_a_long_symlink_needs_a_page_and_a_short_one_none(source: Path) -> None:
    (source / "short").symlink_to("x" * 127)
    assert measure(source).size == 0
    (source / "long").symlink_to("x" * 128)
    assert measure(source).size == PAGE


def test_flagged_files_are_listed_by_path_and_directories_are_not(source: Path) -> None:
    (source / "sub.so").mkdir()
    for name in ("a.so", "sub.so/b.so", "sub.so/c"):
        (source / name).touch()
    (source / "l.so").symlink_to("a.so")
    found = measure(source, flagged=re.compile(r".*\.so\Z"))
    assert sorted(found.flagged) == sorted(
        f"{source}/{name}" for name in ("a.so", "l.so", "sub.so/b.so")
    )
    assert found.flagged_count == 3


def test_beyond_a_thousand_flagged_files_are_only_counted() -> None:
    total = walker.Measure()
    for number in range(1005):
        walker.note_flagged(total, str(number))
    assert (len(total.flagged), total.flagged_count) == (1000, 1005)


def test_file_that_vanishes_while_it_is_measured_is_refused_naming_where(source: Path) -> None:
    folder = source / "some/where"
    folder.mkdir(parents=True)
    for name in "abcd":
        (folder / name).write_bytes(b"x")
    others = _others(folder)

    class Pattern:
        """Called with each name that was measured; so it can act between two of them."""

        def match(self, name: str) -> None:
            for other in others:
                (folder / other).unlink(missing_ok=True)
            del name

    with pytest.raises(RefusedError) as caught:
        measure(source, flagged=Pattern())  # type: ignore[arg-type]
    assert caught.value.message.startswith(f"{folder}/")
    assert caught.value.message.endswith(" changed while it was read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_directory_that_may_not_be_read_is_named(source: Path) -> None:
    (source / "closed").mkdir(mode=0)
    with pytest.raises(OverlaydError, match=re.escape(f"{source}/closed")) as caught:
        measure(source)
    assert caught.value.code == "no-permission"


def test_walk_gives_each_entry_once_and_each_directory_its_enter_and_leave(source: Path) -> None:
    (source / "d").mkdir()
    (source / "f").touch()
    (source / "d/l").symlink_to("x")
    with opened(source) as fd:
        steps = [(kind.name, name) for kind, _, name in walker.Walk(fd, "s", 9)]
    assert sorted(steps[1:3]) == [("DIRECTORY", "d"), ("FILE", "f")]
    assert [steps[0], *steps[3:]] == [
        ("ENTER", ""),
        ("ENTER", "d"),
        ("SYMLINK", "l"),
        ("LEAVE", "d"),
        ("LEAVE", ""),
    ]


def test_walk_that_is_abandoned_leaves_no_descriptor_open(source: Path) -> None:
    os.close(make_chain(source, ["d"] * 30))
    before = open_fds()
    with opened(source) as fd:
        steps = iter(walker.Walk(fd, "s", 99))
        for _ in range(40):
            next(steps)
        assert open_fds() > before + 10
        del steps
    assert open_fds() == before


def test_stretches_of_data_cover_the_file_and_end_with_it(source: Path) -> None:
    sparse(source / "f", 8 << 20, (1 << 20, b"x" * 10), (6 << 20, b"y" * PAGE * 2))
    with (source / "f").open("rb") as file:
        found = list(walker.extents(file.fileno(), 8 << 20))
        assert all(0 <= start < end <= 8 << 20 for start, end in found)
        for at in (1 << 20, 6 << 20, (6 << 20) + PAGE * 2 - 1):
            assert any(start <= at < end for start, end in found)
        assert sum(end - start for start, end in found) <= 256 << 10
        assert list(walker.extents(file.fileno(), (1 << 20) + 5))[-1][1] == (1 << 20) + 5
        assert list(walker.extents(file.fileno(), 0)) == []


# A single file


def single(source: Path, dest: Path, name: str, limits: walker.Limits = WIDE) -> Progress:
    dest.mkdir()
    progress = Progress()
    with opened(source) as source_fd, opened(dest) as dest_fd:
        into = writer.Writer(f"{source}/{name}", limits, dest_fd)
        copier = layers.Copier(into, preserve_owner=False, progress=progress)
        copier.single_file(source_fd, name, dest_fd, "renamed")
    return progress


def test_single_file_is_copied_under_the_name_it_gets(source: Path, dest: Path) -> None:
    (source / "tool").write_bytes(b"x" * 10_000)
    (source / "tool").chmod(0o4751)
    os.utime(source / "tool", ns=(5, 1_600_000_000_000_000_123))
    (source / "other").touch()
    os.link(source / "tool", source / "linked")
    progress = single(source, dest, "tool")
    assert os.listdir(dest) == ["renamed"]
    facts = (dest / "renamed").stat()
    assert (dest / "renamed").read_bytes() == b"x" * 10_000
    assert (mode(dest / "renamed"), facts.st_mtime_ns, facts.st_nlink) == (
        *(0o751, 1_600_000_000_000_000_123, 1),
    )
    assert progress.size == 10_000


def test_single_file_is_measured_in_pages_and_against_the_limit(source: Path, dest: Path) -> None:
    (source / "tool").write_bytes(b"x" * 5000)
    with opened(source) as fd:
        found = walker.measure_file("tool", fd, "the tool", WIDE)
        assert (found.entries, found.size) == (1, 2 * PAGE)
        with pytest.raises(SpaceError, match="the tool holds 8K; a source may have 4K"):
            walker.measure_file("tool", fd, "the tool", walker.Limits(1, PAGE, 1))
    with pytest.raises(SpaceError):
        single(source, dest, "tool", walker.Limits(1, PAGE, 1))


@pytest.mark.parametrize("change", ["gone", "symlink", "fifo"])
def test_single_file_that_is_another_by_now_is_refused(
    source: Path, dest: Path, change: str
) -> None:
    if change == "symlink":
        (source / "tool").symlink_to("/etc/passwd")
    elif change == "fifo":
        os.mkfifo(source / "tool")
    with time_limit(5), pytest.raises(RefusedError, match=re.escape(f"{source}/tool")) as caught:
        single(source, dest, "tool")
    assert f"{source}/tool/" not in caught.value.message
    assert not list(dest.iterdir())
