# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line in a fork of the test that lacks something: limits, signals, streams."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlayd import cli
from tests.mounts.conftest import EMPTY_CONFIG, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

CODES: Final = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130}
"""Those of docs/exit-codes.md."""
GROUPS: Final = "/sys/fs/cgroup/memory"


@dataclass(frozen=True)
class Done:
    """What a command came to; *code* is negative for a signal."""

    code: int
    out: str
    err: str


def command(
    *arguments: str | Path, without: Callable[[], object] = lambda: None, timeout: int = 60
) -> Done:
    """Run the command line in a fork of this process, in which *without* is called first."""
    reading, writing = os.pipe()  # not a file: that has limits of its own
    with tempfile.TemporaryFile(dir="/dev/shm") as out:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside xdist's threads
            child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(writing, 2)
            os.closerange(3, 1 << 12)
            _become(arguments, without, timeout)
        os.close(writing)
        with open(reading, errors="replace") as pipe:
            err = pipe.read()
        _, status = os.waitpid(child, 0)
        out.seek(0)
        text = out.read().decode(errors="replace")
    return Done(os.waitstatus_to_exitcode(status), text, err)


def _become(arguments: Sequence[str | Path], without: Callable[[], object], timeout: int) -> None:
    """Be the command line, and end."""
    code = 98
    try:
        signal.alarm(timeout)
        sys.argv = ["overlayd", *map(str, arguments), "--config", str(EMPTY_CONFIG)]
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        without()
        cli.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 97
    except BaseException:  # noqa: BLE001  # what it is, the test is told
        with contextlib.suppress(BaseException):
            traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
    except OSError:
        code = code or 120  # as an interpreter does at its end
    finally:
        os._exit(code)


def script(place: Path) -> Path:
    """Write the console script as the package has it: isolated from the caller's environment."""
    place.write_text(
        f"#!{sys.executable} -I\n"
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, *{_packages()!r}]\n"
        "from overlayd.__main__ import main\nsys.exit(main())\n"
    )
    place.chmod(0o755)
    return place


def _packages() -> list[str]:
    return [path for path in sys.path if path.endswith("-packages")]


def installed(
    place: Path,
    *arguments: str | Path,
    env: Mapping[str, str],
    prefix: str = 'exec "$@"',
) -> Done:
    """Run the installed script by a shell's *prefix*, with no environment but *env*."""
    done = subprocess.run(
        ["/bin/bash", "-c", prefix, "bash", place, *map(str, arguments)],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def memory(size: int) -> Iterator[Callable[[], None]]:
    """Give a control group of *size* bytes of memory: what is called to go into it.

    :raises OSError: if there can be none here.
    """
    group = f"{GROUPS}/overlayd-test-{os.getpid()}"
    os.mkdir(group)

    def write(name: str, text: str) -> None:
        with open(f"{group}/{name}", "w") as file:
            file.write(text)

    try:
        write("memory.limit_in_bytes", str(size))
        yield lambda: write("cgroup.procs", str(os.getpid()))
    finally:
        with contextlib.suppress(OSError):
            write("memory.force_empty", "0")
        os.rmdir(group)
