# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that show private overlays to a program: enter, run."""

from __future__ import annotations

import os
import pwd

import click

from overlayd.cli_common import Common, absolute, common_options
from overlayd.errors import RefusedError
from overlayd.model import Options, Request

_REST = {"allow_interspersed_args": False}


@click.command(short_help="Run a program that sees your private overlays.", context_settings=_REST)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="NAME... [-- COMMAND]")
@common_options
def enter(common: Common, *, words: tuple[str, ...]) -> None:
    """Run COMMAND, or a shell, where the private overlays NAME can be seen.

    All of your private overlays are seen there, and what everybody sees, too. Any number of
    programs can be there at a time. Nothing in there gains rights: sudo and its like do not work.

    \b
    Examples:
      overlayd apply fix ./share/app /usr/share/app
      overlayd enter fix
      overlayd enter fix -- app --version
    """  # noqa: D301
    del common  # its options are every command's
    _outside_of_root()
    names, command = _split(words)
    if not names:
        raise click.UsageError("Give the NAME of a private overlay.")
    from overlayd import entrance  # noqa: PLC0415  # after what is wrong with the words

    entrance.enter(names, command)


@click.command(short_help="Run a program that alone sees some overlays.", context_settings=_REST)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SOURCE:TARGET... [-- COMMAND]")
@common_options
def run(common: Common, *, words: tuple[str, ...]) -> None:
    """Run COMMAND, or a shell, with each SOURCE laid over its TARGET, a path under /usr.

    Nobody else sees them, they have no names, and they are gone when it ends.

    \b
    Examples:
      overlayd run ./share/app:/usr/share/app -- app --version
      overlayd run ./lib:/usr/lib/app ./share:/usr/share/app
    """  # noqa: D301
    _outside_of_root()
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
    common.private().run(requests, command)


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


def _outside_of_root() -> None:
    if os.geteuid() == 0:
        message = "root's overlays are seen by everybody: there is nothing to enter"
        raise RefusedError(message, hint="private overlays are for users other than root")
