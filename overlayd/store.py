# SPDX-License-Identifier: LGPL-2.1-or-later
"""The records, their locks, and the storage of overlays; where they lie: :mod:`overlayd.world`.

Since every write makes a new file, one reading of the directory (name and inode number) tells
which records changed: a process that stays keeps the others in memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING, Final

from overlayd import locks, overlayfs, records
from overlayd import syscalls as sys
from overlayd.errors import BusyError, from_oserror, not_found, shown
from overlayd.model import UUID, Phase, Record
from overlayd.places import RUN
from overlayd.world import World, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_RECORD: Final = 256 << 10
_PATIENCE: Final = 10.0
"""Seconds that a short operation waits for another on the same overlay."""

WORLD_PATIENCE = 30.0
"""Seconds that a change waits for the lock which others hold for moments."""

RECORDS: Final = f"{RUN}/records"
STORAGE: Final = f"{RUN}/storage"
STAGE: Final = f"{RUN}/stage"
LAYER: Final = "layer"
"""The part of an overlay's storage that its layer is in."""
QUARANTINE: Final = f"{RUN}/quarantine"
_LOCK: Final = f"{RUN}/lock"


def storage_path(uuid: str, which: str = "") -> str:
    """Return the directory of an overlay's storage, or the mount point of a part of it."""
    return f"{STORAGE}/{uuid}/{which}" if which else f"{STORAGE}/{uuid}"


def upper_name(number: int) -> str:
    """Return the name of the upper storage with this number."""
    return f"upper.{number}"


def _open_lock() -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(_LOCK, flags)
    except FileNotFoundError:
        # Somebody deleted it.  The count that begins anew is none that a process remembers.
        fd = os.open(_LOCK, flags | os.O_CREAT, 0o600)
        os.pwrite(fd, os.urandom(7), 0)
        return fd


class Lock:
    """The lock of one overlay; held by whoever works on it."""

    def __init__(self, fd: int) -> None:
        """Take over *fd*, the overlay's storage directory."""
        self._fd = fd

    def take(self) -> bool:
        """Lock it, and say whether it is this process's now; not if what it is of is gone.

        :raises OSError: if that cannot be.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return os.fstat(self._fd).st_nlink > 0

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Store(World):
    """Access to what lies below ``/run/overlayd``.

    Nothing is made before something has to be written.  Not for use by two threads at once,
    except for what takes no cache: :meth:`write`, :meth:`drop` and the locks.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        """Report what is odd but no reason to fail to *warn*."""
        super().__init__()
        self._warn = warn
        self._lock_fd = -1
        self._given_out = b"none"
        self._inodes: dict[str, int] = {}
        self._read_once = False
        self._known: dict[str, Record | None] = {}
        self._believed: list[Record] = []

    def stage(self, uuid: str) -> str:
        """Return an empty directory of this overlay's on a mount that is private.

        :raises OSError: if it cannot be made.
        """
        if not _is_mount(STAGE):
            with self.locked():
                if not _is_mount(STAGE):
                    _attach_tmpfs(STAGE)
        # Again each time: a crash may have come between attaching and this.
        sys.mount_propagation(STAGE, sys.MS_PRIVATE)
        path = f"{STAGE}/{uuid}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        return path

    def unstage(self, uuid: str) -> None:
        """Remove the overlay's stage and whatever is mounted on it.

        :raises OSError: if the kernel refuses.
        """
        path = f"{STAGE}/{uuid}"
        try:
            while _is_mount(path):
                overlayfs.unstage(path)
            os.rmdir(path)
        except FileNotFoundError:
            return

    @contextlib.contextmanager
    def staging(self, uuid: str) -> Iterator[str]:
        """Yield the overlay's stage for a while."""
        try:
            yield self.stage(uuid)
        finally:
            self.unstage(uuid)

    @contextlib.contextmanager
    def locked(self, patience: float | None = None) -> Iterator[None]:
        """Hold the lock under which names and places are given out.

        :param patience: seconds to wait for it, :data:`WORLD_PATIENCE` unless given.
        :raises BusyError: if another command keeps it: one that hangs, or was stopped.
        :raises OverlaydError: if it cannot be opened.
        """
        try:
            fd = _open_lock()
        except OSError as error:
            raise from_oserror(error, f"opening {_LOCK}") from None
        try:
            waits = WORLD_PATIENCE if patience is None else patience
            locks.take(fd, _LOCK, "all overlays", waits)
            self._lock_fd = fd
            yield
        finally:
            self._lock_fd = -1
            os.close(fd)

    def reserved(self) -> list[Record]:
        """Return records that hold every name and place in use; call under :meth:`locked`.

        Some may have been removed since: what stands in the way is to be looked at again.  The
        lock's file counts how often a name was given out, so that as long as nobody else did,
        nothing has to be read.
        """
        count = os.pread(self._lock_fd, 8, 0)
        if count != self._given_out:
            self.records()
            self._given_out = count
        return self._believed

    def reserve(self, record: Record) -> Lock:
        """Give the name and the place to *record*; call under :meth:`locked`."""
        before = os.pread(self._lock_fd, 8, 0)
        count = (int.from_bytes(before, "little") + 1).to_bytes(8, "little")
        # Before the record is there: a crash in between is no harm.
        os.pwrite(self._lock_fd, count, 0)
        if before == self._given_out:
            self._given_out = count
        # Storage without a record would be looked for by ``cleanup`` alone.
        self.write(record, first=True)
        os.mkdir(storage_path(record.uuid), 0o700)
        return self.lock(record)  # somebody who saw the record may have it for a moment

    def try_lock(self, uuid: str) -> Lock | None:
        """Take the overlay's lock; None if somebody holds it, or it was removed meanwhile.

        :raises FileNotFoundError: if there is no storage to lock.
        :raises OverlaydError: if it cannot be locked.
        """
        path = storage_path(uuid)
        try:
            lock = Lock(os.open(path, _OPEN_DIRECTORY))
            try:
                taken = lock.take()
            except OSError:
                lock.release()
                raise
        except FileNotFoundError:
            raise
        except OSError as error:
            raise from_oserror(error, f"locking {path}") from None
        if not taken:
            lock.release()
            return None
        return lock

    def lock(self, record: Record, patience: float = _PATIENCE) -> Lock:
        """Take the overlay's lock, waiting *patience* seconds for a short operation to end.

        :raises BusyError: if another command keeps it.
        :raises NotFoundError: if the overlay goes away meanwhile.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                lock = self.try_lock(record.uuid)
            except FileNotFoundError:
                fresh = self.get(record.uuid)
                if fresh is None or fresh.phase is not Phase.ACTIVE:
                    # A remover has only the record to drop, if nobody killed it.
                    raise not_found(record.name) from None
                # Somebody deleted it; what is left must be removable all the same.
                with contextlib.suppress(FileExistsError):
                    os.mkdir(storage_path(record.uuid), 0o700)
                continue
            if lock is not None:
                return lock
            if time.monotonic() > deadline:
                message = f"another command is working on {record.name}"
                raise BusyError(message, hint="try again when it is done")
            time.sleep(0.005)

    def storages(self) -> list[str]:
        """Return the uuids for which there is a storage directory."""
        return os.listdir(STORAGE)

    def records(self) -> list[Record]:
        """Return every record that can be believed; the others go into quarantine.

        :raises OverlaydError: if the directory cannot be read.
        """
        try:
            with os.scandir(RECORDS) as entries:
                inodes = {entry.name: entry.inode() for entry in entries}
        except OSError as error:
            raise from_oserror(error, f"reading {RECORDS}") from None
        self._read_once = True
        if inodes != self._inodes:
            known = self._known
            self._known = {
                name: known[name] if self._inodes.get(name) == inode else self._read(name)
                for name, inode in inodes.items()
                if not name.startswith(".new-")
            }
            self._inodes = inodes
            self._believed = [record for record in self._known.values() if record is not None]
        return self._believed

    def _remember(self, name: str, record: Record | None) -> None:
        """Keep in memory what was just written or, with None, deleted."""
        if record is None:
            self._known.pop(name, None)
        else:
            self._known[name] = record
        self._believed = [known for known in self._known.values() if known is not None]

    def remembered(self) -> list[Record]:
        """Return the records as last read or written here; good for an early answer only."""
        return self._believed if self._read_once else self.records()

    def get(self, uuid: str) -> Record | None:
        """Return one record as it is now, if it is there."""
        name = f"{uuid}.json"
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(f"{RECORDS}/{name}").st_ino == self._inodes.get(name):
                return self._known[name]
        return self._read(name)

    def _read(self, name: str) -> Record | None:
        path = f"{RECORDS}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None  # removed a moment ago
        except OSError as error:
            self._quarantine(name, error.strerror or "cannot be opened")
            return None
        try:
            facts = os.fstat(fd)
            own = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid()
            if not own or facts.st_mode & 0o022:
                whose = "root's that only root" if os.geteuid() == 0 else "yours that only you"
                self._quarantine(name, f"not a file of {whose} can write")
                return None
            data = os.read(fd, _MAX_RECORD + 1)
        finally:
            os.close(fd)
        uuid = name.removesuffix(".json")
        try:
            if len(data) > _MAX_RECORD:
                raise records.RecordError("larger than 256 KiB")  # noqa: TRY301
            record = records.decode(data)
            if record.uuid != uuid or UUID.fullmatch(uuid) is None:
                raise records.RecordError("not the overlay its file is named for")  # noqa: TRY301
            if record.boot_id != self.boot_id:
                raise records.RecordError("of another boot")  # noqa: TRY301
        except records.RecordError as error:
            self._quarantine(name, str(error))
            return None
        return record

    def _quarantine(self, name: str, reason: str) -> None:
        with contextlib.suppress(OSError):
            os.mkdir(QUARANTINE, 0o700)
        for number in range(1000):
            target = f"{QUARANTINE}/{name}.{number}"
            if os.path.lexists(target):
                continue
            try:
                os.rename(f"{RECORDS}/{name}", target)
            except FileNotFoundError:
                return
            except OSError as error:
                self._warn(f"record {shown(name)}: {reason}; it stays: {error.strerror}")
                return
            self._warn(f"record {shown(name)}: {reason}; moved to {shown(target)}")
            return

    def write(self, record: Record, *, first: bool = False) -> None:
        """Write *record* whole; *first* if there is none of its overlay yet.

        What is left when this process is killed is a file beside the record that the next write or
        :meth:`drop` takes; beside a first one nothing would, so that is written without a name.

        :raises OverlaydError: if it cannot be written.
        """
        data = records.encode(record)
        try:
            inode = (_write_first if first else _write_over)(record.uuid, data)
        except OSError as error:
            raise from_oserror(error, f"writing the record of {record.name}") from None
        self._inodes[f"{record.uuid}.json"] = inode
        self._remember(f"{record.uuid}.json", record)

    def drop(self, uuid: str) -> None:
        """Delete a record, if it is there."""
        for name in (f"{uuid}.json", f".new-{uuid}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{RECORDS}/{name}")
        self._inodes.pop(f"{uuid}.json", None)
        self._remember(f"{uuid}.json", None)

    def attach_storage(self, uuid: str, which: str, size: int, inodes: int) -> None:
        """Mount a fresh tmpfs of at most *size* bytes as part *which* of the storage."""
        path = storage_path(uuid, which)
        os.mkdir(path, 0o700)
        _attach_tmpfs(path, size, inodes, folios=which == LAYER)

    def drop_storage(self, uuid: str, which: str = "") -> None:
        """Unmount an overlay's storage, or one part of it; the kernel frees it when it can.

        :raises OSError: if the kernel refuses.
        """
        top = storage_path(uuid)
        if which:
            _unmount_all(f"{top}/{which}")
            return
        with contextlib.suppress(FileNotFoundError):
            for part in os.listdir(top):
                _unmount_all(f"{top}/{part}")
            os.rmdir(top)


def _write_first(uuid: str, data: bytes) -> int:
    """Write a record's file under its name at once; return its inode."""
    folder = os.open(RECORDS, _OPEN_DIRECTORY)
    try:
        fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            write_whole(fd, data)
            os.link(f"/proc/self/fd/{fd}", f"{uuid}.json", dst_dir_fd=folder, follow_symlinks=True)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)
    finally:
        os.close(folder)


def _write_over(uuid: str, data: bytes) -> int:
    """Exchange a record's file by another one; return its inode."""
    fresh = f"{RECORDS}/.new-{uuid}"
    try:
        fd = os.open(
            fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            inode = os.fstat(fd).st_ino
            write_whole(fd, data)
        finally:
            os.close(fd)
        os.rename(fresh, f"{RECORDS}/{uuid}.json")
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    return inode


def _is_mount(path: str) -> bool:
    return sys.statx(sys.AT_FDCWD, path).mount_root


def _attach_tmpfs(
    path: str, size: int = 1 << 20, inodes: int = 4096, *, folios: bool = False
) -> None:
    mount_fd = overlayfs.make_tmpfs(size, inodes, folios=folios)
    try:
        overlayfs.attach(mount_fd, path)
    finally:
        os.close(mount_fd)


def _unmount_all(path: str) -> None:
    """Detach every mount stacked at *path* and remove the directory; fine if there is none.

    What lies in it was written there after somebody else had unmounted the storage.
    """
    try:
        while True:
            sys.umount2(path, sys.MNT_DETACH)
    except OSError as error:
        # EINVAL: not a mount point any more.
        if error.errno not in {errno.EINVAL, errno.ENOENT}:
            raise
    with contextlib.suppress(FileNotFoundError):
        _delete(path)


def _delete(path: str) -> None:
    """Remove a directory with all that is in it, but for what is mounted there."""
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif not _is_mount(entry.path):
                _delete(entry.path)
    os.rmdir(path)


def quarantined() -> list[str]:
    """Return the names of the records in quarantine."""
    try:
        return sorted(os.listdir(QUARANTINE))
    except FileNotFoundError:
        return []
