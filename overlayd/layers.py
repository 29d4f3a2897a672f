# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copying a source into a layer, within this process."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from overlayd import caller
from overlayd.walker import (
    Kind,
    Walk,
    attribute_names,
    changed,
    extents,
    has_holes,
    open_file,
    read_link,
    refuse_special,
    wanted_attribute,
)

if TYPE_CHECKING:
    from overlayd.progress import Progress
    from overlayd.writer import Writer

_CHUNK: Final = 16 << 20
_NOBODY: Final = 65534
"""What the kernel shows in a user namespace for an owner that is not mapped there."""


@dataclass(slots=True)
class Copier:
    """One copy of a source by *writer*."""

    writer: Writer
    preserve_owner: bool
    progress: Progress
    _links: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    _attributes: bool = True

    def tree(self, source_fd: int, base_fd: int | None) -> None:
        """Copy everything below *source_fd*; the layer's root is made already.

        ``base_fd`` is the directory of the base that lies beneath the root; None where the copy
        does not touch the base.

        :raises SpaceError: when a limit or the storage is full.
        :raises RefusedError: for what may not be copied, or a source that changes meanwhile.
        """
        writer = self.writer
        walk = Walk(source_fd, writer.label, writer.limits.depth)
        try:
            for kind, fd, name in walk:
                writer.at(name)
                if kind is Kind.FILE:
                    writer.step()
                    self._file(fd, name, name, writer.directory)
                elif kind is Kind.SYMLINK:
                    writer.step()
                    self._symlink(fd, name)
                elif kind is Kind.DIRECTORY:
                    writer.step(over=False)
                    writer.make_directory(name)
                elif kind is Kind.ENTER:
                    self.progress.check()
                    if writer.depth:
                        writer.enter(name)
                    else:
                        writer.begin(base_fd)
                else:
                    self._leave(fd)
                    writer.leave()
        except OSError as error:
            raise writer.error(error) from None
        finally:
            writer.close()

    def single_file(self, source_dir: int, name: str, dest_dir: int, dest_name: str) -> None:
        """Copy one regular file, as a source of its own.

        :raises SpaceError: when a limit or the storage is full.
        :raises RefusedError: for a source that changes meanwhile.
        """
        try:
            self._file(source_dir, name, dest_name, dest_dir)
        except OSError as error:
            raise self.writer.error(error) from None

    def _file(self, source_dir: int, name: str, dest_name: str, dest_dir: int) -> None:
        """Copy the regular file *name*, or link it to the copy made of it before."""
        writer = self.writer
        source = open_file(name, source_dir)
        try:
            facts = os.fstat(source)
            if not stat.S_ISREG(facts.st_mode):
                raise refuse_special(facts.st_mode, writer.path())
            if facts.st_nlink > 1:
                key = (facts.st_dev, facts.st_ino)
                if (first := self._links.get(key)) is not None:
                    writer.link(first, dest_name, dest_dir)
                    self.progress.advance(1, 0)
                    return
                self._links[key] = writer.place
            writer.store(facts.st_size if not has_holes(facts) else 0)
            dest = writer.create(dest_name, dest_dir)
            try:
                self._data(source, dest, facts)
                self._xattrs(source, dest)
                if self.preserve_owner:
                    os.fchown(dest, *_owner(facts))
                os.fchmod(dest, facts.st_mode & 0o777)
                os.utime(dest, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
            finally:
                os.close(dest)
            after = os.fstat(source)
            if (after.st_mtime_ns, after.st_size) != (facts.st_mtime_ns, facts.st_size):
                raise changed(writer.path())
        finally:
            os.close(source)

    def _data(self, source: int, dest: int, facts: os.stat_result) -> None:
        size = facts.st_size
        if not has_holes(facts):
            self._stretch(source, dest, 0, size)
        else:
            for start, end in extents(source, size):
                os.lseek(dest, start, os.SEEK_SET)
                self.writer.store(end - start)
                self._stretch(source, dest, start, end)
            os.ftruncate(dest, size)
        self.progress.advance(1, 0)

    def _stretch(self, source: int, dest: int, start: int, end: int) -> None:
        at = start
        while at < end:
            # EXDEV rules out copy_file_range from disk to tmpfs; sendfile has no such limit.
            done = os.sendfile(dest, source, at, min(_CHUNK, end - at))
            if done == 0:
                raise changed(self.writer.path())
            at += done
            self.progress.advance(0, done)

    def _symlink(self, source_dir: int, name: str) -> None:
        writer = self.writer
        facts, text = read_link(name, source_dir, writer.path())
        writer.symlink(name, text, facts.st_mtime_ns)
        if self.preserve_owner:
            dest = writer.directory
            os.chown(name, *_owner(facts), dir_fd=dest, follow_symlinks=False)
        self.progress.advance(1, 0)

    def _leave(self, source: int) -> None:
        """Give a finished directory its attributes: the base's if it has it, else the source's."""
        dest = self.writer.directory
        if not self.writer.merged():
            facts = os.fstat(source)
            self._xattrs(source, dest)
            if self.preserve_owner:
                os.fchown(dest, *_owner(facts))
            os.fchmod(dest, facts.st_mode & 0o1777)
            os.utime(dest, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
        self.progress.advance(1, 0)

    def _xattrs(self, source: int, dest: int) -> None:
        """Keep ``user.*`` attributes, never those of an overlay; none where there are none."""
        if not self._attributes:
            return
        names = attribute_names(source)
        if names is None:
            self._attributes = False
            return
        for name in names:
            if wanted_attribute(name):
                self.writer.set_attribute(dest, name, os.getxattr(source, name))


def _owner(facts: os.stat_result) -> tuple[int, int]:
    """Return uid and gid to give; -1, which changes nothing, for those that cannot be told."""
    if caller.in_user_namespace():
        unknown = {_NOBODY: -1}
        return unknown.get(facts.st_uid, facts.st_uid), unknown.get(facts.st_gid, facts.st_gid)
    return facts.st_uid, facts.st_gid
