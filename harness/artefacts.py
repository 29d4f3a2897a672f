# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is kept of a failed test: a folder of text files, and how to see it fail again."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError
from harness.machine import Capability
from harness.provider import HOST_KERNEL, IMAGE_KERNEL
from harness.trees import remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.machine import Machine
    from harness.provider import Case

COMMAND_TIMEOUT: Final = 30.0
"""Seconds for each command whose output is kept."""
_NAME_LENGTH: Final = 120
_LARGEST: Final = 4 << 20  # of the files in the machine's work directory: disks are larger


def folder(root: Path, test: str) -> Path:
    """Return the folder for *test* beneath *root*: the same for each run, one for each test."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", test).strip("-.")
    if len(name) > _NAME_LENGTH:
        name = f"{name[:_NAME_LENGTH]}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"
    return root / name


def reproduce(command: str, case: Case | None, test: str, options: Iterable[str] = ()) -> str:
    """Return the one line that runs *test* again as it ran; *command* is what runs tests."""
    words = [*options]
    if case is not None:
        words.append(f"--machine={case.machine}")
        if case.kernel not in {HOST_KERNEL, IMAGE_KERNEL}:
            words.append(f"--kernel={case.kernel}")
    return f"{command} {shlex.join([*words, test])}"


def collect(
    place: Path,
    machine: Machine | None,
    *,
    texts: Mapping[str, str],
    commands: Mapping[str, str | Sequence[str]],
) -> None:
    """Fill *place*, which is made anew, with *texts* and with what *machine* can still tell.

    What cannot be had is not missed: the file says why.

    :raises OSError: if it cannot be written.
    """
    remove_tree(place)
    place.mkdir(parents=True)
    for name, text in texts.items():
        _write(place / name, text)
    if machine is None:
        return
    wanted: dict[str, Callable[[], str]] = {}
    if Capability.CONSOLE in machine.capabilities:
        wanted["console.txt"] = machine.console
    if machine.broken is not None:
        _write(place / "broken.txt", "\n".join([str(machine.broken), *_notes(machine.broken)]))
    else:
        wanted["mountinfo.after"] = _runs(machine, ["cat", "/proc/1/mountinfo"])
        if Capability.SYSTEMD in machine.capabilities:
            wanted["journal.txt"] = _runs(
                machine, ["journalctl", "--no-pager", "-q", "-b", "-o", "short-monotonic"]
            )
        else:
            wanted["dmesg.txt"] = _runs(machine, ["dmesg"])
        for name, command in commands.items():
            wanted[name] = _runs(machine, command)
    for name, get in wanted.items():
        try:
            text = get()
        except HarnessError as error:
            text = f"not to be had: {error}\n"
        _write(place / name, text)
    _copy_files(machine.workdir, place / "machine")


def _runs(machine: Machine, command: str | Sequence[str]) -> Callable[[], str]:
    def get() -> str:
        result = machine.run(command, check=False, timeout=COMMAND_TIMEOUT)
        ended = f"\n(exit status {result.returncode})\n" if result.returncode else ""
        return result.out + (result.err and f"\n{result.err}") + ended

    return get


def _notes(error: BaseException) -> Sequence[str]:
    return getattr(error, "__notes__", ())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")


def _copy_files(workdir: Path, place: Path) -> None:
    """Copy the machine's own logs; not its sockets and disks."""
    with suppress(OSError):
        for source in sorted(workdir.iterdir()):
            status = source.lstat()
            if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= _LARGEST:
                place.mkdir(exist_ok=True)
                shutil.copyfile(source, place / source.name)
