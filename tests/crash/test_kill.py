# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL before and after every system call that changes anything, one after another."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from tests.crash import tracing
from tests.crash.scenes import SCENES, Scene, Stage
from tests.crash.tracing import Do

if TYPE_CHECKING:
    from tests.crash.conftest import Proof
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
