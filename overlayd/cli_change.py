# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that change something: apply, reset, remove, batch."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import click

from overlayd import render
from overlayd.cli_common import (
    Common,
    absolute,
    check_stateroot,
    common_options,
    complete_names,
    interruptible,
    recorded,
    stateroot_option,
)
from overlayd.errors import NoPermissionError, OverlaydError, RefusedError, shown
from overlayd.model import APPLIED, BASE, Options, Request, check_writable_dir, parse_size

if TYPE_CHECKING:
    from overlayd.cli_common import Noted
    from overlayd.model import Overlay
    from overlayd.progress import Progress


class _Size(click.ParamType):  # type: ignore[type-arg]  # not generic in Debian's click
    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            return parse_size(str(value))
        except RefusedError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)


@click.command(short_help="Lay SOURCE over TARGET under a name.")
@click.argument("name")
@click.argument("source")
@click.argument("target")
@click.option("--read-only", is_flag=True, help="No edits through the target.")
@click.option("--allow-other", is_flag=True, help="Everyone sees it; always so for root.")
@click.option(
    "--default-permissions", is_flag=True, help="The kernel checks modes; always so, recorded."
)
@stateroot_option
@click.option("--allow-critical", is_flag=True, help="Permit a target the system depends on.")
@click.option("--preserve-owner", is_flag=True, help="Keep owners; else all is root's.")
@click.option("--private", is_flag=True, help="Only 'enter' shows it; so for users anyway.")
@click.option(
    "--writable-dir",
    "writable_dirs",
    multiple=True,
    metavar="PATH",
    help="Lay a directory of yours over this one beneath TARGET; for private overlays.",
)
@click.option("--size", type=_Size(), metavar="SIZE", help="Room for edits, such as 64M or 2G.")
@click.option("--dry-run", is_flag=True, help="Check everything, say the steps, do nothing.")
@common_options
def apply(  # noqa: PLR0913  # one parameter per option
    common: Common,
    *,
    name: str,
    source: str,
    target: str,
    read_only: bool,
    allow_other: bool,
    default_permissions: bool,
    stateroot: str | None,
    allow_critical: bool,
    preserve_owner: bool,
    private: bool,
    writable_dirs: tuple[str, ...],
    size: int | None,
    dry_run: bool,
) -> None:
    """Lay SOURCE over TARGET, a path under /usr, and call that NAME.

    SOURCE is copied, so that later changes to it do not show. A directory is merged into TARGET;
    a file goes into a TARGET directory, or over a TARGET file. A TARGET that does not exist shows
    up in an overlay on its nearest parent.

    \b
    Examples:
      overlayd apply fix ./share/app /usr/share/app
      overlayd apply tool ./mytool /usr/bin/mytool --allow-critical
      overlayd apply doc ./manual /usr/share/doc/app --read-only
      overlayd apply big ./data /usr/share/data --size 2G --dry-run
    """  # noqa: D301
    if read_only and size is not None:
        message = "--size is the room for edits, and --read-only has none"
        raise click.UsageError(message)
    if private and allow_other:
        raise click.UsageError("An overlay is either --private or everybody's: --allow-other.")
    if writable_dirs and (allow_other or os.geteuid() == 0):
        message = "--writable-dir is for private overlays; in others root can write everywhere"
        raise click.UsageError(message)
    options = Options(
        read_only=read_only,
        allow_other=allow_other,
        default_permissions=default_permissions,
        preserve_owner=preserve_owner,
        allow_critical=allow_critical,
        writable_dirs=tuple(map(check_writable_dir, writable_dirs)),
    )
    with (
        interruptible(common) as progress,
        recorded(common, "apply", name, enabled=not dry_run) as noted,
    ):
        noted.about(name, target=target, source=source)
        check_stateroot(stateroot)
        request = Request(
            name=name,
            source=absolute(source, "SOURCE"),
            target=absolute(target, "TARGET"),
            options=options,
            size=size,
            private=private,
        )
        noted.about(name, target=request.target, source=request.source)
        manager = common.manager(private=private)
        if dry_run:
            steps = manager.describe(request, progress)
        else:
            overlay = manager.apply(request, progress)
            noted.done(overlay)
    if dry_run:
        click.echo(render.as_json({"steps": steps}) if common.json else "\n".join(steps))
    else:
        common.show(overlay, render.applied(overlay))


def _version(text: str) -> int:
    words = {"base": BASE, "applied": APPLIED}
    if text in words:
        return words[text]
    if text.isascii() and text.isdigit() and len(text) < 10:  # noqa: PLR2004
        return int(text)
    message = f"{shown(text)!r} is not a version: base, applied or a number"
    raise click.UsageError(message)


@click.command(short_help="Drop the edits; back to the base or to what was applied.")
@click.argument("name", shell_complete=complete_names)
@click.option("--to", "version", default="base", metavar="base|applied|N", show_default=True)
@common_options
def reset(common: Common, *, name: str, version: str) -> None:
    """Drop what was edited in the overlay NAME and show a version of it: the base if not said.

    It stays mounted, and nobody sees a moment without it. Programs that run from it keep their
    old files.

    \b
    Examples:
      overlayd reset fix
      overlayd reset fix --to applied
    """  # noqa: D301
    number = _version(version)
    with interruptible(common) as progress, recorded(common, "reset", name) as noted:
        overlay = common.manager().reset(name, number, progress)
        noted.done(overlay)
    what = "the base" if number == BASE else f"version {number}"
    common.show(overlay, f"{name}: {shown(overlay.record.target)} shows {what}")


@click.command(short_help="Take an overlay away.")
@click.argument("name", required=False, shell_complete=complete_names)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every overlay there is, or all that are yours.",
)
@click.option("--lazy", is_flag=True, help="Also while in use: programs keep their old files.")
@common_options
def remove(common: Common, *, name: str | None, everything: bool, lazy: bool) -> None:
    """Take the overlay NAME away, with everything edited in it.

    With --all, those that cannot be removed are named and do not keep the others.

    \b
    Examples:
      overlayd remove fix
      overlayd remove fix --lazy
      overlayd remove --all
    """  # noqa: D301
    if everything == (name is not None):
        raise click.UsageError("Give either the NAME of an overlay or --all.")
    with interruptible(common) as progress, recorded(common, "remove", name or "") as noted:
        if name is None:
            _remove_all(common, progress, noted, lazy=lazy)
            return
        overlay = common.manager().remove(name, lazy=lazy, progress=progress)
        noted.done(overlay)
    common.show(overlay, _removed(overlay))


def _removed(overlay: Overlay) -> str:
    still = ", something still uses the old files" if overlay.state == "draining" else ""
    return f"{overlay.record.name}: removed{still}"


def _remove_all(common: Common, progress: Progress, noted: Noted, *, lazy: bool) -> None:
    """Remove every overlay that can be.

    :raises OverlaydError: the last cause, if some could not; each is warned of.
    """
    manager = common.manager()
    gone: list[Overlay] = []
    failed: OverlaydError | None = None
    for overlay in manager.list():
        progress.check()
        record = overlay.record
        if os.geteuid() not in {0, record.owner}:
            continue
        noted.about(record.name, target=record.target, source=record.source)
        try:
            gone.append(manager.remove(record.name, lazy=lazy, progress=progress))
            noted.done(gone[-1])
        except OverlaydError as error:
            noted.failed(error)
            common.warn(f"{overlay.record.name} stays: {error.message}")
            failed = error
        else:
            if not common.json:
                click.echo(_removed(gone[-1]))
    if common.json:
        click.echo(render.as_json([render.overlay_object(overlay) for overlay in gone]))
    if failed is not None:
        raise failed


@click.command(short_help="Apply many overlays from a file.")
@click.argument("file")
@click.option("--atomic", is_flag=True, help="All or none.")
@click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True, metavar="N")
@common_options
def batch(common: Common, *, file: str, atomic: bool, jobs: int) -> None:
    """Apply the [[overlay]] tables of a TOML FILE, copying several at a time.

    The keys are those of apply: name, source, target, size, writable_dirs, and read_only,
    allow_other, private, default_permissions, allow_critical, preserve_owner = true. With --atomic
    nothing shows before all is copied, and if one fails none stays.

    \b
    Examples:
      overlayd dump > overlays.toml
      overlayd batch overlays.toml --atomic
    """  # noqa: D301
    from pathlib import Path  # noqa: PLC0415

    from overlayd import batch as batches  # noqa: PLC0415

    requests = batches.read(Path(file))
    if atomic and os.geteuid() != 0:
        message = "only root can apply a batch all or none"
        raise NoPermissionError(message, hint="use sudo, or leave --atomic out")
    private = any(request.private for request in requests)
    if private and atomic:
        message = "private overlays cannot be applied all or none"
        raise RefusedError(message, hint="leave --atomic out")
    common.manager(private=private)
    with interruptible(common) as progress, recorded(common, "apply") as noted:
        outcomes = batches.run(
            requests,
            partial(common.manager, private=private),
            progress,
            jobs=jobs if os.geteuid() == 0 else 1,  # a person answers one question at a time
            atomic=common.own_manager if atomic else None,
        )
        noted.batch(outcomes)
    if common.json:
        results: list[dict[str, object]] = []
        for outcome in outcomes:
            result: dict[str, object] = {"name": outcome.request.name}
            if outcome.overlay is not None:
                result["overlay"] = render.overlay_object(outcome.overlay)
            if outcome.error is not None:
                result |= render.error_object(outcome.error)
            results.append(result)
        click.echo(render.as_json(results))
    else:
        for outcome in outcomes:
            if outcome.overlay is not None:
                click.echo(render.applied(outcome.overlay))
            elif outcome.error is not None:
                click.echo(f"{outcome.request.name}: failed: {outcome.error.message}", err=True)
    failed = sum(outcome.error is not None for outcome in outcomes)
    if (error := batches.worst(outcomes)) is not None:
        message = f"{failed} of {len(outcomes)} overlays failed, the first: {error.message}"
        raise type(error)(message, hint=error.hint)
