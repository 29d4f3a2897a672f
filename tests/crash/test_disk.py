# SPDX-License-Identifier: LGPL-2.1-or-later
"""Power cuts while the history is written: whatever the disk may be left with is looked at.

The directory of the history is on an ext4 whose writes and flushes QEMU notes.  Each state that a
power cut can leave is made of that note, mounted, which has ext4 do what its journal says, and
read.  What is promised is in ``docs/history.md``.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

import pytest

from harness import blocklog
from overlayd import history
from overlayd.database import DAMAGED, connect
from overlayd.errors import RefusedError
from overlayd.history import Limits
from tests.crash.loops import mounted
from tests.mounts.conftest import STATE
from tests.unit.histories import NOON, NOWHERE, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.blocklog import Cut, Entry
    from tests.crash.tried import Proof
    from tests.mounts.conftest import World

    Names = tuple[str, ...]
    Step = Callable[[], object]

FOLDER: Final = STATE / "overlayd"
DATABASE: Final = FOLDER / "history.db"
JOURNAL: Final = FOLDER / "history.db-journal"
ROOM: Final = Path("/run/disk")
SIZE: Final = 8 << 20
SUPERBLOCK: Final = 1024
DAMAGE: Final = b"no database at all " * 500


@pytest.fixture(autouse=True)
def _can_note_writes() -> None:
    if why := blocklog.export_fails():
        pytest.skip(why)
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            pytest.skip(f"there is no {device}")


@dataclass(frozen=True)
class Case:
    """What is there before, and what is done then: so much in the quick form, and in the whole."""

    step: Callable[[int], Step]
    quick: int
    whole: int
    before: Step = lambda: None
    between: frozenset[Names] = frozenset()
    """What may be seen besides what is there before the first step and after it."""
    aside: bool = False
    """Whether a damaged database is there from the beginning."""


@dataclass(frozen=True)
class Recording:
    """What was written to a disk that was *image* at first.

    ``states`` has what is in the history before the first step and after each, ``acknowledged``
    after how many entries each step was over.
    """

    image: bytes
    entries: Sequence[Entry]
    states: Sequence[Names | None]
    acknowledged: Sequence[int]


def noted() -> Names | None:
    """Return the names of what the history has, None of one that cannot be read."""
    try:
        return tuple(one.name for one in history.read(DATABASE))
    except RefusedError:
        return None


def note(*names: str, limits: Limits | None = None, message: str = "") -> Step:
    attempts = [attempt(name=name, at=NOON, message=message) for name in names]

    def step() -> None:
        assert history.note_all(attempts, database=DATABASE, limits=limits, address=NOWHERE)

    return step


def fill() -> None:
    """Have a history that is as large as it may be."""
    for number in range(0, 240, 40):
        names = [f"old{one}" for one in range(number, number + 40)]
        note(*names, limits=SMALL, message="m" * 400)()
    assert os.path.getsize(DATABASE) > 0.7 * SMALL.size


def damage() -> None:
    FOLDER.mkdir(mode=0o700)
    DATABASE.write_bytes(DAMAGE)


def some(number: int) -> list[str]:
    return [f"n{number}.{one}" for one in range(20)]


SMALL: Final = Limits(size=32 * 4096)
CASES: Final = {
    "from nothing": Case(lambda n: note(f"n{n}"), quick=4, whole=80),
    "at its limit": Case(lambda n: note(*some(n), message="m" * 400), 2, 20, before=fill),
    "several at once": Case(lambda n: note(*some(n)), 2, 20),
    "of a damaged one": Case(
        lambda n: note(f"n{n}"), 2, 4, before=damage, between=frozenset({()}), aside=True
    ),
}


def record(image: bytes, before: Step, steps: Sequence[Step]) -> Recording:
    """Do *steps* on a disk, what is done *before* not being noted."""
    file, log = ROOM / "disk", ROOM / "log"
    file.write_bytes(image)
    with mounted(file, STATE):
        before()
    start = file.read_bytes()
    states, acknowledged = [], []
    with blocklog.exported(file, log) as device, mounted(device, STATE):
        states.append(noted())
        for step in steps:
            step()
            acknowledged.append(blocklog.count(log))
            states.append(noted())
    with mounted(file, STATE):
        assert noted() == states[-1], "QEMU did not write what it was given"
    return Recording(start, blocklog.read(log), states, acknowledged)


def empty() -> bytes:
    """Return a new file system."""
    file = ROOM / "empty"
    with file.open("wb") as made:
        made.truncate(SIZE)
    options = ("-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard")
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, file], check=True)
    return file.read_bytes()


@dataclass
class Check:
    """Looks at one state after another; keeps some in which a change waits to be rolled back."""

    recording: Recording
    case: Case
    hot: list[bytes] = field(default_factory=list)
    wanted: int = 0

    def all(self, proof: Proof) -> None:
        """Look at every state that there may be."""
        recording, random = self.recording, Random(proof.seed)
        for cut in blocklog.cuts(recording.image, recording.entries, random=random):
            if cut.torn is None or cut.torn.offset > SUPERBLOCK:  # ext4 has it written whole
                proof.count()
                self.look(cut)

    def look(self, cut: Cut) -> None:
        """Mount what the cut left, read it, and go on with it."""
        (ROOM / "cut").write_bytes(cut.image)
        with mounted(ROOM / "cut", STATE):
            if os.path.exists(JOURNAL) and os.path.getsize(JOURNAL) and len(self.hot) < self.wanted:
                self.hot.append(bytes(cut.image))
            done = bisect.bisect_right(self.recording.acknowledged, cut.entries)
            may = set(self.recording.states[done : done + 2])
            found = noted()
            assert found in may | (self.case.between if done == 0 else set()), str(cut)
            if found is not None and DATABASE.exists():
                with contextlib.closing(connect(str(DATABASE), 1)) as connection:
                    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            self.go_on(cut, found or ())

    def go_on(self, cut: Cut, found: Names) -> None:
        """Insist that the next command's note is taken and costs none but the oldest."""
        note("next")()
        after = noted()
        assert after is not None, str(cut)
        assert after[-1] == "next"
        assert after[:-1] == found[len(found) + 1 - len(after) :], str(cut)
        aside = [name for name in os.listdir(FOLDER) if DAMAGED in name]
        assert set(os.listdir(FOLDER)) == {DATABASE.name, JOURNAL.name, *aside}
        # Nothing is taken for damaged that is not, and what is damaged is kept.
        assert [(FOLDER / name).read_bytes() for name in aside] == [DAMAGE] * self.case.aside


@pytest.mark.parametrize("case", CASES)
def test_what_was_noted_is_there_whenever_the_power_goes(
    world: World, case: str, proof: Proof
) -> None:
    """Power cut at every write to the disk of the history, with writes lost and torn."""
    del world
    proof.random = True
    ROOM.mkdir()
    this = CASES[case]
    steps = [this.step(number) for number in range(this.whole if proof.whole else this.quick)]
    recording = record(empty(), this.before, steps)
    first, last = (set(recording.states[place] or ()) for place in (0, -1))
    assert bool(first - last) is (this.before is fill)  # what is oldest was dropped
    check = Check(recording, this, wanted=8 if proof.whole else 1)
    check.all(proof)
    proof.remark(f"{len(recording.entries)} entries of {len(steps)} notes")
    # The power goes again while the first command after a cut puts right what that left.
    for image in check.hot:
        Check(record(image, lambda: None, [noted, note("later")]), this).all(proof)
