# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs of this machine that build something: run to the end, and blamed in one line.

A program that mounts or starts others runs *apart*: in mount and process namespaces of its own, so
that whatever it leaves behind is gone with it, also when this process is killed.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING, Final

from harness.errors import BuildError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_NOTE_LENGTH: Final = 4096
_TIMEOUT: Final = 600.0  # seconds
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_APART: Final = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--propagation", "private"),
    *("--pid", "--fork", "--kill-child", "--mount-proc", "--"),
)


def run(  # noqa: PLR0913 - all by keyword, and each with a use
    argv: Sequence[str | Path],
    *,
    what: str,
    apart: bool = False,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = _TIMEOUT,
) -> str:
    """Run a program to its end and return what it wrote to its standard output.

    It gets no input, an environment of *env* and little else, and *timeout* seconds.

    :param what: what fails if it fails; begins the error's line.
    :param apart: in mount and process namespaces of its own; needs root.
    :raises BuildError: if it fails; the notes have the end of what it wrote.
    :raises HostError: if it cannot be started.
    """
    command = [*(_APART if apart else ()), *map(str, argv)]
    environment = {"PATH": _PATH, "LC_ALL": "C.UTF-8", "HOME": os.environ.get("HOME", "/root")}
    try:
        done = subprocess.run(  # noqa: S603
            command,
            cwd=cwd,
            env=environment | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=timeout,
        )
    except FileNotFoundError as error:
        raise HostError(f"{what}: {error.filename} is missing") from error
    except subprocess.TimeoutExpired as error:
        raise _noted(
            f"{what}: not done after {timeout:.0f} s", error.output, error.stderr
        ) from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1].strip() if lines else f"exit status {done.returncode}"
        raise _noted(f"{what}: {reason}", done.stdout, done.stderr)
    return done.stdout.decode("utf-8", "replace")


def need_root(what: str) -> None:
    """Raise HostError unless this process is root's, as *what* needs."""
    if os.geteuid() != 0:
        raise HostError(f"{what} needs root")


class Timer:
    """Says which step is done, and the seconds since the last one."""

    def __init__(self, say: Callable[[str], object], what: str) -> None:
        self._say = say
        self._what = what
        self._last = time.monotonic()

    def __call__(self, step: str) -> None:
        """Say that *step* is done."""
        now = time.monotonic()
        self._say(f"{self._what}: {step}: {now - self._last:.1f} s")
        self._last = now


def _noted(message: str, out: bytes | None, err: bytes | None) -> BuildError:
    error = BuildError(message)
    for name, data in (("stdout", out), ("stderr", err)):
        if data and (text := data.decode("utf-8", "replace").strip()[-_NOTE_LENGTH:]):
            error.add_note(f"{name}: {text}")
    return error
