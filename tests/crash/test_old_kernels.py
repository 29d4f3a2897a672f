# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls, and forms of them, that older kernels do not have."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from overlayd import syscalls as sc
from tests.crash import tracing
from tests.crash.scenes import SCENES, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.tracing import Act, Point
    from tests.crash.tried import Proof
    from tests.mounts.conftest import World

_EVERY: Final = tracing.CHANGING | tracing.LOOKING


@dataclass(frozen=True)
class Old:
    """What a kernel lacks, the errno that it says then, and whether overlayd needs it."""

    lacks: Callable[[Point], bool]
    says: int
    needed: bool = False

    def act(self, point: Point) -> Act:
        """Fail what is missing."""
        return self.says if self.lacks(point) else None


def _option(point: Point, name: str) -> bool:
    return point.call == "fsconfig" and bool(point.arguments[2]) and point.text(2) == name


KERNELS: Final = {
    "no openat2 (5.6)": Old(lambda point: point.call == "openat2", errno.ENOSYS, needed=True),
    "no mount API (5.2)": Old(lambda point: point.call == "fsopen", errno.ENOSYS, needed=True),
    "no mount beneath (6.5)": Old(
        lambda point: (
            point.call == "move_mount" and bool(point.arguments[4] & sc.MOVE_MOUNT_BENEATH)
        ),
        errno.EINVAL,
    ),
    "no lowerdir+ (6.8)": Old(lambda point: _option(point, "lowerdir+"), errno.EINVAL),
    "no statmount (6.8)": Old(lambda point: point.call in {"statmount", "listmount"}, errno.ENOSYS),
    "no unique mount ids (6.8)": Old(
        lambda point: point.call == "statx" and bool(point.arguments[3] & sc.STATX_MNT_ID_UNIQUE),
        errno.EINVAL,
    ),
    "no layers by descriptor (6.13)": Old(
        lambda point: point.call == "fsconfig" and point.arguments[1] == sc.FSCONFIG_SET_FD,
        errno.EINVAL,
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_older_kernel_is_enough_or_it_is_said(world: World, proof: Proof, kernel: str) -> None:
    """A command on a kernel that lacks something."""
    tracing.need()
    stage, old = Stage(world), KERNELS[kernel]
    met = 0
    for name, scene in SCENES.items():
        before, after, _ = scene.extent(stage)
        stage.clear()
        scene.prepare(stage)
        there = stage.inventory()
        outcome = scene.run(stage, old.act, _EVERY)
        proof.count()
        met += outcome.acted is not None
        try:
            if outcome.acted is None or not old.needed:
                assert outcome.code == scene.code, outcome.said
                stage.check(after)
            else:
                assert outcome.code == 9, outcome.said
                assert "Traceback" not in outcome.said
                assert stage.inventory() == there
                stage.check(before)
        except BaseException as error:
            error.add_note(f"{name}: {outcome.code}, {outcome.said}")
            raise
    assert met, "nothing asks for it any more"
    stage.clear()
