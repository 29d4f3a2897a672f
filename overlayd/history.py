# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was attempted: a line in the journal, and a row in a database that survives reboots.

The database is a convenience, and removing an overlay is not: whatever state disk and file are in,
:func:`note` returns.  It waits for others for :data:`PATIENCE` seconds in all, and for the disk as
long as five syncs take.

It has a rollback journal (``journal_mode=TRUNCATE``, ``synchronous=FULL``) and no write-ahead log.
Each command opens the file for a single row, so a log would be copied into the file each time it is
closed, which costs syncs as well; and its index is a mapped file, of which a full or failing disk
makes a SIGBUS, where everything else is an error that can be ignored.  A power cut takes the row
that was being written, at most.  The rollback journal gets the mode of the database, 0600.

Bounds: in bytes by ``max_page_count``, kept free ahead of it by dropping the oldest rows of the
user who has most, and in age; both a few rows at a time within the transaction that adds one.  A
damaged file is set aside; two of those are kept, each of which can be as large as the database may
be.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING, Final

from overlayd import caller, journal
from overlayd.database import (
    DamagedError,
    check_file,
    connect,
    directory,
    is_damage,
    is_whole,
    lock,
    number,
    set_aside,
)
from overlayd.errors import (
    BusyError,
    NoPermissionError,
    OverlaydError,
    RefusedError,
    SpaceError,
    UsageError,
    from_oserror,
    shown,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    StrPath = str | os.PathLike[str]

DATABASE: Final = "/var/lib/overlayd/history.db"
MESSAGE_ID: Final = "3e746622692e4d79a937eb95bec5ca18"
"""``MESSAGE_ID`` of every entry in the journal; fixed for good."""
PATIENCE: Final = 0.5
"""Seconds that a note waits for whoever has the database."""
DONE: Final = "done"
"""The outcome that is no error's code."""

_READ_PATIENCE: Final = 2.0
_SCHEMA: Final = 1
_DROP: Final = 64
"""Rows dropped at a time."""
_ROUNDS: Final = 16
"""How often at most within one note."""
_FEWEST_PAGES: Final = 32
_INCREMENTAL: Final = 2
"""What ``PRAGMA auto_vacuum`` says of a database that gives back pages when told to."""
_ANYTHING: Final = "SELECT 1 FROM sqlite_schema LIMIT 1"
_VACUUMED: Final = 256
"""Pages given back at a time."""
_LATEST: Final = 253402300799.0
"""The last second of the year 9999; times beyond are a damaged file's."""
_BYTES: Final = {"name": 256, "target": 4096, "source": 4096, "message": 1024}
_OTHER_BYTES: Final = 128


@dataclass(frozen=True, slots=True)
class Attempt:
    """One thing that somebody tried to do.

    ``at`` is when it began, in seconds since 1970, ``seconds`` how long it took.  ``uid`` is who
    asked, ``login_uid`` who had logged in, which sudo does not change.  ``via`` is *direct* for
    root's own process and *bus* for a caller of the service; ``pid`` and ``session_id`` are the
    caller's.  ``rule`` is what allowed or denied it.  ``outcome`` is *done* or an error's code.
    What is not known is empty.
    """

    at: float
    uid: int
    session_id: int | None
    pid: int
    via: str
    verb: str
    name: str
    target: str
    source: str
    uuid: str
    allowed: bool
    rule: str
    digest: str
    outcome: str
    message: str
    seconds: float
    login_uid: int | None = None
    boot_id: str = ""
    """Filled in by :func:`note` where it is empty."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept: rows of so many days, and a file of so many bytes."""

    days: int = 365
    size: int = 16 << 20


_COLUMNS: Final = tuple(field.name for field in fields(Attempt))
_TEXTS: Final = tuple(f.name for f in fields(Attempt) if f.type == "str")
_MARKS: Final = ("CAST(? AS TEXT)" if key in _TEXTS else "?" for key in _COLUMNS)
# As bytes: a path need not be UTF-8, and comes back as it was.
_INSERT: Final = f"INSERT INTO attempts ({', '.join(_COLUMNS)}) VALUES ({', '.join(_MARKS)})"  # noqa: S608

# Bytes of some rows, roughly; what is no text of its own takes some 200 of each.
_LENGTHS: Final = (f"length(CAST({key} AS BLOB))" for key in _TEXTS if key in _BYTES)
_LARGEST: Final = f"uid ORDER BY sum({' + '.join(_LENGTHS)} + 200) DESC LIMIT 1"
_DROP_FROM_LARGEST: Final = f"""
DELETE FROM attempts WHERE id IN (
    SELECT id FROM attempts WHERE uid IS (SELECT uid FROM attempts GROUP BY {_LARGEST})
    ORDER BY id LIMIT ?)
"""  # noqa: S608


def judged(error: OverlaydError | None) -> tuple[bool, str]:
    """Say of an attempt of root's whether it was allowed, and by which rule."""
    if isinstance(error, NoPermissionError):
        return False, "permission"
    if isinstance(error, RefusedError | UsageError):
        return False, "policy"
    if isinstance(error, SpaceError):
        return False, "limit"
    return True, "root"


def note(
    attempt: Attempt,
    *,
    database: StrPath = DATABASE,
    limits: Limits | None = None,
    address: str = journal.ADDRESS,
) -> bool:
    """Write *attempt* to the journal, then to the *database*; whether that has it now.

    Never raises.  Without *limits* those of the last note that had some are kept to.
    """
    return note_all([attempt], database=database, limits=limits, address=address)


def note_all(
    attempts: Sequence[Attempt],
    *,
    database: StrPath = DATABASE,
    limits: Limits | None = None,
    address: str = journal.ADDRESS,
) -> bool:
    """Do the same for several, of which the database has all or none."""
    try:
        boot = caller.boot_id()
        bounded = [_bounded(replace(a, boot_id=a.boot_id or boot)) for a in attempts]
        for attempt in bounded:
            journal.send(_entry(attempt), address=address)
        _store(bounded, os.fspath(database), limits)
    except Exception:  # noqa: BLE001  # whatever it is, the overlay matters more
        return False
    return True


def _bounded(attempt: Attempt) -> Attempt:
    """Cut what is longer than a name, a path or a line may be."""
    cut: dict[str, str] = {}
    for key in _TEXTS:
        data, most = journal.as_bytes(getattr(attempt, key)), _BYTES.get(key, _OTHER_BYTES)
        if len(data) > most:
            cut[key] = data[:most].decode("utf-8", "surrogateescape")
    return replace(attempt, **cut) if cut else attempt  # type: ignore[arg-type]


def _entry(attempt: Attempt) -> dict[str, str]:
    """Return the fields of the journal; what is unknown has none."""
    what = " ".join(filter(None, (attempt.verb, shown(attempt.name), shown(attempt.target))))
    text = f"{what} by uid {attempt.uid}: {attempt.outcome} in {attempt.seconds:.3f} s"
    if attempt.outcome != DONE:
        text += f": {shown(attempt.message)}"
    entry = {
        "MESSAGE": text,
        "MESSAGE_ID": MESSAGE_ID,
        "PRIORITY": "6" if attempt.outcome == DONE else "5" if attempt.allowed else "4",
    }
    for key, value in zip(_COLUMNS, astuple(attempt), strict=True):
        if value is None or value == "":
            continue
        entry[f"OVERLAYD_{key.upper()}"] = str(int(value) if isinstance(value, bool) else value)
    return entry


# Writing


def _store(attempts: Sequence[Attempt], database: str, limits: Limits | None) -> None:
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.dirname(database), 0o700)
    with directory(os.path.dirname(database)) as folder:
        lock(folder, deadline)
        for last in (False, True):
            check_file(database, folder, make=True)
            try:
                _write(attempts, database, limits, deadline)
            except DamagedError:
                if last:
                    raise
                set_aside(os.path.basename(database), folder)
            else:
                break


def _write(
    attempts: Sequence[Attempt], database: str, limits: Limits | None, deadline: float
) -> None:
    import sqlite3  # noqa: PLC0415  # what only looks does not load it

    try:
        with contextlib.closing(connect(database, deadline - time.monotonic())) as connection:
            run = connection.execute
            if number(connection, "auto_vacuum") != _INCREMENTAL:
                run("PRAGMA auto_vacuum = INCREMENTAL")  # a transaction of its own, with its syncs
            run("PRAGMA journal_mode = TRUNCATE")
            run("PRAGMA synchronous = FULL")
            run(f"PRAGMA busy_timeout = {max(int((deadline - time.monotonic()) * 1000), 1)}")
            run("BEGIN EXCLUSIVE")
            _make_tables(connection)
            limits = _limits(connection, limits)
            most = max(limits.size // number(connection, "page_size"), _FEWEST_PAGES)
            run(f"PRAGMA max_page_count = {most}")
            for attempt in attempts:
                _prune(connection, attempt.at - limits.days * 86400, most)
                values = astuple(attempt)
                run(_INSERT, [journal.as_bytes(v) if isinstance(v, str) else v for v in values])
            run("COMMIT")
    except sqlite3.OperationalError as error:
        busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
        if not busy and (is_damage(error, database) or not is_whole(database)):
            raise DamagedError from error
        raise
    except (sqlite3.Error, ValueError, OverflowError) as error:
        damage = isinstance(error, sqlite3.DatabaseError) and is_damage(error, database)
        if damage or not is_whole(database):
            raise DamagedError from error
        raise


def _make_tables(connection: sqlite3.Connection) -> None:
    version = number(connection, "user_version")
    if version == _SCHEMA:
        return
    if version:
        raise DamagedError  # a later version's, or damaged: set aside, whichever it is
    kinds = {"float": "REAL", "str": "TEXT"}
    columns = (f"{field.name} {kinds.get(str(field.type), 'INTEGER')}" for field in fields(Attempt))
    connection.execute(f"CREATE TABLE attempts (id INTEGER PRIMARY KEY, {', '.join(columns)})")
    connection.execute("CREATE INDEX attempts_at ON attempts (at)")
    connection.execute("CREATE TABLE limits (days INTEGER, size INTEGER)")
    connection.execute(f"PRAGMA user_version = {_SCHEMA}")


def _limits(connection: sqlite3.Connection, given: Limits | None) -> Limits:
    """Return the limits *given*, which are remembered, or those remembered, or the defaults."""
    rows = connection.execute("SELECT days, size FROM limits LIMIT 2").fetchall()
    remembered = (
        Limits(*rows[0])
        if len(rows) == 1
        and all(isinstance(value, int) and 0 < value < 1 << 50 for value in rows[0])
        else None
    )
    if given is not None and given != remembered:
        connection.execute("DELETE FROM limits")
        connection.execute("INSERT INTO limits VALUES (?, ?)", (given.days, given.size))
    return given or remembered or Limits()


def _prune(connection: sqlite3.Connection, oldest: float, most: int) -> None:
    """Make room for one row within *most* pages, dropping what is from before *oldest*.

    What else has to go is the oldest of whoever takes most room: nobody can push out what others
    did by doing much himself.
    """
    run = connection.execute
    run(
        "DELETE FROM attempts WHERE id IN (SELECT id FROM attempts WHERE at < ?"
        " ORDER BY at LIMIT ?)",
        (oldest, _DROP),
    )
    room = max(8, most // 16)
    for _ in range(_ROUNDS):
        pages = number(connection, "page_count")
        if pages - number(connection, "freelist_count") <= most - room:
            break
        run(_DROP_FROM_LARGEST, (_DROP,))
    for _ in range(_VACUUMED):
        # One at a time: Python takes a single step of a statement that gives no columns.
        if number(connection, "page_count") <= most or not number(connection, "freelist_count"):
            break
        run("PRAGMA incremental_vacuum(1)")  # the limit was lowered


# Reading


def read(
    database: StrPath = DATABASE,
    *,
    name: str | None = None,
    uid: int | None = None,
    since: float | None = None,
    limit: int | None = None,
) -> list[Attempt]:
    """Return the attempts that are noted, the oldest first, and of those the last *limit*.

    Without a database there are none.  Writes nothing but what SQLite has to roll back.

    :raises RefusedError: if the file is damaged, or not to be trusted.
    :raises BusyError: if somebody has it for too long.
    """
    path = os.fspath(database)
    where = shown(path)
    try:
        with directory(os.path.dirname(path)) as folder:
            if not check_file(path, folder, make=False):
                return []
        rows = _select(path, name, uid, since, limit)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_oserror(error, f"reading {where}") from None
    except DamagedError as error:
        message = f"{where} is damaged: {shown(str(error))}"
        raise RefusedError(
            message, hint=f"a new one is begun after: mv {where} {where}.bad"
        ) from None
    return [_attempt(row) for row in reversed(rows)]


def _select(
    database: str, name: str | None, uid: int | None, since: float | None, limit: int | None
) -> list[tuple[object, ...]]:
    import sqlite3  # noqa: PLC0415

    conditions = [
        *(() if name is None else [("name = CAST(? AS TEXT)", journal.as_bytes(name))]),
        *(() if uid is None else [("uid = ?", uid)]),
        *(() if since is None else [("at >= ?", since)]),
    ]
    words = " AND ".join(condition for condition, _ in conditions) or "1"
    query = f"SELECT {', '.join(_COLUMNS)} FROM attempts WHERE {words} ORDER BY id DESC LIMIT ?"  # noqa: S608
    values = [value for _, value in conditions]
    try:
        with contextlib.closing(connect(database, _READ_PATIENCE)) as connection:
            connection.execute("PRAGMA query_only = ON")
            version = number(connection, "user_version")
            if version == 0 and not connection.execute(_ANYTHING).fetchall():
                return []  # whoever was about to note the first was killed, or the power went
            if version != _SCHEMA:
                raise DamagedError(f"its version is {version}, not {_SCHEMA}")
            return connection.execute(query, [*values, -1 if limit is None else limit]).fetchall()
    except sqlite3.DatabaseError as error:
        if is_damage(error, database):
            raise DamagedError(str(error)) from error
        where = shown(database)
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            message = f"{where} is in use"
            raise BusyError(message, hint="try again") from None
        message = f"reading {where}: {shown(str(error))}"
        raise OverlaydError(message) from None
    except (OverflowError, MemoryError, ValueError) as error:  # what only a damaged row asks for
        raise DamagedError(str(error)) from error


def _attempt(row: tuple[object, ...]) -> Attempt:
    """Make an attempt of a row, in which a damaged file may have anything."""
    values: dict[str, object] = {}
    for field, value in zip(fields(Attempt), row, strict=True):
        if field.type == "str":
            values[field.name] = value if isinstance(value, str) else ""
        elif field.type == "float":
            number = float(value) if isinstance(value, int | float) else 0.0
            values[field.name] = number if 0 <= number <= _LATEST and math.isfinite(number) else 0.0
        elif field.type == "bool":
            values[field.name] = value == 1
        elif isinstance(value, int):
            values[field.name] = value
        else:
            values[field.name] = None if "None" in str(field.type) else 0
    return Attempt(**values)  # type: ignore[arg-type]


def visible(attempts: Iterable[Attempt], uid: int) -> list[Attempt]:
    """Return what *uid* may see of *attempts*: root all, others their own.

    Of anybody else's they see when, what, the name, the target, who and the outcome.
    """
    return [a if uid in {0, a.uid} else _outlined(a) for a in attempts]


def _outlined(attempt: Attempt) -> Attempt:
    return Attempt(
        at=attempt.at,
        uid=attempt.uid,
        session_id=None,
        pid=0,
        via="",
        verb=attempt.verb,
        name=attempt.name,
        target=attempt.target,
        source="",
        uuid="",
        allowed=attempt.outcome == DONE,
        rule="",
        digest="",
        outcome=attempt.outcome,
        message="",
        seconds=0.0,
    )
