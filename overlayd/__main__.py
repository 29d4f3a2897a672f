# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entry point of ``overlayd`` and ``python3 -m overlayd``."""

import gc
import sys


def main() -> None:
    """Load the command line without looking for garbage, of which loading makes none."""
    gc.disable()
    if sys.argv[1:2] == ["enter"]:
        _enter(sys.argv[2:])
    from overlayd import cli  # noqa: PLC0415  # this is what the first line is for

    gc.freeze()
    gc.enable()
    cli.main()


def _enter(words: list[str]) -> None:
    """Enter without the command line, if that can be."""
    from overlayd import entrance  # noqa: PLC0415  # no other command needs it
    from overlayd.errors import OverlaydError  # noqa: PLC0415

    try:
        entrance.enter_at_once(words)
    except OverlaydError as error:
        from overlayd import cli  # noqa: PLC0415

        cli.fail(error)


if __name__ == "__main__":
    main()
