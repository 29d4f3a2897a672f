# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attempt to start from."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from overlayd.history import Attempt

NOON: Final = 1_790_000_000.0
NOWHERE: Final = "/nonexistent/journal"

_SOME: Final = Attempt(
    at=NOON,
    uid=0,
    session_id=3,
    pid=4711,
    via="direct",
    verb="apply",
    name="fix",
    target="/usr/share/app",
    source="/root/app",
    uuid="4ca82b18-8345-41c2-857d-cbc1686fb806",
    allowed=True,
    rule="root",
    digest="",
    outcome="done",
    message="",
    seconds=0.5,
    login_uid=1000,
    boot_id="25276e32-91b4-43d5-9bbe-ed472651a80b",
)


def attempt(**changes: object) -> Attempt:
    """Return an attempt, with some fields changed."""
    return replace(_SOME, **changes)  # type: ignore[arg-type]
