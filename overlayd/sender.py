# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sending a source, read by the rights of this process (:mod:`overlayd.stream`)."""

from __future__ import annotations

import hashlib
import os
import select
import stat
from typing import TYPE_CHECKING, Final

from overlayd import stream
from overlayd.errors import RefusedError, shown
from overlayd.model import SourceKind
from overlayd.stream import ATTRIBUTES_MAX, DATA_MAX, TIME_MAX, Entry, Header, Stored, Type
from overlayd.walker import (
    INLINE_LINK,
    PAGE,
    Kind,
    Walk,
    attribute_names,
    changed,
    extents,
    has_holes,
    open_file,
    read_link,
    refuse_special,
    unreadable,
    wanted_attribute,
)

if TYPE_CHECKING:
    from overlayd.progress import Progress
    from overlayd.targets import OpenSource
    from overlayd.walker import Measure

_ENOUGH: Final = 256 << 10
"""Bytes that are worth a call."""
_LOOK: Final = 200
"""Milliseconds after which a wish to stop is noticed."""


class NobodyReadsError(Exception):
    """The other end is closed: whoever listened has had enough, and says why elsewhere."""


def send(source: OpenSource, fd: int, measure: Measure, *, depth: int, progress: Progress) -> str:
    """Send *source* to *fd*, a socket or pipe that is made non-blocking; return the digest.

    *measure* is what it was found to hold, *depth* how deep it may be.

    :raises RefusedError: for what cannot be sent, or a source that changes meanwhile.
    :raises NobodyReadsError: if the other end is closed.
    """
    os.set_blocking(fd, False)
    sending = _Sending(source.path, fd, progress)
    sending.put(stream.pack_header(Header(source.kind, measure.entries, measure.size)))
    try:
        if source.kind is SourceKind.DIRECTORY:
            sending.tree(Walk(source.fd, source.path, depth, ordered=True))
        else:
            sending.entries = 1
            sending.file(source.fd, source.file)
    except OSError as error:
        raise unreadable(error, sending.path()) from None
    return sending.end()


class _Sending:
    """What is being sent."""

    def __init__(self, label: str, fd: int, progress: Progress) -> None:
        self.entries = 0
        self._label = label
        self._walk: Walk | None = None
        self._name = ""
        self._folder: list[bytes] = []
        self._fd = fd
        self._progress = progress
        self._size = 0
        self._parts: list[bytes] = []
        self._waiting = 0
        self._digest = hashlib.sha256()
        self._links: dict[tuple[int, int], list[bytes]] = {}
        self._attributes = True

    def path(self) -> str:
        """Return the path of what is being sent, for messages."""
        if self._walk is None:
            return self._label
        return self._walk.path(self._name).rstrip("/")

    def put(self, *parts: bytes) -> None:
        """Send *parts*, soon."""
        self._parts += parts
        self._waiting += sum(map(len, parts))
        if self._waiting >= _ENOUGH:
            self._flush()

    def _flush(self) -> None:
        whole = b"".join(self._parts)
        self._parts, self._waiting = [], 0
        self._digest.update(whole)
        rest = memoryview(whole)
        poll = None
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                if poll is None:
                    poll = select.poll()
                    poll.register(self._fd, select.POLLOUT)
                poll.poll(_LOOK)
                self._progress.check()
            except BrokenPipeError:
                raise NobodyReadsError from None

    def end(self) -> str:
        """Send the end; return the digest."""
        self.put(stream.pack_end(self.entries, self._size))
        self._flush()
        return self._digest.hexdigest()

    def tree(self, walk: Walk) -> None:
        """Send a directory."""
        self._walk = walk
        for kind, fd, name in walk:
            self._name = name
            if kind is Kind.FILE:
                self.entries += 1
                self.file(fd, name)
            elif kind is Kind.SYMLINK:
                self.entries += 1
                self._symlink(fd, name)
            elif kind is Kind.ENTER:
                self._progress.check()
                self.entries += 1
                self._enter(fd, name)
            elif kind is Kind.LEAVE:
                if name:
                    self._folder.pop()
                self.put(stream.pack(Type.LEAVE))
                self._progress.advance(1, 0)

    def _enter(self, fd: int, name: str) -> None:
        self._name = ""  # the walk is in it by now
        facts = os.fstat(fd)
        mode = stat.S_IMODE(facts.st_mode) & 0o1777
        raw = os.fsencode(name)
        if raw:
            self._folder.append(raw)
        attributes = self._read_attributes(fd)
        self.put(stream.pack_enter(Entry(raw or b"root", mode, self._time(facts), attributes)))

    def file(self, directory: int, name: str) -> None:
        """Send a file, or that it is one that was sent."""
        fd = open_file(name, directory)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise refuse_special(facts.st_mode, self.path())
            raw = os.fsencode(name)
            if facts.st_nlink > 1:
                key = (facts.st_dev, facts.st_ino)
                if (first := self._links.get(key)) is not None:
                    self.put(stream.pack_link(raw, first))
                    self._progress.advance(1, 0)
                    return
                self._links[key] = [*self._folder, raw]
            mode, attributes = facts.st_mode & 0o777, self._read_attributes(fd)
            size = facts.st_size
            self.put(stream.pack_file(Entry(raw, mode, self._time(facts), attributes, size)))
            stored = Stored()
            for start, end in extents(fd, size) if has_holes(facts) else ((0, size),):
                self._size += stored.add(start, end)
                self._data(fd, start, end)
            self._progress.advance(1, 0)
            after = os.fstat(fd)
            if (after.st_mtime_ns, after.st_size) != (facts.st_mtime_ns, facts.st_size):
                raise changed(self.path())
        finally:
            os.close(fd)

    def _data(self, fd: int, start: int, end: int) -> None:
        at = start
        while at < end:
            data = os.pread(fd, min(DATA_MAX, end - at), at)
            if not data:
                raise changed(self.path())
            self.put(stream.pack_data(at, len(data)), data)
            at += len(data)
            self._progress.advance(0, len(data))

    def _symlink(self, directory: int, name: str) -> None:
        facts, link = read_link(name, directory, self.path())
        text = os.fsencode(link)
        if len(text) >= INLINE_LINK:
            self._size += PAGE
        self.put(stream.pack_symlink(os.fsencode(name), self._time(facts), text))
        self._progress.advance(1, 0)

    def _time(self, facts: os.stat_result) -> int:
        if not -TIME_MAX <= facts.st_mtime_ns <= TIME_MAX:
            message = f"{shown(self.path())} has a time of change that is too far from today"
            raise RefusedError(message, hint="touch it")
        return facts.st_mtime_ns

    def _read_attributes(self, fd: int) -> list[tuple[bytes, bytes]]:
        if not self._attributes:
            return []
        found = attribute_names(fd)
        if found is None:
            self._attributes = False
            return []
        names = sorted(map(os.fsencode, filter(wanted_attribute, found)))
        if len(names) > ATTRIBUTES_MAX:
            message = f"{shown(self.path())} has more than {ATTRIBUTES_MAX} extended attributes"
            raise RefusedError(message)
        return [(name, os.getxattr(fd, name)) for name in names]
