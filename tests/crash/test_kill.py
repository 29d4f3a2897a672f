# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL before and after every system call that changes anything, one after another."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from tests.crash import tracing
from tests.crash.private_scenes import SCENES as PRIVATE
from tests.crash.scenes import SCENES, Scene, Stage
from tests.crash.tracing import Do

if TYPE_CHECKING:
    from tests.crash.private_scenes import Users
    from tests.crash.tried import Proof
    from tests.mounts.conftest import World

_MOODS = 8
"""Calls by which two runs of one command may differ: threads wait for each other, or do not."""


def sweep(stage: Stage, scene: Scene, how: Do, proof: Proof) -> None:
    """Kill a command at each of its points, until it ends before there is one."""
    before, after, points = scene.extent(stage)
    for number in itertools.count():
        stage.clear()
        scene.prepare(stage)
        outcome = scene.run(stage, tracing.at(number, how))
        if outcome.acted is None:
            assert outcome.code == scene.code
            break
        assert outcome.code == -9, outcome.said
        proof.count()
        try:
            stage.check(before, after)
            stage.use(number)
        except BaseException as error:
            error.add_note(f"{how.value} {outcome.acted}")
            raise
    assert number >= len(points) - _MOODS
    stage.clear()


@pytest.mark.parametrize("how", Do)
@pytest.mark.parametrize("name", SCENES)
def test_killed_at_each_system_call(world: World, proof: Proof, name: str, how: Do) -> None:
    """SIGKILL at each system call that changes anything."""
    tracing.need()
    start = time.monotonic()
    sweep(Stage(world), SCENES[name], how, proof)
    proof.remark(f"{proof.tried / (time.monotonic() - start):.0f} kills/s")


@pytest.mark.parametrize("name", ["apply", "reset", "remove"])
def test_killed_again_while_it_is_settled(world: World, proof: Proof, name: str) -> None:
    """SIGKILL of the command that settles what a killed one left, at each of its system calls."""
    tracing.need()
    stage, scene, settle = Stage(world), SCENES[name], Scene(("list",))
    before, after, points = scene.extent(stage)
    cuts = range(len(points)) if proof.whole else range(3, len(points), len(points) // 6)
    for cut in cuts:
        for number in itertools.count():
            stage.clear()
            scene.prepare(stage)
            scene.run(stage, tracing.at(cut, Do.KILL))
            outcome = settle.run(stage, tracing.at(number, Do.KILL))
            if outcome.acted is None:
                assert outcome.code == 0, outcome.said
                break
            proof.count()
            stage.check(before, after)
            stage.use(number)
    stage.clear()


@pytest.mark.parametrize("name", PRIVATE)
def test_private_commands_are_killed(users: Users, proof: Proof, name: str) -> None:
    """SIGKILL of each process of a command of private overlays at each of its system calls."""
    scene = PRIVATE[name]
    before, after, points = scene.extent(users)
    step = 1 if proof.whole else 6
    for number in itertools.count(proof.seed % step, step):
        users.clear()
        scene.prepare(users)
        outcome = scene.run(users, tracing.at(number, Do.KILL))
        if outcome.acted is None:
            break
        proof.count()
        try:
            users.check(before, after)
        except BaseException as error:
            error.add_note(f"killed before {outcome.acted}")
            raise
    assert number >= len(points) - _MOODS
    users.clear()
