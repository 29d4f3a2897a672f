# SPDX-License-Identifier: LGPL-2.1-or-later
"""A SQLite file that root alone may write: opening it with care, and setting a damaged one aside.

What is in it is the business of :mod:`overlayd.history`.  Nobody but root can put anything into the
directory, which is checked, so what is found there when looking is still there when opening.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING, Final

from overlayd.errors import RefusedError, shown

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

DAMAGED: Final = ".damaged-"
"""Between the database's name and the time at which it was set aside."""
KEPT: Final = 2
"""How many of those there are at most."""
_INTERVAL: Final = 0.002
_PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-")


class DamagedError(Exception):
    """The database is not one, or not as this version writes it."""


@contextlib.contextmanager
def directory(path: str) -> Iterator[int]:
    """Open the directory of the database, in which nobody but its owner may write.

    :raises RefusedError: if somebody else may.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_owner(os.fstat(fd), path)
        yield fd
    finally:
        os.close(fd)


def _check_owner(facts: os.stat_result, path: str) -> None:
    if facts.st_uid not in {0, os.geteuid()} or facts.st_mode & 0o022:
        name = shown(path)
        message = f"{name}: must belong to root and be writable by root alone"
        raise RefusedError(message, hint=f"chown root {name}; chmod go-w {name}")


def check_file(database: str, folder: int, *, make: bool) -> bool:
    """Whether there is a database; with *make* it is made, empty.

    Opened by nobody but SQLite: closing a descriptor of it would drop SQLite's own locks.

    :raises RefusedError: if it is something else, or somebody else's.
    """
    name = os.path.basename(database)
    try:
        facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        if not make:
            return False
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(name, flags, 0o600, dir_fd=folder))
        return True
    if not stat.S_ISREG(facts.st_mode):
        message = f"{shown(database)}: not a regular file"
        raise RefusedError(message, hint="move it out of the way")
    _check_owner(facts, database)
    return True


def lock(folder: int, deadline: float) -> None:
    """Be the only one who writes, or sets the file aside.

    :raises TimeoutError: after the *deadline*.
    """
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(_INTERVAL)
        else:
            return


def connect(database: str, patience: float) -> sqlite3.Connection:
    """Open a database that is there; nothing is made."""
    import sqlite3  # noqa: PLC0415

    path = "".join(
        chr(byte) if byte in _PLAIN else f"%{byte:02X}"
        for byte in os.fsencode(os.path.abspath(database))
    )
    connection = sqlite3.connect(
        f"file:{path}?mode=rw", uri=True, timeout=max(patience, 0.001), isolation_level=None
    )
    connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    try:
        # Nothing that a damaged or foreign schema says is run.
        connection.execute("PRAGMA trusted_schema = OFF")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def is_damage(error: sqlite3.DatabaseError, database: str) -> bool:
    """Whether *error* is of the file, not of disk, locks or memory."""
    import sqlite3  # noqa: PLC0415

    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    if code == sqlite3.SQLITE_READONLY:  # so says a damaged header too
        return os.access(database, os.W_OK)
    return code in {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_ERROR,  # a table or a column is not there
        sqlite3.SQLITE_SCHEMA,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_TOOBIG,
    }


def is_whole(database: str) -> bool:
    """Whether SQLite finds nothing wrong with the file; where it cannot look, yes.

    For what failed without saying why: reads all of the file.
    """
    import sqlite3  # noqa: PLC0415

    try:
        with contextlib.closing(connect(database, 0)) as connection:
            return connection.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)]
    except sqlite3.DatabaseError as error:
        return not is_damage(error, database)
    except UnicodeDecodeError:  # of the message, which has a part of the damaged schema
        return False


def number(connection: sqlite3.Connection, pragma: str) -> int:
    """Return what a *pragma* says, which is a number."""
    ((value,),) = connection.execute(f"PRAGMA {pragma}").fetchall()
    return int(value)


def set_aside(name: str, folder: int) -> None:
    """Rename a damaged database and what belongs to it, and keep the newest few."""
    aside = f"{name}{DAMAGED}{int(time.time())}"
    # The journal first: it would be taken for that of the new database.
    for part in ("-journal", "-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{name}{part}", f"{aside}{part}", src_dir_fd=folder, dst_dir_fd=folder)
    found = [other for other in os.listdir(folder) if other.startswith(f"{name}{DAMAGED}")]
    times = sorted({_set_aside_at(other) for other in found})
    for other in found:
        if _set_aside_at(other) in times[:-KEPT]:
            with contextlib.suppress(OSError):
                os.unlink(other, dir_fd=folder)


def _set_aside_at(name: str) -> int:
    digits = name.rpartition(DAMAGED)[2].partition("-")[0]
    return int(digits) if digits.isascii() and digits.isdigit() else 0
