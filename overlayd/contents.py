# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations that make an overlay's storage and put into it what it is to show, as values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlayd import layers, overlayfs, writer
from overlayd import syscalls as sys
from overlayd.errors import NotFoundError, shown
from overlayd.executor import Step
from overlayd.model import SourceKind, counted, human_size
from overlayd.store import LAYER, storage_path, upper_name
from overlayd.targets import OpenSource, Streamed
from overlayd.walker import OPEN_DIRECTORY, Limits, check_file_over

if TYPE_CHECKING:
    from overlayd.executor import Run
    from overlayd.targets import OpenPlace, Source

TREE: Final = "tree"
"""The directory of a layer that the overlay shows."""


@dataclass(frozen=True, slots=True)
class MountStorage(Step):
    """Mount a tmpfs for a part of the overlay's storage."""

    which: str
    size: int
    inodes: int

    def describe(self) -> str:
        """Say what the step does."""
        return f"mount a tmpfs of {human_size(self.size)} and {self.inodes} inodes as {self.which}"

    def apply(self, run: Run) -> None:
        """Mount it."""
        run.store.attach_storage(run.record.uuid, self.which, self.size, self.inodes)

    def undo(self, run: Run) -> None:
        """Unmount it."""
        run.store.drop_storage(run.record.uuid, self.which)


@dataclass(frozen=True, slots=True)
class FillLayer(Step):
    """Copy the source into the layer."""

    source: str
    prefix: tuple[str, ...]
    limits: Limits
    preserve_owner: bool
    entries: int
    size: int
    writable_dirs: tuple[str, ...] = ()

    def describe(self) -> str:
        """Say what the step does."""
        where = f" as {shown('/'.join(self.prefix))}" if self.prefix else ""
        return (
            f"copy {counted(self.entries)}, {human_size(self.size)}, from {shown(self.source)}"
            f" into the layer{where}"
        )

    def apply(self, run: Run) -> None:
        """Copy, then make the layer's filesystem read-only."""
        if run.source is None or run.place is None:
            raise AssertionError
        top = _open_storage(run, LAYER)
        try:
            os.mkdir(TREE, 0o700, dir_fd=top)
            tree = os.open(TREE, OPEN_DIRECTORY, dir_fd=top)
            try:
                self._fill(run, run.source, run.place, tree)
            finally:
                os.close(tree)
            overlayfs.make_read_only(top)
        finally:
            os.close(top)

    def _fill(self, run: Run, source: Source, place: OpenPlace, tree: int) -> None:
        run.progress.expect(self.entries, self.size)
        if not self.prefix:
            self._content(run, source, tree, place.base_fd)
            for path in self.writable_dirs:
                writer.lay_directory(tree, place.base_fd, path)
            return
        folders = self.prefix
        if source.kind is SourceKind.FILE:
            folders = self.prefix[:-1]
            point = place.place.mount_point
            check_file_over(self.source, place.base_fd, self.prefix[0], point)
        fd = os.dup(tree)
        try:
            for name in folders:
                os.mkdir(name, 0o755, dir_fd=fd)
                inner = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
                os.fchmod(fd, 0o755)
            self._content(run, source, fd, None)
            for path in self.writable_dirs:
                writer.lay_directory(fd, None, path)
        finally:
            os.close(fd)

    def _content(self, run: Run, source: Source, fd: int, base_fd: int | None) -> None:
        """Write what the source holds into the directory *fd*, which lies over *base_fd*."""
        into = writer.Writer(self.source, self.limits, fd)
        directory = source.kind is SourceKind.DIRECTORY
        if isinstance(source, Streamed):
            if directory:
                source.receiver.tree(into, base_fd)
            else:
                source.receiver.single_file(into, fd, self.prefix[-1])
            layer = source.receiver.received.as_layer(run.record.layers[0])
            run.record = run.record.with_(layers=(layer, *run.record.layers[1:]))
        elif isinstance(source, OpenSource):
            copier = layers.Copier(into, self.preserve_owner, run.progress)
            if directory:
                copier.tree(source.fd, base_fd)
            else:
                copier.single_file(source.fd, source.file, fd, self.prefix[-1])


@dataclass(frozen=True, slots=True)
class PrepareUpper(Step):
    """Make the upper and work directories; the upper's root looks like the base's.

    A read-only overlay has an empty directory in its place: two lowers are the fewest the kernel
    takes, and a storage of its own tells one tree of the overlay from the next by f_fsid.
    """

    number: int

    def describe(self) -> str:
        """Say what the step does."""
        return "prepare the topmost directory, its root as the base's"

    def apply(self, run: Run) -> None:
        """Make them."""
        top = _open_storage(run, upper_name(self.number))
        try:
            os.close(writer.make_directory(top, "upper", base_of(run)))
            if not run.record.options.read_only:
                os.mkdir("work", 0o700, dir_fd=top)
        finally:
            os.close(top)


def _open_storage(run: Run, which: str) -> int:
    """Open the root of a part of the storage.

    :raises NotFoundError: if it is not mounted; what is written would fill what others need.
    """
    path = storage_path(run.record.uuid, which)
    fd = os.open(path, OPEN_DIRECTORY)
    if not sys.statx(fd).mount_root:
        os.close(fd)
        message = f"storage of {run.record.name} is gone: {path}"
        raise NotFoundError(message, hint="somebody unmounted it; try again")
    return fd


def base_of(run: Run) -> int:
    """Return the fd of the base directory, from the target or from a copy of its parent."""
    if run.base_fd >= 0:
        return run.base_fd
    if run.place is None:
        raise AssertionError
    return run.place.base_fd
