# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing a layer: copying a source into storage, and making directories look like the base's.

The kernel takes mode, owner and attributes of a merged directory from the topmost layer that has
it.  So every directory of a layer that the base has too gets the base's, the root first of all;
otherwise a source directory of mode 0700 would lock everybody out of the target.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from overlayd.errors import OverlaydError, SpaceError, from_oserror
from overlayd.model import shown
from overlayd.walker import (
    OPEN_DIRECTORY,
    Kind,
    Limits,
    Walk,
    changed,
    check_size,
    conflict,
    extents,
    has_holes,
    is_directory,
    open_base,
    open_file,
    refuse_special,
    too_many,
)
from overlayd.walker import Measure as _Count

if TYPE_CHECKING:
    from overlayd.progress import Progress

_CHUNK: Final = 16 << 20
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NEVER_KEPT: Final = "trusted.overlay."


@dataclass(slots=True)
class Copier:
    """One copy of a source into the layer at ``dest_fd``.

    ``base_fd`` is the directory of the base that lies beneath ``dest_fd``; None where the copy
    does not touch the base.  Sizes in bytes.
    """

    label: str
    limits: Limits
    preserve_owner: bool
    progress: Progress
    dest_root: int
    _count: _Count = field(default_factory=_Count)
    _links: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    _attributes: bool = True
    _place: tuple[str, ...] = ()

    def tree(self, source_fd: int, base_fd: int | None) -> None:
        """Copy everything below *source_fd*; the layer's root is made already.

        :raises SpaceError: when a limit or the storage is full.
        :raises RefusedError: for what may not be copied, or a source that changes meanwhile.
        """
        walk = Walk(source_fd, self.label, self.limits.depth)
        dests: list[int] = []
        bases: list[int | None] = []
        names: list[str] = []
        try:
            for kind, fd, name in walk:
                self._place = (*names, name)
                if kind is Kind.FILE:
                    self._step(bases[-1])
                    self._file(fd, name, dests[-1], name, self._place)
                elif kind is Kind.SYMLINK:
                    self._step(bases[-1])
                    self._symlink(fd, name, dests[-1])
                elif kind is Kind.DIRECTORY:
                    self._step(None)
                    os.mkdir(name, 0o700, dir_fd=dests[-1])
                elif kind is Kind.ENTER:
                    self.progress.check()
                    if dests:
                        try:
                            bases.append(open_base(bases[-1], name))
                        except NotADirectoryError:
                            raise conflict(
                                self._path(), "the base", base_is_directory=False
                            ) from None
                        dests.append(os.open(name, OPEN_DIRECTORY, dir_fd=dests[-1]))
                        names.append(name)
                    else:
                        bases.append(None if base_fd is None else os.dup(base_fd))
                        dests.append(os.dup(self.dest_root))
                else:
                    self._leave(fd, dests[-1], bases[-1])
                    os.close(dests.pop())
                    if (base := bases.pop()) is not None:
                        os.close(base)
                    if names:
                        names.pop()
        except OSError as error:
            raise self._storage_error(error) from None
        finally:
            for open_fd in (*dests, *bases):
                if open_fd is not None:
                    os.close(open_fd)

    def _step(self, base: int | None) -> None:
        """Count an entry; *base* is the base's directory if the entry must not be one there."""
        self._count.entries += 1
        if self._count.entries > self.limits.entries:
            raise too_many(self.label, self.limits)
        if is_directory(base, self._place[-1]):
            raise conflict(self._path(), "the base", base_is_directory=True)

    def _path(self) -> str:
        """Return the path of what is being copied, for messages."""
        return "/".join((self.label, *self._place)).rstrip("/")

    def _storage_error(self, error: OSError) -> OverlaydError:
        if error.errno == errno.ENOSPC:
            message = f"{shown(self.label)} outgrew the storage measured for it while it was copied"
            return SpaceError(message, hint="apply again when nothing writes to the source")
        if error.errno in {errno.ENOENT, errno.ELOOP, errno.ENXIO}:
            return changed(self._path())
        return from_oserror(error, f"copying {shown(self._path())}")

    def single_file(self, source_dir: int, name: str, dest_dir: int, dest_name: str) -> None:
        """Copy one regular file, as a source of its own.

        :raises SpaceError: when a limit or the storage is full.
        :raises RefusedError: for a source that changes meanwhile.
        """
        try:
            self._file(source_dir, name, dest_dir, dest_name, (dest_name,))
        except OSError as error:
            raise self._storage_error(error) from None

    def _file(  # from here to there
        self, source_dir: int, name: str, dest_dir: int, dest_name: str, place: tuple[str, ...]
    ) -> None:
        """Copy the regular file *name*, or link it to the copy made of it before."""
        source = open_file(name, source_dir)
        try:
            facts = os.fstat(source)
            if not stat.S_ISREG(facts.st_mode):
                raise refuse_special(facts.st_mode, self._path())
            if facts.st_nlink > 1:
                key = (facts.st_dev, facts.st_ino)
                if (first := self._links.get(key)) is not None:
                    self._link(first, dest_dir, dest_name)
                    self.progress.advance(1, 0)
                    return
                self._links[key] = place
            self._count.size += facts.st_size if not has_holes(facts) else 0
            check_size(self._count, self.label, self.limits)
            dest = os.open(dest_name, _CREATE, 0o600, dir_fd=dest_dir)
            try:
                self._data(source, dest, facts)
                self._xattrs(source, dest)
                if self.preserve_owner:
                    os.fchown(dest, facts.st_uid, facts.st_gid)
                os.fchmod(dest, facts.st_mode & 0o777)
                os.utime(dest, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
            finally:
                os.close(dest)
            after = os.fstat(source)
            if (after.st_mtime_ns, after.st_size) != (facts.st_mtime_ns, facts.st_size):
                raise changed(self._path())
        finally:
            os.close(source)

    def _data(self, source: int, dest: int, facts: os.stat_result) -> None:
        size = facts.st_size
        if not has_holes(facts):
            self._stretch(source, dest, 0, size)
        else:
            for start, end in extents(source, size):
                os.lseek(dest, start, os.SEEK_SET)
                self._count.size += end - start
                check_size(self._count, self.label, self.limits)
                self._stretch(source, dest, start, end)
            os.ftruncate(dest, size)
        self.progress.advance(1, 0)

    def _stretch(self, source: int, dest: int, start: int, end: int) -> None:
        at = start
        while at < end:
            # EXDEV rules out copy_file_range from disk to tmpfs; sendfile has no such limit.
            done = os.sendfile(dest, source, at, min(_CHUNK, end - at))
            if done == 0:
                raise changed(self._path())
            at += done
            self.progress.advance(0, done)

    def _link(self, first: tuple[str, ...], dest_dir: int, name: str) -> None:
        """Link to the earlier copy at *first*; its path may be longer than one call takes."""
        fd = os.dup(self.dest_root)
        try:
            for part in first[:-1]:
                deeper = os.open(part, OPEN_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = deeper
            os.link(first[-1], name, src_dir_fd=fd, dst_dir_fd=dest_dir, follow_symlinks=False)
        finally:
            os.close(fd)

    def _symlink(self, source_dir: int, name: str, dest_dir: int) -> None:
        facts = os.stat(name, dir_fd=source_dir, follow_symlinks=False)
        if not stat.S_ISLNK(facts.st_mode):
            raise changed(self._path())
        os.symlink(os.readlink(name, dir_fd=source_dir), name, dir_fd=dest_dir)
        if self.preserve_owner:
            os.chown(name, facts.st_uid, facts.st_gid, dir_fd=dest_dir, follow_symlinks=False)
        os.utime(
            name, ns=(facts.st_mtime_ns, facts.st_mtime_ns), dir_fd=dest_dir, follow_symlinks=False
        )
        self.progress.advance(1, 0)

    def _leave(self, source: int, dest: int, base: int | None) -> None:
        """Give a finished directory its attributes: the base's if it has it, else the source's."""
        if base is not None:
            copy_directory_attributes(base, dest)
        else:
            facts = os.fstat(source)
            self._xattrs(source, dest)
            if self.preserve_owner:
                os.fchown(dest, facts.st_uid, facts.st_gid)
            os.fchmod(dest, facts.st_mode & 0o1777)
            os.utime(dest, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
        self.progress.advance(1, 0)

    def _xattrs(self, source: int, dest: int) -> None:
        """Keep ``user.*`` attributes, never those of an overlay; none where tmpfs has none."""
        if not self._attributes:
            return
        try:
            names = os.listxattr(source)
            for name in names:
                if name.startswith("user.") and not name.startswith("user.overlay."):
                    os.setxattr(dest, name, os.getxattr(source, name))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._attributes = False


def copy_directory_attributes(base: int, dest: int) -> None:
    """Give directory *dest* mode, owner, attributes, ACLs and times of directory *base*."""
    facts = os.fstat(base)
    os.fchown(dest, facts.st_uid, facts.st_gid)
    try:
        names = os.listxattr(base)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        names = []
    for name in names:
        if name.startswith(_NEVER_KEPT):
            continue
        try:
            os.setxattr(dest, name, os.getxattr(base, name))
        except OSError as error:
            # user.* does not exist on tmpfs before Linux 6.6; anything else must not be lost.
            if error.errno != errno.EOPNOTSUPP or not name.startswith("user."):
                raise
    os.fchmod(dest, stat.S_IMODE(facts.st_mode))
    os.utime(dest, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def make_directory(parent: int, name: str, like: int) -> int:
    """Make directory *name* in *parent* that looks like directory *like*; return its fd."""
    os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
    try:
        copy_directory_attributes(like, fd)
    except OSError:
        os.close(fd)
        raise
    return fd
