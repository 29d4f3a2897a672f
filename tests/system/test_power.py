# SPDX-License-Identifier: LGPL-2.1-or-later
"""The power goes: nothing of any overlay is left, and everything that was noted is."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest

from harness import blocklog, disk
from harness.machine import Capability
from harness.programs import run
from harness.qemu import Disk
from harness.vm import QemuMachine
from tests.system.guest import RUN, SOURCES
from tests.system.test_transience import (
    BASE,
    CATCH,
    TEXT,
    changes_on_disk,
    check_nothing_is_left,
    once_elsewhere,
)

if TYPE_CHECKING:
    from tests.crash.tried import Proof
    from tests.system.guest import Guest

Names: TypeAlias = list[tuple[str, str]]

STOP: Final = Path(__file__).with_name("stop.py")
STATE: Final = "/var/lib/overlayd"
DATABASES: Final = {"history.db", "history.db-journal"}
SYNCS: Final = 5
"""How often a note has the kernel write to the disk."""
MAY: Final[list[Names]] = [[], [("remove", "noting")]]
"""What the history may have of a note that is being written; with its last sync it has it."""
ROOT: Final = Path(__file__).parents[2]
# In the root of a disk that was the history's: what is there, that it is whole, and the next note.
LOOK: Final = f"""
import contextlib, json, os, sys
sys.path.insert(0, {str(ROOT)!r})
from overlayd import database, history
from tests.unit.histories import attempt
place = os.path.join(os.getcwd(), "history.db")
found = [(one.verb, one.name) for one in history.read(place)]
if os.path.exists(place):
    with contextlib.closing(database.connect(place, 1)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
assert history.note(attempt(name="next"), database=place, address="/nonexistent")
assert [(one.verb, one.name) for one in history.read(place)] == [*found, ("apply", "next")]
print(json.dumps([found, os.listdir()]))
"""


def history_of(guest: Guest) -> Names:
    attempts = json.loads(guest.overlayd("history", "--json").out)
    return [(one["verb"], one["name"]) for one in attempts]


def note_some(guest: Guest, name: str) -> Names:
    """Do a few things that are noted; return them."""
    source = guest.source(name, TEXT)
    guest.sh(
        f"""
        overlayd apply {name} {source} {BASE}
        overlayd reset {name}
        overlayd remove {name}
        ! overlayd remove {name}
        """,
        timeout=180,
    )
    return [("apply", name), ("reset", name), ("remove", name), ("remove", name)]


@pytest.mark.needs(Capability.POWER_CUT)
def test_power_cut_at_every_step_of_every_operation(
    fresh: Guest, rounds: int, proof: Proof
) -> None:
    """Power cut of a machine whose commands stand at each trace point of each operation."""
    every = 8 if fresh.emulated and rounds == 1 else 1
    before: Names = []
    for turn in range(rounds):
        source = fresh.source("power", TEXT)
        fresh.machine.copy_in(STOP, f"{SOURCES}/stop.py")
        fresh.machine.copy_in(CATCH, f"{SOURCES}/catch.py")
        fresh.sh(f"overlayd apply noting {source} {BASE}; ! overlayd reset none", timeout=180)
        before += [("apply", "noting"), ("reset", "none")]
        # One is writing its note, and all others are in the middle of their work.
        count = SYNCS - turn % SYNCS
        catch = ("python3", "-IS", f"{SOURCES}/catch.py", "noting", "fdatasync", str(count))
        fresh.machine.run([*catch, "overlayd", "remove", "noting"], timeout=180)
        stop = ("python3", "-I", f"{SOURCES}/stop.py", source, str(every), str(turn))
        said = fresh.machine.run(stop, timeout=600).out
        stands = [tuple(json.loads(line)) for line in said.splitlines()]
        assert {verb for verb, _, _ in stands} >= {"apply", "batch", "reset", "remove"}
        assert len(stands) >= 100 // every
        proof.count(len(stands))
        fresh.machine.power_cut()
        assert changes_on_disk(fresh) == ""
        fresh.machine.start()
        assert fresh.sh(f"[ ! -e {RUN} ] || ls -A {RUN}") == ""
        check_nothing_is_left(fresh)
        found = history_of(fresh)
        assert found[: len(before)] == before
        assert found[len(before) :] in MAY[count == SYNCS :]
        # The journal of a note that was cut short is rolled back by whoever reads, and goes.
        left = set(fresh.sh(f"ls {STATE}").split())
        assert left == DATABASES or (count < SYNCS and left == {"history.db"})
        source = fresh.source("next", TEXT)
        work = f"overlayd apply next {source} {BASE}; cat {BASE}/motd; overlayd remove next"
        assert "Try me." in fresh.sh(work, timeout=180).splitlines()
        before = [*found, ("apply", "next"), ("remove", "next")]
        assert history_of(fresh) == before


@pytest.mark.needs(Capability.POWER_CUT)
def test_history_is_whole_whenever_the_power_goes(
    fresh: Guest, rounds: int, tmp_path: Path, proof: Proof
) -> None:
    """Power cut of a machine at every write to the disk of its history."""
    once_elsewhere(fresh, rounds)
    image, log = tmp_path / "history", tmp_path / "log"
    with image.open("xb") as file:
        file.truncate(16 << 20)
    run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", image], what="making a disk")
    empty = image.read_bytes()
    log.touch()
    attach(fresh, Disk(path=image, format="raw", serial="history", log=log))
    fresh.sh(f"rm -rf {STATE}/*; mount /dev/disk/by-id/virtio-history {STATE}; rmdir {STATE}/*")
    names: Names = []
    acknowledged = []
    for number in range(5):
        for name in note_some(fresh, f"noted{number}"):
            names.append(name)
            acknowledged.append(blocklog.count(log))
    fresh.machine.power_cut()
    fresh.machine.close()
    for cut in blocklog.cuts(empty, blocklog.read(log)):
        proof.count()
        image.write_bytes(cut.image)
        command = [sys.executable, "-c", LOOK]
        found, files = json.loads(disk.look(image, command, disk_format="raw"))
        assert [tuple(one) for one in found] == names[: len(found)], str(cut)
        assert len(found) >= sum(entries <= cut.entries for entries in acknowledged), str(cut)
        assert set(files) - {"lost+found"} == DATABASES, str(cut)


def attach(guest: Guest, more: Disk) -> None:
    """Give the machine one more disk, which it gets by being off for a moment."""
    machine = guest.machine
    assert isinstance(machine, QemuMachine)
    machine.power_cut()
    machine.spec = replace(machine.spec, disks=(*machine.spec.disks, more))
    machine.start()
