# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that must not outlive this process, however it ends.

The kernel does it (PR_SET_PDEATHSIG): a child gets SIGKILL when the *thread* that started it is
gone.  So all such children are started by one thread that stays as long as the process.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from harness.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Job = tuple[Future[subprocess.Popen[bytes]], Callable[[], subprocess.Popen[bytes]]]

# The signal is set only after the fork: whoever was orphaned before that sees another parent.
GUARD = '[ "$PPID" = "$1" ] || exit 125; shift; exec "$@"'


@dataclass
class _Starter:
    """The thread that starts children; the one of the parent is not in a forked process."""

    pid: int = field(default_factory=os.getpid)
    jobs: queue.SimpleQueue[Job] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._work, name="child starter", daemon=True).start()

    def _work(self) -> None:
        while True:
            future, job = self.jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - it goes to whoever waits
                future.set_exception(error)

    def run(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self.jobs.put((future, job))
        return future.result()


_lock = threading.Lock()
_starter: _Starter | None = None


def spawn(
    argv: Sequence[str],
    *,
    cwd: Path,
    stdout: IO[bytes] | int = subprocess.DEVNULL,
    stderr: IO[bytes] | int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start *argv* in *cwd*, to be killed with this process; safe in threads.

    It has no standard input and a session of its own: Ctrl-C at a terminal does not reach it.

    :raises HostError: if it cannot be started.
    """
    global _starter  # noqa: PLW0603 - one thread for the process, made at first need
    with _lock:
        if _starter is None or _starter.pid != os.getpid():
            _starter = _Starter()
        starter = _starter
    guarded = ["sh", "-c", GUARD, "sh", str(os.getpid()), *argv]
    try:
        return starter.run(
            lambda: subprocess.Popen(  # noqa: S603
                ["setpriv", "--pdeathsig", "KILL", "--", *guarded],  # noqa: S607
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        )
    except OSError as error:
        raise HostError(
            f"cannot start {argv[0]}: {error.strerror}", hint="apt install util-linux"
        ) from error
