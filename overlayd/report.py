# SPDX-License-Identifier: LGPL-2.1-or-later
"""Summing up the history: by user, by target, by outcome and by day, and the time in use.  Pure."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from overlayd.history import DONE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from overlayd.history import Attempt

_DAY: Final = "%Y-%m-%d"
_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Use:
    """The time for which one overlay was there, in seconds since 1970.

    ``end`` is *now* if it is there ``still``, and may lie before ``start`` if a clock was set.
    """

    name: str
    target: str
    uid: int
    uuid: str
    start: float
    end: float
    still: bool


def uses(attempts: Iterable[Attempt], *, now: float, boot_id: str) -> list[Use]:
    """Return for how long each overlay was in use, from *attempts*, the oldest first.

    That is from a successful apply to the successful remove of the same uuid, or the cleanup of its
    name in the same boot.  One of the present boot *boot_id* without an end counts until *now*.
    History does not know when an earlier boot ended: what was open then counts until the last thing
    that was noted of that boot, so it is too short by however long the machine ran on.  Somebody
    else's unmounting is not noted, and a remove with ``--lazy`` ends the time although programs
    may go on.
    """
    begun: dict[str, Attempt] = {}
    ended: dict[str, float] = {}
    names: dict[tuple[str, str], str] = {}
    latest: dict[str, float] = {}
    for attempt in attempts:
        at = attempt.at + attempt.seconds
        latest[attempt.boot_id] = max(at, latest.get(attempt.boot_id, 0.0))
        if attempt.outcome != DONE:
            continue
        uuid = attempt.uuid
        if attempt.verb == "apply" and uuid:
            begun[uuid] = attempt
            names[attempt.boot_id, attempt.name] = uuid
        elif attempt.verb == "remove" and uuid:
            ended[uuid] = at
        elif attempt.verb == "cleanup" and attempt.name:
            uuid = names.pop((attempt.boot_id, attempt.name), "")
            ended.setdefault(uuid, at)
    found = []
    for uuid, first in begun.items():
        still = uuid not in ended and first.boot_id == boot_id
        end = now if still else ended.get(uuid, latest[first.boot_id])
        start = first.at + first.seconds
        found.append(Use(first.name, first.target, first.uid, uuid, start, end, still))
    return found


@dataclass(slots=True)
class Line:
    """Counts of one user or target."""

    attempts: int = 0
    applies: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Report:
    """Everything that ``report`` says; ``days`` are those of the local calendar, without gaps."""

    attempts: int = 0
    users: dict[int, Line] = field(default_factory=dict)
    targets: dict[str, Line] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    days: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def as_object(self) -> dict[str, object]:
        """Return the documented JSON object."""
        return {
            "attempts": self.attempts,
            "by_user": [{"uid": uid, **_line(line)} for uid, line in self.users.items()],
            "by_target": [{"target": key, **_line(line)} for key, line in self.targets.items()],
            "by_outcome": dict(self.outcomes.most_common()),
            "applies_per_day": [{"day": day, "applies": n} for day, n in self.days.items()],
            "seconds_in_use": round(self.seconds, 3),
        }


def _line(line: Line) -> dict[str, object]:
    return {
        "attempts": line.attempts,
        "applies": line.applies,
        "failed": line.failed,
        "seconds_in_use": round(line.seconds, 3),
    }


def summed(
    attempts: Iterable[Attempt],
    *,
    now: float,
    boot_id: str,
    uid: int | None = None,
    since: float | None = None,
) -> Report:
    """Sum up what *uid* did after *since*; ``applies`` are those that were done.

    *attempts* are all that there are, the oldest first: an overlay may be older than *since*, and
    somebody else may have removed it.  Its time in use counts for whoever applied it.
    """
    everything = list(attempts)
    after = float("-inf") if since is None else since
    report = Report()
    done = []
    for attempt in everything:
        if attempt.at < after or uid not in {None, attempt.uid}:
            continue
        report.attempts += 1
        report.outcomes[attempt.outcome] += 1
        lines = [report.users.setdefault(attempt.uid, Line())]
        if attempt.target:
            lines.append(report.targets.setdefault(attempt.target, Line()))
        applied = attempt.verb == "apply" and attempt.outcome == DONE
        for line in lines:
            line.attempts += 1
            line.applies += applied
            line.failed += attempt.outcome != DONE
        if applied:
            done.append(attempt.at)
    for use in uses(everything, now=now, boot_id=boot_id):
        seconds = use.end - max(use.start, after)
        if seconds <= 0 or uid not in {None, use.uid}:
            continue
        report.seconds += seconds
        report.users.setdefault(use.uid, Line()).seconds += seconds
        if use.target:
            report.targets.setdefault(use.target, Line()).seconds += seconds
    report.days = per_day(done)
    report.users = _busiest_first(report.users)
    report.targets = _busiest_first(report.targets)
    return report


def _busiest_first(lines: dict[_Key, Line]) -> dict[_Key, Line]:
    return dict(sorted(lines.items(), key=lambda item: -item[1].attempts))


_MOST_DAYS: Final = 366


def per_day(moments: Sequence[float]) -> dict[str, int]:
    """Count *moments* by local day; the days between are there too, of a year at most."""
    counts = Counter(time.strftime(_DAY, time.localtime(moment)) for moment in moments)
    if not counts:
        return {}
    first, last = min(moments), max(moments)
    first = max(first, last - _MOST_DAYS * 86400)
    days: dict[str, int] = {}
    moment = first
    while moment < last:
        day = time.strftime(_DAY, time.localtime(moment))
        days[day] = counts[day]
        moment += 43200  # half a day: not every day has 24 hours
    day = time.strftime(_DAY, time.localtime(last))
    days[day] = counts[day]
    return days


_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


def bars(counts: dict[str, int], width: int, encoding: str) -> str:
    """Draw one line per key within *width* columns, in what *encoding* has."""
    try:
        _EIGHTHS.encode(encoding)
        blocks = _EIGHTHS
    except (UnicodeEncodeError, LookupError):
        blocks = " #"
    most = max(counts.values(), default=0)
    key_width = max(map(len, counts), default=0)
    room = width - key_width - 2 - 1 - len(str(most))
    lines = []
    for key, count in counts.items():
        bar = _bar(count, most, room, blocks) if room > 0 else ""
        lines.append(f"{key.ljust(key_width)}  {f'{bar} ' if bar else ''}{count}"[: max(width, 1)])
    return "\n".join(lines)


def _bar(count: int, most: int, room: int, blocks: str) -> str:
    """Draw *count*; anything but nothing is seen."""
    if not count:
        return ""
    parts = len(blocks) - 1
    length = max(count * room * parts // most, 1)
    whole, rest = divmod(length, parts)
    return blocks[-1] * whole + (blocks[rest] if rest else "")


def span(seconds: float) -> str:
    """Write how long, in the two largest units."""
    rest = int(seconds)
    words: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, rest = divmod(rest, size)
        if number or (unit == "s" and not words):
            words.append(f"{number} {unit}")
        elif words:
            break
    return " ".join(words[:2])
