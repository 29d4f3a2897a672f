# SPDX-License-Identifier: LGPL-2.1-or-later
"""Overlays of both scopes: the caller's private ones, and those that everybody sees."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING

from overlayd.errors import NoPermissionError, ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.cleanup import Action
    from overlayd.client import Client
    from overlayd.manager import Manager
    from overlayd.model import Overlay, Request
    from overlayd.private import Private
    from overlayd.progress import Progress

    System = Client | Manager


class Scopes:
    """What :class:`overlayd.manager.Manager` does, for users, and for root where he has both.

    A name means the caller's private overlay if he has one of that name.
    """

    def __init__(
        self, private: Private, system: Callable[[], System], warn: Callable[[str], None]
    ) -> None:
        """Make what does the others only if it is needed; report oddities to *warn*."""
        self._private = private
        self._make = system
        self._warn = warn

    @cached_property
    def _system(self) -> System:
        return self._make()

    def _of(self, name: str) -> Private | System:
        return self._private if self._private.has(name) else self._system

    def describe(self, request: Request, progress: Progress) -> list[str]:
        """Say what an apply would do.

        :raises OverlaydError: what is wrong with the request.
        """
        return self._maker(request).describe(request, progress)

    def apply(self, request: Request, progress: Progress) -> Overlay:
        """Make an overlay, that everybody sees if the request says so.

        :raises OverlaydError: and then nothing is left of it.
        """
        return self._maker(request).apply(request, progress)

    def _maker(self, request: Request) -> Private | System:
        if os.geteuid() == 0:
            return self._private if request.private else self._system
        return self._system if request.options.allow_other else self._private

    def status(self, name: str) -> Overlay:
        """Return one overlay.

        :raises NotFoundError: if there is none of this name.
        """
        return self._of(name).status(name)

    def reset(self, name: str, version: int, progress: Progress | None = None) -> Overlay:
        """Take an overlay back to *version*."""
        return self._of(name).reset(name, version, progress)

    def remove(self, name: str, *, lazy: bool = False, progress: Progress | None = None) -> Overlay:
        """Remove an overlay."""
        return self._of(name).remove(name, lazy=lazy, progress=progress)

    def limits(self) -> dict[str, tuple[int | None, int]]:
        """Return the user's limits for overlays that everybody sees."""
        return self._system.limits()

    def cleanup(self, *, dry_run: bool = False) -> list[Action]:
        """Remove what has no use any more: of his own, and of everybody's if he may."""
        has_own = self._private.exists()
        own = self._private.cleanup(dry_run=dry_run)
        try:
            return own + self._system.cleanup(dry_run=dry_run)
        except (NoPermissionError, ServiceError) as error:
            if not has_own:
                raise
            self._warn(f"only your own was cleaned up: {error.message}")
            return own

    # Last, as the name hides the type within the class from here on.
    def list(self, *, draining: bool = False) -> list[Overlay]:
        """Return every overlay, by name, the private ones first.

        :raises OverlaydError: if neither kind can be had.
        """
        own = self._private.list(draining=draining)
        try:
            return own + self._system.list(draining=draining)
        except ServiceError as error:
            if not own:
                raise
            self._warn(f"only your own are shown: {error.message}")
            return own
