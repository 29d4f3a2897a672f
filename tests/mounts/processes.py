# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that hold something until a test lets them go, and waiting for what takes a moment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tests.mounts.conftest import ROOT, bind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_NOBODY = """
import encodings.ascii, encodings.latin_1, os, shutil, sys, textwrap
from overlayd import batch, cleanup, cli, cli_change, cli_history, cli_look, cli_private, client
from overlayd import config, doctor, examine, manager, ops, private, reconcile, removal, scopes
config.load()  # whatever is imported late is imported by now: the interpreter may be root's alone
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
cli.main()
"""
_WAIT = "\nprint('ready', flush=True)\nsys.stdin.readline()\n"


class Child:
    """A child that runs a piece of Python, then waits; a line makes it run to its end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def let_go(self) -> str:
        """Let it run to its end; return what it still said."""
        said, _ = self.process.communicate("\n", timeout=20)
        assert self.process.returncode == 0, said
        return said


def as_nobody(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as an ordinary user, from copies that he may read."""
    places = []
    for name, origin in (("project", ROOT), ("packages", Path(click.__file__).parents[1])):
        place = Path("/run") / name
        if not place.exists():
            place.mkdir()
            bind(origin, place)
        places.append(str(place))
    return subprocess.run(
        [sys.executable, "-c", _NOBODY, *map(str, arguments)],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")},
            "PYTHONPATH": ":".join(places),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@contextlib.contextmanager
def child(
    code: str, *arguments: str | Path, before: Sequence[str | Path] = (), then: str = ""
) -> Iterator[Child]:
    """Run *code* (``sys.argv[1:]`` are *arguments*) and wait until it has; *then* runs at its end.

    *before* is a command that becomes the interpreter, such as ``unshare -m``.
    """
    text = f"import os, sys\n{code}{_WAIT}{then}"
    process = subprocess.Popen(
        [*before, sys.executable, "-ISc", text, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Child(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether *condition* comes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
