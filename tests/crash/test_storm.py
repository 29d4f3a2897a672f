# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many processes at once, killed at random moments: what stays is consistent, and nobody waits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from overlayd import mountinfo, observer, store
from overlayd import syscalls as sc
from overlayd.errors import ExistsError
from overlayd.model import is_within
from tests.crash.forked import children
from tests.crash.storming import (
    ANSWERS,
    NAMES,
    PROCESSES,
    TARGETS,
    Storm,
    lay_out,
    what_shows,
)
from tests.mounts.conftest import PLAY, RUN, SOURCES, World, bind, enter_new_world, mount, snapshot

if TYPE_CHECKING:
    from tests.crash.tried import Proof

_BATCH: Final = {True: 250, False: 40}
_BATCHES: Final = {True: 8, False: 2}
_SEEDS: Final = {True: 5, False: 1}
LONGEST_CHANGE: Final = store.WORLD_PATIENCE + store._PATIENCE
"""Seconds: the lock of all, and that of one overlay."""
LONGEST_LOOK: Final = observer._WORLD_PATIENCE + len(NAMES) * observer._PATIENCE
"""Seconds: the lock of all, and each overlay at work."""
_VIEW: Final = Path("/run/view")


def base_as_it_is() -> dict[str, tuple[object, ...]]:
    """Return the playground without what is mounted on it, through a mount made for this."""
    _VIEW.mkdir(exist_ok=True)
    bind(PLAY, _VIEW)
    try:
        found = snapshot(_VIEW)
    finally:
        sc.umount2(str(_VIEW))
    return {name.removeprefix(str(_VIEW)): facts for name, facts in found.items()}


def foreign_mounts() -> set[tuple[int, str]]:
    """Return the mounts that are not overlayd's."""
    table = mountinfo.read()
    return {
        (each.mount_id, each.mount_point)
        for each in table.within("/")
        if each.tag is None and not is_within(each.mount_point, str(RUN))
    }


def check(world: World, base: dict[str, tuple[object, ...]], beside: dict[str, int]) -> None:
    """Check all that must be true whenever nobody is at work."""
    found = world.manager().list(draining=True)
    assert {overlay.state for overlay in found} == {"active"}, "nobody holds what was removed"
    world.check_invariants()
    assert store.quarantined() == []
    assert base_as_it_is() == base
    assert {o.record.name: o.mount_id for o in found if o.record.name in beside} == beside
    live = {overlay.record.mount_point: overlay for overlay in found}
    for point, overlay in live.items():
        assert not [other for other in live if other.startswith(f"{point}/")]
        assert overlay.record.tree is not None
        assert what_shows(Path(point)) == ("new" if overlay.record.tree.version else "base")
        inside = Path(point, "in")
        if inside.is_dir():
            with pytest.raises(ExistsError) as caught:
                world.apply("nested", SOURCES / "storm", inside)
            assert "do not nest" in str(caught.value.hint)
    for target in set(TARGETS) - {str(Path(point).relative_to(PLAY)) for point in live}:
        path = PLAY / target
        if not any(is_within(str(path), point) for point in live):
            assert what_shows(path) == "base"


def test_many_processes_at_once_and_some_killed_leave_all_consistent(proof: Proof) -> None:
    """A storm of commands, some killed."""
    proof.random = True
    waits = {"longest look": 0.0, "longest change": 0.0}
    answers = dict.fromkeys(ANSWERS, 0)
    kills, seconds = 0, 0.0
    before = children()
    for seed in range(proof.seed, proof.seed + _SEEDS[proof.whole]):
        enter_new_world()
        world = World()
        lay_out()
        beside = {}
        for name in ("beside", "besides"):
            overlay = world.apply(name, SOURCES / "storm", world.base(name, {"a": "base"}))
            assert overlay.mount_id is not None
            beside[name] = overlay.mount_id
        mount("theirs", world.base("theirs", {}), "tmpfs")
        base, foreign = base_as_it_is(), foreign_mounts()
        with Storm(world, seed) as storm:
            for _ in range(_BATCHES[proof.whole]):
                proof.count(PROCESSES * _BATCH[proof.whole])
                storm.blow(_BATCH[proof.whole])
                check(world, base, beside)
                assert foreign_mounts() == foreign
            for what, longest in waits.items():
                waits[what] = max(longest, storm.most(what))
            for answer in ANSWERS:
                answers[answer] += storm.sum(answer)
            kills += storm.kills
            seconds += storm.seconds
        assert children() == before
        for overlay in world.manager().list():
            world.manager().remove(overlay.record.name)
        assert world.leftovers() == []
        assert foreign_mounts() == foreign
        assert base_as_it_is() == base
    assert kills
    assert answers["done"] > proof.tried / 4, answers
    assert answers["exists"] > 0
    proof.remark(", ".join(f"{number} {answer}" for answer, number in answers.items()))
    proof.remark(f"{kills} killed in the middle")
    proof.remark(f"{proof.tried / seconds:.0f} operations a second by {PROCESSES} processes")
    proof.remark(f"a look took {waits['longest look']:.2f} s at most (bound: {LONGEST_LOOK:g} s)")
    proof.remark(
        f"a change took {waits['longest change']:.2f} s at most (bound: {LONGEST_CHANGE:g} s)"
    )
    assert waits["longest look"] < LONGEST_LOOK
    assert waits["longest change"] < LONGEST_CHANGE
