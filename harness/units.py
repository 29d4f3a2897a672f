# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for a systemd unit, by the service manager's own signals and not by the clock."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.channel import Channel

_PROPERTIES: Final = (
    "LoadState,ActiveState,SubState,Type,Result,ConditionResult,ConditionTimestampMonotonic,"
    "InactiveEnterTimestampMonotonic"
)
_OBJECTS: Final = "/org/freedesktop/systemd1/unit/"
_SAFETY: Final = 5.0
"""Seconds after which it is asked again without a signal: the manager may have been re-executed."""
_JOBS_EVERY: Final = 0.5
"""The same for an inactive unit: that no job is left is signalled about others, not about it."""
_READY: Final = 5.0
_BLIND: Final = 0.25
"""The same where the manager's socket cannot be had."""


@dataclass(frozen=True)
class UnitState:
    """What became of a unit: whether it was reached, or why not."""

    reached: bool
    why: str

    def __str__(self) -> str:
        return self.why


_DONE: Final = UnitState(reached=True, why="has done its work")
_IDLE: Final = UnitState(
    reached=False, why="is inactive, and nothing is queued that would start it"
)
_FORGOTTEN: Final = UnitState(
    reached=False, why="is inactive, was not started yet, and nothing is queued that would do it"
)


def wait(channel: Channel, unit: str, timeout: float) -> UnitState:
    """Wait until *unit* is active, or has done its work if it is oneshot, or never will be.

    At most *timeout* seconds; the answer then says what it was still doing.
    """
    deadline = time.monotonic() + timeout
    changed = threading.Event()

    def note(message: Mapping[str, object]) -> None:
        if "ready" in message or "signal" in message or "done" in message:
            changed.set()

    with channel.asking("signals", on_line=note, word=object_path(unit)) as request:
        changed.wait(_READY)  # what happens from now on is signalled, what was before is looked up
        ran = False
        while True:
            changed.clear()
            shown = show(channel, unit)
            idle = shown.get("ActiveState") == "inactive"
            ran = ran or shown.get("ActiveState") in {"activating", "deactivating"}
            state = judge(shown, queued=not idle or _queued(channel), ran=ran)
            if state is _FORGOTTEN and _ran(channel, unit):
                return _DONE
            if state is not None:
                return state
            left = deadline - time.monotonic()
            if left <= 0:
                doing = f"{shown.get('ActiveState', '?')} ({shown.get('SubState', '?')})"
                return UnitState(reached=False, why=f"is still {doing} after {timeout:g} s")
            blind = request.over.is_set() or not shown
            pause = _BLIND if blind else _JOBS_EVERY if idle else _SAFETY
            changed.wait(min(left, pause))


def judge(shown: Mapping[str, str], *, queued: bool, ran: bool = False) -> UnitState | None:
    """Return what became of a unit with these properties; None while that is open.

    *queued* says whether the service manager still has something to do, *ran* whether the unit was
    seen to do something: it unloads units that are done and forgets when they were.
    """
    load, active = shown.get("LoadState", ""), shown.get("ActiveState", "")
    result = shown.get("Result", "success")
    if active in {"active", "reloading", "refreshing"}:
        return UnitState(reached=True, why=f"is {active}")
    if active == "failed":
        return UnitState(reached=False, why=f"failed: {result}")
    if load in {"not-found", "masked", "bad-setting", "error"}:
        return UnitState(reached=False, why=f"cannot be started: {load}")
    if active != "inactive":
        return None
    if (
        shown.get("ConditionResult") == "no"
        and shown.get("ConditionTimestampMonotonic", "0") != "0"
    ):
        return UnitState(reached=False, why="was skipped: a condition was not met")
    once = shown.get("Type") == "oneshot" and result == "success"
    if once and (ran or shown.get("InactiveEnterTimestampMonotonic", "0") != "0"):
        return _DONE
    if queued:
        return None
    return _FORGOTTEN if once else _IDLE


def _ran(channel: Channel, unit: str) -> bool:
    """Whether the journal has it that *unit* was started since the boot, and nothing went wrong."""
    wanted = [f"UNIT={unit}", "JOB_TYPE=start", "JOB_RESULT=done"]
    return bool(channel.run(["journalctl", "-qb", "-n1", "-ocat", *wanted]).stdout)


def show(channel: Channel, unit: str) -> dict[str, str]:
    """Return properties of *unit*, or of the service manager itself if that is empty.

    None at all while the manager cannot be asked, as when it re-executes itself.
    """
    what = ["--property=NJobs"] if not unit else [f"--property={_PROPERTIES}", "--", unit]
    out = channel.run(["systemctl", "show", *what]).out
    return dict(line.partition("=")[::2] for line in out.splitlines() if "=" in line)


def _queued(channel: Channel) -> bool:
    return show(channel, "").get("NJobs") != "0"


def object_path(unit: str) -> str:
    """Return the D-Bus path of *unit*: every byte but letters and digits is written ``_xx``."""
    return _OBJECTS + "".join(
        char if char.isascii() and char.isalnum() and (at or char.isalpha()) else _escaped(char)
        for at, char in enumerate(unit)
    )


def _escaped(char: str) -> str:
    return "".join(f"_{byte:02x}" for byte in char.encode())
