# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build the image, or enter a fresh machine: ``python -m tests.system image|shell``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from harness import shell
from harness.container import ContainerMachine
from harness.errors import HarnessError
from harness.fleet import CONTAINER, VM
from harness.provider import HOST_KERNEL, IMAGE_KERNEL, Case
from tests.system import project


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m tests.system", description=__doc__)
    programs = parser.add_subparsers(dest="what", required=True)
    for what in ("image", "shell"):
        options = programs.add_parser(what, prog=f"./nox -s {what} --")
        options.add_argument("--kernel", metavar="VERSION", default=IMAGE_KERNEL)
        options.add_argument("--accel", choices=["auto", "kvm", "tcg"], default="auto")
        options.add_argument("--no-cache", action="store_true", help="build everything anew")
        if what == "shell":
            options.add_argument("--machine", choices=[VM, CONTAINER], default=VM)
            options.add_argument(
                "command", nargs=argparse.REMAINDER, help="run this instead of a shell"
            )
    chosen = parser.parse_args()
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {line}", file=sys.stderr)  # noqa: T201

    try:
        with project.fresh_cache() if chosen.no_cache else nullcontext():
            machines = project.fleet(accelerator=chosen.accel, say=say)
            try:
                if chosen.what == "image":
                    made = machines.image(chosen.kernel)
                    print(f"{made.disk}\ncommit {made.commit}, Linux {made.release}")  # noqa: T201
                    return 0
                kernel = HOST_KERNEL if chosen.machine == CONTAINER else chosen.kernel
                with machines.acquire(Case(chosen.machine, kernel)) as machine:
                    say(f"{machine.name} is up")
                    if chosen.command[:1] == ["--"]:
                        del chosen.command[0]
                    if chosen.command:
                        done = machine.run(chosen.command, check=False, timeout=600)
                        sys.stdout.write(done.out)
                        sys.stderr.write(done.err)
                        return done.returncode
                    if isinstance(machine, ContainerMachine):
                        entry = [*machine.enter(), "bash", "--login"]
                        return subprocess.run(entry, check=False).returncode
                    shell.serve(machine)
                    shell.attach(Path(machine.workdir))
                    return 0
            finally:
                machines.close()
    except HarnessError as error:
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        sys.stderr.write(f"{error}{hint}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
