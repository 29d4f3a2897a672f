# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who uses an overlay: every process, in every mount namespace, before and after a detach.

An overlay made with ``uuid=off`` reports the f_fsid of its storage, which tmpfs draws at random.
So ``statfs`` on whatever a process holds (working directory, root, program, descriptors, mapped
files) tells, whether the mount still has a path or not.  ``st_dev`` would not: files of an
overlay carry their layer's.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlayd import mountinfo
from overlayd import syscalls as sys

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

_NO_FILESYSTEM: Final = ("socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/", "/proc/", "/sys/")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses an overlay, and by what."""

    pid: int
    command: str
    path: str


def _processes() -> list[str]:
    return [entry for entry in os.listdir("/proc") if entry.isdigit()]


def _handles(pid: str) -> Iterator[str]:
    """Yield the magic links of everything the process holds that may lie on a filesystem."""
    top = f"/proc/{pid}"
    for name in ("cwd", "root", "exe"):
        yield f"{top}/{name}"
    for folder in ("fd", "map_files"):
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{top}/{folder}"):
                yield f"{top}/{folder}/{name}"


def find(fsids: Container[int]) -> list[Holder]:
    """Return one :class:`Holder` per process that uses an overlay with one of *fsids*."""
    found: list[Holder] = []
    for pid in _processes():
        for link in _handles(pid):
            try:
                path = os.readlink(link)
                if path.startswith(_NO_FILESYSTEM):
                    continue
                facts = sys.statfs(link)
            except OSError:
                continue  # gone meanwhile, or a kernel thread
            if facts.type == sys.OVERLAYFS_SUPER_MAGIC and facts.fsid in fsids:
                found.append(Holder(int(pid), _command(pid), path.removesuffix(" (deleted)")))
                break
    return found


def _command(pid: str) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
        return file.read().strip().decode(errors="replace")
    return "?"


def _kernel_threads() -> set[str]:
    """Return the kernel's own threads, most of a quiet machine's processes, in one reading."""
    with contextlib.suppress(OSError), open("/proc/2/comm", "rb") as file:
        if file.read() == b"kthreadd\n":
            with open("/proc/2/task/2/children", "rb") as children:
                return {"2", *children.read().decode().split()}
    return set()  # a container, or a kernel without that file


def foreign_copies(uuid: str) -> bool:
    """Whether the overlay's mount has a copy in a mount namespace other than the caller's.

    A plain unmount asks the kernel only about this namespace and those that receive from it.
    """
    seen = {mountinfo.namespace()}
    for pid in set(_processes()) - _kernel_threads():
        try:
            space = mountinfo.namespace(pid)
            if space not in seen:
                seen.add(space)
                if uuid in mountinfo.read(pid).tagged:
                    return True
        except OSError:
            continue
    return False
