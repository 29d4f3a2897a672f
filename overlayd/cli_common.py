# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the commands share: the common options, signals, completion."""

from __future__ import annotations

import contextlib
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from overlayd import render
from overlayd.errors import OverlaydError
from overlayd.observer import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.manager import Manager
    from overlayd.model import Overlay
    from overlayd.render import TerminalProgress

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
        """Return what looks at overlays.

        :raises OverlaydError: also for a ``--config`` that cannot be used, needed or not.
        """
        if self.config is not None:
            self.load()
        return Observer(warn=self.warn)

    def manager(self) -> Manager:
        """Return what changes overlays; it takes a while to load."""
        from overlayd.manager import Manager  # noqa: PLC0415

        return Manager(self.load, warn=self.warn, trace=self.trace)

    @property
    def trace(self) -> Callable[[str, Operation], None] | None:
        """What is called around each step: with ``-v`` it is said."""
        return _trace if self.verbose else None

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


def common_options(command: Callable[..., None]) -> Callable[..., None]:
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
def interruptible(common: Common) -> Iterator[TerminalProgress]:
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


def complete_names(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the names of overlays."""
    try:
        overlays = Observer(warn=lambda _: None).list()
    except OverlaydError:
        return []
    return [o.record.name for o in overlays if o.record.name.startswith(incomplete)]


def check_stateroot(name: str | None) -> None:
    """Accept no stateroot or the booted one.

    :raises RefusedError: for any other.
    """
    if name is not None:
        from overlayd import ostree  # noqa: PLC0415

        ostree.check_stateroot(name, ostree.booted())


def stateroot_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--os`` and ``--stateroot``."""
    return click.option(
        "--os",
        "--stateroot",
        "stateroot",
        metavar="NAME",
        help="The OSTree stateroot; only the booted one can be meant.",
    )(command)
