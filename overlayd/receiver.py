# SPDX-License-Identifier: LGPL-2.1-or-later
"""Receiving a source from somebody who may be hostile, and writing it into a layer.

Nothing of the sender's is opened or asked about, and the near end of the line that he sends by is
the service's alone (:mod:`overlayd.lines`).  Whatever he sends or does not send, it ends in bounded
time, and takes no more memory and storage than his limits allow.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from overlayd import stream
from overlayd.errors import BusyError, RefusedError, from_oserror, shown
from overlayd.stream import FRAME, FRAME_MAX, HEADER, Entry, Header, Stored, Type
from overlayd.walker import INLINE_LINK, PAGE, Measure, check_size, note_flagged, too_many

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator

    from overlayd.model import Layer
    from overlayd.progress import Progress
    from overlayd.walker import Limits
    from overlayd.writer import Writer

_READ: Final = 1 << 20
_LOOK: Final = 0.2
"""Seconds after which a wish to stop is noticed."""
_WRITABLE: Final = 0o022
"""Taken from each mode: whoever may write could change what an administrator has permitted."""
_ATTRIBUTES_MAX: Final = 16 << 20
"""Bytes of attributes in a whole source."""
_PATH_MAX: Final = 400
"""Characters of the path of a flagged file."""
_NO_FILE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EPERM}


@dataclass(slots=True)
class Received:
    """What was received; ``size`` in bytes as stored, ``digest`` in hexadecimal.

    ``flagged`` has paths below the root, or the ends of very long ones.
    """

    digest: str = ""
    entries: int = 1
    size: int = 0
    file_count: int = 0
    flagged: list[str] = field(default_factory=list)
    flagged_count: int = 0

    def as_layer(self, announced: Layer) -> Layer:
        """Return the layer with what it holds instead of what was announced."""
        return replace(announced, entries=self.entries, size=self.size, digest=self.digest)


@dataclass(slots=True)
class _Directory:
    entry: Entry
    last: bytes = b""
    down: bool = False
    """Whether directories have begun, after which nothing else may come."""


class Receiver:
    """One stream, from the non-blocking descriptor *fd*, which it closes at the end."""

    def __init__(  # noqa: PLR0913  # all of them bounds
        self,
        fd: int,
        *,
        limits: Limits,
        flagged: re.Pattern[str],
        seconds: float,
        patience: float,
        progress: Progress,
    ) -> None:
        """Read nothing yet.  All has to come within *seconds*, each piece within *patience*."""
        self._fd = fd
        self._limits = limits
        self._flag = flagged.match
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        self._patience = patience
        self._progress = progress
        self._buffer = memoryview(bytearray(FRAME_MAX + _READ))  # what is not used takes none
        self._at = self._filled = 0
        self._digest = hashlib.sha256()
        self._header: Header | None = None
        self._found = Measure(entries=1)
        self._attributes = 0
        self.received = Received()

    def close(self) -> None:
        """Stop listening; a second time does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def header(self) -> Header:
        """Return what the source is said to be.

        :raises SpaceError: if that is more than it may be.
        :raises RefusedError: if it makes no sense.
        """
        if self._header is None:
            header = stream.parse_header(self._take(HEADER.size))
            if not header.entries:
                raise _wrong("it has no entries")
            if header.entries > self._limits.entries:
                raise too_many("the source", self._limits)
            check_size(Measure(size=header.size), "the source", self._limits)
            self._header = header
        return self._header

    @property
    def declared(self) -> Measure:
        """What it is said to hold."""
        header = self.header()
        return Measure(header.entries, header.size)

    def tree(self, writer: Writer, base_fd: int | None) -> None:
        """Write all of a directory below the writer's root, which lies over *base_fd*.

        :raises OverlaydError: if anything is wrong with it; the layer is to be dropped then.
        """
        with self._writing(writer):
            kind, body = self._frame()
            if kind is not Type.ENTER:
                raise _wrong("it does not begin with a directory")
            writer.begin(base_fd)
            above = [_Directory(self._counted(stream.parse_enter(body)))]
            self._progress.advance(1, 0)
            while above:
                kind, body = self._frame()
                if kind is Type.LEAVE:
                    stream.parse_leave(body)
                    self._leave(writer, above.pop().entry)
                elif kind is Type.ENTER:
                    above.append(self._enter(writer, above[-1], stream.parse_enter(body)))
                elif kind is Type.FILE:
                    entry = self._counted(stream.parse_file(body))
                    name = self._next(writer, above[-1], entry.name)
                    self._file(writer, entry, name)
                elif kind is Type.SYMLINK:
                    raw, mtime, text = stream.parse_symlink(body)
                    name = self._next(writer, above[-1], raw)
                    if len(text) >= INLINE_LINK:
                        self._store(PAGE)
                    writer.symlink(name, os.fsdecode(text), mtime)
                elif kind is Type.LINK:
                    raw, first = stream.parse_link(body)
                    self._link(writer, self._next(writer, above[-1], raw), first)
                else:
                    raise _wrong(f"a frame of type {kind.name} where none can be")
            self._end()

    def single_file(self, writer: Writer, directory: int, name: str) -> None:
        """Write the one file that the source is as *name* in *directory*.

        :raises OverlaydError: if anything is wrong with it; the layer is to be dropped then.
        """
        with self._writing(writer):
            stream.check_name(os.fsencode(name))
            kind, body = self._frame()
            if kind is not Type.FILE:
                raise _wrong("it does not begin with a file")
            entry = self._counted(stream.parse_file(body))
            self.received.file_count = 1
            self._note_flagged((name,))
            self._file(writer, entry, name, directory)
            self._progress.advance(1, 0)
            self._end()

    @contextmanager
    def _writing(self, writer: Writer) -> Iterator[None]:
        try:
            self.header()
            yield
        except OSError as error:
            raise writer.error(error) from None
        except (ValueError, OverflowError) as error:
            raise _wrong(f"{shown(writer.path())}: {error}") from None
        finally:
            writer.close()

    # -- entries -------------------------------------------------------------------------------

    def _enter(self, writer: Writer, above: _Directory, entry: Entry) -> _Directory:
        if writer.depth > self._limits.depth:
            message = f"{shown(writer.path())} lies deeper than {self._limits.depth} directories"
            hint = f"{self._limits.table}.source_depth in the configuration"
            raise RefusedError(message, hint=hint)
        if not above.down:
            above.down, above.last = True, b""
        name = self._ascending(writer, above, self._counted(entry).name)
        self._count(writer, over=False)
        writer.make_directory(name)
        writer.enter(name)
        self._progress.check()
        return _Directory(entry)

    def _leave(self, writer: Writer, entry: Entry) -> None:
        if not writer.merged():
            fd = writer.directory
            self._set_attributes(writer, fd, entry)
            os.fchmod(fd, entry.mode & ~_WRITABLE & ~stat.S_ISVTX)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        writer.leave()

    def _next(self, writer: Writer, above: _Directory, raw: bytes) -> str:
        """Check and count an entry that is no directory; return its name."""
        if above.down:
            raise _wrong(f"{_named(raw)} comes after directories")
        name = self._ascending(writer, above, raw)
        self._count(writer, over=True)
        self.received.file_count += 1
        self._note_flagged(writer.place)
        return name

    @staticmethod
    def _ascending(writer: Writer, above: _Directory, raw: bytes) -> str:
        name = os.fsdecode(raw)
        writer.at(name)
        if raw <= above.last:
            raise _wrong(f"{shown(writer.path())} comes twice, or too late")
        above.last = raw
        return name

    def _note_flagged(self, place: tuple[str, ...]) -> None:
        name = place[-1]
        if self._flag(name):
            path = "/".join(place)
            # An administrator reads it in a dialog, which is not to be filled with one path.
            note_flagged(self.received, path if len(path) <= _PATH_MAX else f"…/{name}")

    def _count(self, writer: Writer, *, over: bool) -> None:
        writer.step(over=over)
        self._found.entries += 1
        if self._found.entries > self.header().entries:
            raise _wrong(f"it has more than the {self.header().entries} entries that it announced")
        self._progress.advance(1, 0)

    def _store(self, size: int) -> None:
        self._found.size += size
        if self._found.size > self.header().size:
            raise _wrong(f"it has more than the {self.header().size} bytes that it announced")

    def _counted(self, entry: Entry) -> Entry:
        """Count the attributes of *entry*."""
        self._attributes += sum(len(name) + len(value) for name, value in entry.attributes)
        if self._attributes > _ATTRIBUTES_MAX:
            raise _wrong(f"more than {_ATTRIBUTES_MAX} bytes of attributes")
        return entry

    def _file(self, writer: Writer, entry: Entry, name: str, directory: int | None = None) -> None:
        fd = writer.create(name, directory)
        try:
            written = self._data_of(writer, entry, fd)
            if written < entry.size:
                os.ftruncate(fd, entry.size)
            self._set_attributes(writer, fd, entry)
            os.fchmod(fd, entry.mode & ~_WRITABLE)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(fd)

    def _data_of(self, writer: Writer, entry: Entry, fd: int) -> int:
        """Write the data of a file; return where it ends."""
        at = 0
        stored = Stored()
        while True:
            kind, length = self._head()
            if kind is not Type.DATA:
                self._at -= FRAME.size
                return at
            offset, data = stream.parse_data(self._take(length))
            end = offset + len(data)
            if offset < at or end > entry.size:
                raise _wrong(f"data of {shown(writer.path())} that lies where none can")
            self._store(stored.add(offset, end))
            if os.pwrite(fd, data, offset) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # tmpfs takes what fits
            at = end
            self._progress.advance(0, len(data))

    @staticmethod
    def _link(writer: Writer, name: str, first: list[bytes]) -> None:
        """Link to an earlier file, which nobody but the sender says is one."""
        try:
            writer.link(tuple(map(os.fsdecode, first)), name)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
        else:
            mode = os.stat(name, dir_fd=writer.directory, follow_symlinks=False).st_mode
            if stat.S_ISREG(mode):
                return
        raise _wrong(f"{shown(writer.path())} is a link to no file")

    @staticmethod
    def _set_attributes(writer: Writer, fd: int, entry: Entry) -> None:
        for name, value in entry.attributes:
            writer.set_attribute(fd, os.fsdecode(name), value)

    def _end(self) -> None:
        kind, body = self._frame()
        if kind is not Type.END:
            raise _wrong(f"a frame of type {kind.name} after all of it")
        found = (self._found.entries, self._found.size)
        if stream.parse_end(body) != found:
            raise _wrong(f"it is not the {found[0]} entries and {found[1]} bytes that it says")
        if self._at != self._filled or self._more():
            raise _wrong("something comes after its end")
        self.received.entries, self.received.size = found
        self.received.digest = self._digest.hexdigest()

    # -- bytes ---------------------------------------------------------------------------------

    def _more(self) -> bool:
        """Whether there is more by now; the sender may keep his end, so nobody waits for it."""
        try:
            return bool(os.read(self._fd, 1))
        except BlockingIOError:
            return False

    def _frame(self) -> tuple[Type, bytes]:
        """Return type and body of the next frame."""
        kind, length = self._head()
        return kind, bytes(self._take(length))

    def _head(self) -> tuple[Type, int]:
        """Return type and length of the next frame."""
        return stream.parse_frame(self._take(FRAME.size))

    def _take(self, size: int) -> memoryview:
        """Return the next *size* bytes, which the next call may overwrite."""
        while self._filled - self._at < size:
            self._read()
        self._at += size
        return self._buffer[self._at - size : self._at]

    def _read(self) -> None:
        """Read on, waiting for it."""
        rest = self._filled - self._at
        if self._at:  # at most once for each frame, which is longer than the rest
            self._buffer[:rest] = self._buffer[self._at : self._filled]
            self._at, self._filled = 0, rest
        room = self._buffer[self._filled : self._filled + _READ]
        waited = time.monotonic()
        poll = None
        while True:
            self._progress.check()
            try:
                size = os.readv(self._fd, [room])
            except BlockingIOError:
                now = time.monotonic()
                if now - waited > self._patience:
                    message = f"nothing more of the source came for {self._patience:.0f} seconds"
                    hint = "limits.stall_seconds in the configuration"
                    raise BusyError(message, hint=hint) from None
                self._in_time(now)
                if poll is None:
                    poll = select.poll()
                    poll.register(self._fd, select.POLLIN)
                poll.poll(_LOOK * 1000)
            except OSError as error:
                raise from_oserror(error, "reading the source that is sent") from None
            else:
                self._in_time(time.monotonic())
                if not size:
                    raise _wrong("it broke off")
                self._digest.update(room[:size])
                self._filled += size
                return

    def _in_time(self, now: float) -> None:
        if now > self._deadline:
            message = f"the source was not there whole within {self._seconds:.0f} seconds"
            raise BusyError(message, hint="limits.receive_seconds in the configuration")


def _named(raw: bytes) -> str:
    return repr(shown(os.fsdecode(raw)))


def _wrong(what: str) -> RefusedError:
    return RefusedError(f"the source that was sent makes no sense: {what}")
