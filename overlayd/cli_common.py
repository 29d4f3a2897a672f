# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the commands share: the common options, signals, completion."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from overlayd import caller, render
from overlayd.errors import (
    NotFoundError,
    OverlaydError,
    RefusedError,
    ServiceError,
    UsageError,
    shown,
)
from overlayd.places import ROOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from overlayd.batch import Outcome
    from overlayd.cleanup import Action
    from overlayd.client import Client
    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.history import Attempt
    from overlayd.manager import Manager
    from overlayd.model import Overlay
    from overlayd.observer import Observer
    from overlayd.private import Private
    from overlayd.render import TerminalProgress
    from overlayd.scopes import Scopes

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class Common:
    """The options that every command has."""

    json: bool
    verbose: bool
    config: str | None
    loaded: Config | None = None
    """The configuration, once something has needed it."""

    def load(self) -> Config:
        """Return the configuration, read once."""
        if self.loaded is None:
            from pathlib import Path  # noqa: PLC0415

            from overlayd import config  # noqa: PLC0415  # 'list' needs none

            self.loaded = config.load(None if self.config is None else Path(self.config))
        return self.loaded

    def observer(self) -> Observer | Scopes:
        """Return what looks at overlays.

        :raises OverlaydError: also for a ``--config`` that cannot be used, needed or not.
        """
        if self.config is not None:
            self.load()
        if self._has_private():
            return self._scopes()
        from overlayd.observer import Observer  # noqa: PLC0415  # for root alone

        return Observer(warn=self.warn)

    def manager(self, *, private: bool = False) -> Manager | Scopes:
        """Return what changes overlays, *private* ones of root's too; it takes a while to load.

        For root that is done by this process; for others in their own namespaces, or by the
        service.
        """
        return self._scopes() if private or self._has_private() else self.own_manager()

    @staticmethod
    def _has_private() -> bool:
        """Whether there may be private overlays of the caller's: root has them rarely."""
        return os.geteuid() != 0 or os.path.exists(ROOTS)

    def _scopes(self) -> Scopes:
        from overlayd.scopes import Scopes  # noqa: PLC0415  # root needs it rarely

        system = self.own_manager if os.geteuid() == 0 else self.client
        return Scopes(self.private(), system, self.warn)

    def private(self) -> Private:
        """Return what does private overlays."""
        from overlayd.private import Private  # noqa: PLC0415

        return Private(self.load, warn=self.warn, trace=self.trace)

    def own_manager(self) -> Manager:
        """Return what does it in this process.

        :raises NoPermissionError: for callers other than root.
        """
        from overlayd.manager import Manager  # noqa: PLC0415

        return Manager(self.load, warn=self.warn, trace=self.trace)

    def client(self) -> Client:
        """Return what asks the service.

        :raises ServiceError: if the library for that is not there.
        """
        try:
            from overlayd.client import Client  # noqa: PLC0415
        except ModuleNotFoundError as error:
            message = f"the service cannot be asked: there is no Python module {error.name}"
            raise ServiceError(message, hint="use sudo, or install python3-jeepney") from None
        return Client(self.load, warn=self.warn)

    def past(
        self,
        *,
        name: str | None = None,
        uid: int | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> list[Attempt]:
        """Return what was attempted, as far as the caller may see it; the oldest first.

        The only way of the commands to the history.

        :raises OverlaydError: if it cannot be read.
        """
        from overlayd import history  # noqa: PLC0415  # only what looks back needs it

        if self.config is not None:
            self.load()
        if os.geteuid() != 0:
            return self.client().history(name=name, uid=uid, since=since, limit=limit)
        return history.read(name=name, uid=uid, since=since, limit=limit)

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


class Noted:
    """What a running command will have attempted, for the history."""

    def __init__(self, verb: str, name: str) -> None:
        """Begin with *name*, which may be empty."""
        self.verb = verb
        self.attempts: list[Attempt] = []
        self.about(name)

    def about(self, name: str, *, target: str = "", source: str = "") -> None:
        """Begin an attempt; it ends with the next call of :meth:`done` or :meth:`failed`."""
        self._open = True
        self._name, self._target, self._source = name, target, source
        self._at, self._start = time.time(), time.monotonic()

    def done(self, overlay: Overlay) -> None:
        """End an attempt that gave *overlay*."""
        self._end(overlay, None)

    def failed(self, error: OverlaydError) -> None:
        """End an attempt, unless it has ended."""
        if self._open:
            self._end(None, error)

    def batch(self, outcomes: Sequence[Outcome]) -> None:
        """Add what became of a batch."""
        for outcome in outcomes:
            request = outcome.request
            self.about(request.name, target=request.target, source=request.source)
            rule = "batch" if outcome.bystander else ""
            self._end(outcome.overlay, outcome.error, seconds=outcome.seconds, rule=rule)

    def cleaned(self, actions: Sequence[Action]) -> None:
        """Add what a cleanup has done; the time is that of all."""
        seconds = time.monotonic() - self._start
        at = self._at
        self._open = False
        for action in actions:
            self.about(action.subject if action.kind in {"lost", "drained"} else "")
            self._at = at
            error = None if action.failed is None else OverlaydError(action.failed)
            uuid = action.subject if action.kind == "orphan" else ""
            self._end(None, error, seconds=seconds, uuid=uuid, message=action.text)

    def _end(  # noqa: PLR0913  # all but two for one caller each
        self,
        overlay: Overlay | None,
        error: OverlaydError | None,
        *,
        seconds: float | None = None,
        rule: str = "",
        uuid: str = "",
        message: str = "",
    ) -> None:
        from overlayd import history  # noqa: PLC0415  # what only looks does not load it

        self._open = False
        record = None if overlay is None else overlay.record
        allowed, judgement = history.judged(error)
        self.attempts.append(
            history.Attempt(
                at=self._at,
                uid=os.getuid(),
                login_uid=caller.login_uid(),
                session_id=caller.session_id(),
                pid=os.getpid(),
                via="direct",
                verb=self.verb,
                name=self._name if record is None else record.name,
                target=self._target if record is None else record.target,
                source=self._source if record is None else record.source,
                uuid=uuid if record is None else record.uuid,
                allowed=allowed,
                rule=rule or judgement,
                digest="",
                outcome=history.DONE if error is None else error.code,
                message=message if error is None else error.message,
                seconds=time.monotonic() - self._start if seconds is None else seconds,
            )
        )

    def write(self, common: Common) -> None:
        """Write it all; never raises, as the answer is decided."""
        if not self.attempts or os.geteuid() != 0:
            return
        from overlayd import history  # noqa: PLC0415

        loaded = common.loaded
        limits = None
        if loaded is not None:
            limits = history.Limits(loaded.history_days, loaded.history_size)
        with contextlib.suppress(KeyboardInterrupt):
            history.note_all(self.attempts, limits=limits)


@contextlib.contextmanager
def recorded(common: Common, verb: str, name: str = "", *, enabled: bool = True) -> Iterator[Noted]:
    """Note for the history what happens within, when it has; usage errors are not noted.

    To be left before anything is printed, and within :func:`interruptible`, so that a signal that
    comes too late does not change the answer.  Only root's attempts are noted here.
    """
    noted = Noted(verb, name)
    try:
        yield noted
    except (UsageError, click.ClickException):
        raise
    except OverlaydError as error:
        noted.failed(error)
        raise
    except Exception as error:
        noted.failed(OverlaydError(str(error)))
        raise
    finally:
        if enabled:
            noted.write(common)


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
        overlays = Common(json=False, verbose=False, config=None).observer().list()
    except OverlaydError:
        return []
    return [o.record.name for o in overlays if o.record.name.startswith(incomplete)]


def absolute(path: str, what: str) -> str:
    """Make *path* absolute; a directory that is gone is an error, not a guess.

    :raises RefusedError: for what cannot be made so.
    """
    if not path or "\0" in path:
        message = f"{what} is empty"
        raise RefusedError(message)
    try:
        whole = path if path.startswith("/") else f"{os.getcwd()}/{path}"
    except FileNotFoundError:
        message = f"{what} {shown(path)} is relative, and the working directory is gone"
        raise RefusedError(message) from None
    # ".." stays: what it leads to depends on links before it.
    return "/" + "/".join(part for part in whole.split("/") if part not in {"", "."})


def uid_of(user: str) -> int:
    """Return the uid that *user*, a name or a number, stands for.

    :raises NotFoundError: if there is no such user.
    """
    if user.isascii() and user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        message = f"there is no user {shown(user)!r}"
        raise NotFoundError(message) from None


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
