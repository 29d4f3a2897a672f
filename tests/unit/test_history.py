# SPDX-License-Identifier: LGPL-2.1-or-later
"""The database of attempts: what comes back, who sees what, its bounds, every kind of damage."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from overlayd import caller
from overlayd.database import DAMAGED, KEPT
from overlayd.errors import BusyError, NoPermissionError, OverlaydError, RefusedError, SpaceError
from overlayd.history import PATIENCE, Attempt, Limits, judged, note, note_all, read, visible
from tests.unit.histories import NOON, NOWHERE, attempt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Name a database that is not there yet, nor is its directory."""
    return tmp_path / "state/history.db"


def put(database: Path, *attempts: Attempt, limits: Limits | None = None) -> bool:
    return note_all(attempts, database=database, limits=limits, address=NOWHERE)


def intact(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def aside(database: Path) -> list[str]:
    return sorted(name for name in os.listdir(database.parent) if DAMAGED in name)


# What comes back

_text = st.text(max_size=20) | st.binary(max_size=20).map(os.fsdecode)
_number = st.integers(0, 2**32)


@given(
    st.builds(
        Attempt,
        at=st.floats(0, 4e9),
        seconds=st.floats(0, 1e6),
        uid=_number,
        pid=_number,
        session_id=st.none() | _number,
        login_uid=st.none() | _number,
        allowed=st.booleans(),
        boot_id=_text.filter(bool),
        **dict.fromkeys(("via", "verb", "name", "target", "source", "uuid"), _text),
        **dict.fromkeys(("rule", "digest", "outcome", "message"), _text),
    )
)
@settings(max_examples=30)
def test_attempt_comes_back_as_it_was(noted: Attempt) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "state/history.db")
        assert put(database, noted)
        assert read(database) == [noted]
        assert read(database, name=noted.name, uid=noted.uid, since=noted.at) == [noted]


def test_filters_and_the_last_so_many(database: Path) -> None:
    some = [attempt(at=NOON + n, name=f"n{n % 2}", uid=n % 3) for n in range(12)]
    put(database, *some)
    assert read(database) == some
    assert read(database, name="n1") == some[1::2]
    assert read(database, uid=2) == some[2::3]
    assert read(database, since=NOON + 9) == some[9:]
    assert read(database, limit=4) == some[-4:]
    assert read(database, name="n0", uid=0, since=NOON + 1, limit=1) == [some[6]]
    assert read(database, name="' OR 1 --") == []


def test_boot_is_filled_in(database: Path) -> None:
    put(database, attempt(boot_id=""))
    assert read(database)[0].boot_id == caller.boot_id()


def test_files_are_the_owners_alone_whatever_the_umask(database: Path) -> None:
    before = os.umask(0)
    try:
        put(database, attempt())
    finally:
        os.umask(before)
    assert database.parent.stat().st_mode & 0o777 == 0o700
    for name in os.listdir(database.parent):
        assert (database.parent / name).stat().st_mode & 0o777 == 0o600, name


def test_looking_makes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "none/history.db") == []
    (tmp_path / "some").mkdir(mode=0o700)
    assert read(tmp_path / "some/history.db") == []
    assert os.listdir(tmp_path) == ["some"]
    assert os.listdir(tmp_path / "some") == []


def test_looking_changes_nothing(database: Path) -> None:
    put(database, attempt())
    before = database.read_bytes(), sorted(os.listdir(database.parent))
    read(database)
    assert (database.read_bytes(), sorted(os.listdir(database.parent))) == before


@pytest.mark.parametrize(
    ("error", "judgement"),
    [
        (None, (True, "root")),
        (BusyError("x"), (True, "root")),
        (RefusedError("x"), (False, "policy")),
        (SpaceError("x"), (False, "limit")),
        (NoPermissionError("x"), (False, "permission")),
    ],
)
def test_judgement_of_an_error(error: OverlaydError | None, judgement: tuple[bool, str]) -> None:
    assert judged(error) == judgement


# Who sees what


def test_others_see_only_that_something_was_done() -> None:
    own, other = attempt(uid=1000), attempt(uid=1001, rule="limit", outcome="space", allowed=False)
    assert visible([own, other], 0) == [own, other]
    seen_own, seen = visible([own, other], 1000)
    assert seen_own == own
    kept = {"at", "verb", "name", "target", "uid", "outcome"}
    for field in fields(Attempt):
        value = getattr(seen, field.name)
        if field.name in kept:
            assert value == getattr(other, field.name)
        else:
            assert not value, field.name


# Bounds


def test_size_and_age_hold_over_many_thousand_notes(database: Path) -> None:
    limits = Limits(days=10, size=1 << 20)
    chance = random.Random(4)
    largest = 0
    total, step = 50_000, 250
    for first in range(0, total, step):
        some = [
            attempt(at=NOON + n * 20, target="/usr/" + "x" * chance.randrange(400), name=f"n{n}")
            for n in range(first, first + step)
        ]
        assert put(database, *some, limits=limits)
        size = sum(path.stat().st_size for path in database.parent.iterdir())
        largest = max(largest, size)
    assert largest <= limits.size
    left = read(database)
    assert left[-1].name == f"n{total - 1}"
    assert [a.name for a in left] == [f"n{n}" for n in range(total - len(left), total)]
    assert len(left) > 1000
    assert left[0].at >= left[-1].at - 10 * 86400
    assert intact(database)


def test_what_is_too_old_goes_although_there_is_room(database: Path) -> None:
    limits = Limits(days=2)
    for hour in range(200):
        assert put(database, attempt(at=NOON + hour * 3600), limits=limits)
    left = read(database)
    assert left[0].at == NOON + 151 * 3600
    assert len(left) == 49


def test_clock_that_was_wrong_for_a_while_does_not_keep_old_rows(database: Path) -> None:
    limits = Limits(days=1)
    put(database, *[attempt(at=NOON + 1e9) for _ in range(200)], limits=limits)
    for day in range(300):
        put(database, attempt(at=NOON + day * 86400), limits=limits)
    assert sum(a.at < NOON + 1e9 for a in read(database)) == 2


def test_lowered_limit_shrinks_the_file_bit_by_bit(database: Path) -> None:
    large = [attempt(message="x" * 1000) for _ in range(4000)]
    assert put(database, *large)
    assert database.stat().st_size > 4 << 20
    low = Limits(size=512 << 10)
    for _ in range(40):
        assert put(database, attempt(), limits=low)
    assert database.stat().st_size <= low.size
    assert intact(database)


def test_limits_are_remembered_by_those_who_have_none(database: Path) -> None:
    put(database, attempt(), limits=Limits(days=1))
    put(database, attempt(at=NOON + 3 * 86400))
    assert [a.at for a in read(database)] == [NOON + 3 * 86400]
    put(database, attempt(at=NOON), limits=Limits(days=100))
    put(database, attempt(at=NOON + 4 * 86400))
    assert len(read(database)) == 3


def test_largest_rows_fit_the_smallest_limit(database: Path) -> None:
    long = "x" * 5000
    for n in range(200):
        noted = attempt(at=NOON + n, name=long, target=long, source=long, message=long, rule=long)
        assert put(database, noted, limits=Limits(size=256 << 10)), n
    assert database.stat().st_size <= 256 << 10


def test_user_who_does_much_pushes_out_what_is_his_own(database: Path) -> None:
    limits = Limits(size=512 << 10)
    others = [attempt(at=NOON + n, uid=uid) for n in range(100) for uid in (0, 7)]
    assert put(database, *others, limits=limits)
    for _ in range(40):
        assert put(database, *[attempt(uid=8, message="x" * 900) for _ in range(50)], limits=limits)
    # Rows of one's own that are small do not push out the large ones of others by their number.
    large = [attempt(uid=9, message="x" * 900) for _ in range(30)]
    assert put(database, *large, limits=limits)
    for _ in range(40):
        assert put(database, *[attempt(uid=8) for _ in range(50)], limits=limits)
    assert [a for a in read(database) if a.uid in {0, 7}] == others
    assert read(database, uid=9) == large
    assert len(read(database, uid=8)) > 300
    assert intact(database)


# Others


def test_many_processes_write_at_once_and_nothing_is_lost(database: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from overlayd.history import note; from tests.unit.histories import attempt\n"
        "print(sum(note(attempt(name=f'{sys.argv[2]}-{n}'), database=Path(sys.argv[1]),"
        " address='/nonexistent') for n in range(25)))"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, database, str(number)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for number in range(6)
    ]
    noted = sum(int(writer.communicate(timeout=120)[0]) for writer in writers)
    found = read(database)
    assert len({a.name for a in found}) == len(found) == noted
    assert noted > 100  # one that waited for too long may be missing
    assert intact(database)
    assert aside(database) == []


def test_threads_of_one_process_write_and_read_at_once(database: Path) -> None:
    results: list[bool] = []

    def work(number: int) -> None:
        for n in range(10):
            results.append(put(database, attempt(name=f"{number}-{n}")))
            read(database)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(database)) == sum(results) > 30
    assert intact(database)


@contextlib.contextmanager
def held(database: Path, how: str) -> Iterator[None]:
    """Have somebody hold the database: another writer of ours, or whoever looks with sqlite3."""
    if how == "writer":
        fd = os.open(database.parent, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
        os.close(fd)
        return
    statement = "BEGIN EXCLUSIVE" if how == "exclusive" else "BEGIN; SELECT * FROM attempts"
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for part in sys.argv[2].split(';'): cursor = c.execute(part)\n"
        "cursor.fetchone(); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, database, statement],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        process.kill()


@pytest.mark.parametrize("how", ["writer", "exclusive", "reader"])
def test_database_that_somebody_holds_is_waited_for_briefly(database: Path, how: str) -> None:
    put(database, attempt())
    with held(database, how):
        start = time.monotonic()
        assert not put(database, attempt())
        took = time.monotonic() - start
    assert PATIENCE * 0.8 < took < PATIENCE * 4
    assert put(database, attempt())
    assert len(read(database)) == 2
    assert aside(database) == []


def test_reader_of_a_database_that_is_held_says_so(database: Path) -> None:
    put(database, attempt())
    with held(database, "exclusive"), pytest.raises(BusyError, match="in use"):
        read(database)


def test_writer_killed_at_any_moment_leaves_a_whole_database(database: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from overlayd.history import note; from tests.unit.histories import attempt\n"
        "while True:\n"
        "    if note(attempt(target='x' * 4000), database=Path(sys.argv[1]), address='/none'):\n"
        "        print(flush=True)\n"
    )
    chance = random.Random()
    acknowledged = 0
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", code, database], stdout=subprocess.PIPE, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            acknowledged += len(process.stdout.readline())
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            acknowledged += len(process.stdout.read())
        found = len(read(database))
        assert acknowledged <= found <= acknowledged + 1
        acknowledged = found
        assert intact(database)
    assert put(database, attempt())
    assert aside(database) == []


@pytest.mark.parametrize("done", [(), ("PRAGMA auto_vacuum = INCREMENTAL",)])
def test_first_note_cut_short_at_its_beginning_is_no_damage(
    database: Path, done: Sequence[str]
) -> None:
    database.parent.mkdir(mode=0o700)
    database.touch(0o600)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        for statement in done:
            connection.execute(statement)
    assert bool(database.stat().st_size) is bool(done)
    assert read(database) == []
    assert put(database, attempt())
    assert len(read(database)) == 1
    assert aside(database) == []


def test_note_is_one_transaction(database: Path) -> None:
    def changes() -> int:  # of the header, https://sqlite.org/fileformat2.html#file_change_counter
        return int.from_bytes(database.read_bytes()[24:28], "big")

    assert put(database, attempt())
    for before in range(changes(), changes() + 3):
        assert put(database, attempt())
        assert changes() == before + 1


# What is not a database of ours


def damaged_copies(count: int) -> Sequence[Attempt]:
    return [attempt(at=NOON + n, message="m" * (n * 7 % 300)) for n in range(count)]


@functools.cache
def healthy() -> bytes:
    """Return a database of several levels."""
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "state/history.db")
        assert put(database, *damaged_copies(300), limits=Limits())
        return database.read_bytes()


_flips = st.lists(
    st.tuples(st.integers(0, 99) | st.integers(0, 1 << 18), st.integers(0, 255)),
    min_size=1,
    max_size=30,
)


@example(flips=[(3658, 128)], cut=None)  # in the schema, which SQLite's message then quotes
@given(flips=_flips, cut=st.none() | st.integers(0, 1 << 18))
@settings(max_examples=150)
def test_damage_anywhere_stops_no_note_for_longer_than_one(
    flips: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(healthy()[:cut])
    for place, value in flips:
        if data:
            data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "history.db")
        database.write_bytes(data)
        database.chmod(0o600)
        first = put(database, attempt(name="first"))
        assert put(database, attempt(name="second")), first
        assert put(database, attempt(name="third"))
        with contextlib.suppress(RefusedError):  # where the damage is, no note has come by
            assert read(database)[-1].name == "third"
        visible_files = [name for name in os.listdir(folder) if not name.endswith("-journal")]
        assert len(visible_files) <= 2


@pytest.mark.parametrize(
    "data",
    [b"garbage " * 1000, b"SQLite format 3\0" + bytes(84), os.urandom(9000)],
    ids=["text", "header", "noise"],
)
def test_what_is_no_database_is_set_aside_and_reading_says_so(database: Path, data: bytes) -> None:
    database.parent.mkdir(mode=0o700)
    database.write_bytes(data)
    database.chmod(0o600)
    with pytest.raises(RefusedError, match="damaged") as caught:
        read(database)
    assert caught.value.hint == f"a new one is begun after: mv {database} {database}.bad"
    assert database.read_bytes() == data
    assert put(database, attempt())
    assert read(database) == [attempt()]
    (kept,) = aside(database)
    assert (database.parent / kept).read_bytes() == data


def test_database_of_another_version_or_another_program_is_set_aside(database: Path) -> None:
    for statement in ("PRAGMA user_version = 2", "DROP TABLE attempts", "DROP TABLE limits"):
        put(database, attempt(name="before"))
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute(statement)
        assert put(database, attempt(name="after"))
        assert [a.name for a in read(database)] == ["after"]
    assert len(aside(database)) >= 1


def test_journal_of_a_damaged_database_is_not_played_into_the_new_one(database: Path) -> None:
    put(database, *damaged_copies(50))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE attempts SET message = 'changed'")
        hot = (database.parent / "history.db-journal").read_bytes()
        assert hot
    database.write_bytes(b"garbage " * 1000)
    (database.parent / "history.db-journal").write_bytes(hot)
    assert put(database, attempt())
    assert put(database, attempt())
    assert read(database) in ([attempt(), attempt()], [*damaged_copies(50), attempt(), attempt()])
    assert intact(database)


def test_few_damaged_ones_are_kept(database: Path) -> None:
    database.parent.mkdir(mode=0o700)
    for number in range(1, 6):
        (database.parent / f"{database.name}{DAMAGED}{number}").write_bytes(b"")
    (database.parent / f"{database.name}{DAMAGED}5-journal").write_bytes(b"")
    database.write_bytes(b"garbage " * 1000)
    database.chmod(0o600)
    assert put(database, attempt())
    new, *old = aside(database)
    assert old == [f"{database.name}{DAMAGED}{n}" for n in ("5", "5-journal")]
    assert (database.parent / new).read_bytes() == b"garbage " * 1000
    assert KEPT == 2


@pytest.mark.parametrize("what", ["directory", "symlink", "fifo", "dangling", "writable by others"])
def test_what_is_not_a_file_of_ours_is_refused_and_left_alone(database: Path, what: str) -> None:
    database.parent.mkdir(mode=0o700)
    target = database.parent.parent / "victim"
    if what == "directory":
        database.mkdir()
    elif what == "fifo":
        os.mkfifo(database)
    elif what == "writable by others":
        database.touch()
        database.chmod(0o660)
    else:
        database.symlink_to(target)
        if what == "symlink":
            target.write_bytes(b"precious")
    before = os.lstat(database)
    assert not put(database, attempt())
    assert os.lstat(database) == before
    assert os.listdir(database.parent) == [database.name]
    if what == "symlink":
        assert target.read_bytes() == b"precious"
    else:
        assert not target.exists()
    with pytest.raises(RefusedError):
        read(database)


def test_directory_that_others_may_write_to_or_a_link_to_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert not put(tmp_path / "open/history.db", attempt())
    with pytest.raises(RefusedError, match="writable by root alone"):
        read(tmp_path / "open/history.db")
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("closed")
    assert not put(tmp_path / "link/history.db", attempt())
    with pytest.raises(OverlaydError):
        read(tmp_path / "link/history.db")
    assert os.listdir(tmp_path / "closed") == os.listdir(tmp_path / "open") == []


@needs_root
def test_file_and_directory_of_another_user_are_refused(database: Path) -> None:
    put(database, attempt())
    os.chown(database, 1000, 1000)
    assert not put(database, attempt())
    with pytest.raises(RefusedError, match="must belong to root"):
        read(database)
    os.chown(database, 0, 0)
    os.chown(database.parent, 1000, 1000)
    assert not put(database, attempt())
    os.chown(database.parent, 0, 0)
    assert len(read(database)) == 1


def test_missing_parent_and_odd_values_are_no_error(tmp_path: Path) -> None:
    assert not put(tmp_path / "a/b/c/history.db", attempt())
    assert not put(tmp_path / "state/history.db", attempt(uid=1 << 80))
    assert put(tmp_path / "state/history.db", attempt(name="a\0b\ud800"))
    assert read(tmp_path / "state/history.db")[0].name == "a\0b\\ud800"


def test_rows_of_nonsense_are_read_as_nothing_in_particular(database: Path) -> None:
    put(database, attempt())
    columns = ("at", "uid", "pid", "name", "allowed", "seconds", "session_id")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        for column in columns:
            for value in (b"\xff", "text", 9e999, -5, None, 1 << 62):
                connection.execute("CREATE TABLE IF NOT EXISTS x (y)")
                connection.execute(f"UPDATE attempts SET {column} = ?", (value,))
                (found,) = read(database)
                assert 0 <= found.at <= 253402300799
                for kind, name in ((int, "uid"), (int, "pid"), (str, "name"), (bool, "allowed")):
                    assert isinstance(getattr(found, name), kind)


def test_note_of_one(database: Path) -> None:
    assert note(attempt(), database=database, address=NOWHERE)
    assert read(database) == [attempt()]
