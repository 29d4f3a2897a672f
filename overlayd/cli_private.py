# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that show private overlays to programs: enter, run, attach, detach."""

from __future__ import annotations

import os
import pwd

import click

from overlayd import render
from overlayd.cli_common import Common, absolute, common_options, complete_names, recorded
from overlayd.errors import NoPermissionError
from overlayd.model import Options, Request

_REST = {"allow_interspersed_args": False}
_AS_ROOT = "As uid 0 of the user namespace, which can change owners; needs subordinate uids."


@click.command(short_help="Run a program that sees your private overlays.", context_settings=_REST)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="NAME... [-- COMMAND]")
@click.option("--as-root", is_flag=True, help=_AS_ROOT)
@common_options
def enter(common: Common, *, words: tuple[str, ...], as_root: bool) -> None:
    """Run COMMAND, or a shell, where the private overlays NAME can be seen.

    All of your private overlays are seen there, and what everybody sees, too. Any number of
    programs can be there at a time. Nothing in there gains rights: sudo and its like do not work.
    Root makes private overlays by 'overlayd apply --private'.

    \b
    Examples:
      overlayd apply fix ./share/app /usr/share/app
      overlayd enter fix
      overlayd enter fix -- app --version
      overlayd enter --as-root fix -- chown -R www-data: /usr/share/app/cache
    """  # noqa: D301
    del common  # its options are every command's
    names, command = _split(words)
    if not names:
        raise click.UsageError("Give the NAME of a private overlay.")
    from overlayd import entrance  # noqa: PLC0415  # after what is wrong with the words

    entrance.enter(names, command, as_root=as_root)


@click.command(short_help="Run a program that alone sees some overlays.", context_settings=_REST)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SOURCE:TARGET... [-- COMMAND]")
@click.option("--as-root", is_flag=True, help=_AS_ROOT)
@common_options
def run(common: Common, *, words: tuple[str, ...], as_root: bool) -> None:
    """Run COMMAND, or a shell, with each SOURCE laid over its TARGET, a path under /usr.

    Nobody else sees them, they have no names, and they are gone when it ends.

    \b
    Examples:
      overlayd run ./share/app:/usr/share/app -- app --version
      overlayd run ./lib:/usr/lib/app ./share:/usr/share/app
    """  # noqa: D301
    pairs, command = _split(words)
    if not pairs:
        raise click.UsageError("Give at least one SOURCE:TARGET.")
    requests = []
    for number, pair in enumerate(pairs, 1):
        source, colon, target = pair.rpartition(":")
        if not colon:
            raise click.UsageError(f"Not of the form SOURCE:TARGET: {pair}")
        requests.append(
            Request(
                name=f"run-{number}",
                source=absolute(source, "SOURCE"),
                target=absolute(target, "TARGET"),
                options=Options(),
                size=None,
            )
        )
    common.private().run(requests, command, as_root=as_root)


_unit = click.option("--unit", metavar="UNIT", help="The service, such as foo.service.")
_restart = click.option("--restart", is_flag=True, help="Start it again now, if it runs.")


@click.command(short_help="Show a private overlay of root's to one service.")
@click.argument("name", shell_complete=complete_names)
@_unit
@_restart
@common_options
def attach(common: Common, *, name: str, unit: str | None, restart: bool) -> None:
    """Show the private overlay NAME to the service UNIT alone, from its next start on.

    By a drop-in below /run, which 'overlayd detach', 'overlayd remove' or a reboot takes back.

    \b
    Examples:
      overlayd apply fix ./lib /usr/lib/food --private
      overlayd attach fix --unit food.service --restart
    """  # noqa: D301
    if unit is None:
        raise click.UsageError("Give the --unit.")
    with recorded(common, "attach", name) as noted:
        _root_only()
        overlay = common.private().attach(name, unit)
        noted.done(overlay)
    _restarted(common, [unit], restart=restart)
    common.show(overlay, f"{name}: {unit} sees it{'' if restart else ' from its next start on'}")


@click.command(short_help="Show a private overlay to a service no more.")
@click.argument("name", shell_complete=complete_names)
@_unit
@_restart
@common_options
def detach(common: Common, *, name: str, unit: str | None, restart: bool) -> None:
    """Show the private overlay NAME to the service UNIT no more, or to none.

    A service that runs keeps it until it is started again.

    \b
    Examples:
      overlayd detach fix --restart
      overlayd detach fix --unit food.service
    """  # noqa: D301
    with recorded(common, "detach", name):
        _root_only()
        units = common.private().detach(name, unit)
    _restarted(common, units, restart=restart)
    if common.json:
        click.echo(render.as_json(units))
    else:
        click.echo(f"{name}: no longer shown to {', '.join(units)}")


def _root_only() -> None:
    if os.geteuid() != 0:
        message = "only root shows overlays to services"
        raise NoPermissionError(message, hint="run it with sudo")


def _restarted(common: Common, units: list[str], *, restart: bool) -> None:
    from overlayd import shown  # noqa: PLC0415

    if restart:
        shown.restart(units)
    elif not common.json:
        click.echo(f"  hint: systemctl restart {' '.join(units)}", err=True)


def _split(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return what comes before ``--``, and the command after it: a shell if there is none."""
    end = words.index("--") if "--" in words else len(words)
    command = [*words[end + 1 :]]
    return [*words[:end]], command or [_shell()]


def _shell() -> str:
    if shell := os.environ.get("SHELL"):
        return shell
    try:
        return pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    except KeyError:
        return "/bin/sh"
