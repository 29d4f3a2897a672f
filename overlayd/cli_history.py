# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that look back: history and report."""

from __future__ import annotations

import re
import shutil
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from overlayd import caller, render
from overlayd import report as reports
from overlayd.cli_common import Common, common_options, complete_names, uid_of
from overlayd.errors import shown

if TYPE_CHECKING:
    from overlayd.history import Attempt

_AGO: Final = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DAYS_SHOWN: Final = 31
_TARGETS_SHOWN: Final = 20


def moment(text: str, now: float) -> float:
    """Return the time that ``--since`` names, in seconds since 1970; without a zone it is local.

    :raises click.UsageError: if it names none.
    """
    if match := _AGO.fullmatch(text):
        return now - int(match[1]) * _SECONDS[match[2]]
    from datetime import datetime, timedelta  # noqa: PLC0415

    try:
        if text in {"today", "yesterday"}:
            today = (
                datetime.fromtimestamp(now)
                .astimezone()
                .replace(  # local midnight
                    hour=0, minute=0, second=0, microsecond=0, tzinfo=None
                )
            )
            return (today - timedelta(days=text == "yesterday")).timestamp()
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        message = (
            f"{shown(text)!r} is not a time: 2026-11-27, 2026-11-27T08:30, 2h, 3d, today, yesterday"
        )
        raise click.UsageError(message) from None


def _user_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option("--user", metavar="UID|NAME", help="Only what this user did.")(command)


def _since_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--since", metavar="WHEN", help="Only what came after: a date, 2h, 3d, today, yesterday."
    )(command)


@click.command(short_help="Show what was attempted.")
@click.argument("name", required=False, shell_complete=complete_names)
@_user_option
@_since_option
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    metavar="N",
    help="The last so many.",
)
@common_options
def history(
    common: Common, *, name: str | None, user: str | None, since: str | None, limit: int
) -> None:
    """Show what was attempted, of the overlays called NAME or of all; the latest comes last.

    WHEN is a date or time such as 2026-11-27 or 2026-11-27T08:30, a while ago such as 30m, 2h, 3d
    or 1w, or today or yesterday.

    \b
    Examples:
      overlayd history
      overlayd history fix --since yesterday
      overlayd history --user root --since 2h --json
    """  # noqa: D301
    found = common.past(name=name, uid=_uid(user), since=_after(since), limit=limit + 1)
    attempts = found[-limit:]
    if common.json:
        click.echo(render.as_json([attempt_object(attempt) for attempt in attempts]))
        return
    if not attempts:
        click.echo("nothing was noted")
        return
    if len(found) > limit:
        click.echo(f"the last {limit}; there are earlier ones (--limit)")
    click.echo(_table(attempts))


def _uid(user: str | None) -> int | None:
    return None if user is None else uid_of(user)


def _after(since: str | None) -> float | None:
    return None if since is None else moment(since, time.time())


def attempt_object(attempt: Attempt) -> dict[str, object]:
    """Return the documented JSON object of an attempt."""
    whole = int(attempt.at)
    thousandths = int(attempt.at * 1000) % 1000
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
    return {
        **asdict(attempt),
        "at": f"{stamp}.{thousandths:03}Z",
        "seconds": round(attempt.seconds, 6),
    }


def _table(attempts: list[Attempt]) -> str:
    rows = [("WHEN", "USER", "WHAT", "NAME", "OUTCOME", "TOOK", "TARGET")]
    rows += [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.at)),
            shown(render.user_name(attempt.uid)),
            shown(attempt.verb),
            shown(attempt.name) or "-",
            shown(attempt.outcome),
            f"{attempt.seconds:.2f} s",
            shown(attempt.target) or "-",
        )
        for attempt in attempts
    ]
    return render.columns(rows)


@click.command(short_help="Sum up what was attempted.")
@_user_option
@_since_option
@common_options
def report(common: Common, *, user: str | None, since: str | None) -> None:
    """Sum up what was attempted: by user, by target, by outcome, and the applies of each day.

    In use is the time from an apply to the remove; overlays that a reboot took away count until
    the last thing that was noted before it.

    \b
    Examples:
      overlayd report
      overlayd report --since 1w
      overlayd report --user root --since 2026-11-01 --json
    """  # noqa: D301
    uid, after = _uid(user), _after(since)
    summary = reports.summed(
        common.past(), now=time.time(), boot_id=caller.boot_id(), uid=uid, since=after
    )
    if common.json:
        click.echo(render.as_json(summary.as_object()))
        return
    if not summary.users:
        click.echo("nothing was noted")
        return
    click.echo("\n\n".join(_sections(summary)))


def _sections(summary: reports.Report) -> list[str]:
    """Return the parts of a report for people."""
    head = ("ATTEMPTS", "APPLIED", "FAILED", "IN USE")
    users = [(shown(render.user_name(uid)), line) for uid, line in summary.users.items()]
    targets = [(shown(target), line) for target, line in summary.targets.items()]
    sections = [
        render.columns(
            [(title, *head)]
            + [
                (key, str(x.attempts), str(x.applies), str(x.failed), reports.span(x.seconds))
                for key, x in lines[:_TARGETS_SHOWN]
            ]
        )
        + (f"\nand {len(lines) - _TARGETS_SHOWN} more" if len(lines) > _TARGETS_SHOWN else "")
        for title, lines in (("USER", users), ("TARGET", targets))
        if lines
    ]
    if not summary.attempts:
        return sections
    outcomes = [(shown(key), str(number)) for key, number in summary.outcomes.most_common()]
    sections.append(render.columns([("OUTCOME", "ATTEMPTS"), *outcomes]))
    if summary.days:
        days = dict(list(summary.days.items())[-_DAYS_SHOWN:])
        title = "APPLIED PER DAY"
        if len(days) < len(summary.days):
            title += f", the last {_DAYS_SHOWN} days"
        width = shutil.get_terminal_size().columns
        sections.append(f"{title}\n{reports.bars(days, width, sys.stdout.encoding or 'ascii')}")
    return sections
