# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files on the host's side of a copy: a tree as lines for the agent, and lines from it as a tree.

What comes out of a machine is written by whoever had root in there: it can make nothing outside of
the target, neither by its names nor by way of its links.
"""

from __future__ import annotations

import contextlib
import os
import stat
from binascii import a2b_base64, b2a_base64
from typing import TYPE_CHECKING, Final

from harness.errors import ChannelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

CHUNK: Final = 48 * 1024
_TIME_MAX: Final = (1 << 63) - 1


def data_lines(data: bytes) -> Iterator[dict[str, object]]:
    """Yield the lines that carry *data*."""
    view = memoryview(data)
    for at in range(0, len(view), CHUNK):
        yield {"op": "data", "data": b2a_base64(view[at : at + CHUNK], newline=False).decode()}


def lines(source: Path | bytes, mode: int | None) -> Iterator[dict[str, object]]:
    """Yield the lines for *source*, without the request's id; *mode* is for its root.

    :raises OSError: if it cannot be read.
    """
    if isinstance(source, bytes):
        yield {"op": "entry", "name": "", "kind": "file", "mode": mode or 0o644}
        yield from data_lines(source)
    elif source.is_dir():
        yield _entry("", "dir", source.stat(), mode=mode)
        yield from _tree(os.fspath(source), "")
    else:
        yield from _file(os.fspath(source), "", source.stat(), mode)
    yield {"op": "end"}


def _tree(place: str, name: str) -> Iterator[dict[str, object]]:
    with os.scandir(place) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for each in inside:
        info = each.stat(follow_symlinks=False)
        below = f"{name}/{each.name}" if name else each.name
        if each.is_symlink():
            yield _entry(below, "link", info, link=os.readlink(each.path))
        elif each.is_dir():
            yield _entry(below, "dir", info)
            yield from _tree(each.path, below)
        elif each.is_file():
            yield from _file(each.path, below, info, None)
        else:
            raise OSError(f"{each.path}: neither a file, a directory nor a link")


def _file(
    place: str, name: str, info: os.stat_result, mode: int | None
) -> Iterator[dict[str, object]]:
    with open(place, "rb") as file:
        yield _entry(name, "file", info, mode=mode)
        while data := file.read(CHUNK * 16):
            yield from data_lines(data)


def _entry(
    name: str, kind: str, info: os.stat_result, *, mode: int | None = None, link: str = ""
) -> dict[str, object]:
    mode = stat.S_IMODE(info.st_mode) if mode is None else mode
    entry: dict[str, object] = {"op": "entry", "name": name, "kind": kind, "mode": mode}
    return entry | {"mtime": info.st_mtime_ns, "link": link}


class Receiver:
    """Makes of the agent's lines a tree at *target*."""

    def __init__(self, target: Path) -> None:
        """Write nothing before the first line."""
        self._target = os.fspath(target)
        self._made: set[str] = set()
        self._directories: list[tuple[str, int, int]] = []
        self._file: BinaryIO | None = None
        self._entry: tuple[str, int, int] = ("", 0, 0)

    def take(self, message: Mapping[str, object]) -> None:
        """Take a line.

        :raises OSError: if it cannot be written.
        :raises ChannelError: if it would lead out of the target, or makes no sense.
        """
        entry, data = message.get("entry"), message.get("data")
        try:
            if isinstance(entry, dict):
                self._add(entry)
            elif isinstance(data, str) and self._file is not None:
                self._file.write(a2b_base64(data))
        except ValueError as error:  # no base64, or a name that no file can have
            raise ChannelError(f"the agent sent what makes no sense: {error}") from None

    def close(self) -> None:
        """Finish: directories get their modes last, as some may not be written to."""
        self._show()
        for place, mode, mtime in reversed(self._directories):
            os.chmod(place, mode)
            os.utime(place, ns=(mtime, mtime))
        self._directories.clear()

    def _add(self, entry: Mapping[str, object]) -> None:
        self._show()
        name, kind = str(entry.get("name", "")), entry.get("kind")
        mode, mtime = entry.get("mode"), entry.get("mtime")
        # No program of theirs shall be root on the host.
        mode = mode & 0o1777 if isinstance(mode, int) else 0o600
        mtime = mtime if isinstance(mtime, int) and abs(mtime) <= _TIME_MAX else 0
        place = self._place(name)
        if kind == "dir":
            os.makedirs(place, exist_ok=True) if not name else _make_directory(place)
            os.chmod(place, 0o700)
            self._made.add(name)
            self._directories.append((place, mode, mtime))
            return
        if not name:
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)  # whatever it leads to is not ours
        if kind == "link":
            os.symlink(str(entry.get("link", "")), place)
            os.utime(place, ns=(mtime, mtime), follow_symlinks=False)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.fdopen(os.open(place, flags, 0o600), "wb")
            self._entry = (place, mode, mtime)

    def _place(self, name: str) -> str:
        """Return where *name* belongs, if it lies in a directory that came before."""
        if not name:
            return self._target
        parent, _, last = name.rpartition("/")
        if parent not in self._made or last in {"", ".", ".."}:
            raise ChannelError(f"the agent sent a file of a strange name: {name!r}")
        return os.path.join(self._target, name)

    def _show(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            place, mode, mtime = self._entry
            os.chmod(place, mode)
            os.utime(place, ns=(mtime, mtime))


def _make_directory(place: str) -> None:
    """Make *place* a directory; a link that is there is none."""
    if not stat.S_ISDIR(os.lstat(place).st_mode if os.path.lexists(place) else 0):
        os.mkdir(place)
