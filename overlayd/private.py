# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private overlays: those that a user has without root, seen by what he starts inside alone.

A holder process keeps a user namespace and a mount namespace of the user's; the world in them is
like root's, and so is the manager.  What changes something is done by a child that enters, so that
the command itself stays where it was.  Everything here is the user's own: whoever can tamper with
it can already do all that it does.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from overlayd import caller, entrance, homes, overlayfs, plan, shown, subids, targets, userns
from overlayd.cleanup import Action
from overlayd.errors import NoPermissionError, NotFoundError, OverlaydError, RefusedError, not_found
from overlayd.manager import Manager, User
from overlayd.model import Scope, State
from overlayd.observer import Observer
from overlayd.places import RUN
from overlayd.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.model import Overlay, Request

_LOOK: Final = 0.05
"""Seconds after which a wish to stop is passed on."""
_T = TypeVar("_T")


class Private:
    """What :class:`overlayd.manager.Manager` does, in the namespaces of the calling user."""

    def __init__(
        self,
        config: Callable[[], Config],
        *,
        warn: Callable[[str], None],
        trace: Callable[[str, Operation], None] | None = None,
    ) -> None:
        """Take what :class:`Manager` takes."""
        self._load = config
        self._warn = warn
        self._trace = trace
        self._owner = plan.Owner(os.getuid(), caller.session_id())

    # -- what can be asked ---------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the user has a private overlay of this name, or one that is not settled yet."""
        with homes.opened() as home:
            return (found := homes.find(home)) is not None and name in homes.names(found)

    def exists(self) -> bool:
        """Whether the user has any private overlays."""
        return self._found() is not None

    def status(self, name: str) -> Overlay:
        """Return one overlay.

        :raises NotFoundError: if there is none of this name.
        """
        found = self._needed(name)
        return self._look(found, lambda: Observer(warn=self._warn).status(name))

    def reset(self, name: str, version: int, progress: Progress | None = None) -> Overlay:
        """Take an overlay back to *version*, as :meth:`Manager.reset` does."""
        found = self._needed(name)
        done = _inside(found, lambda: self._manager().reset(name, version, progress), progress)
        if os.geteuid() == 0 and done.record.uuid in shown.uuids():
            self._show_anew(found, name)
        return done

    def _show_anew(self, found: int, name: str) -> bool:
        """Let services that start from now on see what there is; return whether they did not."""
        overlay, mount = self._mount(found, name)
        try:
            return shown.replace(overlay.record, mount)
        finally:
            os.close(mount)

    def remove(self, name: str, *, lazy: bool = False, progress: Progress | None = None) -> Overlay:
        """Remove an overlay, as :meth:`Manager.remove` does; the holder goes with the last one."""
        found = self._needed(name)
        if os.geteuid() == 0:
            shown.withdraw(self.status(name).record.uuid)
        gone = _inside(
            found, lambda: self._manager().remove(name, lazy=lazy, progress=progress), progress
        )
        homes.let_go()
        return gone

    def attach(self, name: str, unit: str) -> Overlay:
        """Show an overlay of root's to the service *unit*, from its next start on.

        :raises OverlaydError: if that cannot be.
        """
        shown.check_unit(unit)
        overlay, mount = self._mount(self._needed(name), name)
        try:
            shown.present(overlay.record, mount, unit)
        finally:
            os.close(mount)
        return overlay

    def _mount(self, found: int, name: str) -> tuple[Overlay, int]:
        """Return an overlay and a copy of its mount, which the caller closes.

        :raises RefusedError: if it has none that can be seen.
        """
        receiving, sending = socket.socketpair()

        def send() -> Overlay:
            overlay = Observer(warn=self._warn).status(name)
            if overlay.state is not State.ACTIVE:
                message = f"{name} is {overlay.state}"
                raise RefusedError(message, hint=f"overlayd status {name}")
            place = os.open(overlay.record.mount_point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            socket.send_fds(sending, [b"m"], [overlayfs.clone(place)])
            return overlay

        with receiving, sending:
            overlay = _inside(found, send)
            _, fds, _, _ = socket.recv_fds(receiving, 1, 1)
        return overlay, fds[0]

    def detach(self, name: str, unit: str | None) -> list[str]:
        """Show an overlay of root's to no service any more, or not to *unit*; return which.

        :raises NotFoundError: if it is shown to none, or not to that.
        """
        uuid = self.status(name).record.uuid
        if not (gone := shown.withdraw(uuid, unit)):
            message = f"{name} is not shown to {unit or 'any service'}"
            raise NotFoundError(message)
        return gone

    def cleanup(self, *, dry_run: bool = False) -> list[Action]:
        """Remove what has no use any more, as :meth:`Manager.cleanup` does."""
        found = self._found()
        done = (
            []
            if found is None
            else _inside(found, lambda: self._manager().cleanup(dry_run=dry_run))
        )
        homes.let_go()
        return done + self._withdrawn(dry_run=dry_run)

    def _withdrawn(self, *, dry_run: bool) -> list[Action]:
        """Let services be shown what there is, where a command was killed or the holder is gone."""
        left = shown.uuids() if os.geteuid() == 0 else set()
        there = {each.record.uuid: each for each in self.list(draining=True)} if left else {}
        done = []
        for uuid in sorted(left):
            action = Action("shown", uuid, f"what services were shown of {uuid}")
            if uuid not in there:
                if not dry_run:
                    shown.withdraw(uuid)
                done.append(action)
            elif not dry_run and (shown.settle(uuid) or self._refreshed(there[uuid])):
                done.append(action)
        return done

    def _refreshed(self, overlay: Overlay) -> bool:
        """Let services see an overlay as a reset has made it; return whether they did not yet."""
        found = self._found()
        return (
            found is not None
            and overlay.state is State.ACTIVE
            and self._show_anew(found, overlay.record.name)
        )

    def describe(self, request: Request, progress: Progress) -> list[str]:
        """Say what an apply would do, having checked everything that can be checked.

        :raises OverlaydError: what the apply would raise.
        """
        return self._with_source(request, progress, self._describe)

    def apply(self, request: Request, progress: Progress) -> Overlay:
        """Make an overlay that nobody else sees.

        :raises OverlaydError: and then nothing is left of it.
        """
        return self._with_source(request, progress, self._apply)

    @staticmethod
    def _describe(manager: Manager, request: Request, progress: Progress, user: User) -> list[str]:
        _check_owners(request)
        return manager.describe(request, progress, user)

    def _apply(self, manager: Manager, request: Request, progress: Progress, user: User) -> Overlay:
        _check_owners(request)
        if os.geteuid() != 0 and not (request.options.read_only or _keeps_attributes()):
            self._warn(
                "this kernel (before Linux 6.6) lets no directory of the base be removed or renamed"
                " in a private overlay"
            )
        return manager.apply(request, progress, user)

    def _with_source(
        self,
        request: Request,
        progress: Progress,
        work: Callable[[Manager, Request, Progress, User], _T],
    ) -> _T:
        """Do what takes a source, which is what the path leads to where the caller is."""
        self._load()
        if request.options.preserve_owner and os.geteuid() != 0 and (why := subids.missing()):
            raise _no_owners(why)
        source = targets.open_source(request.source)
        try:
            with homes.opened(make=True) as home:
                found = homes.find(home) or homes.start(home)
                user = User(self._owner, source)
                return _inside(
                    found, lambda: work(self._manager(), request, progress, user), progress
                )
        finally:
            source.close()
            homes.let_go()

    def _manager(self) -> Manager:
        return Manager(self._load, warn=self._warn, trace=self._trace, scope=Scope.PRIVATE)

    @staticmethod
    def _found() -> int | None:
        with homes.opened() as home:
            return homes.find(home)

    @staticmethod
    def _look(found: int, work: Callable[[], _T]) -> _T:
        """Do what only looks: by a child that goes in, or here where this is inside already."""
        return work() if homes.is_inside(found) else _inside(found, work)

    def _needed(self, name: str) -> int:
        if (found := self._found()) is None:
            raise not_found(name)
        return found

    # -- for once ------------------------------------------------------------------------------

    def run(
        self, requests: Sequence[Request], command: Sequence[str], *, as_root: bool
    ) -> NoReturn:
        """Become *command* with overlays that are its own and go with it.

        With *as_root* by uid 0 of the user namespace, as :func:`entrance.enter` does.

        :raises OverlaydError: if one of them cannot be made.
        """
        self._load()
        place = entrance.working_directory()
        sources = [targets.open_source(request.source) for request in requests]
        userns.begin(others=as_root)
        manager = self._manager()
        for request, source in zip(requests, sources, strict=True):
            manager.apply(request, Progress(), User(self._owner, source))
        entrance.become(command, place, as_root=as_root)

    # Last, as the name hides the type within the class from here on.
    def list(self, *, draining: bool = False) -> list[Overlay]:
        """Return the user's private overlays, by name.

        :raises OverlaydError: if the records cannot be read.
        """
        if (found := self._found()) is None:
            return []
        return self._look(found, lambda: Observer(warn=self._warn).list(draining=draining))


# -- work inside -------------------------------------------------------------------------------


def _check_owners(request: Request) -> None:
    """Refuse to keep owners where there are none but the user himself."""
    if request.options.preserve_owner and os.geteuid() != 0 and not userns.maps_others():
        raise _no_owners("they were not there when the first private overlay was made")


def _no_owners(why: str) -> NoPermissionError:
    return NoPermissionError("--preserve-owner takes root, or subordinate uids", hint=why)


def _keeps_attributes() -> bool:
    """Whether a tmpfs keeps ``user.*`` attributes, by which an overlay hides directories."""
    try:
        os.setxattr(RUN, "user.overlayd", b"1")
        os.removexattr(RUN, "user.overlayd")
    except OSError:
        return False
    return True


def _inside(pid: int, work: Callable[[], _T], progress: Progress | None = None) -> _T:
    """Have *work* done by a child where process *pid* is, and return what it returns.

    :raises OverlaydError: what it raises.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(pid, work, writing)
    os.close(writing)
    try:
        said = _wait(reading, child, progress)
    finally:
        os.close(reading)
        os.waitpid(child, 0)
    try:
        kind, value = pickle.loads(said)  # noqa: S301  # a child of ours
    except (EOFError, pickle.UnpicklingError):
        raise OverlaydError("the child that does it ended before its time") from None
    if kind is None:
        return value  # type: ignore[no-any-return]
    message, hint = value
    raise kind(message, hint=hint)


def _work(pid: int, work: Callable[[], object], writing: int) -> NoReturn:
    """Do the child's part."""
    answer: tuple[object, object]
    try:
        entrance.join(pid)
        answer = None, work()
    except OverlaydError as error:
        answer = type(error), (error.message, error.hint)
    except BaseException as error:  # noqa: BLE001  # it is told, and the child ends
        answer = OverlaydError, (f"{type(error).__name__}: {error}", None)
    try:
        with os.fdopen(writing, "wb") as file:
            pickle.dump(answer, file)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _wait(reading: int, child: int, progress: Progress | None) -> bytes:
    """Return what a child says; pass on the wish to stop, which it may not have heard."""
    said, told = b"", False
    while True:
        if select.select([reading], [], [], _LOOK)[0]:
            if not (data := os.read(reading, 1 << 16)):
                return said
            said += data
        elif progress is not None and progress.stopped and not told:
            os.kill(child, signal.SIGTERM)
            told = True
