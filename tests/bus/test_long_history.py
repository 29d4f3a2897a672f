# SPDX-License-Identifier: LGPL-2.1-or-later
"""A long history, asked for again and again."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from overlayd import history
from tests.bus.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Bus


def longest_wait(storm: Callable[[], None], count: int, seconds: float = 2.5) -> float:
    """Return how long a user's List takes at most while others make a storm."""
    children = []
    for _ in range(count):
        if not (pid := os.fork()):
            try:
                storm()
            finally:
                os._exit(0)
        children.append(pid)
    waits = []
    try:
        with Peer("carol") as carol:
            time.sleep(0.5)
            ended = time.monotonic() + seconds
            while time.monotonic() < ended:
                began = time.monotonic()
                assert not carol.list(timeout=60).error
                waits.append(time.monotonic() - began)
                time.sleep(0.11)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return max(waits)


def test_long_history_keeps_nobody_waiting(bus: Bus) -> None:
    attempt = history.Attempt(
        at=1.0,
        uid=7001,
        session_id=1,
        pid=1,
        via="bus",
        verb="apply",
        name="hers",
        target="/usr/share/somewhere",
        source="/home/alice/src",
        uuid="x" * 36,
        allowed=True,
        rule="r",
        digest="d" * 64,
        outcome="done",
        message="m" * 100,
        seconds=1.0,
        login_uid=7001,
    )
    assert history.note_all([attempt] * 12_000)
    bus.serve()

    def storm() -> None:
        with Peer("alice") as alice:
            while True:
                alice.call("History", "a{sv}", ({},))

    wait = longest_wait(storm, 2)
    assert wait < 2.0, wait
