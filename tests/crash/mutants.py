# SPDX-License-Identifier: LGPL-2.1-or-later
"""overlayd without one of its undos, locks or checks: who notices.

::

    python -m tests.crash.mutants [--list] [--only NAME...]

``mutants.toml`` beside this says what is taken away or swapped, and which tests are to fail of it.
They run on a copy of the tree, first as it is: what is not green without a mutant shows nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).parents[2]
LIST: Final = Path(__file__).with_suffix(".toml")
FAULT: Final = "An undo, a lock or a check removed, or two steps swapped"
_COPIED: Final = ("overlayd", "tests", "data", "pyproject.toml")
_PATIENCE: Final = 60.0
"""Seconds after which tests that do not end have noticed."""
_PASSED, _FAILED = 0, 1
_ENDS: Final = re.compile(r"\b[1-9]\d* passed\b")


class MutantError(Exception):
    """A mutant that shows nothing: its text is gone, or its tests are not green without it."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file: the text ``old``, which is there once, becomes ``new``.

    ``tests`` is what is to fail of it, as pytest takes it; ``quick`` says that it does so at once.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    quick: bool = False

    def applied(self, text: str) -> str:
        """Return the *text* of the file with the change made.

        :raises MutantError: if what is to be replaced is not there once.
        """
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise MutantError(f"{self.name}: its text is {count} times in {self.file}")
        return text.replace(self.old, self.new)


def load() -> list[Mutant]:
    """Return the list."""
    with LIST.open("rb") as file:
        return [
            Mutant(f"{Path(path).stem}.{name}", path, **values)
            for path, mutants in tomllib.load(file).items()
            for name, values in mutants.items()
        ]


@dataclass(slots=True)
class Workshop:
    """A copy of the tree, in which mutants are tried one after the other."""

    place: Path
    _green: set[str] = field(default_factory=set)

    def survives(self, mutant: Mutant) -> bool:
        """Try *mutant*; whether all of its tests pass.

        :raises MutantError: if that says nothing.
        """
        path = self.place / mutant.file
        changed = mutant.applied(path.read_text(encoding="utf-8"))
        if mutant.tests not in self._green:
            code, said = self._run(mutant.tests)
            if code != _PASSED or not _ENDS.search(said):
                raise MutantError(f"{mutant.name}: not green without it:\n{said[-2000:]}")
            self._green.add(mutant.tests)
        original = path.with_suffix(".original")
        path.rename(original)
        path.write_text(changed, encoding="utf-8")
        os.utime(path, (0, 0))  # no compiled file is as old
        try:
            code, said = self._run(mutant.tests)
        finally:
            original.replace(path)
        if code > _FAILED:
            raise MutantError(f"{mutant.name}: its tests did not run:\n{said[-2000:]}")
        return code == _PASSED

    def _run(self, tests: str) -> tuple[int, str]:
        """Run *tests* in the copy; return the exit code and what was printed."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they take longer than most tests
            "PYTHONDONTWRITEBYTECODE": "1",
            "CI": "1",  # hypothesis tries the same each time
        }
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [*command, *shlex.split(tests)],
                cwd=self.place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                code = _FAILED
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return code, output.read()


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    """Give a copy of the tree for a while."""
    with tempfile.TemporaryDirectory(prefix="overlayd-mutants-") as name:
        place = Path(name)
        place.chmod(0o755)  # some tests are other users
        for part in _COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, place / part)
            else:
                shutil.copy2(ROOT / part, place / part)
        yield Workshop(place)


def try_all(mutants: Sequence[Mutant]) -> bool:
    """Try *mutants* and print what became of each; return whether all were killed."""
    start = time.monotonic()
    survivors: list[str] = []
    errors: list[str] = []
    with workshop() as place:
        for mutant in mutants:
            began = time.monotonic()
            try:
                survived = place.survives(mutant)
            except MutantError as error:
                errors.append(mutant.name)
                word = f"error: {error}"
            else:
                if survived:
                    survivors.append(mutant.name)
                word = "SURVIVED" if survived else "killed"
            _say(f"{time.monotonic() - began:6.1f} s  {mutant.name}: {word}")
    killed = len(mutants) - len(survivors) - len(errors)
    sums = f"{killed} of {len(mutants)} killed, survived: {survivors}, errors: {errors}"
    _say(f"{sums}, {time.monotonic() - start:.0f} s")
    return not survivors and not errors


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.mutants", description=FAULT)
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these alone")
    options = parser.parse_args()
    mutants = load()
    if unknown := set(options.only) - {mutant.name for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    if options.only:
        mutants = [mutant for mutant in mutants if mutant.name in options.only]
    if options.list:
        for mutant in mutants:
            _say(f"{mutant.name:55} {mutant.file}")
        return 0
    return 0 if try_all(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
