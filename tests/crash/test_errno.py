# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every system call of a command fails in turn: an honest error, and nothing of it is left."""

from __future__ import annotations

import errno
import random
import time
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Final

import pytest

from tests.crash import tracing
from tests.crash.private_scenes import SCENES as PRIVATE
from tests.crash.scenes import SCENES, Scene, Stage, View

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.crash.private_scenes import Users
    from tests.crash.tracing import Act, Outcome, Point
    from tests.crash.tried import Proof
    from tests.mounts.conftest import World

CLASSES: Final = (
    *(errno.ENOSPC, errno.EMFILE, errno.EINTR, errno.EPERM, errno.EBUSY, errno.EINVAL),
    *(errno.ENOSYS, errno.EIO),
)
"""One of each kind: space, limits, interruption, permission, busy, invalid, missing call, I/O."""
TOLD_APART: Final = (
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.EAGAIN, errno.EACCES),
    *(errno.EOPNOTSUPP, errno.EDQUOT, errno.EROFS, errno.ESRCH, errno.EXDEV, errno.ENOMEM),
)
"""Those that the code looks for beside these."""
CODES: Final = {0, 1, *range(3, 11)}
"""Exit codes that an error of the kernel's may have; 1 where the output cannot be written."""
_LIES: Final = {
    *((call, errno.ENOENT) for call in ("rmdir", "unlink", "umount2", "newfstatat", "getdents64")),
    ("umount2", errno.EINVAL),
    ("read", errno.EAGAIN),
}
"""What the kernel says only of what is gone already, or does not block, while here it is not so."""
_CODE_1: Final = ("writing the output", "some of it could not be removed")


def cases(points: list[Point], seed: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Yield points by number, and errnos; not *whole*: one for each point, all in turn."""
    generator = random.Random(seed)
    for point in points:
        kinds = [
            [error for error in kind if (point.call, error) not in _LIES]
            for kind in (CLASSES, TOLD_APART)
        ]
        # As many of the classes as of the others.
        some = [generator.choice(generator.choice(kinds))]
        yield from ((point.number, error) for error in (kinds[0] + kinds[1] if whole else some))


def failing(number: int, error: int) -> Callable[[Point], Act]:
    """Let point *number* fail, unless another call is there this time that may not fail so."""
    return lambda point: (
        error if point.number == number and (point.call, error) not in _LIES else None
    )


class End(Enum):
    """What became of a command in which something failed."""

    DONE = "done all the same"
    FINISHED = "finished by the next command"
    UNDONE = "undone"


def check(stage: Stage, outcome: Outcome, before: View, after: View, there: list[str]) -> End:
    """Assert that a command did what it was to do, or that nothing of it is left; say which."""
    said = outcome.said
    assert "Traceback" not in said, said
    assert outcome.code in CODES, said
    if outcome.code == 0:
        stage.check(after)
        return End.DONE
    assert said.startswith("overlayd: ") or "\noverlayd: " in said, said
    if outcome.code == 1:
        assert any(text in said for text in _CODE_1), said
    undone = stage.view() == before and stage.inventory() == there
    stage.check(before, after)
    if undone:
        assert stage.view() == before
        return End.UNDONE
    assert stage.view() == after or "overlays failed" in said, said
    return End.FINISHED


def _said(outcome: Outcome) -> str:
    assert outcome.acted is not None
    return f"{outcome.acted.call}, point {outcome.acted.number}: {outcome.code}, {outcome.said}"


def fail_each(world: World, scene: Scene, calls: dict[int, str], proof: Proof) -> None:
    """Let each of *calls* that a command makes fail."""
    tracing.need()
    stage = Stage(world)
    proof.random = not proof.whole
    start = time.monotonic()
    before, after, points = scene.extent(stage, calls)
    ends: Counter[End] = Counter()
    problems: list[str] = []
    for number, error in cases(points, proof.seed, whole=proof.whole):
        stage.clear()
        scene.prepare(stage)
        there = stage.inventory()
        outcome = scene.run(stage, failing(number, error), calls)
        if outcome.acted is None:
            continue  # threads, or a history that needs less
        proof.count()
        try:
            end = check(stage, outcome, before, after, there)
            ends[end] += 1
            if end is End.UNDONE:
                again = scene.run(stage)
                assert again.code == scene.code, again.said
                stage.check(after)
        except AssertionError as problem:
            problems.append(f"{errno.errorcode[error]} of {_said(outcome)}: {problem}")
    stage.clear()
    assert not problems, "\n".join(problems)
    proof.remark(f"{proof.tried / (time.monotonic() - start):.0f} cases/s")
    proof.remark(", ".join(f"{ends[end]} {end.value}" for end in End))


@pytest.mark.parametrize("name", [name for name in SCENES if "thread" not in name])
def test_each_call_that_changes_something_fails(world: World, proof: Proof, name: str) -> None:
    """An errno of each class from each system call that changes anything."""
    fail_each(world, SCENES[name], tracing.CHANGING, proof)


@pytest.mark.parametrize("name", ["apply", "reset", "remove"])
def test_each_call_that_looks_fails(world: World, proof: Proof, name: str) -> None:
    """An errno of each class from each system call that looks at something."""
    fail_each(world, SCENES[name], tracing.LOOKING, proof)


@pytest.mark.parametrize("name", PRIVATE)
def test_each_call_of_a_private_command_fails(users: Users, proof: Proof, name: str) -> None:
    """An errno from each system call of a command of private overlays."""
    scene = PRIVATE[name]
    proof.random = True
    before, after, points = scene.extent(users)
    step = 1 if proof.whole else 6
    every = [*cases(points, proof.seed, whole=False)]  # each takes most of a second
    for number, error in every[proof.seed % step :: step]:
        users.clear()
        scene.prepare(users)
        outcome = scene.run(users, failing(number, error))
        if outcome.acted is None:
            continue
        proof.count()
        try:
            assert "Traceback" not in outcome.said
            assert outcome.code in CODES
            users.check(*([after] if outcome.code == 0 else [before, after]))
            if outcome.code and users.view() == before:
                assert scene.run(users).code == 0
                users.check(after)
        except AssertionError as problem:
            problem.add_note(f"{errno.errorcode[error]} of {_said(outcome)}")
            raise
    users.clear()
