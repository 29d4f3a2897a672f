# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory of a user's login session, and the holder process that it names.

Everything here is the user's own: whoever can tamper with it can already do all that it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import time

from overlayd import caller
from overlayd.errors import KernelError, OverlaydError, RefusedError, from_oserror, shown
from overlayd.places import ROOTS, RUN

TYPE_CHECKING = False  # see overlayd.entrance
if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from typing import Final

FILE: Final = "holder.json"
_PATIENCE: Final = 20.0
"""Seconds that a holder has to be there, or to be gone."""


def _directory() -> str:
    """Return the directory of the login session, or one in /tmp that lasts as long as the boot."""
    uid = os.getuid()
    if uid == 0:
        return ROOTS
    for path in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}"):
        with contextlib.suppress(OSError):
            facts = os.stat(path)
            if path.startswith("/") and facts.st_uid == uid and not facts.st_mode & 0o077:
                return f"{path}/overlayd"
    return f"/tmp/overlayd-{uid}"  # noqa: S108  # whose it is is checked


@contextlib.contextmanager
def opened(*, make: bool = False) -> Generator[int]:
    """Open the user's directory, locked together with others; -1 if there is none.

    :raises RefusedError: if it is somebody else's.
    """
    path = _directory()
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield -1
        return
    except OSError as error:
        raise from_oserror(error, f"opening {shown(path)}") from None
    try:
        facts = os.fstat(fd)
        if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            message = f"{shown(path)} has to be yours alone"
            raise RefusedError(message, hint=f"ls -ld {shown(path)}")
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield fd
    finally:
        os.close(fd)


def find(home: int) -> int | None:
    """Return the holder's pid if it lives and is what the file says it is."""
    if home < 0:
        return None
    try:
        file = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=home)
        with open(file, encoding="utf-8") as text:
            told = json.load(text)
        pid = int(told["pid"])
        if caller.identity(pid) != told or os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid


def start(home: int) -> int:
    """Start a holder and wait until it is there; *home* is locked, and shared with others.

    :raises OverlaydError: if it cannot be.
    """
    path = os.readlink(f"/proc/self/fd/{home}")
    # One of those who share the lock starts it.
    lock = os.open("start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=home)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (found := find(home)) is not None:
            return found
        flags = ["-I", "-P"] if sys.flags.isolated else []
        own = [sys.executable, *flags, "-m", "overlayd.holder", path]
        if scope := _in_scope():
            with contextlib.suppress(OverlaydError):
                return _started([*scope, *own], home)
        return _started(own, home)
    finally:
        os.close(lock)


def _in_scope() -> list[str]:
    """Return what puts a process into a unit of the user's manager, if there is one.

    Root's is one of the system's: it does not go with the login that it was started from.
    """
    import shutil  # noqa: PLC0415  # entering needs none of it

    program = shutil.which("systemd-run")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    root = os.geteuid() == 0
    manager = "/run/systemd/system" if root else f"{runtime}/systemd/private"
    if program is None or not os.path.exists(manager):
        return []
    whose = "--system" if root else "--user"
    unit = f"overlayd-holder-{os.getpid()}"
    return [program, whose, "--scope", "--quiet", "--collect", f"--unit={unit}", "--"]


def _started(argv: Sequence[str], home: int) -> int:
    import subprocess  # noqa: PLC0415

    process = subprocess.Popen(  # noqa: S603
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stderr is not None  # noqa: S101
    deadline = time.monotonic() + _PATIENCE
    with process.stderr:
        while time.monotonic() < deadline:
            if (found := find(home)) is not None:
                return found
            if process.poll() is not None:
                raise _failed(process.stderr.read())
            time.sleep(0.01)
    process.kill()
    process.wait()
    raise KernelError("the process that keeps private overlays does not start")


def _failed(said: str) -> OverlaydError:
    try:
        told = json.loads(said)
        return KernelError(told["message"], hint=told["hint"])
    except (ValueError, KeyError, TypeError):
        last = said.strip().rpartition("\n")[2]
        message = f"the process that keeps private overlays does not start: {shown(last)}"
        return KernelError(message)


def let_go() -> None:
    """End the holder if no overlay is left, unless somebody is about to make one."""
    with contextlib.suppress(BlockingIOError, OverlaydError), opened() as home:
        if home < 0:
            return
        fcntl.flock(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = find(home)
        if found is None or names(found):
            return
        pidfd = os.pidfd_open(found)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            select.select([pidfd], [], [], _PATIENCE)
        finally:
            os.close(pidfd)


def is_inside(pid: int) -> bool:
    """Whether this process is where the holder *pid* is.

    Only root can ask that of the kernel from within; others know by whose world they see.
    """
    if os.geteuid() == 0:
        return os.path.samestat(os.stat("/proc/self/ns/mnt"), os.stat(f"/proc/{pid}/ns/mnt"))
    return caller.owns_world()


def names(pid: int) -> set[str]:
    """Return the names of a holder's overlays; they can be read from outside."""
    folder = f"{'' if is_inside(pid) else f'/proc/{pid}/root'}{RUN}/records"
    found = set()
    try:
        for file in os.listdir(folder):
            with (
                contextlib.suppress(OSError, ValueError, KeyError, TypeError),
                open(f"{folder}/{file}", encoding="utf-8") as text,
            ):
                found.add(json.load(text)["name"])
    except OSError:
        return {""}  # nobody can say: better to leave it alone
    return found
