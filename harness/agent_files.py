# SPDX-License-Identifier: LGPL-2.1-or-later
"""A part of the agent: files into the machine and out of it.

The host sends this source to ``agent``, which runs it once.  Trees come and go line by line in one
request, each directory before what is in it.

    put      path, user; then lines ``entry`` (name, kind dir|file|link, mode, mtime, link) and
             ``data``, until ``end`` -> done
    get      path, user -> lines with ``entry`` or ``data`` ... done, skipped
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from binascii import a2b_base64

from harness.agent import AGENT, CHUNK, OPS, PARTS, PIPE, Job, base64, dumps, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from harness.agent import Message, Talk


def number(message: Message, key: str, default: int) -> int:
    """Return a number of the message's."""
    value = message.get(key)
    return value if isinstance(value, int) else default


def set_time(place: str, entry: Message) -> None:
    """Give *place* the time of modification that *entry* names, in nanoseconds."""
    mtime = entry.get("mtime")
    if isinstance(mtime, int):
        os.utime(place, ns=(mtime, mtime), follow_symlinks=False)


class Put(Job):
    """A file or tree that comes line by line; files appear whole, by a rename."""

    def _begin(self) -> None:
        self.file: BinaryIO | None = None
        self.place = self.temporary = ""
        self.entry: Message = {}
        self.count = 0
        self.directories: list[tuple[str, Message]] = []
        self.root = text(self.message, "path")
        if not self.root.startswith("/"):
            raise ValueError(f"{self.root}: must be absolute")
        os.makedirs(os.path.dirname(self.root), exist_ok=True)

    def _take(self, op: str, message: Message) -> None:
        if op == "data":
            if self.file is not None:
                self.file.write(a2b_base64(text(message, "data")))
            return
        self.show()
        if op == "entry":
            self.add(message)
            return
        for place, entry in reversed(self.directories):
            if "mode" in entry:
                os.chmod(place, number(entry, "mode", 0))
            set_time(place, entry)
        self.done()

    def add(self, entry: Message) -> None:
        """Make a directory or link, open a file."""
        name, kind = text(entry, "name", ""), text(entry, "kind")
        place = os.path.join(self.root, name) if name else self.root
        if kind == "dir":
            if not os.path.isdir(place):
                os.mkdir(place, 0o700)
            self.directories.append((place, entry))
            return
        self.count += 1
        self.entry, self.place = entry, place
        temporary = f"{os.path.dirname(place)}/.{AGENT}-{self.ident}-{self.count}"
        if kind == "link":
            os.symlink(text(entry, "link"), temporary)
        else:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self.file = os.fdopen(fd, "wb")
        self.temporary = temporary

    def show(self) -> None:
        """Put the file or link in its place that was begun, if one was."""
        if self.file is not None:
            self.file.close()
            self.file = None
            os.chmod(self.temporary, number(self.entry, "mode", 0o644))
        if self.temporary:
            set_time(self.temporary, self.entry)
            os.rename(self.temporary, self.place)
            self.temporary = ""

    def kill(self) -> None:
        """Drop what is not complete."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # no room for what was buffered
                self.file.close()
            self.file = None
        if self.temporary:
            with contextlib.suppress(OSError):
                os.unlink(self.temporary)
            self.temporary = ""


class Get(Job):
    """A file or tree, sent line by line."""

    def _work(self) -> None:
        self.skipped: list[str] = []
        self.lines = bytearray()
        root = text(self.message, "path")
        info = os.stat(root)
        if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
            raise ValueError(f"{root}: neither a file nor a directory")
        todo = [("", root, info)]
        while todo:
            name, place, info = todo.pop()
            try:
                if stat.S_ISDIR(info.st_mode):
                    names = sorted(os.listdir(place), reverse=True)
                    self.send(self.described(name, "dir", info))
                    for each in names:
                        path = os.path.join(place, each)
                        with contextlib.suppress(FileNotFoundError):
                            todo.append((os.path.join(name, each), path, os.lstat(path)))
                elif stat.S_ISLNK(info.st_mode):
                    self.send(self.described(name, "link", info, os.readlink(place)))
                elif stat.S_ISREG(info.st_mode):
                    self.send_file(name, place, info)
                else:
                    self.skipped.append(place)
            except FileNotFoundError:  # it vanished meanwhile
                if not name:
                    raise
                self.skipped.append(place)
        self.talk.write(bytes(self.lines))
        self.done(skipped=self.skipped)

    def described(self, name: str, kind: str, info: os.stat_result, link: str = "") -> bytes:
        """Return the line for an entry."""
        mode, mtime = stat.S_IMODE(info.st_mode), info.st_mtime_ns
        entry = {"name": name, "kind": kind, "mode": mode, "mtime": mtime, "link": link}
        return dumps({"id": self.ident, "entry": entry})

    def send_file(self, name: str, place: str, info: os.stat_result) -> None:
        """Send a file; what /proc has says of itself that it is empty, and is read all the same."""
        with open(place, "rb", buffering=0) as file:
            self.send(self.described(name, "file", info))
            while data := file.read(CHUNK):
                self.send(b'{"id":%d,"data":"%s"}\n' % (self.ident, base64(data).encode()))

    def send(self, line: bytes) -> None:
        """Send *line* with others: small files are many."""
        self.lines += line
        if len(self.lines) >= CHUNK:
            self.talk.write(bytes(self.lines))
            self.lines.clear()


class Relay(Job):
    """A put or get as another user: done by a second agent, which *is* that user."""

    def _begin(self) -> None:
        path = os.path.abspath(sys.modules["harness.agent"].__file__ or "")
        self.spawn([sys.executable, "-IS", path, "stdio:"], PIPE)
        self.pass_on({"op": "hello", "nonce": "relay"})
        self.pass_on({"op": "load", "id": -1, "part": __name__, "source": PARTS[__name__]})
        self.pass_on({**self.message, "user": None})
        self.in_thread(self._work)

    def _take(self, op: str, message: Message) -> None:
        self.pass_on({**message, "op": op})

    def pass_on(self, message: Message) -> None:
        """Send *message* to the child."""
        if self.process and self.process.stdin:
            with contextlib.suppress(BrokenPipeError):  # _work() finds it dead
                self.process.stdin.write(dumps(message))
                self.process.stdin.flush()

    def _work(self) -> None:
        if not self.process or not self.process.stdout:
            return
        mine = b'{"id":%d,' % self.ident
        for line in self.process.stdout:
            if not line.startswith(mine):
                continue
            last = b'"done":' in line  # a quote within a string would be written \"
            if last:
                self.kill()
                self.process.wait()
                self.talk.jobs.pop(self.ident, None)
            self.talk.write(line)
            if last:
                return
        raise ValueError(f"the agent's child ended with status {self.process.wait()}")


def put(talk: Talk, ident: int, message: Message) -> Job:
    """Return the job for root, or the one for another user."""
    return (Relay if message.get("user") else Put)(talk, ident, message)


def get(talk: Talk, ident: int, message: Message) -> Job:
    """Return the job for root, or the one for another user."""
    return (Relay if message.get("user") else Get)(talk, ident, message)


OPS.update(put=put, get=get)
