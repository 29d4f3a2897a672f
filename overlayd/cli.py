# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: options in, text or JSON and an exit code out.  Nothing is decided here."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from overlayd import __version__, render
from overlayd.errors import (
    InterruptedByUserError,
    NoPermissionError,
    NotFoundError,
    OverlaydError,
    RefusedError,
)
from overlayd.model import APPLIED, BASE, Options, Request, parse_size, shown
from overlayd.observer import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.manager import Manager
    from overlayd.model import Overlay
    from overlayd.render import TerminalProgress

_USAGE: Final = 2
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class Common:
    """The options that every command has."""

    json: bool
    verbose: bool
    config: str | None

    def load(self) -> Config:
        """Read the configuration."""
        from pathlib import Path  # noqa: PLC0415

        from overlayd import config  # noqa: PLC0415  # 'list' needs none

        return config.load(None if self.config is None else Path(self.config))

    def observer(self) -> Observer:
        """Return what looks at overlays."""
        return Observer(warn=self.warn)

    def manager(self) -> Manager:
        """Return what changes overlays; it takes a while to load."""
        from overlayd.manager import Manager  # noqa: PLC0415

        return Manager(self.load, warn=self.warn, trace=_trace if self.verbose else None)

    def warn(self, text: str) -> None:
        """Print a warning to standard error."""
        if self.json:
            click.echo(render.as_json({"warning": {"message": text}}), err=True)
        else:
            click.echo(f"overlayd: warning: {text}", err=True)

    def show(self, overlay: Overlay, text: str) -> None:
        """Print one overlay."""
        click.echo(render.as_json(render.overlay_object(overlay)) if self.json else text)


def _trace(when: str, operation: Operation) -> None:
    if when != "after":
        click.echo(f"{'undo: ' if when == 'undo' else ''}{operation.describe()}", err=True)


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--json``, ``-v`` and ``--config``, as one :class:`Common`."""

    def wrapped(*, json: bool, verbose: bool, config: str | None, **arguments: object) -> None:
        command(Common(json, verbose, config), **arguments)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--config", metavar="FILE", help="Read this file instead of /etc/overlayd."),
        click.option("-v", "--verbose", is_flag=True, help="Say each step on standard error."),
        click.option("--json", is_flag=True, help="Print JSON; errors too, on standard error."),
    ):
        wrapped = option(wrapped)
    return wrapped


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def _interruptible(common: Common) -> Iterator[TerminalProgress]:
    """Yield a progress that signals stop at the next step; a second signal stops at once."""
    progress = render.TerminalProgress(enabled=not common.json and _terminal())

    def stop(_number: int, _frame: FrameType | None) -> None:
        progress.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield progress
    finally:
        progress.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of overlays."""
    try:
        overlays = Observer(warn=lambda _: None).list()
    except OverlaydError:
        return []
    return [o.record.name for o in overlays if o.record.name.startswith(incomplete)]


class _Size(click.ParamType[int]):
    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            return parse_size(str(value))
        except RefusedError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)


def _check_stateroot(name: str | None) -> None:
    if name is not None:
        from overlayd import ostree  # noqa: PLC0415

        ostree.check_stateroot(name, ostree.booted())


def _stateroot(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--os",
        "--stateroot",
        "stateroot",
        metavar="NAME",
        help="The OSTree stateroot; only the booted one can be meant.",
    )(command)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 usage, 3 not found, 4 exists, 5 refused, 6 busy,"
    " 7 no permission, 8 no space or a limit, 9 kernel refused, 130 interrupted, 1 internal.",
)
@click.version_option(__version__, prog_name="overlayd")
def app() -> None:
    """Try a change to a part of a read-only /usr on the running system, and take it back.

    \b
    Examples:
      overlayd apply fix ./build/share/app /usr/share/app
      overlayd list
      overlayd reset fix            back to the base, still mounted
      overlayd reset fix --to applied
      overlayd remove fix

    A reboot removes every overlay.
    """  # noqa: D301  # \b is click's mark for text that is not rewrapped


@app.command(short_help="Lay SOURCE over TARGET under a name.")
@click.argument("name")
@click.argument("source")
@click.argument("target")
@click.option("--read-only", is_flag=True, help="No edits through the target.")
@click.option("--allow-other", is_flag=True, help="Everyone sees it; always so for root.")
@click.option(
    "--default-permissions", is_flag=True, help="The kernel checks modes; always so, recorded."
)
@_stateroot
@click.option("--allow-critical", is_flag=True, help="Permit a target the system depends on.")
@click.option("--preserve-owner", is_flag=True, help="Keep owners; otherwise all is root's.")
@click.option("--size", type=_Size(), metavar="SIZE", help="Room for edits, such as 64M or 2G.")
@click.option("--dry-run", is_flag=True, help="Check everything, say the steps, do nothing.")
@_common
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
    _check_stateroot(stateroot)
    if read_only and size is not None:
        message = "--size is the room for edits, and --read-only has none"
        raise click.UsageError(message)
    request = Request(
        name=name,
        source=_absolute(source, "SOURCE"),
        target=_absolute(target, "TARGET"),
        options=Options(
            read_only=read_only,
            allow_other=allow_other,
            default_permissions=default_permissions,
            preserve_owner=preserve_owner,
            allow_critical=allow_critical,
        ),
        size=size,
    )
    manager = common.manager()
    with _interruptible(common) as progress:
        if dry_run:
            steps = manager.describe(request, progress)
            click.echo(render.as_json({"steps": steps}) if common.json else "\n".join(steps))
            return
        overlay = manager.apply(request, progress)
    common.show(overlay, render.applied(overlay))


def _absolute(path: str, what: str) -> str:
    """Make *path* absolute; a directory that is gone is an error, not a guess."""
    if not path or "\0" in path:
        message = f"{what} is empty"
        raise RefusedError(message)
    try:
        return path if path.startswith("/") else f"{os.getcwd()}/{path}"
    except FileNotFoundError:
        message = f"{what} {shown(path)} is relative, and the working directory is gone"
        raise RefusedError(message) from None


@app.command("list", short_help="Show the overlays.")
@click.option("--user", metavar="UID|NAME", help="Only those of this owner.")
@_stateroot
@click.option("--all", "draining", is_flag=True, help="Also removed ones that are still in use.")
@_common
def list_(common: Common, *, user: str | None, stateroot: str | None, draining: bool) -> None:
    """Show the overlays.

    States: active; lost (somebody unmounted it); covered (something is mounted over it); draining
    (removed, and programs still use it).

    \b
    Examples:
      overlayd list
      overlayd list --user root --json
    """  # noqa: D301
    _check_stateroot(stateroot)
    overlays = common.observer().list(draining=draining)
    if user is not None:
        uid = _uid(user)
        overlays = [overlay for overlay in overlays if overlay.record.owner == uid]
    if common.json:
        click.echo(render.as_json([render.overlay_object(overlay) for overlay in overlays]))
    else:
        click.echo(render.overlay_table(overlays))


def _uid(user: str) -> int:
    if user.isascii() and user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        message = f"there is no user {shown(user)!r}"
        raise NotFoundError(message) from None


@app.command(short_help="Show one overlay.")
@click.argument("name", shell_complete=_names)
@_common
def status(common: Common, *, name: str) -> None:
    """Show everything about the overlay NAME."""
    overlay = common.observer().status(name)
    common.show(overlay, render.overlay_details(overlay))


def _version(text: str) -> int:
    words = {"base": BASE, "applied": APPLIED}
    if text in words:
        return words[text]
    if text.isascii() and text.isdigit() and len(text) < 10:  # noqa: PLR2004
        return int(text)
    message = f"{shown(text)!r} is not a version: base, applied or a number"
    raise click.UsageError(message)


@app.command(short_help="Drop the edits; back to the base or to what was applied.")
@click.argument("name", shell_complete=_names)
@click.option("--to", "version", default="base", metavar="base|applied|N", show_default=True)
@_common
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
    with _interruptible(common) as progress:
        overlay = common.manager().reset(name, number, progress)
    what = "the base" if number == BASE else f"version {number}"
    common.show(overlay, f"{name}: {shown(overlay.record.target)} shows {what}")


@app.command(short_help="Take an overlay away.")
@click.argument("name", shell_complete=_names)
@click.option("--lazy", is_flag=True, help="Also while in use: programs keep their old files.")
@_common
def remove(common: Common, *, name: str, lazy: bool) -> None:
    """Take the overlay NAME away, with everything edited in it.

    \b
    Examples:
      overlayd remove fix
      overlayd remove fix --lazy
    """  # noqa: D301
    with _interruptible(common) as progress:
        overlay = common.manager().remove(name, lazy=lazy, progress=progress)
    still = ", programs still use the old files" if overlay.state == "draining" else ""
    common.show(overlay, f"{name}: removed{still}")


@app.command(short_help="Apply many overlays from a file.")
@click.argument("file")
@click.option("--atomic", is_flag=True, help="All or none.")
@click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True, metavar="N")
@_common
def batch(common: Common, *, file: str, atomic: bool, jobs: int) -> None:
    """Apply the [[overlay]] tables of a TOML FILE, copying several at a time.

    The keys are those of apply: name, source, target, size, and read_only, allow_other,
    default_permissions, allow_critical, preserve_owner = true. With --atomic nothing shows before
    all is copied, and if one fails none stays.

    \b
    Examples:
      overlayd dump > overlays.toml
      overlayd batch overlays.toml --atomic
    """  # noqa: D301
    from pathlib import Path  # noqa: PLC0415

    from overlayd import batch as batches  # noqa: PLC0415
    from overlayd.manager import Manager  # noqa: PLC0415

    requests = batches.read(Path(file))
    config = common.load()
    common.manager()
    with _interruptible(common) as progress:
        outcomes = batches.run(
            requests,
            lambda: Manager(lambda: config, warn=common.warn),
            progress,
            jobs=jobs,
            atomic=atomic,
        )
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


@app.command(short_help="Write the batch file that makes the present overlays again.")
@_common
def dump(common: Common) -> None:
    """Write a file for 'overlayd batch' that makes the present overlays again, after a reboot say.

    What was edited in them is not in it.
    """
    from overlayd import batch as batches  # noqa: PLC0415

    overlays = common.observer().list()
    text = batches.dump(overlays)
    click.echo(render.as_json({"toml": text}) if common.json else text, nl=common.json)


@app.command(short_help="Remove what is lost or left over.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_common
def cleanup(common: Common, *, dry_run: bool) -> None:
    """Remove what has no use any more: lost overlays, orphaned mounts, records in quarantine.

    What cannot be proven to be overlayd's is left alone; see 'overlayd doctor'.
    """
    actions = common.manager().cleanup(dry_run=dry_run)
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


@app.command(short_help="Say whether overlayd works here, and what is wrong.")
@_common
def doctor(common: Common) -> None:
    """Try what the kernel can do, look at limits and leftovers, and say what is wrong.

    Exits with 0 only if overlayd would work.
    """
    from overlayd import doctor as doctors  # noqa: PLC0415

    report = doctors.examine(common.load)
    click.echo(render.as_json(report.as_object()) if common.json else report.as_text())
    if not report.ok:
        sys.exit(9 if os.geteuid() == 0 else NoPermissionError.exit_code)


def _report(code: str, message: str, hint: str | None, *, as_json: bool) -> None:
    with contextlib.suppress(OSError):
        if as_json:
            error = {"error": {"code": code, "message": message, "hint": hint}}
            click.echo(render.as_json(error), err=True)
            return
        click.echo(f"overlayd: {message}", err=True)
        if hint:
            click.echo(f"  hint: {hint}", err=True)


def main() -> None:
    """Run a command and exit with its documented code."""
    as_json = "--json" in sys.argv
    for fd in range(3):
        # A closed standard stream would give its number to the next file that is opened.
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        app.main(standalone_mode=False, prog_name="overlayd")
        if sys.stdout is not None:
            sys.stdout.flush()
    except OverlaydError as error:
        _report(error.code, error.message, error.hint, as_json=as_json)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context is not None else "overlayd --help"
        _report("usage", error.format_message(), hint, as_json=as_json)
        sys.exit(_USAGE)
    except (KeyboardInterrupt, click.Abort):
        _report(InterruptedByUserError.code, "interrupted", None, as_json=as_json)
        sys.exit(InterruptedByUserError.exit_code)
    except BrokenPipeError:
        # Whoever read the output has seen enough; what was asked for is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
