# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a directory tree is, as one digest and as lines that can be compared.

    python3 -IS manifest.py TREE             prints the digest
    python3 -IS manifest.py --lines TREE     prints the lines of which it is the digest
    python3 -IS manifest.py --against FILE TREE
                                             prints what differs from lines in FILE; fails if so

One file, the standard library alone: it runs in a guest and on a mounted disk of one as well.

A line is TYPE MODE UID GID SIZE CONTENT XATTRS PATH, with blanks and the like in the last escaped.
CONTENT is a regular file's SHA-256, a link's target or a device's numbers; XATTRS a digest of the
extended attributes, with their names.  Times, inode numbers and hard links do not count: a
deployment shares files with others, and OSTree keeps no times.  The sizes of directories do not
count either.  What is mounted beneath the tree is looked at like everything else.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from itertools import islice

TYPE_CHECKING = False  # the real one is in a module that takes long to load
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHOWN = 20
BLOCK = 1 << 18
TYPES = {
    stat.S_IFDIR: "d",
    stat.S_IFREG: "f",
    stat.S_IFLNK: "l",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
}


def lines(tree: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the lines of *tree*, itself first, in the order of their paths' parts."""
    root = os.fspath(tree)
    pending = [("", root)]
    while pending:
        name, place = pending.pop()
        status = os.lstat(place)
        yield _line(name or ".", place, status)
        if stat.S_ISDIR(status.st_mode):
            inside = sorted(os.listdir(place), key=_escaped, reverse=True)
            prefix = name and f"{name}/"
            pending += [(f"{prefix}{each}", f"{place}/{each}") for each in inside]


def digest(lines: Iterable[str]) -> str:
    """Return the digest of lines: 64 hexadecimal digits."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode() + b"\n")
    return whole.hexdigest()


def path(line: str) -> str:
    """Return the path of a line, escaped; the tree itself is "."."""
    return line.rpartition(" ")[2]


def differences(expected: Iterable[str], found: Iterable[str]) -> Iterator[str]:
    """Yield what differs, one line each: ``-`` and ``+`` with the line of the one or the other."""
    wanted = {path(line): line for line in expected}
    for line in found:
        was = wanted.pop(path(line), None)
        if was != line:
            if was is not None:
                yield f"-{was}"
            yield f"+{line}"
    for was in wanted.values():
        yield f"-{was}"


def _line(name: str, place: str, status: os.stat_result) -> str:
    kind, size, content = stat.S_IFMT(status.st_mode), 0, "-"
    if kind == stat.S_IFREG:
        size, content = status.st_size, _sha256(place)
    elif kind == stat.S_IFLNK:
        content = _escaped(os.readlink(place))
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        content = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    mode = stat.S_IMODE(status.st_mode)
    return (
        f"{TYPES.get(kind, '?')} {mode:04o} {status.st_uid} {status.st_gid} {size} {content} "
        f"{_attributes(place)} {_escaped(name)}"
    )


def _sha256(place: str) -> str:
    whole = hashlib.sha256()
    with open(place, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            whole.update(block)
    return whole.hexdigest()


def _attributes(place: str) -> str:
    names = sorted(os.listxattr(place, follow_symlinks=False))
    if not names:
        return "-"
    whole = hashlib.sha256()
    for name in names:
        value = os.getxattr(place, name, follow_symlinks=False)
        whole.update(b"%d:%s%d:%s" % (len(name), os.fsencode(name), len(value), value))
    return ",".join(map(_escaped, names)) + "=" + whole.hexdigest()[:16]


def _escaped(text: str) -> str:
    """Return *text* without blanks, controls and what is not UTF-8; nothing else changes."""
    if text.isprintable() and " " not in text and "\\" not in text:
        return text
    plain = {byte: chr(byte) for byte in range(0x21, 0x7F) if byte != ord("\\")}
    return "".join(plain.get(byte) or f"\\{byte:03o}" for byte in os.fsencode(text))


def main(arguments: list[str]) -> int:
    """Do what the module's docstring says."""
    expected: list[str] | None = None
    if arguments[:1] == ["--against"] and len(arguments) > 1:
        with open(arguments[1], encoding="utf-8") as file:
            expected = file.read().splitlines()
        arguments = arguments[2:]
    show = arguments[:1] == ["--lines"]
    if len(arguments) != 1 + show:
        sys.stderr.write(__doc__ or "")
        return 2
    found: Iterable[str] = lines(arguments[-1])
    if expected is not None:
        different = list(islice(differences(expected, found), SHOWN))
        found = different or [digest(expected)]
        status = int(bool(different))
    else:
        found, status = (found if show else [digest(found)]), 0
    sys.stdout.writelines(f"{line}\n" for line in found)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
