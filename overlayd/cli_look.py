# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that look: list, status, dump, doctor; and cleanup."""

from __future__ import annotations

import os
import sys

import click

from overlayd import render
from overlayd.cli_common import (
    Common,
    check_stateroot,
    common_options,
    complete_names,
    recorded,
    stateroot_option,
    uid_of,
)
from overlayd.errors import KernelError, OverlaydError, ServiceError


@click.command("list", short_help="Show the overlays.")
@click.option("--user", metavar="UID|NAME", help="Only those of this owner.")
@stateroot_option
@click.option("--all", "draining", is_flag=True, help="Also removed ones that are still in use.")
@common_options
def list_(common: Common, *, user: str | None, stateroot: str | None, draining: bool) -> None:
    """Show the overlays.

    States: active; lost (somebody unmounted it); covered (something is mounted over it); draining
    (removed, and programs still use it).

    \b
    Examples:
      overlayd list
      overlayd list --user root --json
    """  # noqa: D301
    check_stateroot(stateroot)
    overlays = common.observer().list(draining=draining)
    if user is not None:
        uid = uid_of(user)
        overlays = [overlay for overlay in overlays if overlay.record.owner == uid]
    if common.json:
        click.echo(render.as_json([render.overlay_object(overlay) for overlay in overlays]))
    else:
        click.echo(render.overlay_table(overlays))


@click.command(short_help="Show one overlay, or your limits.")
@click.argument("name", required=False, shell_complete=complete_names)
@click.option("--limits", is_flag=True, help="What you have of each limit, and how much you may.")
@common_options
def status(common: Common, *, name: str | None, limits: bool) -> None:
    """Show everything about the overlay NAME, or your limits.

    \b
    Examples:
      overlayd status fix
      overlayd status --limits
    """  # noqa: D301
    if limits == (name is not None):
        raise click.UsageError("Give either the NAME of an overlay or --limits.")
    if name is not None:
        overlay = common.observer().status(name)
        common.show(overlay, render.overlay_details(overlay))
        return
    found = common.manager().limits()
    if common.json:
        click.echo(render.as_json({k: {"used": u, "limit": m} for k, (u, m) in found.items()}))
    else:
        click.echo(render.limits_table(found))


@click.command(short_help="Write the batch file that makes the present overlays again.")
@common_options
def dump(common: Common) -> None:
    """Write a file for 'overlayd batch' that makes the present overlays again, after a reboot say.

    What was edited in them is not in it.
    """
    from overlayd import batch as batches  # noqa: PLC0415

    overlays = common.observer().list()
    text = batches.dump(overlays)
    click.echo(render.as_json({"toml": text}) if common.json else text, nl=common.json)


@click.command(short_help="Remove what is lost or left over.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@common_options
def cleanup(common: Common, *, dry_run: bool) -> None:
    """Remove what has no use any more: lost overlays, orphaned mounts, records in quarantine.

    What cannot be proven to be overlayd's is left alone; see 'overlayd doctor'.
    """
    manager = common.manager()
    with recorded(common, "cleanup", enabled=not dry_run) as noted:
        actions = manager.cleanup(dry_run=dry_run)
        noted.cleaned(actions)
    if common.json:
        fields = ("kind", "subject", "text", "failed")
        click.echo(render.as_json([{f: getattr(a, f) for f in fields} for a in actions]))
    elif not actions:
        click.echo("nothing to clean up")
    else:
        for action in actions:
            end = f": {action.failed}" if action.failed else ""
            click.echo(f"{'would remove ' if dry_run else ''}{action.text}{end}")
    if any(action.failed for action in actions):
        message = "some of it could not be removed"
        raise OverlaydError(message)


@click.command(short_help="Say whether overlayd works here, and what is wrong.")
@common_options
def doctor(common: Common) -> None:
    """Try what the kernel can do, look at limits and leftovers, and say what is wrong.

    For users other than root: whether there are the service and a polkit, and whether their
    overlays show what they should.  Exits with 0 only if overlayd would work.
    """
    from overlayd import doctor as doctors  # noqa: PLC0415

    if os.geteuid() == 0:
        report = doctors.examine(common.load)
    else:
        report = doctors.examine_service(common.client, common.load)
    click.echo(render.as_json(report.as_object()) if common.json else report.as_text())
    if not report.ok:
        sys.exit(KernelError.exit_code if os.geteuid() == 0 else ServiceError.exit_code)
