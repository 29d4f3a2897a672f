# SPDX-License-Identifier: LGPL-2.1-or-later
"""A long history, asked for again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overlayd import history
from tests.bus.peer import Peer, waits_beside

if TYPE_CHECKING:
    from tests.bus.conftest import Bus


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

    with Peer("alice") as alice:
        alone = alice.call("History", "a{sv}", ({},)).seconds
    wait = max(waits_beside([storm] * 2))
    assert wait < max(2.0, 10 * alone), (wait, alone)
