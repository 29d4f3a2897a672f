# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same system calls with no manager: no records, no locks, no checks, no undo.

Written out straight, so that a reader can hold them against what overlayd does.  The mounts are
like overlayd's own: storage is tmpfs on a shared tmpfs, the stage is private.
"""

from __future__ import annotations

import os
from typing import Final

from benchmarks.world import attach_tmpfs
from overlayd import syscalls as sys

_STORE: Final = "/run/straight"
_STAGE: Final = f"{_STORE}/stage"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LAYER_SIZE: Final = 1 << 20
_UPPER_SIZE: Final = 256 << 20
_INODES: Final = 65536


def prepare() -> None:
    """Make the store that the functions below work in; call once per world."""
    os.mkdir(_STORE)
    attach_tmpfs(_STORE)
    sys.mount_propagation(_STORE, sys.MS_SHARED)
    os.mkdir(_STAGE)
    attach_tmpfs(_STAGE)
    sys.mount_propagation(_STAGE, sys.MS_PRIVATE)


def apply_and_remove(source: str, target: str) -> None:
    """Copy *source* (a flat directory), show it over *target* and take it away again."""
    apply(source, target, "cycle")
    sys.umount2(target)
    top = f"{_STORE}/cycle"
    for part in ("layer", "upper.1"):
        sys.umount2(f"{top}/{part}", sys.MNT_DETACH)
        os.rmdir(f"{top}/{part}")
    os.rmdir(top)


def apply(source: str, target: str, name: str) -> None:
    """Copy *source* (a flat directory) and show it over *target*."""
    source_fd = os.open(source, _DIRECTORY)
    base_fd = os.open(target, _DIRECTORY)
    os.mkdir(f"{_STORE}/{name}", 0o700)

    _tmpfs(f"{_STORE}/{name}/layer", _LAYER_SIZE)
    layer_fd = os.open(f"{_STORE}/{name}/layer", _DIRECTORY)
    os.mkdir("tree", 0o700, dir_fd=layer_fd)
    tree_fd = os.open("tree", _DIRECTORY, dir_fd=layer_fd)
    with os.scandir(source_fd) as entries:
        for entry in entries:
            _copy(entry.name, source_fd, tree_fd)
    _look_like(base_fd, tree_fd)
    context = sys.fspick(layer_fd)
    sys.fsconfig(context, sys.FSCONFIG_SET_FLAG, "ro")
    sys.fsconfig(context, sys.FSCONFIG_CMD_RECONFIGURE)
    os.close(context)

    upper_fd, work_fd = _upper(f"{_STORE}/{name}/upper.1", base_fd)
    overlay_fd = _overlay((tree_fd, base_fd), upper_fd, work_fd)
    sys.move_mount(overlay_fd, base_fd)
    for fd in (source_fd, base_fd, layer_fd, tree_fd, upper_fd, work_fd, overlay_fd):
        os.close(fd)


def reset(target: str, name: str, number: int, *, beneath: bool = True) -> None:
    """Show a fresh upper over the layer and the base at *target*, the *number*-th since apply.

    Not *beneath* is the plain way: take the old one off, then put the new one there.
    """
    parent, entry = os.path.split(target)
    parent_fd = os.open(parent, _PATH)
    clone_fd = sys.open_tree(parent_fd, "", sys.OPEN_TREE_CLONE | sys.AT_EMPTY_PATH)
    stage_fd = os.open(_STAGE, _PATH)
    sys.move_mount(clone_fd, stage_fd)
    base_fd = os.open(f"{_STAGE}/{entry}", _DIRECTORY)

    upper_fd, work_fd = _upper(f"{_STORE}/{name}/upper.{number + 1}", base_fd)
    tree_fd = os.open(f"{_STORE}/{name}/layer/tree", _DIRECTORY)
    overlay_fd = _overlay((tree_fd, base_fd), upper_fd, work_fd)
    os.close(base_fd)
    sys.umount2(_STAGE, sys.MNT_DETACH)

    if beneath:
        top_fd = os.open(target, _PATH)
        sys.move_mount(overlay_fd, top_fd, sys.MOVE_MOUNT_BENEATH)
        sys.umount2(target, sys.MNT_DETACH)
    else:
        sys.umount2(target, sys.MNT_DETACH)
        top_fd = os.open(target, _PATH)
        sys.move_mount(overlay_fd, top_fd)
    sys.umount2(f"{_STORE}/{name}/upper.{number}", sys.MNT_DETACH)
    os.rmdir(f"{_STORE}/{name}/upper.{number}")
    for fd in (parent_fd, clone_fd, stage_fd, tree_fd, upper_fd, work_fd, overlay_fd, top_fd):
        os.close(fd)


def remove(target: str, name: str, number: int) -> None:
    """Take away what :func:`apply` and *number* - 1 resets have left at *target*."""
    sys.umount2(target, sys.MNT_DETACH)
    for part in ("layer", f"upper.{number}"):
        sys.umount2(f"{_STORE}/{name}/{part}", sys.MNT_DETACH)
        os.rmdir(f"{_STORE}/{name}/{part}")
    os.rmdir(f"{_STORE}/{name}")


def _copy(name: str, source_dir: int, dest_dir: int) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source_dir)
    facts = os.fstat(source)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    dest = os.open(name, flags, 0o600, dir_fd=dest_dir)
    at = 0
    while at < facts.st_size:
        at += os.sendfile(dest, source, at, facts.st_size - at)
    os.fchmod(dest, facts.st_mode & 0o777)
    os.utime(dest, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
    os.close(dest)
    os.close(source)


def _look_like(base: int, fd: int) -> None:
    facts = os.fstat(base)
    os.fchown(fd, facts.st_uid, facts.st_gid)
    os.fchmod(fd, facts.st_mode & 0o7777)
    os.utime(fd, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def _tmpfs(path: str, size: int) -> None:
    os.mkdir(path, 0o700)
    context = sys.fsopen("tmpfs")
    sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "source", "straight")
    sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "size", str(size))
    sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "nr_inodes", str(_INODES))
    sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "mode", "700")
    sys.fsconfig(context, sys.FSCONFIG_CMD_CREATE)
    mount_fd = sys.fsmount(context, sys.MOUNT_ATTR_NODEV | sys.MOUNT_ATTR_NOSUID)
    place_fd = os.open(path, _PATH)
    sys.move_mount(mount_fd, place_fd)
    os.close(place_fd)
    os.close(mount_fd)
    os.close(context)


def _upper(path: str, base_fd: int) -> tuple[int, int]:
    _tmpfs(path, _UPPER_SIZE)
    top_fd = os.open(path, _DIRECTORY)
    os.mkdir("upper", 0o700, dir_fd=top_fd)
    os.mkdir("work", 0o700, dir_fd=top_fd)
    upper_fd = os.open("upper", _DIRECTORY, dir_fd=top_fd)
    work_fd = os.open("work", _DIRECTORY, dir_fd=top_fd)
    os.close(top_fd)
    _look_like(base_fd, upper_fd)
    return upper_fd, work_fd


def _overlay(lowers: tuple[int, ...], upper_fd: int, work_fd: int) -> int:
    context = sys.fsopen("overlay")
    for key, value in (
        ("source", "straight"),
        ("metacopy", "off"),
        ("index", "off"),
        ("nfs_export", "off"),
        ("xino", "off"),
        ("uuid", "null"),
        ("redirect_dir", "on"),
        ("lowerdir", ":".join(f"/proc/self/fd/{fd}" for fd in lowers)),
        ("upperdir", f"/proc/self/fd/{upper_fd}"),
        ("workdir", f"/proc/self/fd/{work_fd}"),
    ):
        sys.fsconfig(context, sys.FSCONFIG_SET_STRING, key, value)
    sys.fsconfig(context, sys.FSCONFIG_CMD_CREATE)
    overlay_fd = sys.fsmount(context, sys.MOUNT_ATTR_NODEV)
    os.close(context)
    return overlay_fd
