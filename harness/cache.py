# SPDX-License-Identifier: LGPL-2.1-or-later
"""What took long to build is kept, under a key made of everything that went into it.

An entry is a directory.  It is built in a stage and renamed into place, so it is there whole or
not at all, whatever is killed when.  Everything else is two locks for each entry:

``KIND.KEY.use``
    shared by whoever uses or builds the entry; removing it takes the lock alone, so that an entry
    in use stays.
``KIND.KEY.build``
    taken alone while building, so that two runs that need the same thing build it once.

A lock is the kernel's (flock) and goes with the process.  A builder holds the first from before
it starts until its caller is done: no lock is ever converted, which flock does not do atomically.

    ROOT/entries/KIND/KEY/label     what it is, for people; its mtime is the last use
    ROOT/entries/KIND/KEY/data      what the caller gets
    ROOT/stage/KIND.KEY.XXXXXXXX    being built, or left behind by a killed builder
    ROOT/locks/

``python -m harness.cache --list`` shows what is there.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError, HostError
from harness.figures import age_text, parse_size, size_text
from harness.timings import Phase, phase
from harness.trees import describe, disk_usage, remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

PROJECT = "overlayd"  # other projects give Cache a root of their own, by default_root("theirs")
DEFAULT_LIMIT = 4 << 30
NEARLY_FULL = 16 << 20  # a build that fails with less room than this failed for lack of it

KIND = re.compile(r"[a-z][a-z0-9-]*", re.ASCII)
KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
STAGE = re.compile(r"([a-z][a-z0-9-]*)\.([0-9a-f]{64})\.[A-Za-z0-9_]+", re.ASCII)
TRASH = "trash."
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# See https://bford.info/cachedir/\n"


def default_root(project: str = PROJECT) -> Path:
    """Return where *project* keeps its cache unless told otherwise.

    That is ``$PROJECT_CACHE``, ``$XDG_CACHE_HOME/PROJECT-harness`` or ``~/.cache/PROJECT-harness``.
    """
    variable = project.upper().replace("-", "_") + "_CACHE"
    if named := os.environ.get(variable):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(base) if base.startswith("/") else Path("~/.cache").expanduser()
    return parent / f"{project}-harness"


def key(*parts: bytes | str | Path) -> str:
    """Return the key of what is built from *parts*: 64 hexadecimal digits.

    A path counts by the modes and content of what it leads to, not by its name; so pass the name,
    too, where it matters.  ``__pycache__`` is left out.  ``key("ab")`` and ``key("a", "b")`` are
    two keys.

    :raises OSError: if a path cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        inner = hashlib.sha256()
        if isinstance(part, Path):
            for chunk in describe(part):
                inner.update(chunk)
        else:
            inner.update(part.encode() if isinstance(part, str) else part)
        digest.update(type(part).__name__.encode() if isinstance(part, bytes | str) else b"path")
        digest.update(inner.digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """One finished entry; *size* in bytes of disk, *used* in seconds since the epoch."""

    kind: str
    key: str
    label: str
    size: int
    used: float
    path: Path


class Cache:
    """The entries beneath *root*, at most *limit* bytes of them besides what is in use.

    Safe between threads and between processes.  Nothing is written before the first entry is
    built, and a root that cannot be written to serves what it has.
    """

    def __init__(self, root: Path, *, limit: int = DEFAULT_LIMIT) -> None:
        self.root = root
        self.limit = limit
        self._entries = root / "entries"
        self._stage = root / "stage"
        self._locks = root / "locks"

    key = staticmethod(key)

    def has(self, kind: str, key: str) -> bool:
        """Return whether this entry is finished at the moment; it may be pruned in the next."""
        return (self._place(kind, key) / "data").is_dir()

    @contextmanager
    def entry(
        self,
        kind: str,
        key: str,
        build: Callable[[Path], None],
        progress: Callable[[str], None] = lambda _line: None,
        *,
        label: str = "",
    ) -> Iterator[Path]:
        """Give the directory of the entry, built by *build* if need be, for as long as the block.

        While the block runs the entry is not pruned, by nobody.  *build* gets an empty directory
        to fill; it is renamed afterwards, so nothing in it may hold its own path.  If *build*
        raises, that goes on to the caller and nothing stays.  *label* says in a few words what it
        is, and *progress* is told in one line when building or waiting starts, and when it ends.

        :raises HostError: if it has to be built, and there is no room or no permission.
        """
        place = self._place(kind, key)
        with ExitStack() as stack:
            if not self._use(stack, kind, key):
                with self._alone(kind, key, progress) as first:
                    if first:
                        self._build(place, build, progress, label)
                self.prune(progress=progress)
            with suppress(OSError):  # a cache that is read-only, or another user's
                os.utime(place / "label")
            yield place / "data"

    def list(self) -> tuple[Entry, ...]:
        """Return all finished entries, the one used last first.

        What several have in common, as hard links, counts for the first of them: that is what is
        left when the others are pruned.
        """
        entries = []
        for place in self._entries.glob("*/*"):
            kind, key = place.parent.name, place.name
            if not (KIND.fullmatch(kind) and KEY.fullmatch(key) and (place / "data").is_dir()):
                continue
            with suppress(OSError):  # pruned this moment
                used = (place / "label").stat().st_mtime
                label = (place / "label").read_text(encoding="utf-8", errors="replace").strip()
                entries.append(Entry(kind, key, label, 0, used, place / "data"))
        entries.sort(key=lambda entry: entry.used, reverse=True)
        seen: set[tuple[int, int]] = set()
        return tuple(replace(each, size=disk_usage(each.path.parent, seen)) for each in entries)

    def prune(
        self, limit: int | None = None, progress: Callable[[str], None] = lambda _line: None
    ) -> tuple[Entry, ...]:
        """Remove the entries not used for longest, until the rest takes at most *limit* bytes.

        Entries in use stay, even if that is more than *limit* (by default the cache's own).  What
        killed builders left goes as well.  Returns what was removed.
        """
        limit = self.limit if limit is None else limit
        if not self._entries.is_dir() or not os.access(self.root, os.W_OK):
            return ()
        self._make_root()  # somebody may be at it just now
        removed = []
        # One at a time: two that add up the same entries would remove twice what is needed.
        with self._locked(self._locks / "prune", fcntl.LOCK_EX):
            self._sweep()
            entries = self.list()
            total = sum(entry.size for entry in entries)
            for entry in reversed(entries):
                if total <= limit:
                    break
                if self._remove(entry.kind, entry.key):
                    total -= entry.size
                    removed.append(entry)
                    progress(f"cache: dropped {entry.kind} {entry.key[:12]} ({entry.label})")
            if total > limit:
                progress(
                    f"cache: {size_text(total)} in {self.root}, of {size_text(limit)} allowed: "
                    "the rest is in use"
                )
        return tuple(removed)

    # -- one entry ---------------------------------------------------------------------------

    def _place(self, kind: str, key: str) -> Path:
        if not KIND.fullmatch(kind) or not KEY.fullmatch(key):
            message = f"not a kind and key of a cache: {kind!r}, {key!r}"
            raise ValueError(message)
        return self._entries / kind / key

    def _use(self, stack: ExitStack, kind: str, key: str) -> bool:
        """Keep the entry from being removed until *stack* ends; return whether it is there."""
        try:
            self._make_root()
            stack.enter_context(self._locked(self._locks / f"{kind}.{key}.use", fcntl.LOCK_SH))
        except OSError as error:
            if self.has(kind, key):  # read-only, and so nothing that could remove it
                return True
            raise self._unusable(error, f"cannot build {kind}") from error
        return self.has(kind, key)

    @contextmanager
    def _alone(self, kind: str, key: str, progress: Callable[[str], None]) -> Iterator[bool]:
        """Be the only builder of the entry; give whether it still is to be built."""
        path = self._locks / f"{kind}.{key}.build"
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                progress(f"{kind}: waiting for another run that builds it")
                stack.enter_context(self._locked(path, fcntl.LOCK_EX))
            except OSError as error:
                raise self._unusable(error, f"cannot build {kind}") from error
            yield not self.has(kind, key)

    def _build(
        self,
        place: Path,
        build: Callable[[Path], None],
        progress: Callable[[str], None],
        label: str,
    ) -> None:
        """Build in a stage and rename it to *place*; the caller holds both locks."""
        kind, key = place.parent.name, place.name
        what = f"{kind} ({label})" if label else kind
        for left in self._stage.glob(f"{kind}.{key}.*"):  # by builders that were killed
            _try_to_remove(left)
        progress(f"{what}: building")
        start = time.monotonic()
        try:
            stage = Path(tempfile.mkdtemp(prefix=f"{kind}.{key}.", dir=self._stage))
        except OSError as error:
            raise self._unusable(error, f"cannot build {what}") from error
        try:
            stage.chmod(0o755)
            (stage / "data").mkdir(mode=0o755)
            (stage / "label").write_text(label.replace("\n", " ") + "\n", encoding="utf-8")
            with phase(Phase.BUILD):
                build(stage / "data")
            flush(stage)
            place.parent.mkdir(exist_ok=True)
            if os.path.lexists(place):  # not an entry, or it would not be built
                self._discard(place)
            stage.rename(place)
        except BaseException as error:
            full = isinstance(error, Exception) and self._is_full(error)  # before room is made
            _try_to_remove(stage)
            if full and isinstance(error, Exception):
                raise self._unusable(error, f"cannot build {what}", full=True) from error
            raise
        progress(f"{what}: built in {time.monotonic() - start:.1f} s")

    def _remove(self, kind: str, key: str) -> bool:
        """Remove the entry unless it is in use; the caller holds the prune lock."""
        path = self._locks / f"{kind}.{key}.use"
        try:
            with self._locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._discard(self._entries / kind / key)
                with suppress(OSError):
                    (self._entries / kind).rmdir()  # the last of its kind
                # Others notice that the file they locked is no longer the one of this name.
                with suppress(OSError):
                    (self._locks / f"{kind}.{key}.build").unlink()
                    path.unlink()
        except OSError:  # in use, or not ours to remove
            return False
        return True

    def _discard(self, place: Path) -> None:
        """Take *place* away in one step, then remove it at leisure."""
        trash = Path(tempfile.mkdtemp(prefix=TRASH, dir=self._stage))
        place.rename(trash / "was")
        _try_to_remove(trash)

    def _sweep(self) -> None:
        """Remove what killed builders and killed removers left; the caller holds the prune lock."""
        for left in self._stage.iterdir():
            if left.name.startswith(TRASH):
                _try_to_remove(left)
            elif match := STAGE.fullmatch(left.name):
                lock = self._locks / f"{match[1]}.{match[2]}.use"
                with suppress(OSError), self._locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    _try_to_remove(left)

    # -- files -------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, path: Path, how: int) -> Iterator[None]:
        """Hold a lock on the file of this name.

        :raises BlockingIOError: with LOCK_NB, if somebody else holds it.
        """
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
                    raise
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # enough to lock it
            try:
                fcntl.flock(fd, how)
                if not _is_named(fd, path):
                    continue  # removed between open and flock
                yield
                return
            finally:
                os.close(fd)

    def _make_root(self) -> None:
        if self._locks.is_dir() and self._stage.is_dir() and self._entries.is_dir():
            return
        for directory in (self.root, self._entries, self._stage, self._locks):
            directory.mkdir(parents=True, exist_ok=True)
        tag = self.root / "CACHEDIR.TAG"  # backups leave it out
        if not tag.exists():
            tag.write_text(TAG, encoding="ascii")

    def _is_full(self, error: Exception) -> bool:
        if isinstance(error, OSError):
            return error.errno in {errno.ENOSPC, errno.EDQUOT}
        try:
            status = os.statvfs(self._stage)
        except OSError:
            return False
        return status.f_blocks > 0 and status.f_bavail * status.f_frsize < NEARLY_FULL

    def _unusable(self, error: Exception, message: str, *, full: bool = False) -> HostError:
        if full or self._is_full(error):
            message += f": no room left in the cache {self.root}"
            return HostError(message, hint="python -m harness.cache --list, --prune --limit=SIZE")
        cause = error.strerror if isinstance(error, OSError) else error
        message += f": the cache {self.root} cannot be written to: {cause}"
        return HostError(message, hint="name another directory for the cache")


def _try_to_remove(path: Path) -> None:
    """Remove what nobody will take for finished; if it does not go, the next sweep tries again."""
    with suppress(OSError, HarnessError):
        remove_tree(path)


def _is_named(fd: int, path: Path) -> bool:
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), named)


def flush(path: Path) -> None:
    """Have everything on the file system of *path* on its disk.

    A rename may reach the disk before what was renamed: after a crash of the host an entry would
    be there with empty files.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), os.fspath(path))
    finally:
        os.close(fd)


# -- for people ------------------------------------------------------------------------------


def table(entries: Iterable[Entry], limit: int, root: Path) -> str:
    """Return *entries* as a table, with what they take together of *limit*."""
    now = time.time()
    entries = tuple(entries)
    rows = [("KIND", "KEY", "SIZE", "USED AGO", "WHAT")]
    rows += [
        (entry.kind, entry.key[:12], size_text(entry.size), age_text(now - entry.used), entry.label)
        for entry in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    ]
    total = sum(entry.size for entry in entries)
    summary = f"{len(entries)} entries, {size_text(total)} of {size_text(limit)} in {root}"
    return "\n".join([*(lines if entries else []), summary, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """List the cache, or prune it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.cache", description="What the harness keeps between runs."
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="list the entries (the default)")
    action.add_argument("--prune", action="store_true", help="drop what was not used for longest")
    parser.add_argument(
        "--limit",
        type=_size_argument,
        default=DEFAULT_LIMIT,
        metavar="SIZE",
        help="what may stay when pruning, like 500M or 4G; 0: only what is in use stays",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="the cache (default: $OVERLAYD_CACHE or the user's cache directory)",
    )
    options = parser.parse_args(arguments)
    cache = Cache(options.root or default_root(), limit=options.limit)
    try:
        if options.prune:
            removed = cache.prune()
            freed = size_text(sum(entry.size for entry in removed))
            sys.stdout.write(f"dropped {len(removed)} entries, {freed}\n")
        sys.stdout.write(table(cache.list(), cache.limit, cache.root))
    except (HarnessError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _size_argument(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
