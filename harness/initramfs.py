# SPDX-License-Identifier: LGPL-2.1-or-later
"""An initramfs, written without help: ``newc`` archives, and modules with what they need.

An archive is the same, byte for byte, whenever its contents are: sorted, owned by root, of no time.
The kernel unpacks several archives one after the other, so that a big one that never changes can
be kept and a small one written anew (Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import io
import lzma
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Final

from harness import elf
from harness.errors import BuildError
from harness.host import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

_ALIGN: Final = 512  # what the kernel skips as zeros between archives


@dataclass(frozen=True, kw_only=True)
class _Entry:
    mode: int
    content: bytes | Path = b""
    device: tuple[int, int] = (0, 0)

    def data(self) -> bytes:
        """Return the contents."""
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


class Archive:
    """The contents of an archive, under names relative to the root; missing parents are made.

    A name that comes again replaces what it was, so that a later tree overlays an earlier one.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, name: str) -> bool:
        return _clean(name) in self._entries

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)

    def directory(self, name: str, *, mode: int = 0o755) -> None:
        """Put in a directory."""
        self._put(name, _Entry(mode=stat.S_IFDIR | mode))

    def file(self, name: str, content: bytes | Path, *, mode: int = 0o644) -> None:
        """Put in a regular file; one named by a path is read when the archive is written."""
        self._put(name, _Entry(mode=stat.S_IFREG | mode, content=content))

    def symlink(self, name: str, target: str) -> None:
        """Put in a symbolic link."""
        self._put(name, _Entry(mode=stat.S_IFLNK | 0o777, content=os.fsencode(target)))

    def device(self, name: str, major: int, minor: int, *, mode: int = 0o600) -> None:
        """Put in a character device."""
        self._put(name, _Entry(mode=stat.S_IFCHR | mode, device=(major, minor)))

    def copy(self, source: Path, name: str) -> None:
        """Put in one file or symbolic link as it is on this machine."""
        mode = source.lstat().st_mode
        if stat.S_ISLNK(mode):
            self.symlink(name, str(source.readlink()))
        elif stat.S_ISREG(mode):
            # The mode's set-id bits must not come along from a tree that somebody else owns.
            self.file(name, source, mode=0o755 if mode & 0o100 else 0o644)
        else:
            raise BuildError(f"neither a file nor a link: {source}")

    def tree(
        self, source: Path, name: str, *, skip: Callable[[str], bool] = lambda _name: False
    ) -> None:
        """Put in a directory with everything below it except what *skip* says.

        *skip* gets names relative to *source*; a directory it takes out is not looked into.
        """
        self.directory(name)
        for folder, folders, files in os.walk(source):
            here = "" if folder == str(source) else f"{os.path.relpath(folder, source)}/"
            folders[:] = [inner for inner in sorted(folders) if not skip(here + inner)]
            for inner in folders:
                if os.path.islink(f"{folder}/{inner}"):
                    self.copy(Path(folder, inner), f"{name}/{here}{inner}")
                else:
                    self.directory(f"{name}/{here}{inner}")
            for inner in sorted(files):
                path = Path(folder, inner)
                if not skip(here + inner) and (path.is_symlink() or path.is_file()):
                    self.copy(path, f"{name}/{here}{inner}")

    def write(self, out: BinaryIO) -> None:
        """Write the archive, padded so that another may follow."""
        size = 0
        for number, name in enumerate(self.names(), 1):
            entry = self._entries[name]
            size += out.write(_record(name, entry, entry.data(), number))
        size += out.write(_record("TRAILER!!!", _Entry(mode=0), b"", 0))
        out.write(bytes(-size % _ALIGN))

    def to_bytes(self) -> bytes:
        """Return the archive."""
        out = io.BytesIO()
        self.write(out)
        return out.getvalue()

    def extract(self, directory: Path) -> None:
        """Write to *directory* what the archive holds, devices left out."""
        for name in self.names():
            entry, path = self._entries[name], directory / name
            if stat.S_ISDIR(entry.mode):
                path.mkdir(parents=True, exist_ok=True)
            elif stat.S_ISLNK(entry.mode):
                path.symlink_to(os.fsdecode(entry.data()))
            elif stat.S_ISREG(entry.mode):
                path.write_bytes(entry.data())
                path.chmod(stat.S_IMODE(entry.mode))

    def _put(self, name: str, entry: _Entry) -> None:
        name = _clean(name)
        for parent in PurePosixPath(name).parents:
            above = self._entries.setdefault(str(parent), _Entry(mode=stat.S_IFDIR | 0o755))
            if not stat.S_ISDIR(above.mode) and str(parent) != ".":
                raise BuildError(f"{name}: {parent} is no directory in this archive")
        self._entries[name] = entry


def _clean(name: str) -> str:
    return str(PurePosixPath(name.lstrip("/")))


def _record(name: str, entry: _Entry, data: bytes, inode: int) -> bytes:
    """Return one member: header, name and contents, each padded to four bytes."""
    encoded = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(data), 0, 0, *entry.device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return b"".join((head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)))


@dataclass(frozen=True, kw_only=True)
class Module:
    """A kernel module and where it is."""

    name: str
    path: Path
    depends: tuple[str, ...]
    content: bytes
    """Not compressed."""


def modules(directory: Path, wanted: Iterable[str]) -> list[Module]:
    """Return modules with all that they need, in an order in which they can be loaded.

    *directory* is a kernel's (``…/lib/modules/RELEASE``); ``modules.dep`` need not be there.  What
    is built into the kernel is left out; BuildError for what the kernel does not have at all.
    """
    files = {_name(path): path for path in sorted((directory / "kernel").rglob("*.ko*"))}
    builtin = set(_builtin(directory))
    found: dict[str, Module] = {}

    def add(name: str) -> None:
        if name in found or name in builtin:
            return
        if name not in files:
            raise BuildError(f"{directory.name} has no module {name}")
        content = _decompressed(files[name])
        depends = elf.modinfo(content).get("depends", "")
        needs = tuple(_plain(part) for part in depends.split(",") if part)
        for need_ in needs:
            add(need_)
        found[name] = Module(name=name, path=files[name], depends=needs, content=content)

    for name in wanted:
        add(_plain(name))
    return list(found.values())


def _builtin(directory: Path) -> Iterator[str]:
    for line in (directory / "modules.builtin").read_text().splitlines():
        yield _name(PurePosixPath(line))


def _name(path: PurePath) -> str:
    return _plain(path.name.partition(".ko")[0])


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        need({"zstd": "zstd"})
        return subprocess.run(
            ["zstd", "--decompress", "--stdout"],  # noqa: S607
            input=data,
            capture_output=True,
            check=True,
        ).stdout
    return data
