# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing a layer, entry by entry, wherever the entries come from.

Names are only ever used beneath open directories of the layer, and of the base that it will lie on.
The kernel takes mode, owner and attributes of a merged directory from the topmost layer that has
it.  So every directory of a layer that the base has too gets the base's, the root first of all;
otherwise a source directory of mode 0700 would lock everybody out of the target.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from overlayd import caller
from overlayd.errors import RefusedError, SpaceError, shown
from overlayd.walker import (
    OPEN_DIRECTORY,
    Limits,
    Measure,
    attribute_names,
    check_size,
    conflict,
    is_directory,
    open_base,
    too_many,
    unreadable,
)

if TYPE_CHECKING:
    from overlayd.errors import OverlaydError

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NEVER_KEPT: Final = ("trusted.overlay.", "user.overlay.")


@dataclass(slots=True)
class Writer:
    """A layer in the making: ``dest_root`` is its directory, ``label`` the source's name.

    ``place`` is the entry that is being written, for messages.
    """

    label: str
    limits: Limits
    dest_root: int
    place: tuple[str, ...] = ()
    count: Measure = field(default_factory=Measure)
    _dests: list[int] = field(default_factory=list)
    _bases: list[int | None] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _attributes: bool = True

    @property
    def directory(self) -> int:
        """The directory of the layer that entries are being written to."""
        return self._dests[-1]

    @property
    def depth(self) -> int:
        """How many directories have been entered and not left, the root included."""
        return len(self._dests)

    def begin(self, base_fd: int | None) -> None:
        """Enter the layer's root, which lies over the directory *base_fd* of the base, if over any.

        Both descriptors stay the caller's.
        """
        self._bases.append(None if base_fd is None else os.dup(base_fd))
        self._dests.append(os.dup(self.dest_root))

    def at(self, name: str) -> None:
        """Note that *name* in the present directory is what is being written."""
        self.place = (*self._names, name)

    def step(self, *, over: bool = True) -> None:
        """Count an entry; unless it is a directory, it may not lie *over* one of the base.

        :raises SpaceError: if there are too many.
        :raises RefusedError: if it would hide a directory.
        """
        self.count.entries += 1
        if self.count.entries > self.limits.entries:
            raise too_many(self.label, self.limits)
        if over and is_directory(self._bases[-1], self.place[-1]):
            raise conflict(self.path(), "the base", base_is_directory=True)

    def store(self, size: int) -> None:
        """Count *size* bytes.

        :raises SpaceError: if there are too many.
        """
        self.count.size += size
        check_size(self.count, self.label, self.limits)

    def make_directory(self, name: str) -> None:
        """Make a directory, to be entered later."""
        os.mkdir(name, 0o700, dir_fd=self._dests[-1])

    def enter(self, name: str) -> None:
        """Enter a directory that was made.

        :raises RefusedError: if the base has something else there.
        """
        try:
            self._bases.append(open_base(self._bases[-1], name))
        except NotADirectoryError:
            raise conflict(self.path(), "the base", base_is_directory=False) from None
        self._dests.append(os.open(name, OPEN_DIRECTORY, dir_fd=self._dests[-1]))
        self._names.append(name)

    def merged(self) -> bool:
        """Give the present directory the base's attributes if the base has it; whether it has."""
        base = self._bases[-1]
        if base is None:
            return False
        copy_directory_attributes(base, self._dests[-1])
        return True

    def leave(self) -> None:
        """Leave the present directory, the root too at last."""
        os.close(self._dests.pop())
        if (base := self._bases.pop()) is not None:
            os.close(base)
        if self._names:
            self._names.pop()

    def create(self, name: str, directory: int | None = None) -> int:
        """Make a file in the present directory, or in *directory*; return its descriptor."""
        where = self._dests[-1] if directory is None else directory
        return os.open(name, _CREATE, 0o600, dir_fd=where)

    def link(self, first: tuple[str, ...], name: str, directory: int | None = None) -> None:
        """Link to what was written at *first*; its path may be longer than one call takes."""
        where = self._dests[-1] if directory is None else directory
        fd = os.dup(self.dest_root)
        try:
            for part in first[:-1]:
                deeper = os.open(part, OPEN_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = deeper
            os.link(first[-1], name, src_dir_fd=fd, dst_dir_fd=where, follow_symlinks=False)
        finally:
            os.close(fd)

    def symlink(self, name: str, text: str, mtime: int) -> None:
        """Make a symlink to *text*, changed at *mtime*, in nanoseconds."""
        directory = self._dests[-1]
        os.symlink(text, name, dir_fd=directory)
        os.utime(name, ns=(mtime, mtime), dir_fd=directory, follow_symlinks=False)

    def set_attribute(self, fd: int, name: str, value: bytes) -> None:
        """Set an extended attribute; nothing happens on a tmpfs that has none (before 6.6)."""
        if self._attributes:
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._attributes = False

    def path(self) -> str:
        """Return the path of what is being written, for messages."""
        return "/".join((self.label, *self.place)).rstrip("/")

    def error(self, error: OSError) -> OverlaydError:
        """Return what an error of writing the present entry means."""
        if error.errno == errno.ENOSPC:
            message = f"{shown(self.label)} outgrew the storage measured for it while it was copied"
            return SpaceError(message, hint="apply again when nothing writes to the source")
        return unreadable(error, self.path(), "copying")

    def close(self) -> None:
        """Close what is open, wherever it ended."""
        while self._dests:
            self.leave()


def copy_directory_attributes(base: int, dest: int) -> None:
    """Give directory *dest* mode, owner, attributes, ACLs and times of directory *base*.

    In a user namespace only what its owner may give: the owner there is himself.
    """
    facts = os.fstat(base)
    limited = caller.in_user_namespace()
    if not limited:
        os.fchown(dest, facts.st_uid, facts.st_gid)
    for name in attribute_names(base) or []:
        if name.startswith(_NEVER_KEPT):
            continue
        try:
            os.setxattr(dest, name, os.getxattr(base, name))
        except OSError as error:
            # user.* does not exist on tmpfs before Linux 6.6; anything else must not be lost.
            user = error.errno == errno.EOPNOTSUPP and name.startswith("user.")
            if not (user or limited):
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


def lay_directory(top: int, base: int | None, path: str) -> None:
    """See to it that the layer *top* has the directory *path*, over the *base*'s if that has it.

    Whoever the layer is of can make and remove entries there then.

    :raises RefusedError: if there is something else in the layer or the base.
    """
    with contextlib.ExitStack() as stack:

        def opened(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        for name in path.split("/"):
            try:
                base = None if (fd := open_base(base, name)) is None else opened(fd)
                with contextlib.suppress(FileExistsError):
                    if base is None:
                        os.mkdir(name, 0o755, dir_fd=top)
                    else:
                        os.close(make_directory(top, name, base))
                top = opened(os.open(name, OPEN_DIRECTORY, dir_fd=top))
            except OSError as error:
                if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
                    raise
                message = f"{shown(path)} beneath the target is no directory"
                raise RefusedError(message, hint="--writable-dir takes one") from None
