# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kill what shows a private overlay of root's to a service; runs in the machine under test.

    python3 -I killing.py PLACE SOURCE TARGET FIRST EVERY

PLACE has tests/crash/tracing.py and python-ptrace, and the service food.service is there.  Each
command is killed before and after the FIRST of its system calls that change anything, and each
EVERY further one: after each kill the service starts, and the next command puts all in order.
Prints how many kills each command had.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import overlayd.cli
from tests.crash import tracing

UNIT = "food.service"
UNITS = Path("/run/systemd/system")
SHOWN = Path("/run/overlayd.private/shown")
ATTACH, DETACH = ("attach", "own", "--unit", UNIT), ("detach", "own")
COMMANDS = {
    # What comes before it.
    ATTACH: (),
    DETACH: (ATTACH,),
    ("reset", "own"): (ATTACH,),
    ("remove", "own"): (ATTACH,),
}


def run(
    arguments: tuple[str, ...], act: Callable[[tracing.Point], tracing.Act] = tracing.nothing
) -> tracing.Outcome:
    """Run a command of overlayd in a child, as its program does."""

    def work() -> None:
        sys.argv = ["overlayd", *arguments]
        overlayd.cli.main()

    return tracing.run(work, act)


def do(*arguments: str) -> None:
    """Run a command that has to work."""
    outcome = run(arguments)
    assert outcome.code == 0, (arguments, outcome.said)


def output(*command: str) -> str:
    """Return what a program says; it may fail."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip()


class Stage:
    """The service, and the overlay that it is shown."""

    def __init__(self, source: str, target: str) -> None:
        """Have nothing yet."""
        self.source, self.target = source, target

    def prepare(self, before: tuple[tuple[str, ...], ...]) -> None:
        """Have the overlay, as it was applied, and do what comes before."""
        do("apply", "own", self.source, self.target, "--private")
        for each in before:
            do(*each)

    def service_sees(self) -> str:
        """Start the service again, which has to work; return what it sees."""
        subprocess.run(["systemctl", "restart", UNIT], check=True)
        top = f"/proc/{output('systemctl', 'show', '--property=MainPID', '--value', UNIT)}/root"
        assert os.listdir(f"{top}{self.target}"), "it sees nothing at all"
        mine = Path(f"{top}{self.target}/mine")
        return mine.read_text(encoding="utf-8").strip() if mine.exists() else ""

    def check(self) -> None:
        """Assert that the service starts, and sees what is shown to it after the next command."""
        self.service_sees()
        do("cleanup")
        told = any(UNITS.glob(f"{UNIT}.d/50-overlayd-*.conf"))
        shows = output("overlayd", "enter", "own", "--", "cat", f"{self.target}/mine")
        assert self.service_sees() == (shows if told else "")

    def kill(self, command: tuple[str, ...], number: int, how: tracing.Do) -> bool:
        """Kill a command at a point of it, and check everything; say whether it came so far."""
        self.prepare(COMMANDS[command])
        outcome = run(command, tracing.at(number, how))
        try:
            assert outcome.acted is not None or outcome.code == 0, outcome.said
            self.check()
            self.clear()
        except BaseException as error:
            error.add_note(f"{command}: {how.value} {outcome.acted}")
            raise
        return outcome.acted is not None

    def clear(self) -> None:
        """Remove all; nothing may be left of it, and the service starts."""
        run(DETACH)
        self.service_sees()
        run(("remove", "own"))
        left = [*UNITS.glob("*overlayd*"), *UNITS.glob("*/*overlayd*"), *SHOWN.glob("*")]
        assert left == [], left
        assert self.service_sees() == ""


def main(source: str, target: str, first: int, every: int) -> None:
    """Kill all there is."""
    tracing.load()
    stage = Stage(source, target)
    for command in COMMANDS:
        count = 0
        for number in itertools.count(first, every):
            if not stage.kill(command, number, tracing.Do.KILL):
                break
            count += 1 + stage.kill(command, number, tracing.Do.KILL_AFTER)
        sys.stdout.write(f"{json.dumps([command[0], count])}\n")


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
