# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a source tree: one walk for measuring and for copying.

The tree may be hostile: names are only ever used beneath an open directory, links are not
followed, and depth is bounded.  Nothing is opened here but directories.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol

from overlayd.errors import OverlaydError, RefusedError, SpaceError, from_oserror, shown
from overlayd.model import human_size

if TYPE_CHECKING:
    import re
    from collections.abc import Generator

    from overlayd.progress import Progress

OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
PAGE: Final = 4096
INLINE_LINK: Final = 128
"""tmpfs keeps the text of a symlink up to this length in the inode (SHORT_SYMLINK_LEN)."""
_MAX_FLAGGED: Final = 1000


class Kind(IntEnum):
    """What a step of the walk is about."""

    FILE = 0
    SYMLINK = 1
    DIRECTORY = 2
    """A directory was found; it is entered later."""
    ENTER = 3
    LEAVE = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What a source may hold at most; ``size`` in bytes as stored.

    ``table`` is where in the configuration that is said.
    """

    entries: int
    size: int
    depth: int
    table: str = "limits"


@dataclass(slots=True)
class Measure:
    """What a source holds: entries, bytes as tmpfs stores them, names that policy flags."""

    entries: int = 0
    size: int = 0
    flagged: list[str] = field(default_factory=list)
    flagged_count: int = 0
    links: set[tuple[int, int]] = field(default_factory=set)


_CHANGED: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODATA}
)
"""Errors of what was something else a moment ago."""


@dataclass(slots=True)
class _Frame:
    fd: int
    name: str
    todo: list[str]


def extents(fd: int, size: int) -> Generator[tuple[int, int], None, None]:
    """Yield start and end of each stretch of data in the first *size* bytes of *fd*.

    Where the filesystem keeps no holes, that is one stretch.
    """
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= size:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at


def has_holes(facts: os.stat_result) -> bool:
    """Whether a file may be sparse; some filesystems that compress look like it too."""
    return facts.st_blocks * 512 < facts.st_size


def open_file(name: str, dir_fd: int) -> int:
    """Open the regular file *name* for reading without following a link or waiting for a peer."""
    return os.open(name, OPEN_FILE, dir_fd=dir_fd)


def _stored(name: str, dir_fd: int, facts: os.stat_result) -> int:
    """Return the bytes that tmpfs needs for a regular file: whole pages, holes left out."""
    if not has_holes(facts):
        return pages(facts.st_size)
    fd = open_file(name, dir_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, "no file any more", name)
        return sum(pages(end) - start // PAGE * PAGE for start, end in extents(fd, facts.st_size))
    finally:
        os.close(fd)


def pages(size: int) -> int:
    """Return *size* in bytes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def special_name(mode: int) -> str:
    """Name the type of a file that cannot be a part of a source."""
    for test, name in (
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISBLK, "block device"),
        (stat.S_ISCHR, "character device"),
    ):
        if test(mode):
            return name
    return "file of unknown type"


def refuse_special(mode: int, path: str) -> RefusedError:
    """Return the error for a device, FIFO or socket at *path*."""
    message = f"{shown(path)} is a {special_name(mode)}"
    return RefusedError(message, hint="a source holds regular files, directories and symlinks")


class Walk:
    """A depth-first walk below an open directory; iterating yields ``(kind, dir_fd, name)``.

    Every entry comes once as FILE, SYMLINK or DIRECTORY with the descriptor of the directory it
    is in.  A directory comes again as ENTER (its own descriptor, its name) and as LEAVE (the
    same), the root too.  A directory's files come before its subdirectories are entered.
    """

    def __init__(
        self,
        root_fd: int,
        label: str,
        depth: int,
        *,
        ordered: bool = False,
        table: str = "limits",
    ) -> None:
        """Walk below *root_fd*, called *label* in errors, at most *depth* levels deep.

        If *ordered*, files and links of a directory come by name, and then its directories.
        """
        self._ordered = ordered
        self._table = table
        self._root_fd = root_fd
        self._label = label
        self._depth = depth
        self._stack: list[_Frame] = []

    def path(self, name: str) -> str:
        """Return the path of *name* in the directory that the walk is in, for messages."""
        return "/".join([self._label, *(frame.name for frame in self._stack[1:]), name])

    def __iter__(self) -> Generator[tuple[Kind, int, str], None, None]:
        """Walk.

        :raises RefusedError: at a special file, or below the permitted depth.
        :raises OverlaydError: if a directory cannot be read.
        """
        stack = self._stack
        try:
            stack.append(_Frame(os.open(".", OPEN_DIRECTORY, dir_fd=self._root_fd), "", []))
            yield Kind.ENTER, stack[-1].fd, ""
            yield from self._scan(stack[-1])
            while stack:
                frame = stack[-1]
                if not frame.todo:
                    yield Kind.LEAVE, frame.fd, frame.name
                    os.close(stack.pop().fd)
                    continue
                name = frame.todo.pop()
                if len(stack) > self._depth:
                    message = f"{shown(self.path(name))} lies deeper than {self._depth} directories"
                    hint = f"{self._table}.source_depth in the configuration"
                    raise RefusedError(message, hint=hint)
                try:
                    fd = os.open(name, OPEN_DIRECTORY, dir_fd=frame.fd)
                except OSError as error:
                    raise unreadable(error, self.path(name), "opening") from None
                stack.append(_Frame(fd, name, []))
                yield Kind.ENTER, fd, name
                yield from self._scan(stack[-1])
        finally:
            for frame in stack:  # left in place, so that path() can still say where it ended
                os.close(frame.fd)

    def _scan(self, frame: _Frame) -> Generator[tuple[Kind, int, str], None, None]:
        try:
            with os.scandir(frame.fd) as entries:
                found = sorted(entries, key=_bytes) if self._ordered else entries
                for entry in found:
                    if entry.is_file(follow_symlinks=False):
                        yield Kind.FILE, frame.fd, entry.name
                    elif entry.is_symlink():
                        yield Kind.SYMLINK, frame.fd, entry.name
                    elif entry.is_dir(follow_symlinks=False):
                        frame.todo.append(entry.name)
                        yield Kind.DIRECTORY, frame.fd, entry.name
                    else:
                        mode = entry.stat(follow_symlinks=False).st_mode
                        raise refuse_special(mode, self.path(entry.name))
                if self._ordered:
                    frame.todo.reverse()  # they are taken from the end
        except OSError as error:
            raise from_oserror(error, f"reading {shown(self.path('.'))}") from None


def _bytes(entry: os.DirEntry[str]) -> bytes:
    return os.fsencode(entry.name)


def wanted_attribute(name: str) -> bool:
    """Whether an extended attribute of a source is kept: ``user.*``, but not an overlay's."""
    return name.startswith("user.") and not name.startswith("user.overlay.")


def changed(path: str) -> RefusedError:
    """Return the error for a source that changes under the walk."""
    message = f"{shown(path)} changed while it was read"
    return RefusedError(message, hint="apply again when nothing writes to the source")


def attribute_names(fd: int) -> list[str] | None:
    """Return the names of a file's extended attributes; None where its file system has none."""
    try:
        return os.listxattr(fd)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return None


def unreadable(error: OSError, path: str, doing: str = "reading") -> OverlaydError:
    """Return what an error at *path* means to the walk: it is another thing by now, or its own."""
    if error.errno in _CHANGED:
        return changed(path)
    return from_oserror(error, f"{doing} {shown(path)}")


def read_link(name: str, dir_fd: int, path: str) -> tuple[os.stat_result, str]:
    """Return the facts and the text of the symlink *name*, called *path* in errors.

    :raises RefusedError: if it is none any more.
    """
    facts = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    try:
        text = os.readlink(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise changed(path) from None
        raise
    if not stat.S_ISLNK(facts.st_mode):
        raise changed(path)
    return facts, text


def conflict(path: str, base_path: str, *, base_is_directory: bool) -> RefusedError:
    """Return the error for a directory over something else, or something else over one."""
    what, over = ("a file", "a directory") if base_is_directory else ("a directory", "a file")
    message = f"{shown(path)} would lay {what} over {over}: {shown(base_path)}"
    return RefusedError(message, hint="move it in the source, or choose a target beside it")


def check_file_over(path: str, base_fd: int, name: str, base_label: str) -> None:
    """Refuse the single file *path* as *name* over a directory of the base, called *base_label*.

    :raises RefusedError: naming both.
    """
    if is_directory(base_fd, name):
        raise conflict(path, f"{base_label}/{name}", base_is_directory=True)


def open_base(base_fd: int | None, name: str) -> int | None:
    """Open the base's directory *name* beneath *base_fd*; None if there is no such name.

    :raises NotADirectoryError: if it is something else.
    """
    if base_fd is None:
        return None
    try:
        return os.open(name, OPEN_DIRECTORY, dir_fd=base_fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotADirectoryError(error.errno, error.strerror, name) from None
        raise


def is_directory(base_fd: int | None, name: str) -> bool:
    """Whether the base has a directory (not a link to one) *name* beneath *base_fd*."""
    if base_fd is None:
        return False
    # Most often there is nothing, and an error caught costs more than the question.
    if not os.access(name, os.F_OK, dir_fd=base_fd, follow_symlinks=False):
        return False
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=base_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def measure_tree(  # noqa: PLR0913  # all of them are facts of one question
    root_fd: int,
    label: str,
    *,
    base_fd: int | None,
    base_label: str,
    limits: Limits,
    flagged: re.Pattern[str],
    progress: Progress,
) -> Measure:
    """Measure the tree below *root_fd* against *limits*, and hold it against the base.

    ``base_fd`` is the directory that the tree is to be laid over, None if there is none.

    :raises SpaceError: when a limit is passed, with both figures.
    :raises RefusedError: for what cannot be copied, and for a directory over a file or a file
        over a directory.
    """
    walk = Walk(root_fd, label, limits.depth, table=limits.table)
    total = Measure(entries=1)
    bases: list[int | None] = []
    flag = flagged.match
    name = ""
    try:
        for kind, fd, name in walk:
            if kind is Kind.ENTER:
                progress.check()
                if not bases:
                    bases.append(None if base_fd is None else os.dup(base_fd))
                    continue
                try:
                    bases.append(open_base(bases[-1], name))
                except NotADirectoryError:
                    path = walk.path("").rstrip("/")
                    over = base_label + path.removeprefix(label)
                    raise conflict(path, over, base_is_directory=False) from None
                continue
            if kind is Kind.LEAVE:
                if (base := bases.pop()) is not None:
                    os.close(base)
                continue
            total.entries += 1
            if total.entries > limits.entries:
                raise too_many(label, limits)
            if kind is Kind.DIRECTORY:
                continue
            if bases[-1] is not None and is_directory(bases[-1], name):
                path = walk.path(name)
                over = base_label + path.removeprefix(label)
                raise conflict(path, over, base_is_directory=True)
            _count(total, kind, name, fd)
            if flag(name):
                note_flagged(total, walk.path(name))
    except OSError as error:
        raise unreadable(error, walk.path(name)) from None
    finally:
        for base in bases:
            if base is not None:
                os.close(base)
    check_size(total, label, limits)
    return total


def measure_file(name: str, dir_fd: int, label: str, limits: Limits) -> Measure:
    """Measure the single file *name* in *dir_fd* as a source."""
    total = Measure(entries=1)
    try:
        _count(total, Kind.FILE, name, dir_fd)
    except OSError as error:
        raise unreadable(error, label) from None
    check_size(total, label, limits)
    return total


class Flagged(Protocol):
    """Names that policy flags, the first of them at least, and how many there are."""

    flagged: list[str]
    flagged_count: int


def note_flagged(total: Flagged, path: str) -> None:
    """Note that policy flags *path*; beyond a thousand they are only counted."""
    total.flagged_count += 1
    if len(total.flagged) < _MAX_FLAGGED:
        total.flagged.append(path)


def _count(total: Measure, kind: Kind, name: str, dir_fd: int) -> None:
    facts = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if kind is Kind.SYMLINK:
        if facts.st_size >= INLINE_LINK:
            total.size += PAGE
        return
    if facts.st_nlink > 1:
        key = (facts.st_dev, facts.st_ino)
        if key in total.links:
            return
        total.links.add(key)
    total.size += _stored(name, dir_fd, facts)


def too_many(label: str, limits: Limits) -> SpaceError:
    """Return the error for a source with too many entries."""
    message = f"{shown(label)} holds more than {limits.entries} entries"
    return SpaceError(message, hint=f"{limits.table}.source_entries in the configuration")


def check_size(total: Measure, label: str, limits: Limits) -> None:
    """Refuse a source that is larger than *limits* allow, with both figures."""
    if total.size > limits.size:
        message = (
            f"{shown(label)} holds {human_size(total.size)};"
            f" a source may have {human_size(limits.size)}"
        )
        raise SpaceError(message, hint=f"{limits.table}.source_size in the configuration")
